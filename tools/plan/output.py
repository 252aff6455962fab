"""Estimates as text and as JSON."""

from tools.plan.instances import FAST, PRICE_SOURCE, SLOW
from tools.plan.roofline import FORMULA, PARTS, Estimate
from tools.plan.topology import topology_name

SHOWN = 20
_RECORDED_FLAGS = (
    "world_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "zero_1",
)
_RECORDED_PROPERTIES = (
    "fits",
    "seconds",
    "device_seconds",
    "binds",
    "peak_share",
    "tokens_per_second_per_node",
    "rows_per_second",
)


def preface() -> str:
    """What estimates are made of: the formula, and what is assumed."""
    lines = [
        "This is a model: nothing ran on a Trainium. The range is that of what is assumed "
        "(tools/plan/instances.py). "
        "The host's seconds are those of other processors than a Trainium's host has.",
        FORMULA,
    ]
    for name, assumed in (("fast", FAST), ("slow", SLOW)):
        shares = (f"{what.replace('_', ' ')} {value:g}" for what, value in vars(assumed).items())
        lines.append(f"{name}: {', '.join(shares)}")
    return "\n".join(lines)


def price_source(price: float | None) -> str:
    """Where the default price of an instance comes from."""
    return f"price: {PRICE_SOURCE if price else 'none is known here, say --price'}"


def describe(estimate: Estimate, price: float | None) -> str:
    """An estimate as text. `price`: USD an hour and node."""
    parts = ", ".join(f"{part} {_range(estimate.parts[part])}" for part in PARTS)
    fits = {"yes": "fits", "no": "does not fit", "perhaps": "may fit: the compiler will tell"}
    held, most, memory = (
        size / 1e9 for size in (estimate.held_bytes, estimate.most_bytes, estimate.memory_bytes)
    )
    lines = [
        f"memory of a core: {fits[estimate.fits]}. {held:.2f} GB are held, at most {most:.2f} GB live at "
        f"once, of {memory:.2f} GB",
        f"step: {_range(estimate.seconds)} s; {estimate.binds} binds",
        f"device: {_range(estimate.device_seconds)} s a step ({parts})",
        *_host_lines(estimate),
        f"roofline: {estimate.roofline_seconds:.3g} s; the step takes "
        f"{_range(one / estimate.roofline_seconds for one in estimate.seconds)} times that, and its products "
        f"{_range(100 * one for one in estimate.peak_share)} % of the peak",
        f"{_range(estimate.tokens_per_second_per_node)} tokens/s a node, "
        f"{_range(estimate.rows_per_second)} rows/s in all",
    ]
    if estimate.bubble:
        lines.append(
            f"of the ticks of a stage {estimate.bubble:.1%} are idle (the bubble), and are paid for above"
        )
    if price:
        lines.append(
            f"{_range(estimate.cost(price))} USD for a million tokens, at {price:.2f} USD an hour and node"
        )
    return "\n".join(lines)


def _host_lines(estimate: Estimate) -> list[str]:
    """What the host needs for a step, traced and replayed, and whether the device would wait for it."""
    traced, replayed = estimate.host_trace_seconds, estimate.host_replay_seconds
    each = (1e6 * seconds / estimate.operations for seconds in traced)
    taken = "so it is run" if estimate.replays else "--replay false traces every step"
    return [
        f"host, traced: {_range(traced)} s a step ({estimate.operations:,} operations of {_range(each)} us): "
        f"{_wait(estimate.device_seconds, traced)}",
        f"host, replayed: {_range(replayed)} s a step: {_wait(estimate.device_seconds, replayed)}; {taken}",
    ]


def _wait(device: tuple[float, float], host: tuple[float, float]) -> str:
    """Whether a step waits for its host, in words."""
    if max(host) <= min(device):
        return "the step does not wait for its host"
    return f"the step {'waits' if min(host) > max(device) else 'may wait'} for its host"


def table(pairs: list[tuple], price: float | None) -> str:
    """The first SHOWN of a sweep's (Config, Estimate), a line each."""
    lines = [
        f"{'fits':8}{'held GB':>8}{'most GB':>8}{'step s':>16}{'tokens/s a node':>18}{'USD/M tokens':>15}  "
        "binds    topology"
    ]
    for config, each in pairs[:SHOWN]:
        step = "{:.2f} - {:.2f}".format(*each.seconds)
        rate = "{1:,.0f} - {0:,.0f}".format(*each.tokens_per_second_per_node)
        cost = "{:.3f} - {:.3f}".format(*sorted(each.cost(price))) if price else ""
        lines.append(
            f"{each.fits:8}{each.held_bytes / 1e9:8.2f}{each.most_bytes / 1e9:8.2f}{step:>16}{rate:>18}"
            f"{cost:>15}  {each.binds:8} {topology_name(config)}"
        )
    left = len(pairs) - SHOWN
    return "\n".join(lines + ([f"... and {left} more, slower or too large"] if left > 0 else []))


def record(config, estimate: Estimate, price: float | None) -> dict:
    """A topology and its estimate, for --json."""
    return {
        **{flag: getattr(config, flag) for flag in _RECORDED_FLAGS},
        "gradient_checkpointing": config.checkpointing_mode,
        "num_microbatches": config.pipeline_microbatches,
        **vars(estimate),
        **{name: getattr(estimate, name) for name in _RECORDED_PROPERTIES},
        "usd_per_million_tokens": estimate.cost(price) if price else None,
    }


def _range(pair) -> str:
    """The two ends of a range, the smaller one first."""
    return " to ".join(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in sorted(pair))
