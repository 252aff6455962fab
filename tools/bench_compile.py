"""What a training step will cost, from the graph of the real one, before a machine is rented: nothing is
executed.

    python -m tools.bench_compile --model llama3-8b --world_size 32 --tensor_parallel_size 8 --max_seq_length
    2048 --lora_r 16       --bf16 [--compile] [--save_hlo DIRECTORY] [--json FILE] [any other flag of
    trainer/main.py]

Runs trainer/loop.py for rank 0 of the world, up to where each graph would be executed
(tools/graphs/tracing.py), and reads its HLO (parallel/graph/hlo.py); the products are compared with a closed
formula (tools/graphs/flops.py). A model is a name or a config.json; no weights are read, no cluster is
needed, and flags that say which data are read change nothing. Everything that is reported is of one core.
`--save_hlo` writes each graph as a serialised HloModuleProto, for an offline compiler.
"""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

from parallel.mesh import Mesh
from parallel.runtime import prepare_environment
from tools.graphs.models import PRESETS, read_model
from tools.graphs.report import measure
from trainer.build import build

REFUSED = {
    "model_id": "--model names the model",
    "adapter_name_or_path": "the flags of LoRA say what is trained",
    "resume": "a step does not depend on what was trained before",
    "do_eval": "the training step alone is traced",
}


def describe(report: dict) -> str:
    """The report as text."""
    said = []
    for name, graph in report["graphs"].items():
        runs = "once" if graph["runs_per_step"] == 1 else f"{graph['runs_per_step']} times"
        compiled = (
            f", XLA:CPU compiles {graph['compile_seconds']:.2f} s"
            if graph["compile_seconds"] is not None
            else ""
        )
        kinds = ", ".join(f"{count} {opcode}" for opcode, count in graph["operations"].items())
        said += [
            f"graph {name}, {runs} a step: {graph['instructions']} HLO instructions, traced "
            f"in {graph['trace_seconds']:.2f} s, lowered in {graph['lowering_seconds']:.2f} s{compiled}",
            f"  {kinds}",
        ]
        said += [
            f"  {what}: {each['count']} of {_size(each['bytes'])} in all"
            for what, each in graph["collectives"].items()
        ]
        said += [
            f"  inputs {_size(graph['input_bytes'])}, outputs {_size(graph['output_bytes'])}, at most "
            f"{_size(graph['peak_bytes'])} live beside the inputs (in the order of the text, nothing fused)"
        ]
    formula, state, stages = report["formula_flops"], report["state_bytes"], report["stage_layers"]
    if len(stages) > 1:
        said.append(
            f"{len(stages)} stages of {report['slots']} layers ({sum(stages)} in all), {report['num_microbatches']} "
            f"micro-batches in {report['ticks']} ticks: {(len(stages) - 1) / report['ticks']:.1%} of them idle"
        )
    if report["kept_bytes"]:
        said.append(
            f"forward ticks keep {_size(report['kept_bytes'] // report['ticks'])} each for the backward, "
            f"{_size(report['kept_bytes'])} in all"
        )
    each = "of each stage " if len(stages) > 1 else ""
    said += [
        f"products of a step: {report['step_flops']:.6g} FLOPs a core in the graph, {formula:.6g} by the formula "
        f"({report['step_flops'] / formula - 1:+.3%})",
        f"a core {each}holds: "
        + ", ".join(f"{name.replace('_', ' ')} {_size(size)}" for name, size in state.items())
        + f"; at most {_size(report['most_bytes'])} live at once",
    ]
    return "\n".join(said)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def check_outputs(save_hlo: str | None, json_path: str | None) -> None:
    """Raise ValueError where something could not be written at the end; makes the directory of --save_hlo."""
    try:
        if save_hlo:
            os.makedirs(save_hlo, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--save_hlo {save_hlo} cannot be made: {error.strerror}") from None
    parent = Path(json_path).parent if json_path else Path()
    if json_path and (Path(json_path).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK)):
        raise ValueError(
            f"--json {json_path} cannot be written: a file in a directory that exists was expected"
        )


def main(arguments: list[str] | None = None) -> int:
    begun = time.perf_counter()
    # On the CPU where the Neuron SDK is installed, too; and the loop's progress bar has nothing to show.
    os.environ |= {"PJRT_DEVICE": "CPU", "TQDM_DISABLE": "1"}
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_compile",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="All other flags are those of trainer/main.py.",
    )
    parser.add_argument(
        "--model", required=True, help=f"{', '.join(PRESETS)}, tiny, a directory or a config.json"
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure XLA:CPU's compilation too (small models)"
    )
    parser.add_argument(
        "--save_hlo",
        metavar="DIRECTORY",
        help="write each graph's HloModuleProto to DIRECTORY/<graph>.hlo.pb",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE")
    chosen, rest = parser.parse_known_args(arguments)
    from tools.graphs.tracing import MANY, devices
    from trainer.config import parse

    config = parse(rest)
    if config.preset:  # a preset says which model and checkpoint the job has; here --model names the model
        config = replace(config, model_id=None, resume=None)
    try:
        for flag, reason in REFUSED.items():
            if getattr(config, flag):
                raise ValueError(f"--{flag} is not taken here: {reason}")
        if not config.do_train:
            raise ValueError("--do_train false leaves no step to trace")
        mesh = Mesh.create(
            0, config.world_size or 1, config.tensor_parallel_size, config.pipeline_parallel_size
        )
        config = config.for_ranks(mesh.dp.size())
        if chosen.compile and mesh.world_size > MANY:
            raise ValueError(f"--compile is for small worlds, up to {MANY} ranks")
        prepare_environment(devices(mesh.world_size), config.stochastic_rounding)
        model_config = read_model(chosen.model)
        build(config, model_config, mesh)
        check_outputs(chosen.save_hlo, chosen.json)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report, protos = measure(config, model_config, mesh, bool(chosen.save_hlo), chosen.compile)
    if chosen.save_hlo:
        for name, proto in zip(report["graphs"], protos, strict=True):
            (Path(chosen.save_hlo) / f"{name}.hlo.pb").write_bytes(proto)
    report |= {
        "seconds": time.perf_counter() - begun,
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    stages = f" x PP{mesh.pp.size()}" if mesh.pp.size() > 1 else ""
    print(
        f"{chosen.model}, TP{mesh.tp.size()}{stages} x DP{mesh.dp.size()}, sequence {config.max_seq_length}, "
        f"{'bf16' if config.bf16 else 'fp32'}\n{describe(report)}\n"
        f"{report['seconds']:.1f} s and {_size(report['host_bytes'])} of this machine's memory in all"
    )
    if chosen.json:
        Path(chosen.json).write_text(
            json.dumps({"model": chosen.model, **report}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
