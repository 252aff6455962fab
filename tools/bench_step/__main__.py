"""Throughput of the real training step, measured: time, tokens, FLOP/s, and where the time goes.

    python -m tools.bench_step [--steps 20] [--warmup 3] [--json NEW] [--compare OLD] [--profile DIR] FLAGS

FLAGS are those of trainer/main.py, whose loop runs; on a CPU, --world_size ranks run in this process. After
the warmup, `steps` steps run as in training. Then as many run that wait for the device after each mark_step,
which separates the host's seconds from the device's: their sum exceeds a step of the first part where the two
overlap there. Where graphs are replayed (--replay), a third part of as many steps traces each one, and waits,
too; torch_xla compiles once more before it. A fourth one traces each, and does not wait: step_trace_seconds.
--profile records two more steps after the second part, which are in no figure, in DIR/step.trace.json.gz
(tools/bench_step/trace.py), for https://ui.perfetto.dev or chrome://tracing.

host_trace_seconds are those that rank 0's host spends in mark_step in a step whose graphs are all traced;
host_replay_seconds and step_replay_seconds are the host's and all of a step whose graphs are all replayed.
python_trace_seconds and python_replay_seconds are the part of the host's in which XLA was not called yet: it
then starts the graph, hands out its outputs and frees what they replace. Where nothing was replayed, the
figures of a replay are missing. On XLA:CPU ranks are threads, and their turns are in the host's seconds.
device_seconds are those that the device still needs when mark_step has returned.

FLOPs are those of the matrix products of forward and backward (tools/graphs/flops.py) of all micro-batches
and ranks. MFU (model FLOPs utilisation, https://arxiv.org/abs/2204.02311) leaves out recomputation for
--gradient_checkpointing and the idle ticks of pipeline stages; HFU counts both. The peak is that of a product
of 2048 x 2048 matrices (on a GPU 8192 x 8192) in the run's dtype, measured before the run on the same device:
on a CPU all ranks share it. first_step_seconds count from the start of this program to the end of its first
step, without measuring the peak. peak_memory_bytes are the host's; peak_device_memory_bytes are there where
the device tells.
"""

import argparse
import sys
import time

BEGUN = time.perf_counter()  # before the slow imports

from tools import cli  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    chosen, flags = _parser().parse_known_args(arguments)
    from model.weights.hub import read_json
    from parallel.runtime import prepare_environment, requested_world_size
    from tools.bench_step.measure import measure
    from trainer.config import parse

    config = parse(flags)
    try:
        if min(chosen.steps, chosen.warmup) < 1:
            raise ValueError("--steps and --warmup: at least 1 was expected")
        old = read_json(chosen.compare) if chosen.compare else None
        world_size = requested_world_size(config.world_size)
        prepare_environment(world_size, config.stochastic_rounding)
        trace = None
        if chosen.profile:
            from tools.bench_step.trace import StepTrace

            trace = StepTrace(chosen.profile)
        figures = measure(config, world_size, chosen.steps, chosen.warmup, trace, BEGUN)
    except ValueError as error:
        return cli.fail(error)
    print_figures(figures, old)
    if trace:
        print(f"{trace.file}: open it in https://ui.perfetto.dev or chrome://tracing")
    if chosen.json:
        cli.write_json(chosen.json, figures | {"flags": flags})
    return 0


def print_figures(figures: dict, old: dict | None) -> None:
    """Print a line for each figure, with its ratio to that of an older measurement."""
    for name, value in figures.items():
        shown = f"{value:.4g}" if value < 1e4 else f"{value:.3e}"
        ratio = f"   {value / old[name]:6.3f} of the old" if old and old.get(name) else ""
        print(f"{name:<26} {shown:>10}{ratio}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("bench_step", __doc__, trainer_flags=True)
    parser.add_argument("--steps", type=int, default=20, help="steps of each part; default 20")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them; default 3")
    parser.add_argument("--json", type=cli.path, help="where the figures go, for a later --compare")
    parser.add_argument(
        "--compare", type=cli.path, help="figures of another run, of the same flags and machine"
    )
    parser.add_argument(
        "--profile", type=cli.path, metavar="DIR", help="record two more steps as a Chrome trace in DIR"
    )
    return parser


if __name__ == "__main__":
    from parallel.runtime import use_huge_pages

    use_huge_pages()
    sys.exit(main())
