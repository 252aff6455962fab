"""Compiled graphs, packed to be shipped beside the training package, and unpacked where they fit.

    python -m tools.neuron_cache pack CACHE ARCHIVE.tar --world_size 32 [flags of trainer/main.py]
    python -m tools.neuron_cache unpack ARCHIVE.tar CACHE --world_size 32 [flags of trainer/main.py]
    python -m tools.neuron_cache list CACHE|ARCHIVE.tar

The compiler's cache has a directory for each of its versions, and in it one for each graph and set of
compiler flags:

    neuronxcc-2.22.12471.0+b4a00d10/MODULE_<hash of the graph>+<hash of the flags>/
        model.hlo_module.pb  compile_flags.json  model.neff  model.done     compiled
        model.log in place of model.neff                                    failed, and never tried again
        model.hlo_module.pb.lock                                            being compiled, or left by a
        killed compiler

(AWS: "Neuron Persistent Cache"; optimum-neuron, optimum/neuron/cache/AGENTS.md.) Graphs depend on the size of
the world and on flags, so an archive says for which it was made, and is refused for others: everything would
be compiled again, without a word.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer.config import Config, parse

FORMAT, VERSION, MANIFEST = "markstep neuron cache", 1, "manifest.json"
DEFAULT_PLACE = "/var/tmp/neuron-compile-cache"
MEMBER = re.compile(r"neuronxcc-[\w.+-]+/MODULE_[\w.+-]+/(?!\.)[\w.+-]+")
# Flags that are data of a graph, or the host's business. All others, also those to come, are taken to change
# it.
NOT_IN_THE_GRAPH = (
    "random_weights",
    "depth_scaled_init",
    "adapter_name_or_path",
    "dataset",
    "dataset_weights",
    "format",
    "train_on_prompt",
    "max_samples",
    "streaming",
    "skip_bad",
    "data_cache_dir",
    "long_examples",
    "validation_split_percentage",
    "do_train",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "on_recompile",
    "seed",
    "output_dir",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "max_minutes",
    "resume",
)
# Of the cache's wrapper, not of the compiler.
WRAPPER_FLAGS = re.compile(r"--(cache_dir|log_level)[= ]\S+|--(no_cache|retry_failed_compilation)\b")


def cache_place(environment: Mapping[str, str]) -> tuple[str, bool]:
    """(directory or URL of the compile cache, whether NEURON_CC_FLAGS says so), as the SDK decides it."""
    flag = re.search(r"--cache_dir[= ](\S+)", environment.get("NEURON_CC_FLAGS", ""))
    return (flag[1], True) if flag else (environment.get("NEURON_COMPILE_CACHE_URL") or DEFAULT_PLACE, False)


def key_of(config: Config, environment: Mapping[str, str]) -> dict:
    """What graphs depend on besides the compiler: the flags that are in them, and the compiler's flags."""
    if not config.world_size:
        raise ValueError(
            "--world_size: the number of ranks that the graphs are for was expected (processes x nodes)"
        )
    flags = {name: value for name, value in vars(config).items() if name not in NOT_IN_THE_GRAPH}
    flags |= {
        "model_id": Path(config.model_directory).name,
        "gradient_checkpointing": config.checkpointing_mode,
        "sequence_parallel": config.divides_sequence,
    }
    compiler_flags = " ".join(sorted(WRAPPER_FLAGS.sub("", environment.get("NEURON_CC_FLAGS", "")).split()))
    return flags | {
        "NEURON_CC_FLAGS": compiler_flags,
        "NEURON_FUSE_SOFTMAX": environment.get("NEURON_FUSE_SOFTMAX", ""),
    }


def state_of(entry: Path) -> str:
    """complete, failed, locked or incomplete: of a MODULE_ directory."""
    names = {path.name for path in entry.iterdir()}
    if {"model.neff", "model.done"} <= names:
        return "complete"
    if "model.log" in names:
        return "failed"
    return "locked" if any(name.endswith(".lock") for name in names) else "incomplete"


