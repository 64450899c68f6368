"""Scenes as batches of tensors: sampling, and conversion to and from the names in ``vocabulary``.

Shapes: B scenes, O objects per scene.  Lengths in frame sides with x to the right and y down, angles in
radians clockwise on the screen, times in frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import cos, exp, log, pi, sin
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COLUMN_MOTIONS,
    MOTIONS,
    ORBITING,
    RESIZING,
    ROW_MOTIONS,
    SHAPES,
    SIZE_JITTER,
    SIZE_RADIUS,
    SIZES,
    SPINNING,
    SPINNING_SHAPES,
    Scene,
    SceneObject,
    is_held_out,
    is_possible,
)

# Half side of the square and circumradius of the others, relative to the size's radius: between equal radii
# and equal areas, so that a size word means about the same for every shape.
SHAPE_SCALE = {"circle": 1.0, "square": 0.886, "triangle": 1.2, "star": 1.25, "ring": 1.08}
# Reach of the upright shape to the side, up and down, and of the shape at any angle, relative to the same radius.
EXTENT = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (0.886, 0.886, 0.886, 0.886 * 2**0.5),
    "triangle": (1.2 * cos(pi / 6), 1.2, 1.2 * 0.5, 1.2),
    "star": (1.25 * sin(2 * pi / 5), 1.25, 1.25 * cos(pi / 5), 1.25),
    "ring": (1.08, 1.08, 1.08, 1.08),
}
MOVE_SPEED = (0.02, 0.04)  # frame sides per frame
BOUNCE_SPEED = (0.025, 0.04)
BOUNCE_FRAMES = 24  # an edge-to-edge pass takes at most this long, so a 5-second clip always shows a turn
ORBIT_RADIUS = (0.22, 0.28)
ORBIT_FRAMES = (20, 32)  # per turn
SPIN_SPEED = (8 * pi / 180, 13 * pi / 180)  # per frame: under a fifth of the star's 72-degree symmetry
RESIZE_FRAMES = (28, 36)
RESIZE_LOG = log(SIZE_RADIUS["large"] / SIZE_RADIUS["small"])
_BOUNCING = ("bounces left and right", "bounces up and down")
# Two sizes whose lanes fit beside each other whatever the shapes.
_SIZE_PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
Uniform = Callable[[Any, Any], Tensor]
SPLITS = ("train", "heldout", "all")


@dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """B scenes of up to O objects.

    Discrete (int64, numbers as in ``vocabulary``): ``background`` [B]; ``colour``, ``shape``, ``motion`` and ``size``
    [B, O], size -1 where the motion changes it.  ``present`` [B, O] bool: False marks a place without an object.
    Continuous (float32 [B, O]): ``x``, ``y`` the centre at time 0; ``radius`` the size's radius at time 0;
    ``speed`` per frame (frame sides, radians or log-radius, always positive); ``phase`` of a bounce in passes
    [0, 2), of an orbit or a spin in radians; ``orbit`` the radius of the path around the frame centre.
    """

    background: Tensor
    present: Tensor
    colour: Tensor
    shape: Tensor
    size: Tensor
    motion: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    speed: Tensor
    phase: Tensor
    orbit: Tensor

    def __len__(self) -> int:
        return self.background.shape[0]

    def select(self, index: Tensor | slice) -> SceneBatch:
        """The scenes at ``index`` (a slice, or an integer or boolean tensor)."""
        return SceneBatch(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def to(self, device: torch.device | str) -> SceneBatch:
        """The same scenes on another device."""
        return SceneBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def scenes(self) -> list[Scene]:
        """The discrete part by name, one :class:`Scene` per item."""
        columns = (self.present, self.colour, self.shape, self.size, self.motion)
        rows = zip(self.background.tolist(), *(column.tolist() for column in columns), strict=True)
        return [
            Scene(
                background=BACKGROUNDS[background],
                objects=tuple(
                    SceneObject(
                        colour=COLOURS[colour],
                        shape=SHAPES[shape],
                        size=SIZES[size] if size >= 0 else None,
                        motion=MOTIONS[motion],
                    )
                    for present, colour, shape, size, motion in zip(*row, strict=True)
                    if present
                ),
            )
            for background, *row in rows
        ]


def sample_scenes(
    batch: int,
    generator: torch.Generator,
    *,
    two_object_fraction: float = 0.0,
    split: str = "train",
    motion_weights: Mapping[str, float] | None = None,
    shape_weights: Mapping[str, float] | None = None,
) -> SceneBatch:
    """Draw ``batch`` scenes on the generator's device.

    ``two_object_fraction`` is each scene's probability of holding two objects of different colours in lanes of
    their own.  ``split``: "train" has no held-out (colour, shape, background, motion) combination in any object,
    "heldout" has one in at least one object, "all" ignores the split.  Motions are drawn evenly, the other
    attributes evenly given the motion (before the split).  ``motion_weights``: how much likelier than the rest a
    motion is in scenes of one object (1 where not named); ``shape_weights``: the same for shapes, in all scenes.
    """
    if batch < 1:
        raise ConfigError(f"sample_scenes: batch must be at least 1, got {batch}")
    if not 0.0 <= two_object_fraction <= 1.0:
        raise ConfigError(f"sample_scenes: two_object_fraction must lie in [0, 1], got {two_object_fraction}")
    if split not in SPLITS:
        raise ConfigError(f"sample_scenes: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    motions = None if motion_weights is None else motion_table(motion_weights)
    shapes = None if shape_weights is None else shape_table(shape_weights)
    two = torch.rand(batch, generator=generator, device=generator.device) < two_object_fraction
    places = 2 if two_object_fraction > 0 else 1
    draft = _draw(two, places, generator, motions, shapes)
    todo = (~_in_split(draft, split)).nonzero()[:, 0]
    while len(todo):
        retry = _draw(two[todo], places, generator, motions, shapes)
        for name, value in retry.items():
            draft[name][todo] = value
        todo = todo[~_in_split(retry, split)]
    return _place(draft, generator)


def batch_from_scenes(scenes: Sequence[Scene], generator: torch.Generator) -> SceneBatch:
    """Scenes given by name, with continuous attributes (and open sizes) drawn at random.

    Raises ConfigError for an attribute that is unknown or missing, and for two objects whose motions or sizes
    do not fit into lanes of their own.
    """
    if not scenes:
        raise ConfigError("batch_from_scenes: no scene given")
    places = max(len(scene.objects) for scene in scenes)
    numbers = torch.tensor([_numbers(scene, places, generator) for scene in scenes], device=generator.device)
    objects = numbers[:, 1:].view(len(scenes), places, 5)
    names = ("present", "colour", "shape", "size", "motion")
    draft = dict(zip(names, objects.unbind(-1), strict=True)) | {"background": numbers[:, 0]}
    draft["present"] = draft["present"].bool()
    return _place(draft, generator)


def extents(shape: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far shape numbers reach to the side, up, down, and at any angle, relative to the radius."""
    side, up, down, any_angle = torch.tensor([EXTENT[name] for name in SHAPES], device=shape.device)[shape].unbind(-1)
    return side, up, down, any_angle


