"""A chart of curves over steps, as SVG within a page. Its colours are variables of the page's style."""

import html
import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 30
MOST_POINTS = 600  # of a curve
PARTS = 100  # of a long curve, each with a median
MOST_DOTS = 60  # up to which each point is drawn, and shows its value
PERCENTILE, ROOM = 0.98, 1.15  # of a chart that is clipped


@dataclass(frozen=True)
class Curve:
    """Points (step, value) of one run, whose colour is that of `number`; a value may be None: not finite.

    `restarts` and `recompilations` are steps.
    """

    name: str
    number: int
    points: list[tuple[int, float | None]]
    restarts: list[int] = field(default_factory=list)
    recompilations: list[int] = field(default_factory=list)


def draw(title: str, curves: list[Curve], unit: str, clips: bool) -> str:
    """The <figure> of a chart; "" where no curve has a point.

    `clips`: values far above nearly all others (a step that compiles) are beyond the upper end.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    axes = _Axes(curves, clips)
    parts = [axes.grid()]
    for curve in curves:
        parts += [_marks(axes, curve), _line(axes, curve)]
    note = f"cut off, up to {_number(axes.beyond)}" if axes.beyond is not None else ""
    unit = "; ".join(filter(None, (unit, note)))
    return (
        f"<figure><figcaption>{html.escape(title)} <small>{html.escape(unit)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


class _Axes:
    """The range of a chart, and where a step and a value are in it."""

    def __init__(self, curves: list[Curve], clips: bool):
        steps = [step for curve in curves for step, _ in curve.points]
        values = sorted(value for curve in curves for _, value in curve.points if value is not None) or [0.0]
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)
        low, high, self.beyond = values[0], values[-1], None
        most = ROOM * values[int(PERCENTILE * (len(values) - 1))]
        if clips and most < high:
            high, self.beyond = most, high
        if clips and low > 0:  # times and bytes are compared with 0
            low = 0.0
        if high <= low:
            low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1)
        self.ticks = nice_ticks(low, high)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])
        if self.beyond is not None and self.beyond <= self.high:
            self.beyond = None

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (min(value, self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        """Lines and numbers of both axes."""
        parts = []
        for value in self.ticks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        for step in nice_ticks(self.first, self.last):
            if step == int(step) and self.first <= step <= self.last:
                parts.append(
                    f'<text x="{self.x(step):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{int(step)}</text>'
                )
        return "".join(parts)


def _line(axes: _Axes, curve: Curve) -> str:
    """The curve, with gaps where it is not finite, and a cross there."""
    parts, path, gap = [], "", True
    for step, value in thin(curve.points):
        if value is None:
            x, y, gap = axes.x(step), HEIGHT - BOTTOM, True
            parts.append(
                f'<path class="cross" d="M{x - 4:.1f} {y - 4}l8 8m0 -8l-8 8"><title>'
                f"{html.escape(curve.name)}, step {step}: not finite</title></path>"
            )
        else:
            path += f"{'M' if gap else 'L'}{axes.x(step):.1f} {axes.y(value):.1f}"
            gap = False
    middle = medians(curve.points)
    faint = " faint" if middle else ""
    line = f'<path class="curve c{curve.number}{faint}" d="{path}"/>' if path else ""
    if middle:
        path = "L".join(f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in middle)
        line += f'<path class="curve c{curve.number}" d="M{path}"/>'
    return line + "".join(parts) + _dots(axes, curve)


def _dots(axes: _Axes, curve: Curve) -> str:
    """The points of a short curve, whose values show where the mouse is."""
    points = [(step, value) for step, value in curve.points if value is not None]
    if len(points) > MOST_DOTS:
        return ""
    return "".join(
        f'<circle class="c{curve.number}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="2.2">'
        f"<title>{html.escape(curve.name)}, step {step}: {value:.6g}</title></circle>"
        for step, value in points
    )


def _marks(axes: _Axes, curve: Curve) -> str:
    """Dashed lines at restarts, triangles at the top where graphs were compiled."""
    parts = []
    for step in curve.restarts:
        if axes.first <= step <= axes.last:
            line = f"M{axes.x(step):.1f} {TOP}V{HEIGHT - BOTTOM}"
            parts.append(
                f'<path class="restart c{curve.number}" d="{line}"><title>'
                f"{html.escape(curve.name)}: started again after step {step}</title></path>"
            )
    for step in curve.recompilations:
        parts.append(
            f'<path class="compiled" d="M{axes.x(step) - 4:.1f} {TOP - 8}h8l-4 8z"><title>'
            f"{html.escape(curve.name)}: graphs were compiled up to step {step}</title></path>"
        )
    return "".join(parts)


def medians(points: list[tuple[int, float | None]]) -> list[tuple[float, float]]:
    """Of a long curve, the middle step and the median of each of PARTS parts; of a short one nothing."""
    if len(points) < 4 * PARTS:
        return []
    bounds = [len(points) * part // PARTS for part in range(PARTS + 1)]
    known = [
        [point for point in points[start:stop] if point[1] is not None] for start, stop in pairwise(bounds)
    ]
    return [(median(step for step, _ in part), median(value for _, value in part)) for part in known if part]


def thin(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """About MOST_POINTS of the points: of each part of the steps the least, the largest, one not finite."""
    if len(points) <= MOST_POINTS:
        return points
    kept, parts = [], MOST_POINTS // 2
    bounds = [len(points) * part // parts for part in range(parts + 1)]
    for start, stop in pairwise(bounds):
        known = [point for point in points[start:stop] if point[1] is not None]
        unknown = [point for point in points[start:stop] if point[1] is None]
        ends = (
            {min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])} if known else ()
        )
        kept += sorted({*ends, *unknown[:1]}, key=lambda point: point[0])
    return kept


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span low to high."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    size = next(each * power for each in (1, 2, 5, 10) if each * power >= rough * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(number * size, 12) for number in range(first, last + 1)]


def _number(value: float) -> str:
    """A number as the label of an axis."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if name == 'k' else size):.4g}{name}"
    return f"{value:.4g}"
