"""Archives of compiled graphs: a tar file that begins with a manifest of its files and of what they are for.

An archive is written, and each of its graphs unpacked, completely or not at all. Nothing that exists is
overwritten.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

from model.weights.hub import naming
from tools.neuron_cache.cache import entries_of, state_of

FORMAT, VERSION, MANIFEST = "markstep neuron cache", 1, "manifest.json"
MEMBER = re.compile(r"neuronxcc-[\w.+-]+/MODULE_[\w.+-]+/(?!\.)[\w.+-]+")


def pack(cache: Path, archive: Path, key: dict, compiler: str) -> list[str]:
    """Write what `compiler` completed into a new archive, and return lines that say what was left out.

    Raises ValueError where there is nothing to pack, or the archive exists.
    """
    files, left_out = files_to_pack(cache, compiler)
    if not files:
        raise ValueError(f"{cache} has no graph that {compiler} has completed; " + "; ".join(left_out))
    if archive.exists():
        raise ValueError(f"{archive} exists: choose another name, or move it away")
    manifest = {"format": FORMAT, "version": VERSION, "compiler": compiler, "key": key, "files": files}
    with (
        naming(archive),
        tempfile.NamedTemporaryFile(dir=archive.parent, prefix=archive.name, suffix=".incomplete") as file,
    ):
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
    return left_out + [f"{archive}: {count(files)} of {compiler}"]


def files_to_pack(cache: Path, compiler: str) -> tuple[dict[str, dict], list[str]]:
    """({name: its size and checksum} of the files that `compiler` completed, lines on all others)."""
    files, left_out = {}, []
    for entry, state in entries_of(cache).items():
        why = state if entry.parent.name == compiler else "another compiler"
        if why != "complete":
            left_out.append(f"left out: {entry.relative_to(cache)} ({why})")
            continue
        for path in sorted(entry.iterdir()):
            name = path.relative_to(cache).as_posix()
            if (
                path.suffix == ".lock"
                or path.is_symlink()
                or not path.is_file()
                or not MEMBER.fullmatch(name)
            ):
                left_out.append(f"left out: {name}")
            else:
                files[name] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    return files, left_out


def unpack(archive: Path, cache: Path, key: dict, compiler: str) -> list[str]:
    """Move the archive's graphs into a cache, each complete, and return lines that say what was done.

    What the cache has already stays. Raises ValueError for an archive that does not fit, is damaged, or holds
    anything besides what its manifest names.
    """
    with open_archive(archive) as tar:
        manifest = read_manifest(tar, archive)
        check_fit(manifest, archive, key, compiler)
        cache.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(dir=cache, prefix=".unpacking-"))
        try:
            extract(tar, manifest["files"], hidden, archive)
            lines = [
                move_entry(entry, cache / entry.relative_to(hidden)) for entry in sorted(hidden.glob("*/*"))
            ]
        except tarfile.TarError as error:
            raise ValueError(f"{archive} is damaged: {error}") from None
        finally:
            shutil.rmtree(hidden)
    return [line for line in lines if line] + [f"{cache}: {count(manifest['files'])} of {compiler}"]


def extract(tar: tarfile.TarFile, files: dict[str, dict], directory: Path, archive: Path) -> None:
    """Write the manifest's files into `directory`; raises ValueError where one is missing or damaged."""
    missing = dict(files)
    while member := tar.next():
        expected = missing.pop(member.name, None)
        if expected is None or not member.isfile() or member.size != expected["bytes"]:
            raise ValueError(f"{archive} is damaged: {member.name} is not what its manifest says")
        path = directory / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), open(path, "xb") as file:
            shutil.copyfileobj(tar.extractfile(member), file)
            file.flush()
            os.fsync(file.fileno())
        if checksum(path) != expected["sha256"]:
            raise ValueError(
                f"{archive} is damaged: the bytes of {member.name} are not those that were packed"
            )
    if missing:
        raise ValueError(f"{archive} is damaged: {min(missing)} is missing")


def move_entry(entry: Path, final: Path) -> str | None:
    """Move a graph's directory to `final`; where that exists, leave both and return a line that says so."""
    final.parent.mkdir(exist_ok=True)
    if final.exists():
        return f"kept: {final} was there ({state_of(final)})"
    os.rename(entry, final)
    return None


def open_archive(archive: Path) -> tarfile.TarFile:
    """The archive, open for reading; raises ValueError where the file is no tar archive."""
    try:
        return tarfile.open(archive, "r:")
    except (tarfile.TarError, EOFError):
        raise _no_archive(archive) from None


def read_manifest(tar: tarfile.TarFile, archive: Path) -> dict:
    """The manifest, which is the first member; raises ValueError where `pack` did not write it."""
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
        raise _no_archive(archive)
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


def count(files: dict[str, dict]) -> str:
    """The number and the size of the graphs in a manifest's files, as text."""
    graphs = len({name.rpartition("/")[0] for name in files})
    size = sum(each["bytes"] for each in files.values())
    return f"{graphs} graph{'s' * (graphs != 1)}, {size / 1e6:,.1f} MB"


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _add(tar: tarfile.TarFile, name: str, size: int, source) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, source)


def _no_archive(archive: Path) -> ValueError:
    return ValueError(f"{archive} is no archive of `python -m tools.neuron_cache pack`, or was changed")
