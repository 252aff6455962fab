"""What a step costs a core, from its graphs."""

from collections import Counter
from dataclasses import dataclass

from parallel.graph.hlo import Graph
from parallel.mesh import Mesh
from trainer.build import build


@dataclass(frozen=True)
class State:
    """Bytes of one rank: parameters; gradients as long fp32 buckets, before they are reduced; fp32 master weights (bf16 under
    --stochastic_rounding) and AdamW's two moments."""

    parameters: int
    gradients: int
    master_weights: int
    moments: int


def state_of(model, config, mesh: Mesh) -> State:
    """From the shapes of the parameters."""
    from parallel.buckets import Buckets
    from parallel.shard import named_shards

    parameters = list(named_shards(model))
    buckets = Buckets([each for each in parameters if each[1].requires_grad], mesh, config.zero_1)
    part = sum(columns for _, columns in buckets.shapes)
    return State(
        sum(parameter.numel() * parameter.element_size() for _, parameter, _ in parameters),
        4 * part * buckets.parts,
        (2 if config.stochastic_rounding else 4) * part,
        8 * part,
    )


def collectives_of(graph: Graph, mesh: Mesh) -> dict[str, dict[str, int]]:
    """{"all-reduce over dp": {"count", "bytes"}, ...}; what is over none of the mesh's groups is over replicas of a slice."""
    kinds = (
        ("world", mesh.world),
        ("tp x pp", mesh.model),
        ("pp", mesh.pp),
        ("dp", mesh.dp),
        ("tp", mesh.tp),
    )
    names = {repr(group.replica_groups): name for name, group in kinds}
    count, size = Counter(), Counter()
    for each in graph.collectives:
        over = (
            "pp" if each.opcode == "collective-permute" else names.get(repr(each.replica_groups), "replicas")
        )
        what = f"{each.opcode} over {over}"
        count[what] += 1
        size[what] += each.bytes
    return {what: {"count": count[what], "bytes": size[what]} for what in sorted(count)}


def measure(
    config, model_config, mesh: Mesh, keep_proto: bool, compiles: bool
) -> tuple[dict, list[bytes | None]]:
    """(the report, the graphs as HloModuleProtos where they are kept)."""
    from parallel.pipeline import Pipeline
    from tools.graphs.flops import micro_batch_flops
    from tools.graphs.report import kept_bytes, most_bytes
    from tools.graphs.tracing import trace

    model = build(config, model_config, mesh)
    micro = config.gradient_accumulation_steps
    often = {"step": 1}
    if config.graph_per_micro_batch:
        passes = (
            {"forward": config.ticks, "backward": config.ticks} if config.ticks > 1 else {"micro_batch": 1}
        )
        often = {name: micro * count for name, count in passes.items()} | {"update": 1}
    found = trace(config, model_config, mesh.world_size, keep_proto, compiles)
    if len(found) != len(often):
        raise RuntimeError(
            f"two steps have {len(found)} graphs, and {len(often)} were expected: something in the step of "
            "trainer/loop.py that changes is a constant of its graph"
        )
    graphs, counted = {}, 0
    for (name, runs), traced in zip(often.items(), found, strict=True):
        graph = Graph(traced.text)
        counted += runs * graph.dot_flops
        graphs[name] = {
            "runs_per_step": runs,
            "trace_seconds": traced.trace_seconds,
            "lowering_seconds": traced.lowering_seconds,
            "compile_seconds": traced.compile_seconds,
            "instructions": len(graph.instructions),
            "operations": dict(graph.operations.most_common()),
            "dot_flops": graph.dot_flops,
            "collectives": collectives_of(graph, mesh),
            "input_bytes": graph.input_bytes,
            "output_bytes": graph.output_bytes,
            "peak_bytes": graph.peak_bytes(),
        }
    stages = Pipeline(mesh.pp).dealt(model_config.num_hidden_layers)
    held = [sum(number < model_config.num_hidden_layers for number in slots) for slots in stages]
    report = {
        "tensor_parallel_size": mesh.tp.size(),
        "pipeline_parallel_size": mesh.pp.size(),
        "data_parallel_size": mesh.dp.size(),
        "stage_layers": held,
        "slots": len(stages[0]),
        "num_microbatches": config.pipeline_microbatches,
        "ticks": config.ticks,
        "graphs": graphs,
        "step_flops": counted,
        "formula_flops": micro * micro_batch_flops(model, config),
        "state_bytes": vars(state_of(model, config, mesh)),
    }
    report |= {"kept_bytes": kept_bytes(report), "most_bytes": most_bytes(report)}
    return report, [traced.proto for traced in found]


def held_bytes(report: dict) -> int:
    """What a core holds all the time. Gradients stay between graphs where several of them add to them."""
    state = report["state_bytes"]
    return sum(size for name, size in state.items() if name != "gradients" or len(report["graphs"]) > 1)


def most_bytes(report: dict) -> int:
    """The most that lives at once: what is held, what is kept of pipeline ticks, and the graph that needs most besides.

    All that a forward tick returns is kept until its backward tick. At the turning point that is there of all ticks of a batch.
    """
    held, graphs, kept = held_bytes(report), report["graphs"], kept_bytes(report)
    one = kept // report["ticks"] if kept else 0
    most = []
    for name, graph in graphs.items():
        given = graph["input_bytes"] - (one if name == "backward" else 0)
        others = {"forward": kept - one, "backward": kept}.get(
            name, 0
        )  # the last forward tick's own are among its results
        most.append(max(held, given) + others + graph["peak_bytes"])
    return max(most)


def kept_bytes(report: dict) -> int:
    """What all forward ticks of a batch keep for the backward ticks."""
    return (
        report["ticks"] * report["graphs"]["forward"]["output_bytes"] if "forward" in report["graphs"] else 0
    )
