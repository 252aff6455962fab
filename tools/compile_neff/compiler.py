"""neuronx-cc: where it is, its flags, and one run of it with what it took, what it made and what it says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.neuron_cache.key import WRAPPER_FLAGS

NAME = "neuronx-cc"
MISSING = (
    f"{NAME} is not on the PATH: `pip install {NAME}` from AWS's package index, whose address stands in the "
    'Neuron documentation under "PyTorch NeuronX setup" (PyPI has only a placeholder). An x86 Linux machine '
    "is enough, no Neuron device is needed; --compiler names one that is elsewhere"
)
ENVIRONMENT = Path(__file__).resolve().parent.parent / "launch" / "neuron_env.sh"
# A process starts with the peak memory of the one that started it, and this one has traced a model. So a
# small one starts the compiler, and reports the peak of what it has started.
MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
with open("peak_kilobytes", "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status if status >= 0 else 128 - status)
"""
MEANINGFUL = 4  # lines of a failed compilation that are shown


@dataclass(frozen=True)
class Compiled:
    """One graph at one optimization level.

    error: the last lines that say why it failed, or "". seconds: from start to end. peak_bytes: the most
    memory that one of the compiler's processes had at a time. neff_bytes: of the result, or None. The
    compiler's own estimates are None where it says nothing of them: estimated_latency is in a unit of its own
    (lower is faster), macs are the multiply-adds of matrix products. log: the file with what it printed.
    """

    seconds: float
    peak_bytes: int
    neff_bytes: int | None
    estimated_latency: float | None
    macs: float | None
    estimated_hbm_gb: float | None
    error: str
    log: str


def find_compiler(given: Path | None) -> Path:
    """The compiler that a flag names, or the one on the PATH. Raises ValueError where there is none."""
    if given is None:
        found = shutil.which(NAME)
        if not found:
            raise ValueError(MISSING)
        return Path(found)
    if given.name != NAME or not given.is_file() or not os.access(given, os.X_OK):
        raise ValueError(f"--compiler {given}: a program of the name {NAME} was expected")
    return given.absolute()


def compiler_flags(compiler: Path) -> list[str]:
    """NEURON_CC_FLAGS as tools/launch/neuron_env.sh sets them for this compiler (or as they are set already),
    without those that only the compile cache reads."""
    environment = os.environ | {"PATH": f"{compiler.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        ["bash", "-c", '. "$0" && printf %s "$NEURON_CC_FLAGS"', ENVIRONMENT],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise OSError(f"{ENVIRONMENT} failed: {done.stderr.strip()}")
    return shlex.split(WRAPPER_FLAGS.sub("", done.stdout))


def compile_graph(
    compiler: Path, hlo: Path, neff: Path, target: str, level: int, flags: list[str]
) -> Compiled:
    """Compile an HloModuleProto into `neff`; what the compiler prints goes into a file beside it, .log.

    It works in a directory that is removed, because it leaves files where it is started, also large ones.
    """
    log = neff.with_suffix(".log")
    with tempfile.TemporaryDirectory(dir=neff.parent) as directory, open(log, "wb") as output:
        command = [compiler, "compile", hlo.absolute(), "--framework=XLA", f"--target={target}", *flags]
        command += [f"--optlevel={level}", f"--output={neff.absolute()}"]
        begun = time.perf_counter()
        status = subprocess.run(
            [sys.executable, "-c", MEASURE, *command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
        seconds = time.perf_counter() - begun
        output.write(_read(Path(directory) / "log-neuron-cc.txt").encode())
        output.flush()
        text = _read(log)
        peak = int(_read(Path(directory) / "peak_kilobytes") or 0)
        metrics = _read(Path(directory) / "global_metric_store.json")
    error = ""
    if status:
        error = why(text) or f"it ended with status {status}, and said nothing"
    elif not neff.is_file():
        error = "it ended well, and wrote no NEFF"
    return Compiled(
        seconds,
        1024 * peak,
        neff.stat().st_size if neff.is_file() and not error else None,
        **estimates(text, metrics),
        error=error,
        log=str(log),
    )


def estimates(text: str, metrics: str) -> dict[str, float | None]:
    """The compiler's own estimates, from its output and from the metrics that it leaves as JSON.

    Neither has a documented form: these names were found in public logs and files of several versions, and
    what is not there is None. Where a graph was compiled in parts, it is the largest value.
    """
    try:
        numbers = list(_numbers(json.loads(metrics)))
    except ValueError:
        numbers = []

    def largest(name, pattern):
        found = [value for key, value in numbers if name in key]
        found += [float(each) for each in re.findall(pattern, text)]
        return max(found, default=None)

    number = r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
    return {
        "estimated_latency": largest("PostSchedEstLatency", rf"PostSchedEstLatency\W+{number}"),
        "macs": largest("HloMacCount", rf"HloMacCount\W+{number}"),
        "estimated_hbm_gb": largest("no such metric", rf"Estimated peak HBM usage \({number}\)"),
    }


def why(text: str) -> str:
    """The last lines of a failed compilation that name an error, else its last lines, without their times."""
    lines = [re.sub(r"^[\d/-]+[T ][\d:.]+(Z| [AP]M)? *", "", line).strip() for line in text.splitlines()]
    # A code, as in [NCC_EVRF035] or [XCG815], names the error; lines above and below are a traceback.
    coded = [line for line in lines if re.search(r"\[(NCC_)?[A-Z]{2,}\d{2,}\]", line)]
    errors = [line for line in lines if re.search(r"(?i)\berror|exception|killed|out of memory", line)]
    shown = list(dict.fromkeys(coded or errors or [line for line in lines if line]))[-MEANINGFUL:]
    return "\n".join(line[:300] for line in shown)


def _numbers(values) -> Iterator[tuple[str, float]]:
    """(key, number) of every number in parsed JSON; of a list, the key that the list is under."""
    items = values.items() if isinstance(values, dict) else (("", each) for each in values)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from ((f"{key}.{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float):
            yield str(key), float(value)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
