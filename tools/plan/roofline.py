"""How long a step takes on an instance, by arithmetic on the report of bench_compile.

This is a model, not a measurement. The terms of FORMULA are those of one graph on one core:

- F: the FLOPs of its matrix products.
- B: each input read once, each output written once, and everything else that lives at the peak written and
  read once. A compiler that keeps more on the chip moves less; one that reads a weight twice moves more.
- wire: for a message of b bytes among n ranks a core sends b (n - 1) / n; for an all-reduce twice that (as a
  ring does, and no algorithm sends less); from one pipeline stage to the next b. Where a group has ranks on
  several nodes, all groups with ranks on a node share its network.
- runs: the graphs of pipeline ticks run M + P - 1 times in an accumulation step. (P - 1) / (M + P - 1) of
  their time is the bubble. The stages wait for each other in every tick.

The fast end of the range has the better of each assumed share (tools/plan/instances.py), the slow end the
worse. At both ends messages and products take turns. The host traces, or replays, the next step while the
device runs this one, so a step takes as long as the slower of both. Not counted are loading of data and
saving. The other operations of the graph are taken to run at the same time as the products; the assumed share
of the products makes up for it.
"""

from dataclasses import dataclass

from tools.graphs.memory import MARGIN, held_bytes, most_bytes
from tools.graphs.report import step_flops
from tools.plan.instances import FAST, IDEAL, SLOW, Assumptions, Instance

FORMULA = (
    "step    = max(device, host)\n"
    "device  = sum over graphs of runs x (busy + network); "
    "of M micro-batches through P stages, both ticks run M + P - 1 times\n"
    "busy    = max(F / (peak FLOP/s x products), B / (memory bandwidth x memory))\n"
    "network = sum over messages of wire / (link bandwidth x link) + link latency; over several nodes of\n"
    "          max(wire / (link bandwidth x link), groups x wire / (network bandwidth x network)) "
    "+ network latency\n"
    "host    = sum over graphs of runs x (replay graph + (inputs + outputs) x replay tensor);\n"
    "          with --replay false, of runs x operations x trace operation"
)
# What a core sends, in units of b (n - 1) / n. A collective-permute sends b.
WIRE = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
PARTS = ("compute", "memory", "network")
HOST = "host"


@dataclass(frozen=True)
class Estimate:
    """What a step takes. Pairs are (at the fast end, at the slow end) of the range.

    `parts`: for each of PARTS, the seconds in which a core waits for it. `operations`: those that the host
    traces in a step, in `host_trace_seconds`; without a trace it needs `host_replay_seconds`. `replays`:
    whether the step is replayed.
    `held_bytes`: what stays in a core's memory between graphs. `most_bytes`: the most that may live at once,
    by bench_compile. `roofline_seconds`: the time with shares of 1, no latency, and messages at the same time
    as products. `peak_flops`: FLOP/s of a core. `flops`: those of the ticks that are not idle; `bubble`: the
    share of the ticks that are.
    """

    rows: int
    tokens: int
    nodes: int
    held_bytes: int
    most_bytes: int
    memory_bytes: int
    parts: dict[str, tuple[float, float]]
    roofline_seconds: float
    peak_flops: float
    flops: float
    operations: int
    host_trace_seconds: tuple[float, float]
    host_replay_seconds: tuple[float, float]
    replays: bool
    bubble: float = 0.0

    @property
    def device_seconds(self) -> tuple[float, float]:
        """The seconds in which the device is busy in a step: the sum of its parts."""
        return tuple(sum(self.parts[part][end] for part in PARTS) for end in (0, 1))

    @property
    def host_seconds(self) -> tuple[float, float]:
        """The seconds in which the host is busy in a step."""
        return self.host_replay_seconds if self.replays else self.host_trace_seconds

    @property
    def seconds(self) -> tuple[float, float]:
        """The seconds of a step."""
        return tuple(map(max, self.device_seconds, self.host_seconds))

    @property
    def fits(self) -> str:
        """`yes`: most_bytes fit, with a MARGIN. `perhaps`: held_bytes fit, and the rest depends on the
        compiler. `no`."""
        if MARGIN * self.most_bytes <= self.memory_bytes:
            return "yes"
        return "perhaps" if self.held_bytes < self.memory_bytes else "no"

    @property
    def binds(self) -> str:
        """HOST, or the part of the device's time that takes most, in the middle of the range."""
        if sum(self.host_seconds) > sum(self.device_seconds):
            return HOST
        return max(PARTS, key=lambda part: sum(self.parts[part]))

    @property
    def tokens_per_second_per_node(self) -> tuple[float, float]:
        """Tokens a second and node, padding included."""
        return tuple(self.tokens / self.nodes / seconds for seconds in self.seconds)

    @property
    def rows_per_second(self) -> tuple[float, float]:
        """Rows a second of all ranks."""
        return tuple(self.rows / seconds for seconds in self.seconds)

    @property
    def peak_share(self) -> tuple[float, float]:
        """Hardware FLOPs utilisation: the share of the peak that products get, recomputation included."""
        return tuple(self.flops / seconds / self.peak_flops for seconds in self.seconds)

    def cost(self, price: float) -> tuple[float, float]:
        """USD for a million tokens, padding included, where a node costs `price` an hour."""
        return tuple(1e6 * price / 3600 / rate for rate in self.tokens_per_second_per_node)


