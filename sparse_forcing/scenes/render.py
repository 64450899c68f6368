"""Scenes to video: trajectories, antialiased shapes, blending.

Shapes: B scenes, O objects, F frames, S pixels to the side.  The world is a torus: what leaves one edge enters
at the opposite one.  Every shape is a function of sums f(x) + g(y), so one broadcast addition per straight edge
draws it at any rotation.
"""

from __future__ import annotations

from math import cos, pi

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.sample import RESIZE_LOG, SHAPE_SCALE, SceneBatch, extents, is_any
from sparse_forcing.scenes.vocabulary import BACKGROUND_RGB, COLOUR_RGB, MOTIONS, SHAPES

RING_HOLE = 0.55  # inner over outer radius
_CHUNK_PIXELS = 1 << 16  # drawn together on a CPU, so that the working set stays in a core's cache
_POLYGON_EDGES = {"square": 4, "triangle": 3, "star": 5}
_FIRST_NORMAL = {"square": 0.0, "triangle": pi / 2, "star": -pi / 2}  # clockwise from the right
_INRADIUS = {"square": 1.0, "triangle": 0.5, "star": cos(2 * pi / 5)}  # of the edge lines, relative to SHAPE_SCALE


def render(scenes: SceneBatch, frames: int, side: int, *, start: int | Tensor = 0) -> Tensor:
    """Draw frames ``start`` to ``start + frames - 1`` of every scene.

    ``start`` is one frame number or one per scene (int [B]).  Returns float32 [B, F, 3, S, S] in [-1, 1] on the
    scenes' device.  Raises ConfigError for a size or frame count below 1.
    """
    if frames < 1 or side < 1:
        raise ConfigError(f"render: frames and side must be at least 1, got {frames} and {side}")
    device = scenes.background.device
    background = _palette(BACKGROUND_RGB, device)[scenes.background]
    video = background[:, None, :, None, None].expand(-1, frames, -1, side, side).clone()
    x, y, radius, angle = trajectories(scenes, frames, start=start)
    contrast = _palette(COLOUR_RGB, device)[scenes.colour] - background[:, None]
    step = max(1, _CHUNK_PIXELS // (frames * side * side)) if device.type == "cpu" else len(scenes)
    for number, shape in enumerate(SHAPES):
        for place in range(scenes.present.shape[1]):
            chosen = (scenes.present[:, place] & (scenes.shape[:, place] == number)).nonzero()[:, 0]
            for part in chosen.split(step):
                cover = coverage(shape, x[part, place], y[part, place], radius[part, place], angle[part, place], side)
                paint = cover[:, :, None] * contrast[part, place, None, :, None, None]
                video.index_add_(0, part, paint)
    return video


def trajectories(scenes: SceneBatch, frames: int, *, start: int | Tensor = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x and y in [0, 1), radius and angle of every object in every frame; four float32 [B, O, F]."""
    device = scenes.background.device
    time = torch.as_tensor(start, device=device).reshape(-1, 1, 1) + torch.arange(frames, device=device)
    time = time.expand(len(scenes), scenes.motion.shape[1], frames).double()  # a phase after hours is still exact

    def where(name: str) -> Tensor:
        return is_any(scenes.motion, (name,), MOTIONS)[..., None]

    def sign(plus: str, minus: str) -> Tensor:
        return where(plus).double() - where(minus).double()

    travel = scenes.speed[..., None] * time
    x = scenes.x[..., None] + travel * sign("moves right", "moves left")
    y = scenes.y[..., None] + travel * sign("moves down", "moves up")
    side, up, down, _ = (value[..., None] * scenes.radius[..., None] for value in extents(scenes.shape))
    x = torch.where(where("bounces left and right"), _bounce(scenes, travel, side, side), x)
    y = torch.where(where("bounces up and down"), _bounce(scenes, travel, up, down), y)

    turn = sign("orbits clockwise", "orbits counterclockwise")
    course = scenes.phase[..., None] + travel * turn
    x = torch.where(turn != 0, 0.5 + scenes.orbit[..., None] * course.cos(), x)
    y = torch.where(turn != 0, 0.5 + scenes.orbit[..., None] * course.sin(), y)

    spin = sign("spins clockwise", "spins counterclockwise")
    angle = torch.where(spin != 0, scenes.phase[..., None] + travel * spin, 0.0)
    radius = scenes.radius[..., None] * (travel.clamp(max=RESIZE_LOG) * sign("grows", "shrinks")).exp()
    x, y, radius, angle = (value.float() for value in (x % 1, y % 1, radius, angle))
    return x, y, radius, angle


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor, side: int) -> Tensor:
    """How much of every pixel the shape covers.

    ``x``, ``y``, ``radius`` and ``angle`` are [..., F] in frame sides and clockwise radians; returns
    [..., F, S, S] in [0, 1], the signed distance to the outline mapped over one pixel.
    """
    grid = (torch.arange(side, device=x.device) + 0.5) / side
    across = (grid - x[..., None] + 0.5) % 1 - 0.5  # [..., F, S]
    down = (grid - y[..., None] + 0.5) % 1 - 0.5
    return cover_shape(shape, across, down, radius, angle, side)


def cover_shape(shape: str, across: Tensor, down: Tensor, radius: Tensor, angle: Tensor, side: int) -> Tensor:
    """How much the shape covers of pixels 1 / ``side`` wide at the offsets ``across`` [..., F, W] and ``down``
    [..., F, H] from its centre; ``radius`` and ``angle`` are [..., F]; returns [..., F, H, W] in [0, 1]."""
    size = (radius * SHAPE_SCALE[shape])[..., None, None]
    if shape in _POLYGON_EDGES:
        distance = _polygon(shape, across, down, angle[..., None]) - size * _INRADIUS[shape]
    else:
        distance = (across.square()[..., None, :] + down.square()[..., None]).sqrt_()
        if shape == "ring":
            middle, half = (1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2
            distance = distance.sub_(size * middle).abs_().sub_(size * half)
        else:
            distance = distance.sub_(size)
    return distance.mul_(-side).add_(0.5).clamp_(0, 1)


def _polygon(shape: str, across: Tensor, down: Tensor, angle: Tensor) -> Tensor:
    """Distance along the normal of the edge that decides: the largest, or for the pentagram the second largest.

    A point lies in the pentagram when at most one of its five edge lines leaves it outside.
    """
    edges = _POLYGON_EDGES[shape]
    largest = second = None
    for edge in range(edges):
        normal = angle + _FIRST_NORMAL[shape] + 2 * pi * edge / edges
        along = (across * normal.cos())[..., None, :] + (down * normal.sin())[..., None]
        if largest is None:
            largest = along
            continue
        if shape == "star":
            lower = torch.minimum(largest, along)
            second = lower if second is None else torch.maximum(second, lower, out=second)
        largest = torch.maximum(largest, along)
    chosen = second if shape == "star" else largest
    assert chosen is not None
    return chosen


def _bounce(scenes: SceneBatch, travel: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """A centre running between the frame edges, ``before`` and ``after`` being the object's own reach."""
    room = 1 - before - after
    passes = (scenes.phase[..., None] + travel / room) % 2
    return before + room * (1 - (passes - 1).abs())


def _palette(colours: dict[str, tuple[int, int, int]], device: torch.device) -> Tensor:
    """[N, 3] in [-1, 1]."""
    return torch.tensor(list(colours.values()), dtype=torch.float32, device=device) / 127.5 - 1
