"""Video files: decoded within bounds and as players show them, checked against what they declare; encoded in encode.py.

Shapes: F frames, H height, W width, 3 colour channels (RGB). Decoded frames are uint8.

Frames come at a constant rate, so that frame k is what is shown k / fps seconds after the first: a video of a constant
rate gives every frame once; one whose rate varies, or of which another rate is asked for, the frame on show then.
Decoding trusts nothing (see container.py): one constant picture size, and as many frames as the container declares. A
cut mp4 decodes without any error otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import TypeVar

import numpy as np

from sparse_forcing.errors import ConfigError, VideoError
from sparse_forcing.files import PathLike
from sparse_forcing.media.container import MAX_FPS, MAX_SIDE, Video, open_video
from sparse_forcing.media.display import show
from sparse_forcing.media.encode import VideoWriter, to_uint8, write_video

__all__ = [
    "MAX_SIDE",
    "VideoInfo",
    "VideoWriter",
    "count_frames",
    "iter_frames",
    "iterate_video",
    "probe",
    "read_video",
    "to_uint8",
    "write_video",
]

DEFAULT_MAX_FRAMES = 20_000
DEFAULT_MAX_PIXELS = 1 << 29  # over all frames of one video: 1.6 GB of RGB
PIECE_PIXELS = 1 << 25  # over the frames of a piece: 0.1 GB of RGB
EARLY = 1 / 60  # seconds; half a frame at 30 frames/s, and more than containers round times by
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Frames to be expected, frames per second, pixels as they are shown, seconds."""

    frames: int
    fps: float
    height: int
    width: int
    duration: float


def probe(path: PathLike) -> VideoInfo:
    """Read the header, time stamps and first picture of a video.

    Raises:
        VideoError: not a readable video file with a frame rate.
    """
    with open_video(path) as video:
        return _info(video)


def _info(video: Video) -> VideoInfo:
    frames = video.declared or video.stamps
    return VideoInfo(frames=frames, fps=video.fps, height=video.height, width=video.width, duration=frames / video.fps)


def iter_frames(
    path: PathLike, *, fps: float | None = None, max_frames: int = DEFAULT_MAX_FRAMES
) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] frames one at a time, then check that all declared frames came.

    Args:
        fps: frames per second to yield (those on show at the time, repeated where the video is slower); None: its own.
        max_frames: more frames, stored or yielded, are refused, not cut.

    Raises:
        VideoError: damaged data, a changing picture size, more than `max_frames` frames, or fewer frames than declared.
        ConfigError: an `fps` that is no rate.
    """
    _check_rate(fps)
    with open_video(path) as video:
        pictures = _pictures(video, max_frames)
        if fps is None and video.constant:
            yield from (picture for _, picture in pictures)
            return
        for count, picture in enumerate(at_rate(pictures, fps or video.fps, video.last), 1):
            if count > max_frames:
                raise VideoError(f"{path}: more than {max_frames} frames; cut it or raise the limit")
            yield picture


def count_frames(path: PathLike, fps: float, *, max_frames: int = DEFAULT_MAX_FRAMES) -> int:
    """How many frames `iter_frames` yields at `fps`: everything is decoded, nothing is kept. Raises as it does."""
    _check_rate(fps)
    with open_video(path) as video:
        count = 0
        for count, _ in enumerate(at_rate(((time, None) for time, _ in video.frames()), fps, video.last), 1):
            if count > max_frames:
                raise VideoError(f"{path}: more than {max_frames} frames; cut it or raise the limit")
        return count


def _check_rate(fps: float | None) -> None:
    """Refuse a wanted rate that is none: with NaN or 0 frames would be lost in silence."""
    if fps is not None and not (isinstance(fps, Real) and 0 < fps <= MAX_FPS):
        raise ConfigError(f"fps must be a number above 0 and at most {MAX_FPS}, not {fps!r:.60}")


def _pictures(video: Video, max_frames: int) -> Iterator[tuple[float, np.ndarray]]:
    last = -np.inf
    for count, (time, frame) in enumerate(video.frames()):
        picture = show(frame, video.aspect, video.path)
        height, width = picture.shape[:2]
        if (height, width) != (video.height, video.width):
            raise VideoError(
                f"{video.path}: the picture size changes from {video.width}x{video.height} to {width}x{height} at "
                f"frame {count}"
            )
        if count >= max_frames:
            raise VideoError(f"{video.path}: more than {max_frames} frames; cut it or raise the limit")
        if time < last:
            raise VideoError(f"{video.path}: frame {count} is to be shown before the frame that it follows")
        last = time
        yield time, picture


def at_rate(timed: Iterator[tuple[float, T]], fps: float, shown: float) -> Iterator[T]:
    """The items on show 0, 1 / fps, 2 / fps, ... seconds after the first, or nearer in time and about to be shown.

    timed: (seconds, item), times rising. shown: seconds for which the last item stays.
    """
    count, start = 0, 0.0
    before: tuple[float, T] | None = None
    for time, item in timed:
        if before is None:
            start = time
        else:
            while count / fps <= time - start - min((time - before[0]) / 2, EARLY):
                yield before[1]
                count += 1
        before = (time, item)
    if before is not None:
        end = before[0] - start + shown - min(shown, 1 / fps) / 2
        while count / fps < end:
            yield before[1]
            count += 1


def iterate_video(
    path: PathLike, frames_per_piece: int, *, fps: float | None = None, max_frames: int = DEFAULT_MAX_FRAMES
) -> Iterator[np.ndarray]:
    """Decode a video in pieces uint8 [F, H, W, 3] of `frames_per_piece` frames, the last one of what is left.

    Pieces of large pictures are shorter: none has more than PIECE_PIXELS pixels, unless a single frame has.

    Raises:
        VideoError: see `iter_frames`; the pieces before the damage have been yielded by then.
    """
    piece: list[np.ndarray] = []
    for frame in iter_frames(path, fps=fps, max_frames=max_frames):
        piece.append(frame)
        if len(piece) >= min(frames_per_piece, PIECE_PIXELS // (frame.shape[0] * frame.shape[1])):
            yield np.stack(piece)
            piece = []
    if piece:
        yield np.stack(piece)


def read_video(
    path: PathLike,
    *,
    fps: float | None = None,
    max_frames: int = DEFAULT_MAX_FRAMES,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> tuple[np.ndarray, VideoInfo]:
    """Decode a whole video into memory, within bounds.

    Args:
        fps: see `iter_frames`.
        max_frames: more frames are refused, not cut.
        max_pixels: bound on F * H * W; memory is three bytes for each.

    Returns:
        uint8 [F, H, W, 3], and what there is of it.

    Raises:
        VideoError: see `iter_frames`; or the bounds are exceeded.
    """
    _check_rate(fps)
    info = probe(path)
    limit = min(max_frames, max_pixels // (info.height * info.width))
    expected = info.frames if fps is None else int(info.duration * fps)
    if expected > limit or limit < 1:
        raise VideoError(
            f"{path}: {expected} frames of {info.width}x{info.height} exceed the bound of {max_frames} "
            f"frames and {max_pixels} pixels"
        )
    frames, count = np.empty((max(1, expected), info.height, info.width, 3), np.uint8), 0
    for frame in iter_frames(path, fps=fps, max_frames=limit):
        if count == len(frames):  # a container that does not say how many there are
            frames = np.concatenate([frames, np.empty_like(frames)])
        frames[count] = frame
        count += 1
    rate = fps or info.fps
    return frames[:count], replace(info, frames=count, fps=rate, duration=count / rate)
