"""Curves as SVG that takes its colours from the page around it: no script, no file, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 26
MOST = 300  # points of a drawn line: more cannot be told apart at this width
TICKS = 5

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `kind` is a class of the page's style: `faint`, `main`, `second`, `limit`; `dots` marks each point."""

    name: str
    points: Sequence[Point]
    kind: str = "main"
    dots: bool = False


def curve(title: str, series: Sequence[Series], *, log: bool = False, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Return one figure: a caption with the legend, and the lines over the step; nothing where there is no point.

    Values that are not finite (or, with `log`, not above 0) are left out. `marks` are upright lines (step, what).
    """
    drawn = [Series(name=s.name, points=_usable(s.points, log), kind=s.kind, dots=s.dots) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [_scaled(y, log) for s in drawn for _, y in s.points]
    x_axis, y_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x_axis, y_axis, log)]
    parts += [
        f'<line class="mark" x1="{x_axis(x):.1f}" x2="{x_axis(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{escape(what)}</title></line>"
        for x, what in marks
        if x_axis.low <= x <= x_axis.high
    ]
    for s in drawn:
        at = [(x_axis(x), y_axis(_scaled(y, log))) for x, y in thinned(s.points)]
        parts.append(f'<polyline class="{s.kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>')
        if s.dots or len(at) == 1:
            parts += [f'<circle class="{s.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at]
    legend = " ".join(f'<span class="key {s.kind}">{escape(s.name)}</span>' for s in drawn)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean over a window around each point: a twenty-fifth of the line, at least three points."""
    half = max(1, len(points) // 50)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    last = len(points)
    spans = [(max(0, i - half), min(last, i + half + 1)) for i in range(last)]
    return [(points[i][0], (sums[b] - sums[a]) / (b - a)) for i, (a, b) in enumerate(spans)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most about MOST points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST:
        return list(points)
    size = math.ceil(2 * len(points) / MOST)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers within [low, high], a handful of them."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Values onto pixels, with a little room around them."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        upright = last < first
        self.low, self.high = (low - room, high + room) if upright or low == high else (low, high)
        self._first, self._scale = first, (last - first) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self._first + (value - self.low) * self._scale


def _usable(points: Sequence[Point], log: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _grid(x_axis: _Axis, y_axis: _Axis, log: bool) -> list[str]:
    parts = []
    for value in _log_ticks(y_axis) if log else ticks(y_axis.low, y_axis.high):
        y = y_axis(_scaled(value, log))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value in ticks(x_axis.low, x_axis.high):
        if value == round(value):
            parts.append(f'<text x="{x_axis(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_short(value)}</text>')
    return parts


def _log_ticks(axis: _Axis) -> list[float]:
    powers = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    for times in ((1,), (1, 3), (1, 2, 5)):
        inside = [t * 10.0**p for p in powers for t in times if axis.low <= math.log10(t * 10.0**p) <= axis.high]
        if len(inside) >= 3:
            break
    else:
        inside = [value for value in ticks(10**axis.low, 10**axis.high) if value > 0]
    return inside[:: max(1, len(inside) // TICKS)]


def _short(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
