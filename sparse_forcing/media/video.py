"""Video files: decoded within bounds and checked against what they declare, encoded whole or not at all.

Shapes: F frames, H height, W width, 3 colour channels (RGB). Decoded frames are uint8; frames to encode are uint8 or
float in [0, 1].

Decoding trusts nothing: only local files, only video containers (no playlists, which may name other files), one
constant picture size, and as many frames as the container declares: a cut mp4 decodes without any error otherwise.

Encoding is H.264 in mp4, BT.709, limited range. Even sizes use 4:2:0, which every player takes; an odd height or width
uses 4:4:4, because 4:2:0 cannot hold it and the picture is never padded, cropped or resized silently.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from sparse_forcing.errors import OutputError, VideoError
from sparse_forcing.files import PathLike, atomic_path, is_file

DEFAULT_MAX_FRAMES = 20_000
DEFAULT_MAX_PIXELS = 1 << 29  # over all frames of one video: 1.6 GB of RGB
MAX_SIDE = 16_384

# Demuxers for one self-contained file. Playlists and scripts (hls, concat, ...) could open other files or the network.
SMALLEST_TREE = 128  # pixels; below, x264's macroblock tree reads memory it never wrote: no two encodings are equal
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,h264,hevc,flv,ogg,gif,ivf,obu,yuv4mpegpipe"
_BT709 = 1  # the code of BT.709 for primaries and transfer (ISO/IEC 23091-2)


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a container declares: `frames` (0 if it does not say), frames per second, pixels, seconds."""

    frames: int
    fps: float
    height: int
    width: int
    duration: float


def probe(path: PathLike) -> VideoInfo:
    """Read the header of a video, decoding nothing.

    Raises:
        VideoError: not a readable video file with one picture size and a frame rate.
    """
    with _open(path) as (_, info):
        return info


