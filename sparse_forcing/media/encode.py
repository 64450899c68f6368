"""Video files, encoded whole or not at all.

Frames are uint8 or float in [0, 1]. Encoding is H.264 in mp4, BT.709, limited range. Even sizes use 4:2:0, which every
player takes; an odd height or width uses 4:4:4, because 4:2:0 cannot hold it and the picture is never padded, cropped
or resized silently.
"""

from __future__ import annotations

import math
import os
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sparse_forcing.errors import OutputError
from sparse_forcing.files import PathLike, atomic_path
from sparse_forcing.media.coded import SEGMENT_FRAMES, Coded, KeptSegments, Mp4File, PictureCoder
from sparse_forcing.media.container import MAX_SIDE


class VideoWriter:
    """Write an H.264 mp4 frame by frame; the file appears under its name only when the block ends well.

    with VideoWriter("out.mp4", fps=16, height=64, width=64, scale=4) as writer:
        writer.write(frames)                  # [F, 64, 64, 3], any number of times

    Args:
        fps: frames per second, above 0.
        height, width: pixels of the frames that are written in.
        scale: every pixel becomes `scale` x `scale` pixels in the file, so that tiny pictures can be watched.
        crf: x264's constant quality, lower is better; 12 is visually lossless.
        kept: begin with the frames that these hold, and leave in them what a later writer can begin with.
        live: a second file with the same pictures, which can be played at any time while it is written. It is not
            atomic: it stays as it is when the block ends, however that is.

    The bytes depend on the frames and these arguments alone: neither on how the frames are grouped into `write` calls
    nor on the machine's core count, nor on where a writer went on from kept frames.

    Raises:
        OutputError: bad arguments, frames of another shape, no frames at all, or the file cannot be written.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        fps: float,
        height: int,
        width: int,
        scale: int = 1,
        crf: int = 12,
        kept: KeptSegments | None = None,
        live: Path | None = None,
    ) -> None:
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            raise OutputError(f"cannot write {path}: frame rate {fps} is outside (0, 1000]")
        if scale < 1 or not (0 < height * scale <= MAX_SIDE and 0 < width * scale <= MAX_SIDE):
            raise OutputError(
                f"cannot write {path}: picture size {width}x{height} times {scale} is outside 1..{MAX_SIDE}"
            )
        self.path, self.frames_written = path, 0
        self.height, self.width, self._scale = height, width, scale
        self._shape = (Fraction(fps).limit_denominator(1001), height * scale, width * scale, crf)
        self._kept, self._live = kept, live
        self._files: list[Mp4File] = []

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            self._open(stack, stack.enter_context(atomic_path(self.path)))
            if self._live is not None:
                self._live.parent.mkdir(parents=True, exist_ok=True)
                self._open(stack, self._live, growing=True)
            for segment in () if self._kept is None else self._kept.segments():
                self._mux(segment)
                self.frames_written += SEGMENT_FRAMES
            self._coder = PictureCoder(*self._shape, first=self.frames_written)
            for picture in () if self._kept is None else self._kept.take_tail():
                self._add(picture)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack, path: Path, *, growing: bool = False) -> None:
        file = Mp4File(path, *self._shape, growing=growing)
        stack.callback(file.close)
        self._files.append(file)

    def _mux(self, pictures: list[Coded]) -> None:
        for file in self._files:
            file.add(pictures)

    def write(self, frames: Any) -> None:
        """Append frames [F, H, W, 3]: uint8, or float in [0, 1] (values outside are clipped). Arrays or CPU tensors."""
        pictures = to_uint8(frames)
        if pictures.ndim != 4 or pictures.shape[1:] != (self.height, self.width, 3):
            raise OutputError(
                f"cannot write {self.path}: frames have shape {list(pictures.shape)}, "
                f"expected [F, {self.height}, {self.width}, 3]"
            )
        for picture in pictures:
            self._add(picture)

    def _add(self, picture: np.ndarray) -> None:
        large = picture
        if self._scale > 1:
            large = picture.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
        coded = self._coder.code(large)
        self._mux(coded)
        self.frames_written += 1
        if self._kept is not None:
            self._kept.add(picture, coded)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            with suppress(Exception):  # what the coder holds back can still be watched
                for file in self._files[1:]:
                    file.add(self._coder.finish())
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self.frames_written == 0:
                raise OutputError(f"cannot write {self.path}: no frames")
            self._mux(self._coder.finish())


def to_uint8(frames: Any) -> np.ndarray:
    """Frames as uint8: floats in [0, 1] are scaled by 255 and rounded, values outside clipped; NaN is an error."""
    array = np.asarray(frames)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise OutputError(f"frames must be uint8 or float in [0, 1], not {array.dtype}")
    if np.isnan(array).any():
        raise OutputError("frames contain NaN")
    return (np.clip(array, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def write_video(path: PathLike, frames: Any, fps: float, *, scale: int = 1) -> None:
    """Write frames [F, H, W, 3] (see `VideoWriter`) as one mp4, atomically. Raises OutputError."""
    pictures = to_uint8(frames)
    if pictures.ndim != 4:
        raise OutputError(
            f"cannot write {os.fspath(path)}: frames have shape {list(pictures.shape)}, expected [F, H, W, 3]"
        )
    with VideoWriter(path, fps=fps, height=pictures.shape[1], width=pictures.shape[2], scale=scale) as writer:
        writer.write(pictures)
