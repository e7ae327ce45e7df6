"""Line, step and bar plots as inline SVG: axes with round ticks, a legend, nothing to load.

It knows numbers and labels only.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Series", "plot"]

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 34, 44
COLOURS = ("#1f5fa8", "#c4571b", "#2e7d4f", "#8a4fa3")


@dataclass(frozen=True)
class Series:
    """One line; a point whose y is None is left out."""

    label: str
    points: Sequence[tuple[float, float | None]]
    kind: Literal["line", "bars"] = "line"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that cover [low, high]."""
    if high <= low:
        high = low + 1
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first = math.floor(low / step)
    return [index * step for index in range(first, math.ceil(high / step - 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 … that cover [low, high]; only the powers of ten where that would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in found if low / 2.5 < value < high * 2.5]
    return inside if len(inside) <= 8 else [10.0**power for power in powers]


def label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(
    title: str,
    x_name: str,
    y_name: str,
    series: Sequence[Series],
    *,
    log_x: bool = False,
    y_top: float | None = None,
    mark_x: tuple[float, str] | None = None,
) -> str:
    """One plot; `mark_x` draws an upright line there. Without any point it says so."""
    drawn = [Series(one.label, [p for p in one.points if p[1] is not None], one.kind) for one in series]
    drawn = [one for one in drawn if one.points]
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="{LEFT}" y="14" class="title">{html.escape(title)}</text>'
    )
    if not drawn:
        return head + f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" class="none">nothing was measured</text></svg>'
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points if y is not None]
    low, high = min(xs), max(xs)
    if mark_x and mark_x[0] < 3 * high:
        high = max(high, mark_x[0])
    if log_x:
        low, high = max(low, 1e-3), max(high, 2e-3)
        x_ticks = decades(low, high)
        low, high = min(low, x_ticks[0]), max(high, x_ticks[-1])
    else:
        low = min(low, 0.0)
        x_ticks = ticks(low, high)
        high = max(high, x_ticks[-1])
    y_ticks = ticks(0.0, y_top or max(max(ys), 1e-9))
    top = y_top or y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        span = math.log(high / low) if log_x else high - low
        part = (math.log(max(x, low) / low) if log_x else x - low) / (span or 1)
        return LEFT + part * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [head]
    for value in y_ticks:
        if value <= top * 1.0001:
            y = place(low, value)[1]
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="y">{label(value)}</text>')
    for value in x_ticks:
        x = place(value, 0)[0]
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}" class="axis"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" class="x">{label(value)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" class="axis"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" class="x">{html.escape(x_name)}</text>')
    middle = (TOP + base) / 2
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" class="x">{html.escape(y_name)}</text>')
    if mark_x and low <= mark_x[0] <= high:
        x = place(mark_x[0], 0)[0]
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}" class="mark"/>')
        parts.append(f'<text x="{x - 4:.1f}" y="{TOP + 12}" class="y">{html.escape(mark_x[1])}</text>')
    at = LEFT
    for index, one in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        points = [place(x, y) for x, y in one.points if y is not None]
        if one.kind == "bars":
            width = max(0.8, (WIDTH - LEFT - RIGHT) / max(1, len(points)) * 0.8)
            parts += [
                f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{base - y:.1f}" '
                f'fill="{colour}" opacity="0.35"/>'
                for x, y in points
            ]
        elif len(points) == 1:
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{colour}"/>')
        else:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            dashes = ' stroke-dasharray="5 4"' if index else ""  # lines on top of each other are both to be seen
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>')
        if len(drawn) > 1:
            parts.append(f'<rect x="{at}" y="21" width="10" height="4" fill="{colour}"/>')
            parts.append(f'<text x="{at + 14}" y="27" class="legend">{html.escape(one.label)}</text>')
            at += 30 + round(6.2 * len(one.label))
    return "".join(parts) + "</svg>"
