"""What a scene may contain, by name: colours, shapes, sizes, backgrounds, motions, and the held-out combinations.

Lengths are in frame sides, times in frames (:data:`FRAME_RATE` per second), colours in 8-bit RGB.
An attribute's number is its position in the tuple of its names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FRAME_RATE = 8
CLIP_FRAMES = 40

COLOUR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "green": (45, 200, 50),
    "blue": (45, 80, 255),
    "yellow": (250, 230, 30),
    "purple": (150, 35, 210),
    "orange": (255, 135, 0),
    "cyan": (30, 225, 235),
    "pink": (255, 125, 200),
}
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "white": (255, 255, 255),
    "navy": (10, 20, 105),
    "brown": (105, 60, 25),
    "dark green": (0, 90, 40),
}
SIZE_RADIUS: dict[str, float] = {"small": 0.117, "medium": 0.172, "large": 0.242}
SIZE_JITTER = 0.04  # relative, either way

COLOURS = tuple(COLOUR_RGB)
BACKGROUNDS = tuple(BACKGROUND_RGB)
SIZES = tuple(SIZE_RADIUS)
SHAPES = ("circle", "square", "triangle", "star", "ring")
MOTIONS = (
    "moves right",
    "moves left",
    "moves up",
    "moves down",
    "bounces left and right",
    "bounces up and down",
    "orbits clockwise",
    "orbits counterclockwise",
    "spins clockwise",
    "spins counterclockwise",
    "grows",
    "shrinks",
    "stays still",
)

SPINNING_SHAPES = ("square", "triangle", "star")  # shapes whose rotation can be seen
SPINNING = ("spins clockwise", "spins counterclockwise")
ORBITING = ("orbits clockwise", "orbits counterclockwise")
RESIZING = ("grows", "shrinks")  # these run through the sizes, so they carry no size word
ROW_MOTIONS = ("moves right", "moves left", "bounces left and right", "stays still")
COLUMN_MOTIONS = ("moves up", "moves down", "bounces up and down", "stays still")


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object by its names; None where a caption left an attribute open."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    motion: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: a background and one or two objects."""

    background: str | None = None
    objects: tuple[SceneObject, ...]


def is_possible(shape: str, motion: str) -> bool:
    """Whether the motion can be seen on the shape: a spinning circle looks still."""
    return motion not in SPINNING or shape in SPINNING_SHAPES


def is_held_out(colour: Any, shape: Any, background: Any, motion: Any) -> Any:
    """Whether a combination (four attribute numbers: ints, or int64 tensors that broadcast) is kept out of training.

    The mixed-radix number of the combination goes through the 32-bit finaliser of MurmurHash3; every tenth
    value is held out.  No seed is involved, so the split never changes.
    """
    code = ((colour * len(SHAPES) + shape) * len(BACKGROUNDS) + background) * len(MOTIONS) + motion
    code = ((code ^ (code >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    code = ((code ^ (code >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (code ^ (code >> 16)) % 10 == 0


def has_held_out(scene: Scene) -> bool:
    """Whether any object of a fully specified scene is a held-out combination."""
    return any(
        is_held_out(
            COLOURS.index(str(item.colour)),
            SHAPES.index(str(item.shape)),
            BACKGROUNDS.index(str(scene.background)),
            MOTIONS.index(str(item.motion)),
        )
        for item in scene.objects
    )
