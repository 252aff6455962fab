"""What a training step will cost, from the graph of the real one, before a machine is rented: nothing is
executed.

    python -m tools.bench_compile --model llama3-8b --world_size 32 --tensor_parallel_size 8 \\
      --max_seq_length 2048 --lora_r 16 --bf16 [--compile] [--save_hlo DIRECTORY] [--json FILE] \\
      [any other flag of trainer/main.py]

Runs trainer/loop.py for rank 0 of the world, up to where each graph would be executed
(tools/graphs/tracing.py), and reads the HLO of the graphs (parallel/graph/hlo.py). Their matrix products are
compared with a closed formula (tools/graphs/flops.py). What lives at the peak of each graph (tools/graphs/
peak.py) is named by kind, layer and line of Python. The model is a name or a config.json: no weights are
read and no cluster is needed. Flags that choose the data change nothing. All figures are those of one core.
`--save_hlo` writes each graph as a serialised HloModuleProto, for an offline compiler.
"""

import argparse
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

from parallel.runtime import prepare_environment
from tools import cli
from tools.graphs.checks import check_file, check_flags
from tools.graphs.describe import describe, format_bytes
from tools.graphs.models import PRESETS, rank_model, read_model
from tools.graphs.report import rank_0_mesh, report_step


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    begun = time.perf_counter()
    # On the CPU, even where the Neuron SDK is installed; and the loop's progress bar has nothing to show.
    os.environ |= {"PJRT_DEVICE": "CPU", "TQDM_DISABLE": "1"}
    chosen, rest = _parser().parse_known_args(arguments)
    from trainer.config import parse

    config = parse(rest)
    try:
        config, model_config = prepare(chosen.model, config, chosen.compile)
        _check_files(chosen)
    except ValueError as error:
        return cli.fail(error)
    report, protos = report_step(config, model_config, bool(chosen.save_hlo), chosen.compile)
    if chosen.save_hlo:
        for name, proto in zip(report["graphs"], protos, strict=True):
            (Path(chosen.save_hlo) / f"{name}.hlo.pb").write_bytes(proto)
    report |= {
        "seconds": time.perf_counter() - begun,
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    pp = report["pipeline_parallel_size"]
    topology = f"TP{report['tensor_parallel_size']}{f' x PP{pp}' if pp > 1 else ''}"
    print(
        f"{chosen.model}, {topology} x DP{report['data_parallel_size']}, sequence {config.max_seq_length}, "
        f"{'bf16' if config.bf16 else 'fp32'}\n{describe(report)}\n"
        f"{report['seconds']:.1f} s and {format_bytes(report['host_bytes'])} of this machine's memory in all"
    )
    if chosen.json:
        cli.write_json(chosen.json, {"model": chosen.model, **report})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("bench_compile", __doc__, trainer_flags=True)
    parser.add_argument(
        "--model",
        type=cli.path_text,
        required=True,
        help=f"{', '.join(PRESETS)}, tiny, a directory or a config.json",
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure XLA:CPU's compilation too (small models)"
    )
    parser.add_argument(
        "--save_hlo",
        type=cli.path_text,
        metavar="DIRECTORY",
        help="write each graph's HloModuleProto to DIRECTORY/<graph>.hlo.pb",
    )
    parser.add_argument("--json", type=cli.path_text, metavar="FILE", help="write the report to FILE")
    return parser


def prepare(model: str, config, compiles: bool = False) -> tuple:
    """(the Config to trace, the ModelConfig), in an environment for the config's world; ValueError for flags
    that are refused."""
    from tools.graphs.tracing import MANY, devices

    if config.preset:  # a preset names the model and the checkpoint of a job; here --model names the model
        config = replace(config, model_id=None, resume=None)
    check_flags(config)
    if not config.do_train:
        raise ValueError("--do_train false leaves no step to trace")
    mesh = rank_0_mesh(config)
    config = config.for_ranks(mesh.dp.size())
    if compiles and mesh.world_size > MANY:
        raise ValueError(f"--compile is for small worlds, up to {MANY} ranks")
    prepare_environment(devices(mesh.world_size), config.stochastic_rounding)
    model_config = read_model(model)
    rank_model(config, model_config, mesh)  # raises ValueError where the model cannot be divided
    return config, model_config


def _check_files(chosen: argparse.Namespace) -> None:
    if chosen.save_hlo:
        try:
            os.makedirs(chosen.save_hlo, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save_hlo {chosen.save_hlo} cannot be made: {error.strerror}") from None
    check_file("--json", chosen.json)


if __name__ == "__main__":
    sys.exit(main())
