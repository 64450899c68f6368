"""Video containers: one local file opened within bounds, its first real video stream, when its frames are shown.

Nothing in a file is trusted: only containers that hold everything themselves are opened (a playlist may name other
files or the network), pictures beyond MAX_PIXELS are refused before they are decoded, and whatever the decoder raises
becomes a VideoError of that file. A cover picture is no video. An edit list, as a cut without encoding leaves it, says
which of the stored frames are shown: only those are decoded and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from sparse_forcing.errors import SparseForcingError, VideoError
from sparse_forcing.files import PathLike, is_file
from sparse_forcing.media.display import shown_size, square_size

MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 1 << 25  # of a picture, which a decoder keeps up to sixteen of; 7680x4320 fits
MAX_FPS = 1000
MAX_PACKETS = 1 << 20
CUT_SECONDS = 0.5  # a file without a frame count may end this much before the end that it declares

# Demuxers for one self-contained file. Playlists and scripts (hls, concat, ...) could open other files or the network.
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,h264,hevc,flv,ogg,gif,ivf,obu,yuv4mpegpipe"
_NOT_A_VIDEO = ("attached_pic", "timed_thumbnails", "still_image")
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave the transparency out


@contextmanager
def explain_decoding(path: PathLike, what: str) -> Iterator[None]:
    """Whatever PyAV raises in the block becomes a VideoError of one line that names `path`."""
    try:
        yield
    except SparseForcingError:
        raise
    except Exception as error:  # PyAV raises far more than its own classes on damaged files
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        raise VideoError(f"{path}: {what} ({reason:.200})") from error


class Video:
    """An open video whose first picture is decoded.

    Attributes:
        height, width: pixels as players show them: turned, with square pixels.
        aspect: width of a stored pixel over its height.
        declared: frames that the container says are shown, 0 if it does not say.
        stamps: frames found in the container, whether or not they decode.
        fps: frames per second, the mean where `constant` is False; last: seconds for which the last frame stays.
    """

    def __init__(self, path: PathLike, container: Any, found: _Stamps) -> None:
        self.path, self.stamps, self._container = path, found.packets, container
        self._stream = first_video(path, container)
        self.aspect = Fraction(self._stream.sample_aspect_ratio or 1)
        self.declared = _count_declared_frames(container, self._stream)
        self.fps, self.constant = _rate(found.times, float(self._stream.average_rate or 0))
        if not 0 < self.fps <= MAX_FPS:
            raise VideoError(f"{path}: has a frame rate of {self.fps:g}, which must be above 0 and at most {MAX_FPS}")
        # AVI stores no times of display, only places: the first frame shown has the first place, and so on.
        self._times = found.times if container.format.name == "avi" else None
        self.last = 1 / self.fps if self.constant or not found.last > 0 else found.last
        self._frames = self._decode()
        first = next(self._frames, None)
        if first is None:
            raise VideoError(f"{path}: no frame could be decoded")
        check_size(path, *square_size(first, self.aspect))
        self.height, self.width = shown_size(first, self.aspect, path)
        self._frames = chain([first], self._frames)

    def frames(self) -> Iterator[tuple[float, Any]]:
        """(seconds, decoded frame) of every frame, once; raises VideoError at the end where frames were missing."""
        count, end, time = 0, 0.0, 0.0
        with explain_decoding(self.path, "damaged video data"):
            for frame in self._frames:
                time = self._time(count, frame)
                end, count = max(end, time + 1 / self.fps), count + 1
                yield time, frame
            self._check_complete(count, end)

    def _time(self, count: int, frame: Any) -> float:
        if self._times is not None and count < len(self._times):
            return float(self._times[count])
        return count / self.fps if frame.time is None else float(frame.time)

    def _decode(self) -> Iterator[Any]:
        decoder = self._decoder()
        # Without this, damaged blocks are concealed: the frames look plausible and nothing is said.
        decoder.options = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(MAX_PIXELS)}
        with explain_decoding(self.path, "damaged video data"):
            for packet in self._container.demux(self._stream):
                for frame in decoder.decode(packet):
                    if frame.is_corrupt:
                        raise VideoError(f"{self.path}: damaged video data")
                    yield frame

    def _decoder(self) -> Any:
        context, tags = self._stream.codec_context, self._stream.metadata
        if any(name.lower() == "alpha_mode" and value == "1" for name, value in tags.items()):
            with explain_decoding(self.path, "its transparency cannot be decoded here"):
                return av.CodecContext.create(_ALPHA_DECODERS[context.name], "r")
        self._stream.thread_type = "AUTO"
        return context

    def _check_complete(self, count: int, end: float) -> None:
        if self.declared and count != self.declared:
            raise VideoError(
                f"{self.path}: declares {self.declared} frames but {count} could be decoded; the file is cut or damaged"
            )
        # Containers without a frame count (webm): the last picture must nearly reach the declared end.
        stream, duration = self._stream, (self._container.duration or 0) / 1e6
        if stream.duration is not None and stream.time_base:
            duration = float(stream.duration * stream.time_base)
        elif len(self._container.streams) > 1:
            return  # the end may be that of the sound
        if not self.declared and end < duration - CUT_SECONDS:
            raise VideoError(
                f"{self.path}: declares {duration:.2f} s but ends after {end:.2f} s; the file is cut or damaged"
            )


@contextmanager
def open_video(path: PathLike) -> Iterator[Video]:
    """Open a video, decoding its first picture.

    Raises:
        VideoError: not a readable video file with a frame rate, or its pictures are too large.
    """
    with _open(path) as container, explain_decoding(path, "not a readable video"):
        stamps = _time_stamps(path, container)
    with _open(path) as container:
        with explain_decoding(path, "not a readable video"):
            video = Video(path, container, stamps)
        yield video


@contextmanager
def _open(path: PathLike) -> Iterator[Any]:
    file = Path(path).absolute()
    if not is_file(file, VideoError):
        raise VideoError(f"{path}: no such video file")
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    with explain_decoding(path, "not a readable video"):
        container = av.open(f"file:{file}", options=options, metadata_errors="replace")
    with container:
        yield container


def first_video(path: PathLike, container: Any) -> Any:
    """The first stream that is a video and not a cover or a thumbnail. Raises VideoError."""
    hidden = av.stream.Disposition(0)
    for name in _NOT_A_VIDEO:
        hidden |= av.stream.Disposition[name]
    stream = next((stream for stream in container.streams.video if not stream.disposition & hidden), None)
    if stream is None:
        raise VideoError(f"{path}: contains no video stream{' but a picture' if container.streams.video else ''}")
    if stream.codec_context is None:
        raise VideoError(f"{path}: its video is coded in a way that is not known; the file is damaged or unusual")
    check_size(path, stream.codec_context.height, stream.codec_context.width)
    return stream


def check_size(path: PathLike, height: int, width: int) -> None:
    """Raises VideoError for pictures that are larger than memory should hold."""
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise VideoError(f"{path}: picture size {width}x{height} is outside 1..{MAX_SIDE}")
    if height * width > MAX_PIXELS:
        raise VideoError(f"{path}: pictures of {width}x{height} exceed the bound of {MAX_PIXELS} pixels")


def _count_declared_frames(container: Any, stream: Any) -> int:
    """Frames that are shown, of those that the container says it stores; 0 if it does not say."""
    kinds, frames = container.format.name.split(","), int(stream.frames)
    if frames and "mov" in kinds:  # its index is complete, and marks what an edit hides
        return sum(not entry.is_discard for entry in stream.index_entries)
    if frames and "avi" in kinds and (entries := list(stream.index_entries)):
        # A place without data leaves the frame before it on show: it counts in the header, and is a gap of the index.
        return frames - (entries[-1].timestamp - entries[0].timestamp + 1 - len(entries))
    return frames


class _Stamps(NamedTuple):
    """Frames found in a container: how many, the seconds from the first one on at which each is shown, sorted (None
    where any is unknown), and for how long the last one is (0: unknown)."""

    packets: int
    times: np.ndarray | None
    last: float


def _time_stamps(path: PathLike, container: Any) -> _Stamps:
    stream = first_video(path, container)
    stamps: list[tuple[int, int]] = []
    count = 0
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            count += 1
            stamp = packet.dts if container.format.name == "avi" else packet.pts
            if stamp is not None:
                stamps.append((stamp, packet.duration or 0))
        if count > MAX_PACKETS:
            raise VideoError(f"{path}: more than {MAX_PACKETS} frames")
    if len(stamps) < max(count, 2) or not stream.time_base:
        return _Stamps(count, None, 0)
    stamps.sort()
    unit = float(stream.time_base)
    times = np.array([time - stamps[0][0] for time, _ in stamps], np.float64) * unit
    return _Stamps(count, times, stamps[-1][1] * unit)


def _rate(times: Sequence[float] | np.ndarray | None, declared: float) -> tuple[float, bool]:
    """Frames per second, and whether every frame is within half a frame of where that rate puts it."""
    if times is None or not times[-1] > 0:
        return declared, True
    mean = float(times[-1]) / (len(times) - 1)
    for interval in [1 / declared, mean] if declared > 0 else [mean]:
        if np.abs(times - np.arange(len(times)) * interval).max() <= interval / 2:
            return 1 / interval, True
    return 1 / mean, False