def is_any(values: Tensor, names: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    """Where attribute numbers stand for one of ``names``; bool, the shape of ``values``."""
    return torch.isin(values, torch.tensor([vocabulary.index(name) for name in names], device=values.device))


def motion_table(weights: Mapping[str, float]) -> Tensor:
    """Weights of the motions by number, float32 [motions], 1 where not named.  Raises ConfigError."""
    return _table("motion", weights, MOTIONS)


def shape_table(weights: Mapping[str, float]) -> Tensor:
    """Weights of the shapes by number, float32 [shapes], 1 where not named.  Raises ConfigError."""
    table = _table("shape", weights, SHAPES)
    if not table[[SHAPES.index(name) for name in SPINNING_SHAPES]].any():
        raise ConfigError(f"shape_weights: {_either(SPINNING_SHAPES)} must have a weight above 0, or nothing can spin")
    return table


def _table(kind: str, weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(f"{kind}_weights: unknown {kind} {name!r}; choose {_either(names)}")
        if weight < 0:
            raise ConfigError(f"{kind}_weights: {name} has weight {weight}; none may be negative")
    found = torch.tensor([float(weights.get(name, 1)) for name in names])
    if not found.any():
        raise ConfigError(f"{kind}_weights: at least one {kind} must have a weight above 0")
    return found


def _draw(
    two: Tensor, places: int, generator: torch.Generator, motions: Tensor | None, shapes: Tensor | None
) -> dict[str, Tensor]:
    """Attribute numbers for a batch; ``two`` [B] says which scenes hold two objects, ``motions`` how likely each motion
    is in the others and ``shapes`` each shape (None: all alike)."""
    batch, device = len(two), two.device

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    def pick(table: Sequence[Sequence[int]], row: Tensor) -> Tensor:
        return torch.tensor(table, device=device)[row, below(len(table[0]), *row.shape)]

    def by_weight(table: Tensor) -> Tensor:
        count = batch * places
        return torch.multinomial(table.to(device), count, True, generator=generator).view(batch, places)

    axis = below(2, batch, 1).expand(-1, places)
    lanes = [[MOTIONS.index(name) for name in names] for names in (ROW_MOTIONS, COLUMN_MOTIONS)]
    in_lane, free = pick(lanes, axis), below(len(MOTIONS), batch, places)
    if motions is not None:
        free = by_weight(motions)
    motion = torch.where(two[:, None], in_lane, free)
    shape = below(len(SHAPES), batch, places)
    visible = [SHAPES.index(name) for name in SPINNING_SHAPES]
    spinning = pick([visible], torch.zeros_like(motion))
    if shapes is not None:
        shape = by_weight(shapes)
        spinning = by_weight(shapes * torch.isin(torch.arange(len(SHAPES)), torch.tensor(visible)))
    shape = torch.where(is_any(motion, SPINNING, MOTIONS), spinning, shape)
    pair = torch.tensor(_SIZE_PAIRS, device=device)[below(len(_SIZE_PAIRS), batch)][:, :places]
    size = torch.where(two[:, None], pair, below(len(SIZES), batch, places))
    colour = below(len(COLOURS), batch, 1)
    if places == 2:
        colour = torch.cat([colour, (colour + 1 + below(len(COLOURS) - 1, batch, 1)) % len(COLOURS)], 1)
    return {
        "background": below(len(BACKGROUNDS), batch),
        "present": two[:, None] | (torch.arange(places, device=device) == 0),
        "colour": colour,
        "shape": shape,
        "size": torch.where(is_any(motion, RESIZING, MOTIONS), -1, size),
        "motion": motion,
    }


def _in_split(draft: dict[str, Tensor], split: str) -> Tensor:
    held = is_held_out(draft["colour"], draft["shape"], draft["background"][:, None], draft["motion"])
    held = (held & draft["present"]).any(1)
    if split == "all":
        return torch.ones_like(held)
    return held if split == "heldout" else ~held


def _numbers(scene: Scene, places: int, generator: torch.Generator) -> list[int]:
    """Background number, then (present, colour, shape, size, motion) of each place, absent ones zero."""
    motions = [item.motion for item in scene.objects]
    if len(motions) not in (1, 2):
        raise ConfigError(f"scene: expected one or two objects, got {len(motions)}")
    sizes = [None if item.size is None else _number("size", item.size, SIZES) for item in scene.objects]
    if len(motions) == 2:
        if not any(all(motion in lanes for motion in motions) for lanes in (ROW_MOTIONS, COLUMN_MOTIONS)):
            raise ConfigError(f"scene: two objects need motions along the same axis, got {motions[0]}, {motions[1]}")
        choices = [pair for pair in _SIZE_PAIRS if all(given in (None, own) for given, own in zip(sizes, pair))]
        if not choices:
            raise ConfigError("scene: two objects of these sizes do not fit beside each other; make one of them small")
    else:
        choices = [(size, size) for size in range(len(SIZES)) if sizes[0] in (None, size)]
    choice = choices[int(torch.randint(len(choices), (), generator=generator, device=generator.device))]
    row = [_number("background", scene.background, BACKGROUNDS)]
    for item, size in zip(scene.objects, choice):
        colour, shape = _number("colour", item.colour, COLOURS), _number("shape", item.shape, SHAPES)
        motion = _number("motion", item.motion, MOTIONS)
        if not is_possible(SHAPES[shape], MOTIONS[motion]):
            raise ConfigError(f"scene: the rotation of a {item.shape} cannot be seen; spin {_either(SPINNING_SHAPES)}")
        row += [1, colour, shape, -1 if item.motion in RESIZING else size, motion]
    return row + [0] * (1 + 5 * places - len(row))


def _number(kind: str, name: str | None, names: Sequence[str]) -> int:
    if name not in names:
        raise ConfigError(f"scene: {kind} is {name!r}; choose {_either(names)}")
    return names.index(str(name))


def _either(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"


def _place(draft: dict[str, Tensor], generator: torch.Generator) -> SceneBatch:
    """Give every object its radius, position, speed and phase."""
    motion, shape = draft["motion"], draft["shape"]

    def uniform(low: Any, high: Any) -> Tensor:
        return low + (high - low) * torch.rand(motion.shape, generator=generator, device=motion.device)

    def among(*names: str) -> Tensor:
        return is_any(motion, names, MOTIONS)

    nominal = torch.tensor([*SIZE_RADIUS.values(), SIZE_RADIUS["small"]], device=motion.device)[draft["size"]]
    nominal = torch.where(among("shrinks"), SIZE_RADIUS["large"], nominal)
    radius = nominal * uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
    largest = torch.where(among("grows"), radius * exp(RESIZE_LOG), radius)
    side, up, down, any_angle = (value * largest for value in extents(shape))
    side, up, down = (torch.where(among(*SPINNING), any_angle, value) for value in (side, up, down))
    x, y = uniform(side, 1 - side), uniform(up, 1 - down)
    if motion.shape[1] == 2:
        x, y = _into_lanes(x, y, draft, (side, up, down), uniform)

    room = torch.where(among("bounces left and right"), 1 - 2 * side, 1 - up - down)
    speed = uniform(*MOVE_SPEED)
    speed = torch.where(among(*_BOUNCING), uniform(*BOUNCE_SPEED).maximum(room / BOUNCE_FRAMES), speed)
    speed = torch.where(among(*ORBITING), 2 * pi / uniform(*ORBIT_FRAMES), speed)
    speed = torch.where(among(*SPINNING), uniform(*SPIN_SPEED), speed)
    speed = torch.where(among(*RESIZING), RESIZE_LOG / uniform(*RESIZE_FRAMES), speed)
    return SceneBatch(
        **draft,
        x=x,
        y=y,
        radius=radius,
        speed=speed,
        phase=torch.where(among(*_BOUNCING), uniform(0.0, 2.0), uniform(0.0, 2 * pi)),
        orbit=uniform(*ORBIT_RADIUS).minimum(0.5 - any_angle),
    )


def _into_lanes(
    x: Tensor, y: Tensor, draft: dict[str, Tensor], reach: tuple[Tensor, Tensor, Tensor], uniform: Uniform
) -> tuple[Tensor, Tensor]:
    """Move the objects of two-object scenes into rows or columns that never touch; all tensors [B, 2]."""
    side, up, down = reach
    rows = is_any(draft["motion"], ROW_MOTIONS, MOTIONS).all(1)
    columns = is_any(draft["motion"], COLUMN_MOTIONS, MOTIONS).all(1)
    rows &= ~columns | (uniform(0.0, 1.0)[:, 0] < 0.5)
    low, high = (torch.where(rows[:, None], value, side) for value in (up, down))
    free = 1 - (low + high).sum(1, keepdim=True)
    # A third of the free space stays between the lanes, a random share of the rest before the one in front.
    margin = free * uniform(0.0, 2 / 3)[:, :1]
    in_front = torch.tensor([True, False], device=x.device) ^ (uniform(0.0, 1.0)[:, :1] < 0.5)
    ahead = torch.where(in_front, 0.0, (low + high).flip(1) + free / 3)
    centre = margin + ahead + low
    two = draft["present"].all(1)
    x = torch.where((two & ~rows)[:, None], centre, x)
    y = torch.where((two & rows)[:, None], centre, y)
    return x, y
