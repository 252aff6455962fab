"""The report of a deep model in a large world, extrapolated from traces of shallow models in a small world.

Layers: all layers but the first have the same operations, or where layers differ those of the layer a period
before, so every count of a graph is a straight line over the number of layers. DEPTHS layers of each stage
are traced, or a period more. FLOPs and bytes of messages, inputs and outputs are exact; the peak is within
0.1 % (compared with a trace of all layers of Llama-2 7B). Messages over dp are those of buckets, which are
filled, so their count may be slightly too large.

Ranks: with more data parallel ranks only the replica groups change, and under ZeRO-1 the size of the
optimizer's state, which is corrected. Partial gradients (of norms, of replicated heads and factors) then also
send less over tp, which is not corrected.

Micro-batches: a second accumulation step runs the graphs of the first one, and the graphs of pipeline ticks
do not depend on the number of ticks. At most two accumulation steps, or TRACED_TICKS pipeline micro-batches,
are traced.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from model.layer_kinds import LayerKinds
from parallel.pipeline import Pipeline
from tools.graphs.memory import state_of
from tools.graphs.models import rank_model
from tools.graphs.report import rank_0_mesh
from tools.plan.step_report import COUNTS

DEPTHS = (2, 4)
TRACED_RANKS = 64  # more ranks take time and memory, and change nothing
TRACED_TICKS = 3
ROOT = Path(__file__).resolve().parent.parent.parent
# Runs bench_compile on the command lines in stdin, and prints a line for each.
# From ROOT, not from the folder where the user stands, in which a file may be called tools.py.
_PROGRAM = f"""
import json, sys
sys.path[0] = {str(ROOT)!r}
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
    """The report of each Config's step, in their order; raises ValueError where a trace fails.

    The Configs must have a world_size. A process can have only one world, so each world that is traced gets a
    process.
    """
    worlds: dict[int, list[int]] = {}
    for number, config in enumerate(configs):
        worlds.setdefault(_config_to_trace(config).world_size, []).append(number)
    found = {}
    for world_size, numbers in worlds.items():
        group = [configs[number] for number in numbers]
        found |= zip(numbers, _reports_of_a_world(world_size, group, model_config), strict=True)
    return [found[number] for number in range(len(configs))]


def _reports_of_a_world(world_size: int, configs: list, model_config) -> list[dict]:
    """The report of each Config's step, where all of them are traced with `world_size` ranks."""
    traced = [_config_to_trace(config) for config in configs]
    with tempfile.TemporaryDirectory() as directory:
        cases, files = [], []
        for number, config in enumerate(traced):
            files.append([])
            for depth in _depths(model_config, config):
                model = Path(directory) / f"{number}-{depth}"
                model.mkdir()
                settings = _shallow(model_config, config, depth).settings()
                (model / "config.json").write_text(json.dumps(settings), encoding="utf-8")
                file = Path(directory) / f"{number}-{depth}.json"
                cases.append(["--model", str(model), "--json", str(file), *_flags(config)])
                files[-1].append(file)
        _trace(cases, world_size)
        shallow = [[json.loads(file.read_text()) for file in each] for each in files]
    return [
        _add_ranks(_add_layers(reports_of_depths, config, model_config), small, config, model_config)
        for reports_of_depths, small, config in zip(shallow, traced, configs, strict=True)
    ]


