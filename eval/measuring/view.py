"""A decoded video, a range of its frames, and features computed once and shared between metrics.

Every metric is a function of a `View`: the whole clip for a plain score, two seconds of it for a drift curve, one
VBench-Long clip. Features are per frame, so a view slices what was computed for the whole clip: one pass of a network
serves all metrics and all windows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparse_forcing.errors import VideoError
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.files import atomic_write_bytes, sha256_file
from sparse_forcing.media.video import read_video

FrameFunction = Callable[[np.ndarray], np.ndarray]
PairFunction = Callable[[np.ndarray, np.ndarray], float]


class FeatureStore:
    """Feature arrays on disk, one file for each video (by content) and extractor (by weights and settings)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, content: str, key: str) -> Path:
        """Where the array of a video (sha256 of its bytes) and an extractor key lies."""
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        return self.folder / "features" / content[:2] / f"{content[:32]}-{name}.npy"

    def load(self, content: str, key: str) -> np.ndarray | None:
        """The stored array, or None when it is absent or damaged (it is then computed again)."""
        try:
            return np.load(self.path(content, key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None

    def save(self, content: str, key: str, value: np.ndarray) -> None:
        """Write an array, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        atomic_write_bytes(self.path(content, key), buffer.getvalue())


@dataclass(kw_only=True)
class Clip:
    """One decoded video: frames uint8 [F, H, W, 3] RGB, frames per second, where it came from, shared features."""

    frames: np.ndarray
    fps: float
    entry: Entry
    sha256: str = ""
    store: FeatureStore | None = None
    memo: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def whole(self) -> View:
        """The view of all frames."""
        return View(clip=self, start=0, stop=len(self.frames))

    def per_frame(self, key: str, compute: FrameFunction, *, keep: bool) -> np.ndarray:
        """compute(frames) -> [F, ...] once for the clip; with `keep` also stored on disk for the next run."""
        if key not in self.memo:
            store = self.store if keep and self.sha256 else None
            value = store.load(self.sha256, key) if store else None
            if value is None or len(value) != len(self.frames):
                value = compute(self.frames)
                if len(value) != len(self.frames):
                    raise ValueError(f"feature {key}: {len(value)} rows for {len(self.frames)} frames")
                if store:
                    store.save(self.sha256, key, value)
            self.memo[key] = value
        return self.memo[key]


@dataclass(frozen=True, kw_only=True)
class View:
    """Frames start..stop of a clip."""

    clip: Clip
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= len(self.clip.frames):
            raise ValueError(f"frames {self.start}..{self.stop} of a clip of {len(self.clip.frames)}")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def frames(self) -> np.ndarray:
        """uint8 [F, H, W, 3] RGB."""
        return self.clip.frames[self.start : self.stop]

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

    def per_frame(self, key: str, compute: FrameFunction, *, keep: bool = False) -> np.ndarray:
        """This view's rows of a per-frame feature; computed for the whole clip on first use."""
        return self.clip.per_frame(key, compute, keep=keep)[self.start : self.stop]

    def pairs(self, key: str, compute: PairFunction, step: int = 1) -> np.ndarray:
        """compute(a, b) for frames (0, step), (step, 2 step), ... of this view, each pair of frames at most once.

        Returns [P]; P may be 0.
        """
        memo = self.clip.memo
        values = []
        for first in range(self.start, self.stop - step, step):
            name = f"{key}:{first}:{first + step}"
            if name not in memo:
                memo[name] = np.array(compute(self.clip.frames[first], self.clip.frames[first + step]))
            values.append(memo[name])
        return np.stack(values) if values else np.zeros(0)


def open_clip(entry: Entry, *, max_frames: int, max_pixels: int, store: FeatureStore | None = None) -> Clip:
    """Decode a whole video within bounds; refuses one that decodes to other than it declares.

    Raises VideoError with the path in one line.
    """
    try:
        digest = sha256_file(entry.video)
    except OSError as error:
        raise VideoError(f"{entry.video}: cannot be read ({error.strerror})") from error
    frames, info = read_video(entry.video, max_frames=max_frames, max_pixels=max_pixels)
    return Clip(frames=frames, fps=info.fps, entry=entry, sha256=digest, store=store)
