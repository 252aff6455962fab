"""A training step of markstep beside trl's and beside a plain loop on torch_xla: same model, same data, same
tokens a step.

    pip install trl==1.16.0 accelerate
    python -m tools.bench_peers [--rounds 3] [--steps 5] [--max_seq_length 512] [--tokens 4096] \\
      [--per_device_train_batch_size 8] [--model small] [--bf16] [--gradient_checkpointing none] \\
      [--huge_pages] [--json FILE]
    PJRT_DEVICE=GPU python -m tools.bench_peers --model llama3-8b --bf16 --max_seq_length 2048 \\
      --tokens 2048 [--peer_python PYTHON]

Each side is a process of its own on this machine's CPU (tools/bench_peers/peers.py; markstep's is
tools.bench_step), or on its GPU: there beside a plain loop and trl on torch's own CUDA
(tools/bench_peers/cuda.py). The sides run one after the other, in rounds that alternate in direction. A side
that is not installed is left out. The model is a Llama with random weights: 6 layers, hidden 512, vocabulary
8192, or that of --model; LoRA r 16 on all linear layers. The examples have lengths such as dolly's, cut to a
row.

Tokens are those of prompts and answers, without padding; target tokens are those of answers alone. The
seconds of a side are the median of its warm steps. Its share of the GEMM peak counts the products of all
positions, by the formula and the peak of tools.bench_step in the same round. markstep starts itself with huge
pages; its peers have them with --huge_pages.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from parallel.runtime import on_gpu
from tools import cli
from tools.bench_peers.inputs import MODEL, make, save_rows
from tools.bench_peers.runs import SIDES, missing, run, sides_here, step_instructions
from tools.bench_peers.table import gpu_table, rates, table, versions
from tools.example_lengths import SHORTEST
from tools.graphs.models import PRESETS


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    chosen, settings = _parse(arguments)
    lacking = {side: missing(side, chosen.peer_python) for side in sides_here()}
    sides = [side for side in lacking if not lacking[side]]
    for side in lacking:
        if side not in sides:
            print(f"{SIDES[side]}: left out, {', '.join(lacking[side])} not installed")
    try:
        device = _device()
    except ValueError as error:
        return cli.fail(error)
    print(
        f"{versions()}{device}\n{chosen.model}, {settings['rows']} rows of {chosen.max_seq_length} a step, "
        f"{settings['micro_batch']} of them at once, {chosen.steps} warm steps a process, {chosen.rounds} "
        f"rounds, peers {'with' if chosen.huge_pages else 'without'} huge pages",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make(directory, model_of(chosen.model), settings)
        save_rows(directory)
        try:
            rounds = _measure(chosen, sides, directory, settings)
        except ValueError as error:
            return cli.fail(error)
        print("\n".join((gpu_table if on_gpu() else table)(rounds)))
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


def model_of(name: str) -> dict:
    """The config.json of a model of --model."""
    return MODEL if name == "small" else PRESETS[name]


def _device() -> str:
    """The GPU and its driver's CUDA, for the line of versions; raises ValueError where it cannot be used."""
    if not on_gpu():
        return ""
    from parallel.runtime import gpu

    found = gpu.check()
    return f", {found.name}, driver of CUDA {found.cuda[0]}.{found.cuda[1]}"


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
    parser.add_argument(
        "--per_device_train_batch_size",
        type=int,
        help="rows of a micro-batch of markstep and of the plain loop, which accumulate the others of a "
        "step; default all. trl's has one row",
    )
    models = ["small", *PRESETS]
    parser.add_argument("--model", choices=models, default="small", help="with random weights; default small")
    parser.add_argument("--bf16", action="store_true", help="all sides train in bf16; default fp32")
    parser.add_argument(
        "--gradient_checkpointing",
        choices=("none", "selective", "full"),
        default="none",
        help="markstep's; the peers compute whole layers again unless it is none",
    )
    parser.add_argument(
        "--peer_python",
        default=sys.executable,
        metavar="PYTHON",
        help="on a GPU, the interpreter of the peers, where another one's torch has CUDA",
    )
    parser.add_argument("--json", type=cli.path, help="where the figures of each round go")
    chosen = parser.parse_args(arguments)
    rows, rest = divmod(chosen.tokens, max(chosen.max_seq_length, 1))
    if min(chosen.rounds, chosen.steps, rows) < 1 or chosen.max_seq_length < SHORTEST or rest:
        parser.error(
            f"--rounds, --steps: at least 1 was expected; --max_seq_length: at least {SHORTEST}; --tokens: a "
            "multiple of it"
        )
    micro_batch = rows if chosen.per_device_train_batch_size is None else chosen.per_device_train_batch_size
    if micro_batch < 1 or rows % micro_batch:
        parser.error(
            f"--per_device_train_batch_size {micro_batch}: a divisor of {rows}, the rows of a step, was "
            "expected"
        )
    if chosen.json and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json {chosen.json}: a file in a directory that exists was expected")
    return chosen, {
        "row_length": chosen.max_seq_length,
        "rows": rows,
        "micro_batch": micro_batch,
        "steps": chosen.steps,
        "warmup": 3,
        "bf16": chosen.bf16,
        "gradient_checkpointing": chosen.gradient_checkpointing,
        "device": "cuda" if on_gpu() else "cpu",
    }


def _measure(
    chosen: argparse.Namespace, sides: list[str], directory: Path, settings: dict
) -> list[dict[str, dict]]:
    """{side: its figures} of each round; raises ValueError where a side fails."""
    rounds = []
    for number in range(chosen.rounds):
        measured = {}
        for side in sides[:: -1 if number % 2 else 1]:
            measured[side] = run(side, directory, settings, chosen.huge_pages, chosen.peer_python)
            rate = rates(measured[side])["tokens"]
            print(f"round {number + 1}: {SIDES[side]}: {rate:.0f} tokens/s", flush=True)
        rounds.append({side: measured[side] for side in sides})
        if chosen.json:
            cli.write_json(chosen.json, rounds)
    return rounds


if __name__ == "__main__":
    sys.exit(main())