def iter_frames(path: PathLike, *, max_frames: int = DEFAULT_MAX_FRAMES) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3] frames one at a time, then check that all declared frames came.

    Raises:
        VideoError: damaged data, a changing picture size, more than `max_frames` frames, or fewer frames than declared.
    """
    with _open(path) as (container, info):
        count, end = 0, 0.0
        for frame in _decoded(container, path):
            if (frame.height, frame.width) != (info.height, info.width):
                raise VideoError(
                    f"{path}: the picture size changes from {info.width}x{info.height} to {frame.width}x{frame.height} "
                    f"at frame {count}"
                )
            count += 1
            if count > max_frames:
                raise VideoError(f"{path}: more than {max_frames} frames; cut it or raise the limit")
            end = max(end, (frame.time or 0.0) + 1.0 / info.fps)
            yield frame.to_ndarray(format="rgb24")
        _check_complete(path, container, info, count, end)


def read_video(
    path: PathLike, *, max_frames: int = DEFAULT_MAX_FRAMES, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[np.ndarray, VideoInfo]:
    """Decode a whole video into memory, within bounds.

    Args:
        max_frames: more frames are refused, not cut.
        max_pixels: bound on F * H * W; memory is three bytes for each.

    Returns:
        uint8 [F, H, W, 3] and what the file declares, with `frames` set to the frames decoded.

    Raises:
        VideoError: see `iter_frames`; or the bounds are exceeded.
    """
    info = probe(path)
    limit = min(max_frames, max_pixels // (info.height * info.width))
    if info.frames > limit or limit < 1:
        raise VideoError(
            f"{path}: {info.frames or 'some'} frames of {info.width}x{info.height} exceed the bound of {max_frames} "
            f"frames and {max_pixels} pixels"
        )
    if info.frames:
        frames = np.empty((info.frames, info.height, info.width, 3), np.uint8)
        for index, frame in enumerate(iter_frames(path, max_frames=info.frames)):
            frames[index] = frame
    else:
        frames = np.stack(list(iter_frames(path, max_frames=limit)))
    return frames, VideoInfo(
        frames=len(frames), fps=info.fps, height=info.height, width=info.width, duration=len(frames) / info.fps
    )


@contextmanager
def _open(path: PathLike) -> Iterator[tuple[Any, VideoInfo]]:
    file = Path(path).absolute()
    if not is_file(file, VideoError):
        raise VideoError(f"{path}: no such video file")
    try:
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        container = av.open(f"file:{file}", options=options, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: not a readable video ({_reason(error)})") from error
    with container:
        yield container, _declared(path, container)


def _declared(path: PathLike, container: Any) -> VideoInfo:
    if not container.streams.video:
        raise VideoError(f"{path}: contains no video stream")
    stream = container.streams.video[0]
    height, width = stream.codec_context.height, stream.codec_context.width
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise VideoError(f"{path}: picture size {width}x{height} is outside 1..{MAX_SIDE}")
    fps = float(stream.average_rate or 0)
    if not (0 < fps <= 1000):
        raise VideoError(f"{path}: frame rate {fps:g} is not usable")
    if stream.duration is not None and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = (container.duration or 0) / 1e6
    return VideoInfo(frames=stream.frames, fps=fps, height=height, width=width, duration=max(duration, 0.0))


def _decoded(container: Any, path: PathLike) -> Iterator[Any]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    # Without this, damaged blocks are concealed: the frames look plausible and nothing is said.
    stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise VideoError(f"{path}: damaged video data")
            yield frame
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path}: damaged video data ({_reason(error)})") from error


def _check_complete(path: PathLike, container: Any, info: VideoInfo, count: int, end: float) -> None:
    if count == 0:
        raise VideoError(f"{path}: no frame could be decoded")
    if info.frames and count != info.frames:
        raise VideoError(
            f"{path}: declares {info.frames} frames but {count} could be decoded; the file is cut or damaged"
        )
    # Containers without a frame count (webm): the last picture must reach the declared end, half a second aside.
    alone = len(container.streams) == 1 or container.streams.video[0].duration is not None
    if not info.frames and alone and end < info.duration - 0.5:
        raise VideoError(
            f"{path}: declares {info.duration:.2f} s but ends after {end:.2f} s; the file is cut or damaged"
        )


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class VideoWriter:
    """Write an H.264 mp4 frame by frame; the file appears under its name only when the block ends well.

    with VideoWriter("out.mp4", fps=16, height=64, width=64, scale=4) as writer:
        writer.write(frames)                  # [F, 64, 64, 3], any number of times

    Args:
        fps: frames per second, above 0.
        height, width: pixels of the frames that are written in.
        scale: every pixel becomes `scale` x `scale` pixels in the file, so that tiny pictures can be watched.
        crf: x264's constant quality, lower is better; 12 is visually lossless.

    The bytes depend on the frames and these arguments alone: neither on how the frames are grouped into `write` calls
    nor on the machine's core count.

    Raises:
        OutputError: bad arguments, frames of another shape, no frames at all, or the file cannot be written.
    """

    def __init__(self, path: PathLike, *, fps: float, height: int, width: int, scale: int = 1, crf: int = 12):
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            raise OutputError(f"cannot write {path}: frame rate {fps} is outside (0, 1000]")
        if scale < 1 or not (0 < height * scale <= MAX_SIDE and 0 < width * scale <= MAX_SIDE):
            raise OutputError(
                f"cannot write {path}: picture size {width}x{height} times {scale} is outside 1..{MAX_SIDE}"
            )
        self.path, self.frames_written = path, 0
        self.height, self.width, self._scale = height, width, scale
        self._rate = Fraction(fps).limit_denominator(1001)
        self._crf = crf

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._container = stack.enter_context(
                av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
            )
            self._stream = self._add_stream()
            self._stack = stack.pop_all()
        return self

    def _add_stream(self) -> Any:
        stream: Any = self._container.add_stream("libx264", rate=self._rate)
        stream.height, stream.width = self.height * self._scale, self.width * self._scale
        odd = stream.height % 2 or stream.width % 2
        stream.pix_fmt = "yuv444p" if odd else "yuv420p"
        # A fixed number of threads: x264's output depends on it.
        stream.options = {"crf": str(self._crf), "preset": "fast", "threads": "2"}
        if min(stream.height, stream.width) < SMALLEST_TREE:
            stream.options = {**stream.options, "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = _BT709
        return stream

    def write(self, frames: Any) -> None:
        """Append frames [F, H, W, 3]: uint8, or float in [0, 1] (values outside are clipped). Arrays or CPU tensors."""
        pictures = to_uint8(frames)
        if pictures.ndim != 4 or pictures.shape[1:] != (self.height, self.width, 3):
            raise OutputError(
                f"cannot write {self.path}: frames have shape {list(pictures.shape)}, "
                f"expected [F, {self.height}, {self.width}, 3]"
            )
        for picture in pictures:
            if self._scale > 1:
                picture = picture.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace=Colorspace.ITU709)
            frame.pts = self.frames_written
            frame.time_base = 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self.frames_written += 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self.frames_written == 0:
                raise OutputError(f"cannot write {self.path}: no frames")
            self._container.mux(self._stream.encode(None))


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
