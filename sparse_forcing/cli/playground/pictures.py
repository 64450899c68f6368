"""HTML of the page: a picture, and a curve of what the video costs while it is made."""

from __future__ import annotations

import base64
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LOSSLESS_SIDE = 256  # pixels: larger pictures go to the browser as JPEG
_WIDTH, _HEIGHT = 400, 90


def picture_html(pixels: np.ndarray | None) -> str:
    """A picture [H, W, 3] as an element that holds all of it, enlarged without smoothing; None: an empty screen."""
    import imageio.v3 as iio

    style = "width:100%;background:#888;border-radius:8px;image-rendering:pixelated"
    if pixels is None:
        return f'<div style="{style};aspect-ratio:1"></div>'
    kind = "png" if max(pixels.shape[:2]) <= LOSSLESS_SIDE else "jpeg"
    data = base64.b64encode(iio.imwrite("<bytes>", pixels, plugin="pillow", extension=f".{kind}", quality=90)).decode()
    return f'<img style="{style}" src="data:image/{kind};base64,{data}">'


def curve_html(points: Sequence[tuple[float, int, float]]) -> str:
    """Two curves over the seconds of the video: megabytes of cache, and frames made per second.

    Args:
        points: (second, bytes of cache, frames per second), in order.
    """
    seconds = [second for second, _, _ in points]
    megabytes = [size / 1e6 for _, size, _ in points]
    speeds = [speed for _, _, speed in points]
    return _curve(seconds, megabytes, "cache", "MB", "#d97706") + _curve(seconds, speeds, "made", "frames/s", "#2563eb")


def _curve(seconds: Sequence[float], values: Sequence[float], name: str, unit: str, colour: str) -> str:
    label = f"{name}: {values[-1]:.1f} {unit}, at most {max(values):.1f}" if values else name
    across, up = (_WIDTH / max(*seconds, 1.0) if seconds else 0.0), (_HEIGHT / (max(values) or 1.0) if values else 0.0)
    places = [(second * across, _HEIGHT - value * up) for second, value in zip(seconds, values, strict=True)]
    if places:
        places.append((float(_WIDTH), places[-1][1]))  # a chunk holds until the next one
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return (
        f'<div style="font-size:small">{label}</div><svg viewBox="0 -2 {_WIDTH} {_HEIGHT + 4}" '
        f'style="width:100%;height:{_HEIGHT}px" preserveAspectRatio="none"><polyline points="{line}" fill="none" '
        f'stroke="{colour}" stroke-width="2" vector-effect="non-scaling-stroke"/></svg>'
    )


def plain(text: str) -> str:
    """Markdown that shows the text as it is, in one line."""
    return "".join(f"\\{letter}" if letter in string.punctuation else letter for letter in " ".join(text.split()))