def entries_of(cache: Path) -> dict[Path, str]:
    """{MODULE_ directory: its state} of a cache; raises ValueError where that is none."""
    if "://" in str(cache) or str(cache).startswith("s3:/"):
        raise ValueError(f"{cache} is no directory: copy it first (aws s3 sync)")
    found = {path: state_of(path) for path in sorted(cache.glob("neuronxcc-*/MODULE_*")) if path.is_dir()}
    if not found:
        raise ValueError(
            f"{cache} holds no neuronxcc-<version>/MODULE_<hash>: a Neuron compile cache was expected"
        )
    return found


def installed_compiler() -> str:
    """The cache's name of the installed compiler; raises ValueError where there is none."""
    try:
        return f"neuronxcc-{version('neuronx-cc')}"
    except PackageNotFoundError:
        raise ValueError(
            "neuronx-cc is not installed: pack and unpack in the environment that trains"
        ) from None


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def pack(cache: Path, archive: Path, key: dict, compiler: str) -> list[str]:
    """Write what that compiler completed into a new archive; returns what to say of what was left out.

    Raises ValueError where there is nothing to pack, or the archive exists.
    """
    said, files = [], {}
    for entry, state in entries_of(cache).items():
        why = state if entry.parent.name == compiler else "another compiler"
        if why != "complete":
            said.append(f"left out: {entry.relative_to(cache)} ({why})")
            continue
        for path in sorted(entry.iterdir()):
            name = path.relative_to(cache).as_posix()
            if (
                path.suffix == ".lock"
                or path.is_symlink()
                or not path.is_file()
                or not MEMBER.fullmatch(name)
            ):
                said.append(f"left out: {name}")
            else:
                files[name] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    if not files:
        raise ValueError(f"{cache} has no graph that {compiler} has completed; " + "; ".join(said))
    if archive.exists():
        raise ValueError(f"{archive} exists: choose another name, or move it away")
    manifest = {"format": FORMAT, "version": VERSION, "compiler": compiler, "key": key, "files": files}
    with tempfile.NamedTemporaryFile(dir=archive.parent, prefix=archive.name, suffix=".incomplete") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            text = json.dumps(manifest, indent=1).encode()
            _add(tar, MANIFEST, len(text), io.BytesIO(text))
            for name, each in files.items():
                with open(cache / name, "rb") as source:
                    _add(tar, name, each["bytes"], source)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, archive)  # complete, or not at all; and never in place of another
        except FileExistsError:
            raise ValueError(f"{archive} exists: choose another name, or move it away") from None
    return said + [f"{archive}: {_count(files)} of {compiler}"]


def _add(tar, name, size, source):
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, source)


def _count(files) -> str:
    graphs, size = (
        len({name.rpartition("/")[0] for name in files}),
        sum(each["bytes"] for each in files.values()),
    )
    return f"{graphs} graph{'s' * (graphs != 1)}, {size / 1e6:,.1f} MB"


def read_manifest(tar: tarfile.TarFile, archive: Path) -> dict:
    """The manifest of an archive; raises ValueError where it is none that `pack` made."""
    member = tar.next()
    try:
        manifest = (
            json.loads(tar.extractfile(member).read())
            if member and member.name == MANIFEST and member.isfile()
            else {}
        )
        good = manifest["format"] == FORMAT and all(MEMBER.fullmatch(name) for name in manifest["files"])
        if good and manifest["version"] != VERSION:
            raise ValueError(f"{archive} is of version {manifest['version']}; {VERSION} was expected")
    except (KeyError, TypeError, json.JSONDecodeError, tarfile.TarError):
        good = False
    if not good:
        raise ValueError(f"{archive} is no archive of `python -m tools.neuron_cache pack`, or was changed")
    return manifest


def check_fit(manifest: dict, archive: Path, key: dict, compiler: str) -> None:
    """Raise ValueError, naming all differences, where the archive was made for something else."""
    made = {"compiler": manifest["compiler"]} | manifest["key"]
    here = {"compiler": compiler} | key
    different = [
        f"{name} {made.get(name, 'unknown')} there and {here.get(name, 'unknown')} here"
        for name in here | made
        if made.get(name) != here.get(name)
    ]
    if different:
        raise ValueError(
            f"{archive} was made for something else, and would not be used: {'; '.join(different)}"
        )


