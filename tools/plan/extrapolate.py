"""Reports of tools/bench_compile of a deep model at a large world, from traces of a shallow one at a small
world.

All layers but the first have the same operations, so what a graph counts is a straight line over the number
of layers: it is traced with DEPTHS layers and drawn on. FLOPs, bytes of messages, inputs and outputs come out
exact, and the peak to 0.1 % (beside a trace of all layers of Llama-2 7B). Messages over dp are those of
buckets, which are filled, so a few too many may be counted. More data parallel ranks than the traced world
has change replica groups alone, and under ZeRO-1 the size of the optimizer's state, which is put in its
place, and of what partial gradients (of norms, of replicated heads and factors) send over tp, which is left
too large. Micro-batches beyond two run the graph of the first ones. Of several pipeline stages each is traced
with DEPTHS layers, and at most TRACED_TICKS micro-batches go through: the graphs of ticks do not depend on
their number.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from parallel.mesh import Mesh
from tools.graphs.report import state_of
from trainer.build import build

DEPTHS = (2, 4)
TRACED_RANKS = 64  # more cost time and memory, and say nothing else
TRACED_TICKS = 3
_PROGRAM = """
import json, sys
from contextlib import redirect_stdout
from tools.bench_compile import main
for arguments in json.load(sys.stdin):
    with redirect_stdout(sys.stderr):
        status = main(arguments)
    if status:
        sys.exit(status)
    print("traced", flush=True)
"""


def reports(configs: list, model_config) -> list[dict]:
    """Of trainer.config.Configs whose world_size is set, in their order; raises ValueError where a trace
    fails.

    Worlds are fixed once per process, so each traced world has a process of its own.
    """
    worlds: dict[int, list[int]] = {}
    for number, config in enumerate(configs):
        worlds.setdefault(_traced(config).world_size, []).append(number)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for world, numbers in worlds.items():
            cases, traced = [], [_traced(configs[number]) for number in numbers]
            for number, config in zip(numbers, traced, strict=True):
                for depth in _depths(model_config, config):
                    layers = depth * config.pipeline_parallel_size
                    model = Path(directory) / str(layers)
                    model.mkdir(exist_ok=True)
                    _write(replace(model_config, num_hidden_layers=layers), model / "config.json")
                    cases.append(
                        [
                            "--model",
                            str(model),
                            "--json",
                            f"{directory}/{number}-{depth}.json",
                            *_flags(config),
                        ]
                    )
            _run(cases, world)
            for number, config in zip(numbers, traced, strict=True):
                depths = _depths(model_config, config)
                shallow = [
                    json.loads((Path(directory) / f"{number}-{depth}.json").read_text()) for depth in depths
                ]
                deep = extended(shallow, depths, _slots(model_config, config))
                found[number] = scaled(deep, config, configs[number], model_config)
    return [found[number] for number in range(len(configs))]


def extended(shallow: list[dict], depths: tuple[int, ...], layers: int) -> dict:
    """The report of `layers` layers a stage, on the line through two of fewer; of one report, itself."""
    if len(shallow) == 1:
        return shallow[0]
    times = (layers - depths[0]) / (depths[1] - depths[0])

    def along(one, two):
        if isinstance(one, dict):
            empty = {"count": 0, "bytes": 0}
            return {key: along(one.get(key, empty), two[key]) for key in two}
        return round(one + times * (two - one))

    graphs = {}
    for name, graph in shallow[0]["graphs"].items():
        counted = ("dot_flops", "collectives", "input_bytes", "output_bytes", "peak_bytes")
        one, two = ({key: each[key] for key in counted} for each in (graph, shallow[1]["graphs"][name]))
        graphs[name] = {"runs_per_step": graph["runs_per_step"], **along(one, two)}
    return {"tensor_parallel_size": shallow[0]["tensor_parallel_size"], "graphs": graphs}


def scaled(report: dict, traced, config, model_config) -> dict:
    """The report of the traced Config, as that of `config`: of more data parallel ranks and micro-batches."""
    meshes = [
        Mesh.create(0, each.world_size, each.tensor_parallel_size, each.pipeline_parallel_size)
        for each in (traced, config)
    ]
    states = [state_of(build(config, model_config, mesh), config, mesh) for mesh in meshes]
    smaller = (
        sum(state.master_weights + state.moments for state in states[:1])
        - states[1].master_weights
        - states[1].moments
    )
    graphs = {name: dict(graph) for name, graph in report["graphs"].items()}
    for name, graph in graphs.items():
        if name in ("micro_batch", "forward", "backward"):
            graph["runs_per_step"] = config.gradient_accumulation_steps * (
                1 if name == "micro_batch" else config.ticks
            )
        else:
            graph["input_bytes"] -= smaller
            graph["output_bytes"] -= smaller
    return {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "data_parallel_size": meshes[1].dp.size(),
        "ticks": config.ticks,
        "graphs": graphs,
        "state_bytes": vars(states[1]),
    }


def _traced(config):
    model = config.tensor_parallel_size * config.pipeline_parallel_size
    traced = replace(
        config, world_size=model * min(config.world_size // model, max(2, TRACED_RANKS // model))
    )
    if config.graph_per_micro_batch and config.ticks > 1:
        count = min(config.pipeline_microbatches, TRACED_TICKS)
        rows = config.per_device_train_batch_size // config.pipeline_microbatches * count
        return replace(
            traced, gradient_accumulation_steps=1, num_microbatches=count, per_device_train_batch_size=rows
        )
    return replace(traced, gradient_accumulation_steps=2) if config.graph_per_micro_batch else traced


def _slots(model_config, config) -> int:
    """The layers of a stage, the spare ones included."""
    return -(-model_config.num_hidden_layers // config.pipeline_parallel_size)


def _depths(model_config, config) -> tuple[int, ...]:
    slots = _slots(model_config, config)
    return DEPTHS if slots > DEPTHS[-1] else (slots,)


def _write(model_config, path: Path) -> None:
    values = vars(model_config) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
    }
    if model_config.rope_scaling:
        values["rope_scaling"] = model_config.rope_scaling | {"rope_type": "llama3"}
    path.write_text(json.dumps(values), encoding="utf-8")


def _flags(config) -> list[str]:
    """What differs from the defaults, as a command line."""
    found = []
    for name, value in vars(config).items():
        if value is not None and value != getattr(type(config), name):
            found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def _run(cases: list[list[str]], world: int) -> None:
    """Trace the cases in a process of `world` ranks."""
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=json.dumps(cases),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent.parent)},
        )
        said.seek(0)
        errors = [line for line in said.read().splitlines() if line.strip()]
    if done.returncode:
        flags = " ".join(cases[min(done.stdout.count("traced"), len(cases) - 1)][4:])
        raise ValueError(
            f"tracing {world} ranks with {flags} failed: {' '.join(errors[-1:]).removeprefix('error: ')}"
        )
