"""What all processes of a job must have alike: versions, flags, the model's files, the tokens.

Each tells the first process its facts, which compares them with its own: one message of each process, and one
answer. With one process nothing is computed.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data.packing import Rows
from model.weights.safetensors_file import checksum
from model.weights.sources import RandomWeights, SafetensorsFiles
from parallel.runtime import Peers
from trainer.checkpoint.model_files import known_files
from trainer.config import Config

PACKAGES = (
    *("markstep", "torch", "torch_xla", "transformers", "tokenizers"),
    *("torch-neuronx", "neuronx-cc", "neuronx-distributed", "libneuronxla"),
)
ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("data", "model", "parallel", "trainer")
CLOCK_SECONDS = 60.0  # that two clocks may differ before it is said

Facts = dict[str, str | None]  # what is compared, and what this process has


def agree_on_start(peers: Peers, config: Config) -> None:
    """Wait until all processes are there; raise ValueError unless versions and flags are the same everywhere.

    Then warn of clocks that differ by more than CLOCK_SECONDS.
    """
    if peers.world_size == 1:
        return
    facts = versions() | {"markstep's source files": _source_files(), "Python": platform.python_version()}
    flags = {f"--{name}": json.dumps(value) for name, value in asdict(config).items()}
    agree(peers, "versions and flags", facts | flags, "start all processes with the same software and flags")
    _compare_clocks(peers)


def agree_on_model(peers: Peers, directories: dict[Path, SafetensorsFiles | RandomWeights | None]) -> None:
    """Raise ValueError unless the files of these directories are the same for all processes.

    Of safetensors files their sizes and headers are compared, of the others that are read, all bytes.
    """
    if peers.world_size == 1:
        return
    facts = {}
    for directory, weights in directories.items():
        for name in known_files(directory):
            content = (directory / name).read_bytes()
            facts[f"{directory.name}/{name}"] = f"{len(content)} bytes with the checksum {checksum(content)}"
        for name, (size, header) in weights.headers().items() if weights else ():
            facts[f"{directory.name}/{name}"] = f"{size} bytes with the checksum {header} of its header"
    agree(peers, "the model's files", facts, "the model has to be the same on all machines")


def agree_on_rows(peers: Peers, names: list[str], rows: Rows, digest: str) -> None:
    """Raise ValueError unless the tokens of the data sets `names`, and the rows made of them, are the same
    for all processes. `digest`: trainer.dataset.fingerprint of the rows."""
    facts = {f"tokens of {name}": each.digest for name, each in zip(names, rows.tokens, strict=True)}
    advice = "the data, or the token cache (--data_cache_dir), differs there"
    agree(peers, "the tokens", facts | {"rows": digest}, advice)


def agree(peers: Peers, name: str, facts: Facts, advice: str) -> None:
    """Raise ValueError, in all processes, unless all have the same facts: it names the first that differs."""

    def differ(rank: str, here: Facts, first: Facts) -> str:
        odd = next(key for key in first | here if here.get(key) != first.get(key))
        theirs, ours = here.get(odd) or "none", first.get(odd) or "none"
        return f"{odd} of {rank} is {theirs}, and that of {peers.name_of(0)} is {ours}: {advice}"

    peers.agree(name, facts, differ)


def versions() -> Facts:
    """The versions of the PACKAGES that are installed."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _source_files() -> str:
    """A checksum of the program, which may be a clone that somebody changes."""
    paths = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return checksum(b"".join(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes() for path in paths))


def _compare_clocks(peers: Peers, clock: Callable[[], float] = lambda: time.time()) -> None:
    """Warn of machines whose clock is not the first process's. To be called right after all have met."""
    times = peers.collect("clocks", clock())
    hosts = set()
    for rank, seconds in enumerate(times or ()):
        ahead = seconds - times[0]
        host = peers.name_of(rank).rpartition(" on ")[2]
        if abs(ahead) > CLOCK_SECONDS and host not in hosts:
            hosts.add(host)
            print(
                f"warning: the clock of {peers.name_of(rank)} is {abs(ahead):.0f} s "
                f"{'ahead of' if ahead > 0 else 'behind'} that of {peers.name_of(0)}: training does not "
                "depend on it, but times in logs and files do",
                file=sys.stderr,
            )
