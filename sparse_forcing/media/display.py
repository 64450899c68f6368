"""A decoded frame as players show it: turned and mirrored as the file says, square pixels, transparency over white."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from sparse_forcing.errors import VideoError
from sparse_forcing.files import PathLike

_LARGEST_OFF_AXIS = 0.01  # of a turn's sine or cosine: what is left of a quarter turn in the file's fixed-point numbers


def show(frame: Any, aspect: Fraction, path: PathLike) -> np.ndarray:
    """uint8 [H, W, 3] RGB of an `av.VideoFrame` whose stored pixels are `aspect` times as wide as high.

    Raises:
        VideoError: the file turns its pictures by less than a quarter, or out of their plane.
    """
    turn = _turn(frame, path)
    height, width = square_size(frame, aspect)
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        picture = over_white(frame.to_ndarray(format="rgba", height=height, width=width))
    else:
        picture = frame.to_ndarray(format="rgb24", height=height, width=width)
    return picture if turn is None else _turn_picture(picture, turn)


def shown_size(frame: Any, aspect: Fraction, path: PathLike) -> tuple[int, int]:
    """Height and width of what `show` returns."""
    height, width = square_size(frame, aspect)
    turn = _turn(frame, path)
    return (width, height) if turn is not None and turn[0] == 0 else (height, width)


def square_size(frame: Any, aspect: Fraction) -> tuple[int, int]:
    """Height and width of a stored picture with square pixels; one side grows, as the HTML standard wants it."""
    if aspect > 1:
        return frame.height, round(frame.width * aspect)
    return round(frame.height / aspect), frame.width


def over_white(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] with transparency -> [H, W, 3] in front of white."""
    colour, opacity = picture[..., :3], picture[..., 3:]
    if (opacity == 255).all():
        return np.ascontiguousarray(colour)
    weight = opacity.astype(np.uint16)
    return ((colour * weight + (255 - weight) * 255 + 127) // 255).astype(np.uint8)


def _turn(frame: Any, path: PathLike) -> tuple[int, int, int, int] | None:
    """Signs (a, b, c, d) of x' = a x + c y, y' = b x + d y, one of the eight turns of a square; None: as stored."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    numbers = np.frombuffer(bytes(data), np.int32).astype(np.float64)
    a, b, u, c, d, v = numbers[:6]
    if not (a or b or c or d):
        return None  # some cameras leave it empty, and no player minds
    norm = math.sqrt(abs(a * d - b * c))
    signs = [0 if abs(x) <= _LARGEST_OFF_AXIS * norm else int(math.copysign(1, x)) for x in (a, b, c, d)]
    if u or v or not norm or not (signs[0] == signs[3] == 0) != (signs[1] == signs[2] == 0):
        angle = math.degrees(math.atan2(b, a))
        raise VideoError(f"{path}: is shown turned by {angle:.0f} degrees or slanted; only quarter turns are read")
    return (signs[0], signs[1], signs[2], signs[3])


def _turn_picture(picture: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    a, b, c, d = turn
    if a == 0:
        picture = picture.swapaxes(0, 1)
    across, down = a + c, b + d  # one of each pair is 0
    return np.ascontiguousarray(picture[:: down or 1, :: across or 1])
