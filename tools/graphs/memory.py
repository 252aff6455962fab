"""What the memory of a core holds during a step, computed from shapes and from the report of its graphs."""

from dataclasses import dataclass

from parallel.mesh import Mesh

# What lives at a peak, by kind. KEPT: made in the forward and read in the backward. WORK: all else, batches
# included.
WEIGHTS, OPTIMIZER, GRADIENTS, KEPT, WORK = KINDS = (
    "weights",
    "optimizer",
    "gradients",
    "kept activations",
    "work",
)
# most_bytes was 0.82 to 1.03 of what XLA:CPU allocates (docs/benchmarks/memory.md).
MARGIN = 1.23


@dataclass(frozen=True)
class State:
    """Bytes of one rank, by kind.

    `gradients` are long fp32 buckets, before they are reduced. `master_weights` are fp32, or bf16 under
    --stochastic_rounding. `moments` are AdamW's two.
    """

    parameters: int
    gradients: int
    master_weights: int
    moments: int


def state_of(model, config, mesh: Mesh) -> State:
    """The state of the rank that has this part of the model, which may be on the meta device."""
    from parallel.buckets import Buckets
    from parallel.shard import named_shards

    parameters = list(named_shards(model))
    buckets = Buckets([each for each in parameters if each[1].requires_grad], mesh, config.zero_1)
    part = sum(columns for _, columns in buckets.shapes)  # elements that this rank updates
    return State(
        parameters=sum(parameter.numel() * parameter.element_size() for _, parameter, _ in parameters),
        gradients=4 * part * buckets.parts,
        master_weights=(2 if config.stochastic_rounding else 4) * part,
        moments=8 * part,
    )


def held_bytes(report: dict) -> int:
    """The bytes that a core holds all the time.

    Gradients are among them where they add up over several graphs: they live between these.
    """
    state = report["state_bytes"]
    return sum(size for name, size in state.items() if name != "gradients" or len(report["graphs"]) > 1)


def kept_bytes(report: dict) -> int:
    """The bytes that all forward ticks of a batch keep for the backward ticks; 0 without pipeline stages."""
    if "forward" not in report["graphs"]:
        return 0
    return report["ticks"] * report["graphs"]["forward"]["output_bytes"]


def bytes_at_peak(report: dict, name: str, alive: dict[str, int]) -> dict[str, int]:
    """{kind: bytes} at the peak of the graph `name`: its `alive` beside the state, and what is held and kept
    all the time."""
    state, kept, several = report["state_bytes"], kept_bytes(report), len(report["graphs"]) > 1
    held = {
        WEIGHTS: state["parameters"],
        OPTIMIZER: state["master_weights"] + state["moments"],
        GRADIENTS: state["gradients"] if several else 0,
        # What one tick keeps is alive in its graph.
        KEPT: kept - kept // report["ticks"] if name in ("forward", "backward") else 0,
    }
    return {kind: held.get(kind, 0) + alive.get(kind, 0) for kind in KINDS}


def most_bytes(report: dict) -> int:
    """The most bytes that live at once: what is held, what forward ticks keep, and the graph that needs most.

    A forward tick's outputs live until its backward tick. When the last forward tick has run, those of all
    ticks of the batch live.
    """
    held, kept = held_bytes(report), kept_bytes(report)
    kept_by_a_tick = kept // report["ticks"] if kept else 0
    # The outputs of the last forward tick are in its peak_bytes already.
    kept_besides = {"forward": kept - kept_by_a_tick, "backward": kept}
    most = []
    for name, graph in report["graphs"].items():
        inputs = graph["input_bytes"] - (kept_by_a_tick if name == "backward" else 0)
        most.append(max(held, inputs) + kept_besides.get(name, 0) + graph["peak_bytes"])
    return max(most)