def estimate(report: dict, instance: Instance, rows: int, length: int, bf16: bool, replays: bool) -> Estimate:
    """The estimate of a step with `rows` rows of `length` tokens over all ranks, from its report.

    `replays`: whether its graphs are replayed, which takes the host less time than to trace them. Raises
    ValueError where the ranks do not fill nodes.
    """
    stages = report["pipeline_parallel_size"]
    world = report["tensor_parallel_size"] * report["data_parallel_size"] * stages
    if world % instance.cores:
        raise ValueError(f"the report is of {world} ranks, which do not fill nodes of {instance.cores} cores")
    peak = instance.bf16_flops if bf16 else instance.fp32_flops
    fast, slow = (_part_seconds(report, instance, peak, assumed) for assumed in (FAST, SLOW))
    roofline = 0.0
    for graph in report["graphs"].values():
        roofline += graph["runs_per_step"] * max(_graph_seconds(graph, report, instance, peak, IDEAL))
    bubble = (stages - 1) / report["ticks"]
    traced, replayed = zip(*(_host_seconds(report, assumed) for assumed in (FAST, SLOW)), strict=True)
    return Estimate(
        rows=rows,
        tokens=rows * length,
        nodes=world // instance.cores,
        held_bytes=held_bytes(report),
        most_bytes=most_bytes(report),
        memory_bytes=instance.memory_bytes,
        parts={part: (fast[part], slow[part]) for part in PARTS},
        roofline_seconds=roofline,
        peak_flops=peak,
        flops=(1 - bubble) * step_flops(report),
        operations=sum(each["runs_per_step"] * each["instructions"] for each in report["graphs"].values()),
        host_trace_seconds=traced,
        host_replay_seconds=replayed,
        replays=replays,
        bubble=bubble,
    )


def _part_seconds(report: dict, instance: Instance, peak: float, assumed: Assumptions) -> dict[str, float]:
    """The seconds of a step in which a core waits for each of PARTS."""
    total = dict.fromkeys(PARTS, 0.0)
    for graph in report["graphs"].values():
        compute, memory, network = _graph_seconds(graph, report, instance, peak, assumed)
        total["compute" if compute >= memory else "memory"] += graph["runs_per_step"] * max(compute, memory)
        total["network"] += graph["runs_per_step"] * network
    return total


def _host_seconds(report: dict, assumed: Assumptions) -> tuple[float, float]:
    """The seconds in which the host (traces, replays) the graphs of a step."""
    trace = replay = 0.0
    for graph in report["graphs"].values():
        runs, tensors = graph["runs_per_step"], graph["inputs"] + graph["outputs"]
        trace += runs * graph["instructions"] * assumed.trace_operation
        replay += runs * (assumed.replay_graph + tensors * assumed.replay_tensor)
    return trace, replay


def _graph_seconds(
    graph: dict, report: dict, instance: Instance, peak: float, assumed: Assumptions
) -> tuple[float, float, float]:
    """(seconds of products, of memory, of messages) of one run of a graph, if each had the core to itself."""
    temporary = max(0, graph["peak_bytes"] - graph["output_bytes"] + graph["overwritten_bytes"])
    moved = graph["input_bytes"] + graph["output_bytes"] + 2 * temporary
    return (
        graph["dot_flops"] / (peak * assumed.products),
        moved / (instance.memory_bandwidth * assumed.memory),
        sum(
            _message_seconds(kind, each, report, instance, assumed)
            for kind, each in graph["collectives"].items()
        ),
    )


def _message_seconds(
    kind: str, messages: dict[str, int], report: dict, instance: Instance, assumed: Assumptions
) -> float:
    """The seconds of all messages of one kind, such as "all-reduce over dp", in one run of a graph."""
    opcode, group = kind.split(" over ")
    size, on_a_node = _group_sizes(report, instance.cores)[group]
    share = 1 if opcode == "collective-permute" else WIRE[opcode] * (size - 1) / size
    wire = messages["bytes"] * share
    inside = wire / (instance.link_bandwidth * assumed.link)
    if size <= on_a_node:
        return inside + messages["count"] * assumed.link_latency * (size > 1)
    groups = instance.cores // on_a_node
    outside = groups * wire / (instance.network_bandwidth * assumed.network)
    return max(inside, outside) + messages["count"] * assumed.network_latency


def _group_sizes(report: dict, cores: int) -> dict[str, tuple[int, int]]:
    """{group: (its ranks, how many of them are on one node of `cores` cores)}.

    Tensor parallel ranks are neighbours; then come the data parallel ones, then the stages. Replicas of a
    slice are some of the tensor parallel ranks; the report does not say how many.
    """
    tp, dp, pp = (report[f"{kind}_parallel_size"] for kind in ("tensor", "data", "pipeline"))
    tp_on_a_node, stages_on_a_node = min(tp, cores), max(1, cores // (tp * dp))
    return {
        "tp": (tp, tp_on_a_node),
        "replicas": (tp, tp_on_a_node),
        "dp": (dp, min(dp, max(1, cores // tp))),
        "pp": (pp, stages_on_a_node),
        "tp x pp": (tp * pp, tp_on_a_node * stages_on_a_node),
        "world": (tp * dp * pp, cores),
    }
