"""The picture that plan draws: for each topology, the range of its tokens/s and the memory of a core."""

from pathlib import Path

from tools.plan.roofline import HOST, PARTS, Estimate

COLOURS = dict(zip((*PARTS, HOST), ("tab:blue", "tab:green", "tab:orange", "tab:purple"), strict=True))
FADED = {"yes": 1.0, "perhaps": 0.5, "no": 0.2}


def draw(topologies: list[tuple[str, Estimate]], title: str, path: Path) -> None:
    """Draw topologies, given as (name, estimate), from top to bottom, and write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(13, 2.6 + 0.3 * len(topologies)),
        sharey=True,
        layout="constrained",
        width_ratios=(3, 2),
    )
    for position, (_, each) in enumerate(topologies):
        slow, fast = sorted(each.tokens_per_second_per_node)
        left.barh(
            position, fast - slow, left=slow, height=0.7, color=COLOURS[each.binds], alpha=FADED[each.fits]
        )
        held, most = each.held_bytes / 1e9, each.most_bytes / 1e9
        right.barh(position, held, height=0.7, color="tab:gray")
        right.barh(
            position,
            most - held,
            left=held,
            height=0.7,
            color="lightgray",
            hatch="//",
            edgecolor="gray",
            linewidth=0,
        )
    limit = topologies[0][1].memory_bytes / 1e9
    right.axvline(limit, color="tab:red")
    right.set_xlim(
        0, min(max(1.1 * limit, *(1.05 * each.most_bytes / 1e9 for _, each in topologies)), 3 * limit)
    )
    left.set_xlim(left=0)
    left.set_yticks(range(len(topologies)), [name for name, _ in topologies])
    left.invert_yaxis()
    left.set_xlabel("tokens/s a node (a range, of a model; pale: may not fit)")
    right.set_xlabel("GB of a core's memory")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.4)
        axes.set_axisbelow(True)
    shown = [part for part in COLOURS if any(each.binds == part for _, each in topologies)]
    handles = [
        *(Patch(color=COLOURS[part], label=f"{part} binds") for part in shown),
        Patch(color="tab:gray", label="held"),
        Patch(facecolor="lightgray", edgecolor="gray", hatch="//", label="at most, at the peak"),
        Patch(color="tab:red", label=f"a core has {limit:.1f} GB"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
