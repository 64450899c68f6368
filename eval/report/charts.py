"""Line charts as inline SVG: curves with bands, one colour a run."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("#2f6fde", "#d9622b", "#2a9d5c", "#a14bc4", "#b8860b", "#c2345a", "#3d8b8b", "#6b6b6b")
WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve: label, x, mean, and the band around it (all of one length)."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def color(number: int) -> str:
    """The colour of run `number`."""
    return COLORS[number % len(COLORS)]


def line_chart(title: str, series: Sequence[Series], x_label: str = "seconds") -> str:
    """A figure with one line and band for each series; numbers on both axes."""
    points = [value for one in series for value in (*one.low, *one.high, *one.mean)]
    xs = [value for one in series for value in one.x]
    low, high = _pad(min(points), max(points))
    start, end = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - start) / (end - start) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_y_axis(low, high, place, start), _x_axis(start, end, place, low, x_label)]
    for number, one in enumerate(series):
        stroke = color(number)
        outline = [place(x, y) for x, y in zip(one.x, one.high)]
        outline += [place(x, y) for x, y in reversed(list(zip(one.x, one.low)))]
        line = [place(x, y) for x, y in zip(one.x, one.mean)]
        parts.append(f'<polygon points="{_path(outline)}" fill="{stroke}" opacity="0.15"/>')
        parts.append(f'<polyline points="{_path(line)}" fill="none" stroke="{stroke}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{stroke}"/>' for x, y in line]
    name = html.escape(title)
    return (
        f'<figure><figcaption>{name}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _pad(low: float, high: float) -> tuple[float, float]:
    # A flat curve gets a visible range of its own, so that noise does not fill the picture.
    margin = max((high - low) * 0.08, abs(high) * 0.005, 1e-6)
    return low - margin, high + margin


def _y_axis(low: float, high: float, place, x: float) -> str:
    parts = []
    for step in range(5):
        value = low + (high - low) * step / 4
        across, down = place(x, value)
        parts.append(f'<line class="grid" x1="{across:.1f}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{_number(value, high - low)}</text>')
    return "".join(parts)


def _x_axis(start: float, end: float, place, y: float, label: str) -> str:
    parts = []
    for step in range(5):
        value = start + (end - start) * step / 4
        across, down = place(value, y)
        parts.append(f'<text x="{across:.1f}" y="{down + 14:.1f}" text-anchor="middle">{value:.3g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(label)}</text>')
    return "".join(parts)


def _number(value: float, span: float) -> str:
    digits = 0 if span >= 20 else 1 if span >= 2 else 2 if span >= 0.2 else 3 if span >= 0.02 else 4
    return f"{value:.{digits}f}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
