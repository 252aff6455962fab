"""A training step of markstep beside trl's and beside a plain loop on torch_xla: same model, same data, same
tokens a step.

    pip install trl==1.16.0 accelerate
    python -m tools.bench_peers [--rounds 3] [--steps 5] [--max_seq_length 512] [--tokens 4096] \\
      [--huge_pages] [--json FILE]

Each side is a process of its own on this machine's CPU (tools/bench_peers/peers.py; markstep's is
tools.bench_step). The sides run one after the other, in rounds that alternate in direction. A side that is
not installed is left out. The model is a Llama with random weights: 6 layers, hidden 512, vocabulary 8192,
fp32, LoRA r 16 on all linear layers. The examples have lengths such as dolly's, cut to a row.

Tokens are those of prompts and answers, without padding; target tokens are those of answers alone. The
seconds of a side are the median of its warm steps. Its share of the GEMM peak counts the products of all
positions, by the formula and the peak of tools.bench_step in the same round. markstep starts itself with huge
pages; its peers have them with --huge_pages.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tools import cli
from tools.bench_peers.inputs import MODEL, make
from tools.bench_peers.runs import SIDES, missing, run, step_instructions
from tools.bench_peers.table import rates, table, versions
from tools.example_lengths import SHORTEST


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    chosen, settings = _parse(arguments)
    sides = [side for side in SIDES if not missing(side)]
    for side in SIDES:
        if side not in sides:
            print(f"{SIDES[side]}: left out, {', '.join(missing(side))} not installed")
    print(
        f"{versions()}\n{settings['rows']} rows of {chosen.max_seq_length} a step, {chosen.steps} warm steps "
        f"a process, {chosen.rounds} rounds, peers {'with' if chosen.huge_pages else 'without'} huge pages",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make(directory, MODEL, settings)
        try:
            rounds = _measure(chosen, sides, directory, settings)
        except ValueError as error:
            return cli.fail(error)
        print("\n".join(table(rounds)))
        if "plain" in sides:
            plain = rounds[0]["plain"]
            ours, theirs = step_instructions(directory, settings), plain["instructions"]
            print(
                f"HLO instructions of a step: markstep {ours}, the plain loop {theirs}: "
                f"{1 - ours / theirs:.0%} fewer; the plain loop recompiled {plain['recompilations']} times "
                "in its warm steps"
            )
    if "trl" in sides:
        print(f"trl's packed examples do not see each other: {[each['trl']['isolated'] for each in rounds]}")
    return 0


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """(the flags, the settings of the inputs); exits with status 2 where a flag cannot be used."""
    parser = cli.parser("bench_peers", __doc__)
    for name, default, text in (
        ("rounds", 3, "of all sides"),
        ("steps", 5, "warm ones of a process"),
        ("max_seq_length", 512, "tokens of a row"),
        ("tokens", 4096, "of a step, padding included"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default {default}")
    parser.add_argument(
        "--huge_pages", action="store_true", help="markstep's peers get large allocations in huge pages too"
    )
    parser.add_argument("--json", type=cli.path, help="where the figures of each round go")
    chosen = parser.parse_args(arguments)
    rows, rest = divmod(chosen.tokens, max(chosen.max_seq_length, 1))
    if min(chosen.rounds, chosen.steps, rows) < 1 or chosen.max_seq_length < SHORTEST or rest:
        parser.error(
            f"--rounds, --steps: at least 1 was expected; --max_seq_length: at least {SHORTEST}; --tokens: a "
            "multiple of it"
        )
    if chosen.json and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json {chosen.json}: a file in a directory that exists was expected")
    return chosen, {"row_length": chosen.max_seq_length, "rows": rows, "steps": chosen.steps, "warmup": 3}


def _measure(
    chosen: argparse.Namespace, sides: list[str], directory: Path, settings: dict
) -> list[dict[str, dict]]:
    """{side: its figures} of each round; raises ValueError where a side fails."""
    rounds = []
    for number in range(chosen.rounds):
        measured = {}
        for side in sides[:: -1 if number % 2 else 1]:
            measured[side] = run(side, directory, settings, chosen.huge_pages)
            rate = rates(measured[side])["tokens"]
            print(f"round {number + 1}: {SIDES[side]}: {rate:.0f} tokens/s", flush=True)
        rounds.append({side: measured[side] for side in sides})
        if chosen.json:
            cli.write_json(chosen.json, rounds)
    return rounds


if __name__ == "__main__":
    sys.exit(main())
