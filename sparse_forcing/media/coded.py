"""Pictures coded by x264 in segments, and mp4 files of them: whole ones, and ones that play while they grow.

Every SEGMENT_FRAMES pictures a new coder begins, which knows nothing of those before. So a video's coding can stop at
the end of any segment and go on from there, and the bytes are those of a coding that never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from sparse_forcing.errors import OutputError
from sparse_forcing.files import atomic_path

SEGMENT_FRAMES = 120
FRAGMENT_SECONDS = 0.5  # of a file that plays while it grows
_BT709 = 1  # the code of BT.709 for primaries and transfer (ISO/IEC 23091-2)
_WHOLE = {"movflags": "+faststart"}
_GROWING = {"movflags": "+frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


class Coded(NamedTuple):
    """A coded picture: when it is shown and decoded, in frames; whether decoding can begin with it; its bytes."""

    pts: int
    dts: int
    key: bool
    data: bytes


class PictureCoder:
    """Codes pictures of one size, segment by segment.

    Args:
        rate: frames per second.
        height, width: pixels of a picture.
        crf: x264's constant quality.
        first: number of the first picture, at the beginning of a segment.
    """

    def __init__(self, rate: Fraction, height: int, width: int, crf: int, first: int = 0) -> None:
        self._make = lambda: _configure(av.CodecContext.create("libx264", "w"), rate, height, width, crf)
        self._rate, self._next = rate, first
        self._codec: Any = None

    def code(self, picture: np.ndarray) -> list[Coded]:
        """What is ready once uint8 [H, W, 3] has come in: often a picture that came some frames before."""
        if self._codec is None:
            self._codec = self._make()
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format=self._codec.pix_fmt, dst_colorspace=Colorspace.ITU709)
        frame.pts, frame.time_base = self._next, 1 / self._rate
        self._next += 1
        ready = [_copy_packet(packet) for packet in self._codec.encode(frame)]
        return ready if self._next % SEGMENT_FRAMES else ready + self.finish()

    def finish(self) -> list[Coded]:
        """The rest of the present segment, which ends here."""
        codec, self._codec = self._codec, None
        return [] if codec is None else [_copy_packet(packet) for packet in codec.encode(None)]


def _configure(codec: Any, rate: Fraction, height: int, width: int, crf: int) -> Any:
    codec.height, codec.width, codec.framerate, codec.time_base = height, width, rate, 1 / rate
    codec.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    codec.flags |= av.codec.context.Flags.global_header
    # A fixed number of threads: x264's output depends on it. Its macroblock tree reads memory that it never wrote, so
    # that no two encodings of some pictures, small or large, would be equal.
    codec.options = {"crf": str(crf), "preset": "fast", "threads": "2", "x264-params": "mbtree=0"}
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries = codec.color_trc = _BT709
    return codec


def _copy_packet(packet: Any) -> Coded:
    return Coded(packet.pts, packet.dts, packet.is_keyframe, bytes(packet))


class Mp4File:
    """An open mp4 file of coded pictures; see `PictureCoder` for the arguments.

    Args:
        growing: True for a file in fragments of FRAGMENT_SECONDS, each on the disk as soon as it is full, so that what
            is there plays at any time; otherwise it can be played once it is closed.
    """

    def __init__(self, path: Path, rate: Fraction, height: int, width: int, crf: int, *, growing: bool = False) -> None:
        fragments = {"frag_duration": str(round(FRAGMENT_SECONDS * 1e6))}
        self._container = av.open(str(path), "w", format="mp4", options=_GROWING | fragments if growing else _WHOLE)
        self._stream = self._container.add_stream("libx264", rate=rate)
        _configure(self._stream, rate, height, width, crf)
        self._time_base = 1 / rate

    def add(self, pictures: Iterable[Coded]) -> None:
        """Append pictures in the order of decoding."""
        for coded in pictures:
            packet = av.Packet(coded.data)
            packet.pts, packet.dts, packet.time_base = coded.pts, coded.dts, self._time_base
            packet.is_keyframe, packet.stream = coded.key, self._stream
            self._container.mux(packet)

    def close(self) -> None:
        self._container.close()


class KeptSegments:
    """What the coding of a video goes on from: its finished segments in files, and the frames after them in memory.

    Args:
        folder: where the files are; name: what they begin with.
        frames: how many frames there are, of which `tail` [f, H, W, 3] are those after the last finished segment.
    """

    def __init__(self, folder: Path, name: str, frames: int = 0, tail: np.ndarray | None = None) -> None:
        self.folder, self.name, self.finished = folder, name, frames // SEGMENT_FRAMES
        self._given = tail
        self._frames: list[np.ndarray] = []
        self._pictures: list[Coded] = []

    def tail(self) -> np.ndarray:
        """uint8 [f, H, W, 3] frames of the unfinished segment; f may be 0."""
        return np.stack(self._frames) if self._frames else np.zeros((0, 1, 1, 3), np.uint8)

    def take_tail(self) -> Iterator[np.ndarray]:
        """The frames that it was given, to be coded and added again."""
        given, self._given = self._given, None
        yield from () if given is None else given

    def segments(self) -> Iterator[list[Coded]]:
        """The finished segments, one at a time. Raises OutputError for one that is missing or damaged."""
        for number in range(self.finished):
            yield _read_segment(self._path(number))

    def add(self, frame: np.ndarray, pictures: list[Coded]) -> None:
        """A frame uint8 [H, W, 3], and what the coder gave for it; a finished segment becomes a file."""
        self._frames.append(frame)
        self._pictures += pictures
        if len(self._frames) == SEGMENT_FRAMES:
            _write_segment(self._path(self.finished), self._pictures)
            self.finished += 1
            self._frames, self._pictures = [], []

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06d}.npz"


def _write_segment(path: Path, pictures: list[Coded]) -> None:
    table = np.array([(p.pts, p.dts, p.key, len(p.data)) for p in pictures], np.int64)
    data = np.frombuffer(b"".join(p.data for p in pictures), np.uint8)
    with atomic_path(path, size=data.nbytes) as temporary, temporary.open("wb") as file:
        np.savez(file, table=table, data=data)


def _read_segment(path: Path) -> list[Coded]:
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip file, which has check sums
            table, data = file["table"].tolist(), file["data"].tobytes()
    except Exception as error:  # numpy and zipfile raise many kinds
        raise OutputError(
            f"{path}: not a readable segment of a video ({error}); start over without --resume"
        ) from error
    pictures, start = [], 0
    for pts, dts, key, size in table:
        pictures.append(Coded(pts, dts, bool(key), data[start : start + size]))
        start += size
    return pictures
