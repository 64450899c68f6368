"""Grounds: smooth, striped, textured or noisy strips, drawn once and then looked at by the camera.

Shapes: F frames, S pixels to the side, W pixels along the whole strip. All that is random is drawn on lattices fixed to
the place, so that a ground looks alike at every resolution and comes back as it was.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil, cos, pi, sin

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sparse_forcing.scenes.worlds.world import Ground

DARKEST, BRIGHTEST = 45.0, 190.0  # 8-bit levels; every object colour stays apart from the grays between
STEEPEST = 45.0  # levels to a screen
TINT = 24.0  # levels of hue
ROUND = 0.85  # of the circle of hues, from end to end
LEVELS_OF_KIND = 18.0  # how far stripes and texture go up and down
NOISE_CELLS = 32  # to a screen
TEXTURE_CELLS = (5, 11)
RULER_DEPTH = -60.0  # levels
RULER_STEP = 1 / 8  # of a screen
RULER_HEIGHT = 0.25


def look(ground: Ground, camera: Sequence[float], side: int, device: torch.device | str = "cpu") -> Tensor:
    """The bare ground at every camera position: float32 [F, 3, S, S] in [-1, 1]."""
    strip = draw_strip(ground, side).to(device)
    picture = torch.empty(len(camera), 3, side, side, device=device)
    for frame, place in enumerate(camera):
        offset = (place - ground.span[0]) * side
        column = min(int(offset), strip.shape[-1] - side - 1)
        near, far = (strip[..., start : start + side] for start in (column, column + 1))
        torch.lerp(near, far, offset - column, out=picture[frame])
    return picture


def draw_strip(ground: Ground, side: int) -> Tensor:
    """All of the ground, [3, S, W] in [-1, 1], one pixel more than the camera can see."""
    rng = random.Random(ground.seed)
    low, high = ground.span
    width = ceil((high - low + 1) * side) + 2
    across = (torch.arange(width) + 0.5) / side  # screens from the strip's left end
    down = (torch.arange(side) + 0.5) / side
    level, marks = _place(ground, rng, across, down, high - low + 1)
    detail = _detail(ground, rng, across, down, width, side)
    levels = (level + detail + marks).expand(side, width)
    return (levels + _tint(rng, across, high - low + 1)[:, None]).div_(127.5).sub_(1).clamp_(-1, 1)


def _tint(rng: random.Random, across: Tensor, screens: float) -> Tensor:
    """Levels [3, W] to add: a faint hue that goes round once along the strip, so that no two places share it."""
    begin, turn = rng.uniform(0, 2 * pi), rng.choice((-1, 1)) * 2 * pi * ROUND / screens
    phases = torch.arange(3)[:, None] * (2 * pi / 3)
    return TINT * (begin + turn * across - phases).cos()


def _place(
    ground: Ground, rng: random.Random, across: Tensor, down: Tensor, screens: float
) -> tuple[Tensor, Tensor | float]:
    """What tells places apart: levels [1, W] or [S, W], and marks to add."""
    middle = rng.uniform(DARKEST + 30, BRIGHTEST - 30)
    if ground.sign == "brightness":
        room = BRIGHTEST - DARKEST - 2 * LEVELS_OF_KIND
        slope = min(STEEPEST, room / screens) * rng.choice((-1, 1))
        least = DARKEST + LEVELS_OF_KIND + rng.random() * (room - abs(slope) * screens)
        start = least if slope > 0 else least + abs(slope) * screens
        return (start + slope * across)[None], 0.0
    step = (across / RULER_STEP).floor()
    height = 0.02 + RULER_HEIGHT * (step * RULER_STEP / screens)
    tooth = ((across / RULER_STEP - step) < 0.5) * RULER_DEPTH
    bottom = ((height[None] - (1 - down[:, None])) * len(down) + 0.5).clamp(0, 1)
    return torch.tensor([[middle]]), bottom * tooth[None]


def _detail(ground: Ground, rng: random.Random, across: Tensor, down: Tensor, width: int, side: int) -> Tensor:
    """Stripes, texture or noise [S, W], in levels around 0."""
    if ground.kind == "striped":
        period, angle = rng.uniform(0.12, 0.3), rng.uniform(0, pi)
        phase = (cos(angle) * across[None] + sin(angle) * down[:, None]) * (2 * pi / period)
        return LEVELS_OF_KIND * (3 * phase.sin()).clamp(-1, 1)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    screens = ceil(width / side)
    if ground.kind == "textured":
        layers = [_lattice(cells, screens, side, width, generator, "bicubic") for cells in TEXTURE_CELLS]
        return (LEVELS_OF_KIND * (layers[0] + 0.6 * layers[1])).clamp(-2 * LEVELS_OF_KIND, 2 * LEVELS_OF_KIND)
    if ground.kind == "noisy":
        return LEVELS_OF_KIND * _lattice(NOISE_CELLS, screens, side, width, generator, "nearest-exact")
    return torch.zeros(1, 1)


def _lattice(cells: int, screens: int, side: int, width: int, generator: torch.Generator, mode: str) -> Tensor:
    """Noise of unit variance on a lattice of so many cells to a screen, drawn column by column: [S, W]."""
    noise = torch.randn(screens * cells, cells, generator=generator).T[None, None]
    return interpolate(noise, (side, screens * side), mode=mode)[0, 0, :, :width]
