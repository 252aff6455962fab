"""What a step costs a core, read from its traced graphs."""

from collections import Counter

from parallel.graph.hlo import Graph
from parallel.mesh import Mesh
from tools.graphs.alive import Alive, name_alive
from tools.graphs.memory import bytes_at_peak, kept_bytes, most_bytes, state_of
from tools.graphs.models import rank_model
from tools.graphs.peak import Peak, find_peak

LARGEST = 10


def rank_0_mesh(config) -> Mesh:
    """The mesh at rank 0 of a world of --world_size ranks; ValueError where that cannot be divided."""
    return Mesh.create(0, config.world_size or 1, config.tensor_parallel_size, config.pipeline_parallel_size)


def report_step(config, model_config, keep_proto: bool, compiles: bool) -> tuple[dict, list[bytes | None]]:
    """(the report of a training step, each of its graphs as an HloModuleProto or None without `keep_proto`).

    Bytes and FLOPs are those of one core. Raises RuntimeError where the step has other graphs than
    Config.graphs says.
    """
    from tools.graphs.tracing import trace
    from trainer.reporting.flops import micro_batch_flops

    mesh = rank_0_mesh(config)
    model = rank_model(config, model_config, mesh)
    found, places = trace(config, model_config, mesh.world_size, keep_proto, compiles)
    if len(found) != len(config.graphs):
        raise RuntimeError(
            f"two steps have {len(found)} graphs, and {len(config.graphs)} were expected: something in the "
            "step of trainer/loop.py that changes is a constant of its graph"
        )
    report = _topology(config, model_config, mesh)
    graphs = [Graph(traced.text) for traced in found]
    peaks = [find_peak(graph, traced.overwritten) for graph, traced in zip(graphs, found, strict=True)]
    alive = name_alive(peaks, graphs, found, places)
    report["graphs"] = {
        name: {"runs_per_step": runs, **_graph_report(*each, mesh)}
        for (name, runs), *each in zip(config.graphs.items(), graphs, found, peaks, strict=True)
    }
    report |= {
        "step_flops": step_flops(report),
        "formula_flops": config.gradient_accumulation_steps * micro_batch_flops(model, config),
        "state_bytes": vars(state_of(model, config, mesh)),
    }
    report |= {"kept_bytes": kept_bytes(report), "most_bytes": most_bytes(report)}
    for (name, graph), tensors in zip(report["graphs"].items(), alive, strict=True):
        graph["at_peak"] = _at_peak(report, name, tensors)
    return report, [traced.proto for traced in found]


def step_flops(report: dict) -> int:
    """FLOPs of the matrix products of a step, summed over its graphs."""
    return sum(graph["runs_per_step"] * graph["dot_flops"] for graph in report["graphs"].values())


def _topology(config, model_config, mesh: Mesh) -> dict:
    from parallel.pipeline import Pipeline

    stages = Pipeline(mesh.pp).layer_ids_of_stages(model_config.num_hidden_layers)
    return {
        "tensor_parallel_size": mesh.tp.size(),
        "pipeline_parallel_size": mesh.pp.size(),
        "data_parallel_size": mesh.dp.size(),
        "stage_layers": [
            sum(number < model_config.num_hidden_layers for number in layers) for layers in stages
        ],
        "slots": len(stages[0]),
        "num_microbatches": config.pipeline_microbatches,
        "ticks": config.ticks,
    }


def _at_peak(report: dict, name: str, alive: list[Alive]) -> dict:
    """Bytes by kind, and the LARGEST of what lives beside the state."""
    sizes = Counter()
    for each in alive:
        sizes[each.kind] += each.bytes
    return {
        "bytes": bytes_at_peak(report, name, sizes),
        "largest": [each._asdict() for each in alive[:LARGEST]],
    }


def _graph_report(graph: Graph, traced, peak: Peak, mesh: Mesh) -> dict:
    results = graph.root.shapes
    return {
        "trace_seconds": traced.trace_seconds,
        "lowering_seconds": traced.lowering_seconds,
        "compile_seconds": traced.compile_seconds,
        "instructions": len(graph.instructions),
        "operations": dict(graph.operations.most_common()),
        "dot_flops": graph.dot_flops,
        "collectives": _collectives(graph, mesh),
        "inputs": graph.operations["parameter"],
        "outputs": len(results),
        "input_bytes": graph.input_bytes,
        "output_bytes": graph.output_bytes,
        "overwritten_bytes": sum(results[number].bytes for number in traced.overwritten),
        "peak_bytes": peak.bytes,
    }


def _collectives(graph: Graph, mesh: Mesh) -> dict[str, dict[str, int]]:
    """{"all-reduce over dp": {"count": ..., "bytes": ...}, ...}, sorted by name.

    A collective over none of the mesh's groups is one over the replicas of a slice.
    """
    groups = {"world": mesh.world, "tp x pp": mesh.model, "pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp}
    # Where two groups have the same ranks, the later name counts.
    names = {repr(group.replica_groups): name for name, group in groups.items()}
    count, size = Counter(), Counter()
    for each in graph.collectives:
        if each.opcode == "collective-permute":
            over = "pp"
        else:
            over = names.get(repr(each.replica_groups), "replicas")
        kind = f"{each.opcode} over {over}"
        count[kind] += 1
        size[kind] += each.bytes
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in sorted(count)}
