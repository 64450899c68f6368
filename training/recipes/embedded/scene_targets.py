"""Auxiliary targets that a procedural scene gives for free: how tokens see the nearest object, what captions say.

Heads that predict them are dropped after training; they make layout and words learned sooner, as aligning inner
features does for image models (REPA, arXiv 2410.06940). Rates of motion are what a caption tells even where noise hides
the object: without them directions are hardly ever learned, because they make little difference to the pixels. Courses
combine the caption with the place: without them a clockwise orbit is not told from a counterclockwise one. What a
caption says of an object is asked for under the object's colour: a list of all that is named does not tell whose
shape it is.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sparse_forcing.scenes.render import trajectories
from sparse_forcing.scenes.sample import SceneBatch, is_any
from sparse_forcing.scenes.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, ORBITING, SHAPES, SIZE_RADIUS, SIZES

HARMONICS = (1, 4)  # the first says roughly where, the second exactly
RATES = 5
POSE_NUMBERS = 8 * len(HARMONICS) + 3 + RATES
COURSE_NUMBERS = 2
TRAITS = len(SHAPES) + len(SIZES) + len(MOTIONS)
ATTRIBUTES = len(BACKGROUNDS) + len(COLOURS) * (1 + TRAITS)
_SYMMETRY = {"square": 4, "triangle": 3, "star": 5}
_STRAIGHT = {"moves right": (1.0, 0.0), "moves left": (-1.0, 0.0), "moves up": (0.0, -1.0), "moves down": (0.0, 1.0)}
_FAST = {"travel": 1 / 32, "growth": 1 / 32, "turn": 1 / 4}
"""Rates per pixel frame that count as 1: frame sides, logarithm of the radius, radians."""


def pose_targets(scenes: SceneBatch, start: Tensor, latent_frames: int, stride: int, rows: int) -> Tensor:
    """The nearest object as seen from every token: [B, latent_frames * rows * rows, POSE_NUMBERS], frame-major.

    Nearest is where the cosines of the distances across and down sum up to most, which on a torus is smooth.
    Sine and cosine of the distance across and down (the world is a torus) in the first and last of the `stride` pixel
    frames of a token, the logarithm of the radius, the rotation modulo the shape's symmetry, and rates (`_rates`).
    """
    first = torch.arange(0, latent_frames * stride, stride, device=scenes.motion.device)
    ends = torch.stack([first, first + stride - 1])
    x, y, radius, angle = trajectories(scenes, latent_frames * stride, start=start)
    centre = (torch.arange(rows, device=first.device) + 0.5) / rows
    across = (centre - x[:, :, ends, None]).movedim(2, -1)[:, :, :, None]  # [B, O, F, 1, R, 2]
    down = (centre - y[:, :, ends, None]).movedim(2, -1)[:, :, :, :, None]  # [B, O, F, R, 1, 2]
    waves = [f(2 * pi * k * d) for k in HARMONICS for d in (across, down) for f in (torch.sin, torch.cos)]
    symmetry = torch.tensor([_SYMMETRY.get(name, 0) for name in SHAPES], device=first.device)[scenes.shape, None]
    turn = symmetry * angle[:, :, first]
    size = (radius[:, :, first] / SIZE_RADIUS["medium"]).log() * 2
    rates = _rates(scenes, (x, y, radius, angle), first, stride)
    own = torch.cat([torch.stack([size, turn.cos(), turn.sin()], -1), rates], -1)
    grid = (*scenes.motion.shape, latent_frames, rows, rows, -1)
    poses = torch.cat([*(w.expand(grid) for w in waves), own[:, :, :, None, None].expand(grid)], -1)
    closeness = (2 * pi * across[..., 0]).cos() + (2 * pi * down[..., 0]).cos()
    nearest = closeness.masked_fill(~scenes.present[:, :, None, None, None], -torch.inf).argmax(1, keepdim=True)
    return poses.take_along_dim(nearest[..., None], 1)[:, 0].flatten(1, 3)


def _rates(scenes: SceneBatch, path: tuple[Tensor, ...], first: Tensor, stride: int) -> Tensor:
    """[B, O, latent_frames, RATES]: how fast objects travel across and down, grow, spin and orbit."""
    x, y, radius, angle = path

    def per_frame(value: Tensor) -> Tensor:
        return (value[:, :, first + stride - 1] - value[:, :, first]) / max(1, stride - 1)

    def travel(value: Tensor) -> Tensor:
        moved = value[:, :, first + stride - 1] - value[:, :, first]
        return ((moved + 0.5) % 1 - 0.5) / max(1, stride - 1) / _FAST["travel"]

    clockwise, counterclockwise = (is_any(scenes.motion, (name,), MOTIONS).float() for name in ORBITING)
    orbit = (scenes.speed * (clockwise - counterclockwise) / _FAST["turn"])[..., None]
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


def attribute_targets(scenes: SceneBatch) -> tuple[Tensor, Tensor]:
    """What a caption says, and which of these numbers count, both [B, ATTRIBUTES] in {0, 1}.

    The background, the colours, and for every colour shape, size and motion of the object that has it; these count only
    where there is such an object. Two objects never share a colour.
    """
    colour = one_hot(scenes.colour, len(COLOURS)) * scenes.present[..., None]
    size = one_hot(scenes.size.clamp(min=0), len(SIZES)) * (scenes.size >= 0)[..., None]
    traits = torch.cat([one_hot(scenes.shape, len(SHAPES)), size, one_hot(scenes.motion, len(MOTIONS))], -1)
    bound = (colour[..., None] * traits[:, :, None]).sum(1)  # [B, colours, TRAITS]
    background, present = one_hot(scenes.background, len(BACKGROUNDS)), colour.sum(1)
    targets = torch.cat([background, present, bound.flatten(1)], 1)
    counted = torch.cat(
        [torch.ones_like(background), torch.ones_like(present), present.repeat_interleave(TRAITS, 1)], 1
    )
    return targets.float(), counted.float()
