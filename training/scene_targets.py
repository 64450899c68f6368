"""Auxiliary targets that a procedural scene gives for free: where each token sees the object, and what a caption says.

Heads that predict them are dropped after training; they make layout and words learned sooner, as aligning inner
features does for image models (REPA, arXiv 2410.06940). Rates of motion are what a caption tells even where noise hides
the object: without them directions are hardly ever learned, because they make little difference to the pixels. Courses
combine the caption with the place: without them a clockwise orbit is not told from a counterclockwise one.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from sparse_forcing.scenes.render import trajectories
from sparse_forcing.scenes.sample import SceneBatch, is_any
from sparse_forcing.scenes.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, ORBITING, SHAPES, SIZE_RADIUS, SIZES

HARMONICS = (1, 4)  # the first says roughly where, the second exactly
RATES = 5
POSE_NUMBERS = 8 * len(HARMONICS) + 3 + RATES
COURSE_NUMBERS = 2
ATTRIBUTES = len(BACKGROUNDS) + len(COLOURS) + len(SHAPES) + len(SIZES) + len(MOTIONS)
_SYMMETRY = {"square": 4, "triangle": 3, "star": 5}
_STRAIGHT = {"moves right": (1.0, 0.0), "moves left": (-1.0, 0.0), "moves up": (0.0, -1.0), "moves down": (0.0, 1.0)}
_FAST = {"travel": 1 / 32, "growth": 1 / 32, "turn": 1 / 4}
"""Rates per pixel frame that count as 1: frame sides, logarithm of the radius, radians."""


def pose_targets(scenes: SceneBatch, start: Tensor, latent_frames: int, stride: int, rows: int) -> Tensor:
    """The first object as seen from every token: [B, latent_frames * rows * rows, POSE_NUMBERS], frame-major.

    Sine and cosine of the distance across and down (the world is a torus) in the first and last of the `stride` pixel
    frames of a token, the logarithm of the radius, the rotation modulo the shape's symmetry, and rates (`_rates`).
    """
    x, y, radius, angle = (value[:, 0] for value in trajectories(scenes, latent_frames * stride, start=start))
    device = scenes.motion.device
    first = torch.arange(0, latent_frames * stride, stride, device=device)
    ends = torch.stack([first, first + stride - 1])
    centre = (torch.arange(rows, device=device) + 0.5) / rows
    across = (centre - x[:, ends, None]).movedim(1, -1)[:, :, None]  # [B, F, 1, R, 2]
    down = (centre - y[:, ends, None]).movedim(1, -1)[:, :, :, None]  # [B, F, R, 1, 2]
    waves = [f(2 * pi * k * d) for k in HARMONICS for d in (across, down) for f in (torch.sin, torch.cos)]
    symmetry = torch.tensor([_SYMMETRY.get(name, 0) for name in SHAPES], device=device)[scenes.shape[:, 0], None]
    turn = symmetry * angle[:, first]
    size = (radius[:, first] / SIZE_RADIUS["medium"]).log() * 2
    rates = _rates(scenes, (x, y, radius, angle), first, stride)
    own = torch.cat([torch.stack([size, turn.cos(), turn.sin()], -1), rates], -1)
    grid = (len(scenes), latent_frames, rows, rows, -1)
    return torch.cat([*(w.expand(grid) for w in waves), own[:, :, None, None].expand(grid)], -1).flatten(1, 3)


def _rates(scenes: SceneBatch, path: tuple[Tensor, ...], first: Tensor, stride: int) -> Tensor:
    """[B, latent_frames, RATES]: how fast the first object travels across and down, grows, spins and orbits."""
    x, y, radius, angle = path

    def per_frame(value: Tensor) -> Tensor:
        return (value[:, first + stride - 1] - value[:, first]) / max(1, stride - 1)

    def travel(value: Tensor) -> Tensor:
        moved = value[:, first + stride - 1] - value[:, first]
        return ((moved + 0.5) % 1 - 0.5) / max(1, stride - 1) / _FAST["travel"]

    clockwise, counterclockwise = (is_any(scenes.motion[:, :1], (name,), MOTIONS).float() for name in ORBITING)
    orbit = scenes.speed[:, :1] * (clockwise - counterclockwise) / _FAST["turn"]
    growth, spin = per_frame(radius.log()) / _FAST["growth"], per_frame(angle) / _FAST["turn"]
    return torch.stack([travel(x), travel(y), growth, spin, orbit.expand_as(spin)], -1)


def course_targets(scenes: SceneBatch, rows: int) -> Tensor:
    """Where the first object would be heading if it were at a token: [B, rows * rows, COURSE_NUMBERS], unit vectors
    across and down; 0 for motions whose direction the caption does not tell, or that go nowhere."""
    device = scenes.motion.device
    centre = (torch.arange(rows, device=device) + 0.5) / rows - 0.5
    down, across = torch.meshgrid(centre, centre, indexing="ij")
    clockwise = torch.stack([-down, across], -1) / torch.hypot(down, across).clamp(min=1e-6)[..., None]
    courses = torch.zeros(len(MOTIONS), rows, rows, COURSE_NUMBERS, device=device)
    for name, direction in _STRAIGHT.items():
        courses[MOTIONS.index(name)] = torch.tensor(direction, device=device)
    for name, sense in zip(ORBITING, (1, -1)):
        courses[MOTIONS.index(name)] = sense * clockwise
    return courses[scenes.motion[:, 0]].flatten(1, 2)


def attribute_targets(scenes: SceneBatch) -> Tensor:
    """[B, ATTRIBUTES] in {0, 1}: which background, colours, shapes, sizes and motions a scene has."""
    columns = [torch.nn.functional.one_hot(scenes.background, len(BACKGROUNDS))]
    for numbers, names in (
        (scenes.colour, COLOURS), (scenes.shape, SHAPES), (scenes.size, SIZES), (scenes.motion, MOTIONS),
    ):  # fmt: skip
        told = (scenes.present & (numbers >= 0))[..., None]
        columns.append((torch.nn.functional.one_hot(numbers.clamp(min=0), len(names)) * told).amax(1))
    return torch.cat(columns, 1).float()