def unpack(archive: Path, cache: Path, key: dict, compiler: str) -> list[str]:
    """Put the archive's graphs into a cache, each at once and whole; returns what to say. What is there
    already stays.

    Raises ValueError for an archive that does not fit, is damaged, or holds anything besides what its
    manifest names.
    """
    with _open(archive) as tar:
        manifest = read_manifest(tar, archive)
        check_fit(manifest, archive, key, compiler)
        cache.mkdir(parents=True, exist_ok=True)
        hidden, missing = Path(tempfile.mkdtemp(dir=cache, prefix=".unpacking-")), dict(manifest["files"])
        try:
            while member := tar.next():
                expected = missing.pop(member.name, None)
                if expected is None or not member.isfile() or member.size != expected["bytes"]:
                    raise ValueError(f"{archive} is damaged: {member.name} is not what its manifest says")
                path = hidden / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
                    file.flush()
                    os.fsync(file.fileno())
                if checksum(path) != expected["sha256"]:
                    raise ValueError(
                        f"{archive} is damaged: the bytes of {member.name} are not those that were packed"
                    )
            if missing:
                raise ValueError(f"{archive} is damaged: {min(missing)} is missing")
            said = [_place(entry, cache / entry.relative_to(hidden)) for entry in sorted(hidden.glob("*/*"))]
        except tarfile.TarError as error:
            raise ValueError(f"{archive} is damaged: {error}") from None
        finally:
            shutil.rmtree(hidden)
    return [line for line in said if line] + [f"{cache}: {_count(manifest['files'])} of {compiler}"]


def _place(entry: Path, final: Path) -> str | None:
    final.parent.mkdir(exist_ok=True)
    if final.exists():
        return f"kept: {final} was there ({state_of(final)})"
    os.rename(entry, final)
    return None


def _open(archive: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(archive, "r:")
    except (tarfile.TarError, EOFError):
        raise ValueError(
            f"{archive} is no archive of `python -m tools.neuron_cache pack`, or was changed"
        ) from None


def listing(path: Path) -> list[str]:
    """What is in a cache, or in an archive: a line for each compiler, state, and setting."""
    if path.is_file():
        with _open(path) as tar:
            manifest = read_manifest(tar, path)
        return [
            f"{manifest['compiler']}: {_count(manifest['files'])}",
            *(f"    {name:<30} {value}" for name, value in manifest["key"].items()),
        ]
    totals: dict[tuple[str, str], list[int]] = {}
    for entry, state in entries_of(path).items():
        sizes = totals.setdefault((entry.parent.name, state), [])
        sizes.append(sum(file.stat().st_size for file in entry.iterdir() if file.is_file()))
    return [
        f"{name}: {len(sizes)} {state}, {sum(sizes) / 1e6:,.1f} MB"
        for (name, state), sizes in sorted(totals.items())
    ]


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    end = next(
        (place for place, word in enumerate(given) if word.startswith("--") and word != "--help"), len(given)
    )
    parser = argparse.ArgumentParser(
        prog="python -m tools.neuron_cache",
        description=__doc__.splitlines()[0],
        epilog="Flags of trainer/main.py follow these arguments; list takes none.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text, places in (
        ("pack", "write what is complete in CACHE into a new ARCHIVE", ("cache", "archive")),
        ("unpack", "put ARCHIVE's graphs into CACHE, where they fit", ("archive", "cache")),
        ("list", "what is in a cache or an archive", ("path",)),
    ):
        command = commands.add_parser(name, help=help_text)
        for place in places:
            command.add_argument(place, type=Path)
    chosen = parser.parse_args(given[:end])
    try:
        if chosen.command == "list":
            said = listing(chosen.path)
        else:
            key, compiler = key_of(parse(given[end:]), os.environ), installed_compiler()
            said = (
                pack(chosen.cache, chosen.archive, key, compiler)
                if chosen.command == "pack"
                else unpack(chosen.archive, chosen.cache, key, compiler)
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
