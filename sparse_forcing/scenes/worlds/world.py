"""One world as plain numbers: objects, panels in front of them, the ground, and where everything is in every frame.

Lengths are in frame sides, x to the right and y down on the screen; times in frames. A box is (left, top, right,
bottom).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_forcing.scenes.sample import EXTENT
from sparse_forcing.scenes.vocabulary import SIZE_RADIUS

Box = tuple[float, float, float, float]
HIDDEN, PARTLY, WHOLE = 0, 1, 2
MARGIN = 1 / 64  # an object counts as hidden this far inside a panel; hidden ones are not drawn
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a memory has to keep of an object."""

    colour: str
    shape: str
    size: str
    scale: float = 1.0  # of the size's radius: a few percent of chance

    @property
    def radius(self) -> float:
        return SIZE_RADIUS[self.size] * self.scale

    @property
    def reach(self) -> tuple[float, float, float]:
        """How far the upright shape reaches to the side, up and down."""
        side, up, down, _ = (value * self.radius for value in EXTENT[self.shape])
        return side, up, down

    @property
    def extent(self) -> float:
        """The largest reach."""
        return max(self.reach)


@dataclass(frozen=True, kw_only=True)
class Item:
    """An object and its centre on the screen in every frame; frames where ``shown`` is False lack it altogether."""

    identity: Identity
    x: tuple[float, ...]
    y: tuple[float, ...]
    shown: tuple[bool, ...] | None = None

    def box(self, frame: int) -> Box | None:
        """The box around it, wherever it is; None where it is not shown."""
        if self.shown is not None and not self.shown[frame]:
            return None
        side, up, down = self.identity.reach
        x, y = self.x[frame], self.y[frame]
        return x - side, y - up, x + side, y + down


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A rectangle of one colour (8-bit RGB) in front of all objects and of the panels before it."""

    rgb: tuple[int, int, int]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a kind of world decides: objects, panels, where the camera is (None: it stays), and for a parade which
    object is asked for (from 0) from the frame ``question`` on."""

    items: Sequence[Item]
    panels: Sequence[Panel] = ()
    camera: tuple[float, ...] | None = None
    asked: int | None = None
    question: int = 0


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What lies behind everything: a function of the place, which the camera looks at a screen wide.

    ``seed`` draws its details, ``sign`` ("brightness" or "ruler") says by what a place can be told from another;
    ``span`` is the least and the most camera position.
    """

    kind: str
    seed: int
    sign: str
    span: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class World:
    """A clip of a world, complete but for the pixels; ``camera`` is the place of the screen's left edge.

    ``prompts`` says from which frame on which prompt holds; none names what comes back. ``story`` is the one caption of
    the whole clip.
    """

    kind: str
    frames: int
    seed: int
    index: int
    ground: Ground
    camera: tuple[float, ...]
    items: tuple[Item, ...]
    panels: tuple[Panel, ...] = ()
    story: str = ""
    prompts: dict[int, str] = field(default_factory=dict)
    frame_noise: float = 0.0

    def visibility(self, item: int) -> list[int]:
        """HIDDEN, PARTLY or WHOLE, frame by frame."""
        boxes = map(self.items[item].box, range(self.frames))
        return [self._visible(box, frame) for frame, box in enumerate(boxes)]

    def seen(self, item: int, frame: int) -> Box | None:
        """The box of an object in a frame, None where nothing of it shows."""
        box = self.items[item].box(frame)
        return box if self._visible(box, frame) else None

    def visible_boxes(self) -> list[dict[int, Box]]:
        """For every frame the boxes of all objects of which anything shows, by object number."""
        rows = [
            [(number, self.seen(number, frame)) for number in range(len(self.items))] for frame in range(self.frames)
        ]
        return [{number: box for number, box in row if box is not None} for row in rows]

    def _visible(self, box: Box | None, frame: int) -> int:
        if box is None or box[0] >= 1 or box[1] >= 1 or box[2] <= 0 or box[3] <= 0:
            return HIDDEN
        inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], 1.0), min(box[3], 1.0))
        seen = WHOLE if inside == box else PARTLY
        for panel in self.panels:
            over = panel.boxes[frame]
            if _contains(over, inside):
                return HIDDEN
            if over[0] < box[2] and box[0] < over[2] and over[1] < box[3] and box[1] < over[3]:
                seen = PARTLY
        return seen


def _contains(outer: Box, inner: Box) -> bool:
    """Whether a panel hides a box: MARGIN inside it, or at the edge of the screen."""
    inset = MARGIN - _EPSILON
    return (
        (outer[0] <= inner[0] - inset or outer[0] <= 0)
        and (outer[1] <= inner[1] - inset or outer[1] <= 0)
        and (outer[2] >= inner[2] + inset or outer[2] >= 1)
        and (outer[3] >= inner[3] + inset or outer[3] >= 1)
    )
