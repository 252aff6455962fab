"""Compiles the graphs of a training step by neuronx-cc, on any x86 Linux machine: no Neuron device is needed.

    python -m tools.compile_neff --model llama3-8b --world_size 32 --tensor_parallel_size 8 --bf16
        [--target trn1] [--optlevel 1 2 3] [--output DIRECTORY] [--compiler PATH] [--json FILE]
        [any other flag of trainer/main.py]

Traces the job as tools.bench_compile does, and runs the compiler on each graph at each level, one after the
other, with the flags of tools/launch/neuron_env.sh. The table has seconds, the compiler's peak memory, the
size of the result and the compiler's own estimates, where it gives any. DIRECTORY gets each graph
(<graph>.hlo.pb), each result (<graph>.O<level>.neff) and what the compiler printed (.log). The exit status is
1 where a graph failed; the others are compiled all the same.

The graphs are those of markstep's own layers and its blockwise attention, which need no Neuron software to be
traced; a run on Trainium with neuronx-distributed has others, and compiles its own.
"""

import argparse
import os
import sys
from pathlib import Path

from tools import cli
from tools.bench_compile import prepare
from tools.compile_neff.compiler import Compiled, compile_graph, compiler_flags, find_compiler
from tools.graphs.checks import check_file
from tools.graphs.describe import format_bytes
from tools.graphs.models import PRESETS
from tools.graphs.report import report_step

LEVELS = (1, 2, 3)
HEAD = ("graph", "level", "seconds", "peak memory", "NEFF", "est. latency", "est. MACs", "est. HBM")


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    # Traced on the CPU, even where the Neuron SDK is installed; the loop's progress bar has nothing to show.
    os.environ |= {"PJRT_DEVICE": "CPU", "TQDM_DISABLE": "1"}
    chosen, rest = _parser().parse_known_args(arguments)
    from trainer.config import parse

    config = parse(rest)
    try:
        compiler = find_compiler(chosen.compiler)
        _check(chosen)
        config, model_config = prepare(chosen.model, config)
        flags = compiler_flags(compiler)
        chosen.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return cli.fail(error)
    report, protos = report_step(config, model_config, True, False)
    print(f"{compiler} for {chosen.target}: {' '.join(flags)}", flush=True)
    results: dict[str, dict[int, Compiled]] = {}
    for name, proto in zip(report["graphs"], protos, strict=True):
        hlo = chosen.output / f"{name}.hlo.pb"
        hlo.write_bytes(proto)
        results[name] = {}
        for level in chosen.optlevel:
            print(f"{name}, level {level} ...", flush=True)
            neff = chosen.output / f"{name}.O{level}.neff"
            results[name][level] = compile_graph(compiler, hlo, neff, chosen.target, level, flags)
    print("\n".join(_table(results)))
    if chosen.json:
        graphs = {
            name: {"instructions": report["graphs"][name]["instructions"]}
            | {f"O{level}": vars(each) for level, each in levels.items()}
            for name, levels in results.items()
        }
        job = {"model": chosen.model, "target": chosen.target, "compiler": str(compiler), "flags": flags}
        cli.write_json(chosen.json, job | {"graphs": graphs})
    failed = _failures(results)
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("compile_neff", __doc__, trainer_flags=True)
    parser.add_argument(
        "--model",
        type=cli.path_text,
        required=True,
        help=f"{', '.join(PRESETS)}, tiny, a directory or a config.json",
    )
    parser.add_argument("--target", choices=("trn1", "trn1n", "trn2"), default="trn1", help="default trn1")
    parser.add_argument(
        "--optlevel", type=int, nargs="+", choices=LEVELS, default=[2], help="one or several; default 2"
    )
    parser.add_argument(
        "--output", type=cli.path, default=Path("neff"), help="a new or empty directory; default neff"
    )
    parser.add_argument("--compiler", type=cli.path, help="neuronx-cc, where it is not the one on the PATH")
    parser.add_argument("--json", type=cli.path_text, metavar="FILE", help="write the figures to FILE")
    return parser


def _check(chosen: argparse.Namespace) -> None:
    if chosen.output.exists() and not (chosen.output.is_dir() and not any(chosen.output.iterdir())):
        raise ValueError(f"--output {chosen.output} exists, and is not empty: name a new directory")
    check_file("--json", chosen.json)


def _table(results: dict[str, dict[int, Compiled]]) -> list[str]:
    """Lines of the figures, the levels of a graph below each other; what is not known is left blank."""
    rows = [HEAD]
    for name, levels in results.items():
        for level, each in levels.items():
            hbm = each.estimated_hbm_gb
            rows.append(
                (
                    name,
                    str(level),
                    f"{each.seconds:.1f}",
                    format_bytes(each.peak_bytes),
                    "failed" if each.error else format_bytes(each.neff_bytes),
                    *(
                        "" if value is None else f"{value:.6g}"
                        for value in (each.estimated_latency, each.macs)
                    ),
                    "" if hbm is None else f"{hbm:.2f} GB",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(each)
        )
        for each in ([*zip(row, widths, strict=True)] for row in rows)
    ]


def _failures(results: dict[str, dict[int, Compiled]]) -> list[str]:
    return [
        f"error: {name}, level {level} failed ({each.log}):\n    " + each.error.replace("\n", "\n    ")
        for name, levels in results.items()
        for level, each in levels.items()
        if each.error
    ]


if __name__ == "__main__":
    sys.exit(main())
