"""How long a step takes on a machine: arithmetic on the report of tools/bench_compile. A model, not a
measurement.

The formula is FORMULA; F, B and the messages are of one graph and one core:

- F: the FLOPs of its products.
- B: each input read once, each output written once, and what else lives at the peak written and read once. A
  compiler that keeps more on the chip moves less; one that reads a weight twice, more.
- wire: of a message of b bytes among n ranks a core sends b (n - 1) / n, of an all-reduce twice that (a
  ring's, which no algorithm undercuts), and from one pipeline stage to the next b. Where a group has ranks on
  several nodes, all groups that have ranks on a node share its network.
- runs: the graphs of pipeline ticks run M + P - 1 times a micro-batch of accumulation, so (P - 1) / (M + P -
  1) of their time is the bubble; the stages wait for each other in every tick, and no tick's message is
  hidden behind another's products.

The fast end of a range takes the better of each assumed share (tools/plan/instances.py), the slow end the
worse; no message is hidden behind products at either. Left out: the host, which traces the next step
meanwhile, and whatever waits for it; loading of data; saving; and the rest of the graph, which is taken to
run beside the products (the assumed share of the products makes up for it).
"""

from dataclasses import dataclass

from tools.graphs.report import held_bytes, most_bytes
from tools.plan.instances import FAST, IDEAL, SLOW, Assumed, Machine

FORMULA = """\
step    = sum over graphs of runs x (busy + network); of M micro-batches through P stages, both ticks run M + P - 1 times
busy    = max(F / (peak FLOP/s x products), B / (memory bandwidth x memory))
network = sum over messages of wire / (link bandwidth x link) + link latency; over several nodes of
          max(wire / (link bandwidth x link), groups x wire / (network bandwidth x network)) + network latency"""
WIRE = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
}  # x (n - 1) / n; of a permute, b
PARTS = ("compute", "memory", "network")


@dataclass(frozen=True)
class Estimate:
    """Of a step. Pairs are (at the fast end, at the slow end).

    `parts`: seconds in which each of PARTS is what a core waits for; they add up to `seconds`. `held_bytes`:
    what stays in a core's memory between graphs. `most_bytes`: with the most that bench_compile says can live
    besides. `roofline_seconds`: with shares of 1, no latency, and messages hidden where that can be. `flops`:
    of the ticks that are not idle; `bubble`: the share of the others.
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
    bubble: float = 0.0

    @property
    def seconds(self) -> tuple[float, float]:
        return tuple(sum(self.parts[part][end] for part in PARTS) for end in (0, 1))

    @property
    def fits(self) -> str:
        """`yes`: even the upper bound does. `perhaps`: what is held does, and it is for the compiler to show
        the rest."""
        if self.most_bytes <= self.memory_bytes:
            return "yes"
        return "perhaps" if self.held_bytes < self.memory_bytes else "no"

    @property
    def binds(self) -> str:
        """The part that takes most, in the middle of the range."""
        return max(PARTS, key=lambda part: sum(self.parts[part]))

    @property
    def tokens_per_second_per_node(self) -> tuple[float, float]:
        return tuple(self.tokens / self.nodes / seconds for seconds in self.seconds)

    @property
    def rows_per_second(self) -> tuple[float, float]:
        return tuple(self.rows / seconds for seconds in self.seconds)

    @property
    def peak_share(self) -> tuple[float, float]:
        """The share of the peak that the products take, recomputation included (hardware FLOPs utilisation)."""
        return tuple(self.flops / seconds / self.peak_flops for seconds in self.seconds)

    def cost(self, price: float) -> tuple[float, float]:
        """USD for a million tokens, padding included, where a node costs `price` an hour."""
        return tuple(1e6 * price / 3600 / rate for rate in self.tokens_per_second_per_node)


def estimate(report: dict, machine: Machine, rows: int, length: int, bf16: bool) -> Estimate:
    """Of a report whose world fills its nodes, and whose step has `rows` rows of `length` tokens over all
    ranks."""
    stages, ticks = report["pipeline_parallel_size"], report["ticks"]
    world = report["tensor_parallel_size"] * report["data_parallel_size"] * stages
    if world % machine.cores:
        raise ValueError(f"the report is of {world} ranks, which do not fill nodes of {machine.cores} cores")
    peak = machine.bf16_flops if bf16 else machine.fp32_flops
    fast, slow = (_parts(report, machine, peak, assumed) for assumed in (FAST, SLOW))
    ideal = 0.0
    for graph in report["graphs"].values():
        ideal += graph["runs_per_step"] * max(_graph(graph, report, machine, peak, IDEAL))
    held, most = held_bytes(report), most_bytes(report)
    bubble = (stages - 1) / ticks
    flops = (1 - bubble) * sum(
        graph["runs_per_step"] * graph["dot_flops"] for graph in report["graphs"].values()
    )
    return Estimate(
        rows,
        rows * length,
        world // machine.cores,
        held,
        most,
        machine.memory_bytes,
        {part: (fast[part], slow[part]) for part in PARTS},
        ideal,
        peak,
        flops,
        bubble,
    )


def _parts(report: dict, machine: Machine, peak: float, assumed: Assumed) -> dict[str, float]:
    total = dict.fromkeys(PARTS, 0.0)
    for graph in report["graphs"].values():
        compute, memory, network = _graph(graph, report, machine, peak, assumed)
        total["compute" if compute >= memory else "memory"] += graph["runs_per_step"] * max(compute, memory)
        total["network"] += graph["runs_per_step"] * network
    return total


def _graph(
    graph: dict, report: dict, machine: Machine, peak: float, assumed: Assumed
) -> tuple[float, float, float]:
    """Seconds of (products, memory, messages) of one run, each by itself."""
    moved = (
        graph["input_bytes"] + graph["output_bytes"] + 2 * max(0, graph["peak_bytes"] - graph["output_bytes"])
    )
    return (
        graph["dot_flops"] / (peak * assumed.products),
        moved / (machine.memory_bandwidth * assumed.memory),
        sum(_messages(what, each, report, machine, assumed) for what, each in graph["collectives"].items()),
    )


def _messages(what: str, each: dict[str, int], report: dict, machine: Machine, assumed: Assumed) -> float:
    """Seconds of the messages of one kind ("all-reduce over dp")."""
    opcode, group = what.split(" over ")
    tp, dp, cores = report["tensor_parallel_size"], report["data_parallel_size"], machine.cores
    pp = report["pipeline_parallel_size"]
    # Ranks of a group, and how many of them are on one node: tensor parallel ranks are neighbours, then come
    # the data parallel ones of a stage. Replicas of a slice are some of the tensor parallel ranks; the report
    # does not say how many.
    beside, stages = min(tp, cores), max(1, cores // (tp * dp))
    size, inside = {
        "tp": (tp, beside),
        "replicas": (tp, beside),
        "dp": (dp, min(dp, max(1, cores // tp))),
        "pp": (pp, stages),
        "tp x pp": (tp * pp, beside * stages),
        "world": (tp * dp * pp, cores),
    }[group]
    wire = each["bytes"] * (1 if opcode == "collective-permute" else WIRE[opcode] * (size - 1) / size)
    seconds = wire / (machine.link_bandwidth * assumed.link)
    if size <= inside:
        return seconds + each["count"] * assumed.link_latency * (size > 1)
    outside = cores // inside * wire / (machine.network_bandwidth * assumed.network)
    return max(seconds, outside) + each["count"] * assumed.network_latency