def _config_to_trace(config):
    """The same step with at most TRACED_RANKS ranks and few micro-batches."""
    ranks_of_a_replica = config.tensor_parallel_size * config.pipeline_parallel_size
    dp = min(config.world_size // ranks_of_a_replica, max(2, TRACED_RANKS // ranks_of_a_replica))
    traced = replace(config, world_size=ranks_of_a_replica * dp)
    if not config.graph_per_micro_batch:
        return traced
    if config.ticks == 1:
        return replace(traced, gradient_accumulation_steps=2)
    count = min(config.pipeline_microbatches, TRACED_TICKS)
    rows = config.per_device_train_batch_size // config.pipeline_microbatches * count
    return replace(
        traced, gradient_accumulation_steps=1, num_microbatches=count, per_device_train_batch_size=rows
    )


def _depths(model_config, config) -> tuple[int, ...]:
    """The numbers of layers of a stage that are traced.

    The second has as many layers more as the further ones repeat: where layers differ, a period of their
    kinds, or all of them.
    """
    kinds = LayerKinds(model_config, Pipeline(rank_0_mesh(config).pp)).layers
    if len(kinds) <= DEPTHS[-1]:
        return (len(kinds),)
    period = DEPTHS[1] - DEPTHS[0]
    while any(one != other for one, other in zip(kinds, kinds[period:], strict=False)):
        period += 1
    first = DEPTHS[0] + (len(kinds) - DEPTHS[0]) % period
    return (first, first + period) if first + period < len(kinds) else (len(kinds),)


def _shallow(model_config, config, depth: int):
    """The ModelConfig whose stages have the first `depth` layers of the model's stages."""
    stages = Pipeline(rank_0_mesh(config).pp).layer_ids_of_stages(model_config.num_hidden_layers)
    last = model_config.num_hidden_layers - 1
    ids = [min(layer_id, last) for stage in stages for layer_id in stage[:depth]]
    of_layers = {
        name: tuple(values[layer_id] for layer_id in ids)
        for name in ("windows", "rotary_layers")
        if (values := getattr(model_config, name))
    }
    return replace(model_config, num_hidden_layers=len(ids), **of_layers)


def _flags(config) -> list[str]:
    """The values that differ from the defaults, as a command line; the environment may change that of
    --bf16."""
    found = ["--bf16", str(config.bf16)]
    for name, value in vars(config).items():
        if name != "bf16" and value is not None and value != getattr(type(config), name):
            found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def _trace(cases: list[list[str]], world_size: int) -> None:
    """Run bench_compile on each command line, in one process; raises ValueError where one fails."""
    with tempfile.TemporaryFile("w+") as stderr:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=json.dumps(cases),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        stderr.seek(0)
        errors = [line for line in stderr.read().splitlines() if line.strip()]
    if done.returncode:
        flags = " ".join(cases[min(done.stdout.count("traced"), len(cases) - 1)][4:])
        raise ValueError(
            f"tracing {world_size} ranks with {flags} failed: {' '.join(errors[-1:]).removeprefix('error: ')}"
        )


def _add_layers(shallow: list[dict], config, model_config) -> dict:
    """The report with all layers, on the line through the reports of _depths layers.

    Where the model has so few layers that all were traced, it is the one report that there is.
    """
    if len(shallow) == 1:
        return shallow[0]
    layers = -(-model_config.num_hidden_layers // config.pipeline_parallel_size)
    first, second = _depths(model_config, config)
    times = (layers - first) / (second - first)

    def on_the_line(one, two):
        if isinstance(two, dict):
            empty = {"count": 0, "bytes": 0}  # of a collective that the shallower model does not have
            return {key: on_the_line(one.get(key, empty), two[key]) for key in two}
        return round(one + times * (two - one))

    graphs = {}
    for name, graph in shallow[0]["graphs"].items():
        counted = ("dot_flops", "collectives", "input_bytes", "output_bytes", "peak_bytes", *COUNTS)
        one, two = ({key: each[key] for key in counted} for each in (graph, shallow[1]["graphs"][name]))
        graphs[name] = {"runs_per_step": graph["runs_per_step"], **on_the_line(one, two)}
    return {"graphs": graphs}


def _add_ranks(report: dict, traced, config, model_config) -> dict:
    """The report of the Config that was traced, with all ranks and micro-batches of `config`."""
    mesh = rank_0_mesh(config)
    whole, small = (
        state_of(rank_model(config, model_config, each), config, each) for each in (mesh, rank_0_mesh(traced))
    )
    surplus = small.master_weights + small.moments - whole.master_weights - whole.moments
    graphs = {name: dict(graph) for name, graph in report["graphs"].items()}
    for name, graph in graphs.items():
        graph["runs_per_step"] = config.graphs[name]
        if name in ("update", "step"):  # the graph that reads and writes the optimizer's state
            graph["input_bytes"] -= surplus
            graph["output_bytes"] -= surplus
            graph["overwritten_bytes"] -= surplus
    return {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "data_parallel_size": mesh.dp.size(),
        "ticks": config.ticks,
        "graphs": graphs,
        "state_bytes": vars(whole),
    }
