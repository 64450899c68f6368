"""A video, a range of its frames, and features computed once and shared between metrics.

Every metric is a function of a `View`: the whole clip for a plain score, two seconds of it for a drift curve, one
VBench-Long clip. A metric never holds the whole video: features are per frame and computed piece by piece, pairs and
triples of frames pass by as the video is decoded, and a few frames are picked. What is kept is small: rows of features
(a view slices what was computed for the whole clip) and one number for each group of frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparse_forcing.errors import VideoError
from sparse_forcing.eval.measuring.frames import FileSource, FrameSource
from sparse_forcing.eval.measuring.kept import FeatureStore
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.files import sha256_file

FrameFunction = Callable[[np.ndarray], np.ndarray]
GroupFunction = Callable[..., float]


@dataclass(kw_only=True)
class Clip:
    """One video: where its frames come from, frames per second, what it was meant to show, shared features."""

    source: FrameSource
    fps: float
    entry: Entry
    sha256: str = ""
    store: FeatureStore | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    groups: dict[tuple[str, tuple[int, ...]], float] = field(default_factory=dict, repr=False)

    def whole(self) -> View:
        """The view of all frames."""
        return View(clip=self, start=0, stop=self.source.count)

    def per_frame(self, key: str, compute: FrameFunction, *, keep: bool) -> np.ndarray:
        """compute(frames) -> [n, ...] over pieces, once for the clip: [F, ...]; `keep` stores it for the next run."""
        if key not in self.features:
            store = self.store if keep and self.sha256 else None
            value = store.load(self.sha256, key) if store else None
            if value is None or len(value) != self.source.count:
                value = np.concatenate([self._rows(key, compute, piece) for _, piece in self.source.pieces()])
                if store:
                    store.save(self.sha256, key, value)
            self.features[key] = value
        return self.features[key]

    @staticmethod
    def _rows(key: str, compute: FrameFunction, piece: np.ndarray) -> np.ndarray:
        rows = compute(piece)
        if len(rows) != len(piece):
            raise ValueError(f"feature {key}: {len(rows)} rows for {len(piece)} frames")
        return rows

    def per_group(self, key: str, compute: GroupFunction, groups: Sequence[tuple[int, ...]]) -> np.ndarray:
        """compute(*frames) for each group of frame numbers, each group at most once for the clip: float64 [G].

        One pass over the frames that are missing; only frames that a later group still needs are held.
        """
        missing = [group for group in dict.fromkeys(groups) if (key, group) not in self.groups]
        for group, frames in self._gather(missing):
            self.groups[key, group] = float(compute(*frames))
        return np.array([self.groups[key, group] for group in groups], dtype=np.float64)

    def _gather(self, groups: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], list[np.ndarray]]]:
        """Yield (group, its frames) in the order in which the groups are complete."""
        if not groups:
            return
        uses = Counter(number for group in groups for number in set(group))
        waiting = sorted(groups, key=max)[::-1]
        held: dict[int, np.ndarray] = {}
        for first, piece in self.source.pieces(min(uses), max(uses) + 1):
            for number, frame in enumerate(piece, first):
                if number in uses:
                    held[number] = frame
                while waiting and max(waiting[-1]) <= number:
                    group = waiting.pop()
                    yield group, [held[member] for member in group]
                    for member in set(group):
                        uses[member] -= 1
                        if not uses[member]:
                            del held[member]
            # A view into a piece would keep the whole piece alive.
            held = {number: frame if frame.base is None else frame.copy() for number, frame in held.items()}


@dataclass(frozen=True, kw_only=True)
class View:
    """Frames start..stop of a clip."""

    clip: Clip
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.clip.source.count:
            raise ValueError(f"frames {self.start}..{self.stop} of a clip of {self.clip.source.count}")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return self.clip.source.height

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return self.clip.source.width

    @property
    def short_side(self) -> int:
        """The smaller of height and width."""
        return min(self.height, self.width)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.clip.fps

    @property
    def text(self) -> str | None:
        """The prompt to judge by."""
        return self.clip.entry.text

    def part(self, start: int, stop: int) -> View:
        """A view of frames start..stop counted inside this view."""
        return View(clip=self.clip, start=self.start + start, stop=self.start + stop)

    def pieces(self) -> Iterator[np.ndarray]:
        """This view's frames in order, a few at a time: uint8 [n, H, W, 3]."""
        for _, piece in self.clip.source.pieces(self.start, self.stop):
            yield piece

    def pick(self, numbers: Sequence[int]) -> np.ndarray:
        """A few frames by their number inside this view: uint8 [n, H, W, 3]."""
        return self.clip.source.pick([self.start + number for number in numbers])

    def per_frame(self, key: str, compute: FrameFunction, *, keep: bool = False) -> np.ndarray:
        """This view's rows of a per-frame feature; computed for the whole clip on first use."""
        return self.clip.per_frame(key, compute, keep=keep)[self.start : self.stop]

    def per_group(self, key: str, compute: GroupFunction, groups: Sequence[tuple[int, ...]]) -> np.ndarray:
        """compute(*frames) for groups of frame numbers inside this view: [G]; see `Clip.per_group`."""
        shifted = [tuple(self.start + number for number in group) for group in groups]
        return self.clip.per_group(key, compute, shifted)

    def pairs(self, key: str, compute: GroupFunction, step: int = 1) -> np.ndarray:
        """compute(a, b) for frames (0, step), (step, 2 step), ... of this view: [P], P may be 0."""
        return self.per_group(key, compute, [(first, first + step) for first in range(0, len(self) - step, step)])


def open_clip(entry: Entry, *, max_frames: int, max_pixels: int, store: FeatureStore | None = None) -> Clip:
    """Open a video within bounds, decoding it once; refuses one that decodes to other than it declares.

    Raises VideoError with the path in one line.
    """
    try:
        digest = sha256_file(entry.video)
    except OSError as error:
        raise VideoError(f"{entry.video}: cannot be read ({error.strerror})") from error
    source = FileSource(entry.video, max_frames=max_frames, max_pixels=max_pixels)
    return Clip(source=source, fps=source.fps, entry=entry, sha256=digest, store=store)
