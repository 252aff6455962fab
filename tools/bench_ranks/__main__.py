"""What the processes of a job read, open and wait for, counted in real ones; and ten planted faults.

    python -m tools.bench_ranks [--processes 64] [--checkpoint_gb 1] [--json NEW] [--compare OLD]
    python -m tools.bench_ranks --faults [WORD ...]

Real processes on pretended machines walk the path that ranks take on Trainium, trainer/main.py under
torchrun's variables and store, with a stand-in for the device (tools/bench_ranks/standin.py says what it is).
The walk is a start with a cold token cache, ten steps with saves, the same with a rank that is killed, a
restart of all, and a resume on half of the ranks (tools/bench_ranks/walk.py). For each part there is what all
processes together have read of a checkpoint, of the base model and of tokens, the files that one of them had
open at most, messages to the store, seconds and memory. The losses of the restarted run have to be those of
the undisturbed one. After that the store's messages a second are measured, with a connection for each process
and with 16, and what grows with the ranks is extrapolated to 1,024 and 2,048
(tools/bench_ranks/extrapolation.py).

A full training needs 12 bytes of a checkpoint for each parameter, and about 15 times its size of memory here.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tools import cli

LIMIT_SECONDS = 900.0  # of an attempt


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status: 1 where a run did not end as it has to, or a fault was not named."""
    chosen = _parser().parse_args(arguments)
    from tools.bench_ranks.cluster import prepare

    prepare()
    with tempfile.TemporaryDirectory(prefix="bench_ranks-") as temporary:
        directory = Path(chosen.directory or temporary) / "ranks"
        try:
            if directory.exists():
                raise ValueError(f"{directory} exists: --directory has to be a new one, or one without it")
            found = (
                _faults(directory, chosen.faults) if chosen.faults is not None else _walk(directory, chosen)
            )
        except (ValueError, RuntimeError) as error:
            return cli.fail(error)
    if chosen.json:
        cli.write_json(chosen.json, found)
    return 0 if chosen.faults is None or all(each["passed"] for each in found) else cli.FAILED


def _faults(directory: Path, words: list[str]) -> list[dict]:
    from tools.bench_ranks.fault_runs import in_words, run_faults

    found = []
    for each in run_faults(directory, words):
        print(in_words(each), flush=True)
        found.append(each)
    return found


def _walk(directory: Path, chosen: argparse.Namespace) -> dict:
    from model.weights.hub import read_json
    from tools.bench_ranks.extrapolation import extrapolate
    from tools.bench_ranks.store_speed import messages_per_second
    from tools.bench_ranks.table import print_table
    from tools.bench_ranks.walk import Layout, walk

    Layout.check(chosen.processes, chosen.machines)
    old = read_json(chosen.compare) if chosen.compare else None
    found = walk(directory, chosen.processes, chosen.machines, chosen.checkpoint_gb * 1e9, LIMIT_SECONDS)
    found["store"] = {
        f"{number * chosen.processes} connections": messages_per_second(
            chosen.processes, number * chosen.processes
        )
        for number in (1, 16)
    }
    found["extrapolation"] = extrapolate(found)
    print_table(found, old)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("bench_ranks", __doc__)
    parser.add_argument("--processes", type=int, default=64, help="ranks; default 64, or 4, 8, 16, 32")
    parser.add_argument("--machines", type=int, default=2, help="pretended machines; default 2")
    parser.add_argument(
        "--checkpoint_gb", type=float, default=1.0, help="size of a checkpoint, which the model follows"
    )
    parser.add_argument(
        "--faults",
        nargs="*",
        metavar="WORD",
        help="instead, plant ten faults, or those whose name has one of these words, in jobs of 8 processes",
    )
    parser.add_argument("--json", type=cli.path, help="where the figures go, for a later --compare")
    parser.add_argument("--compare", type=cli.path, help="figures of another run with the same flags")
    parser.add_argument("--directory", type=cli.path, help="keep all files in a folder `ranks` of this one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
