"""Frames of a video in pieces: decoded from its file as they are asked for, so that memory does not grow with length.

A source hands out frames in order (`pieces`) or by number (`pick`). A video that fits into `KEPT_BYTES` stays there: it
is decoded once, a longer one once for every pass over it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sparse_forcing.errors import VideoError
from sparse_forcing.media.video import iterate_video, probe

PIECE_PIXELS = 1 << 22  # of a piece: 12 MB of RGB, and some 50 MB of floats where a metric makes such
LONGEST_PIECE = 32  # frames: the batch of the networks
KEPT_BYTES = 1 << 28  # of a decoded video that stays in memory
FEW = 2  # pieces of a larger video that stay: windows that follow each other meet in one
LARGEST_PICTURE = 1 << 25  # pixels: 8K; metrics need some 60 bytes for each pixel of the picture they look at


class FrameSource:
    """Frames uint8 [F, H, W, 3] RGB of one video. Subclasses say how many there are and read a piece."""

    def __init__(self, count: int, height: int, width: int) -> None:
        self.count, self.height, self.width = count, height, width
        self.piece_length = max(1, min(LONGEST_PIECE, PIECE_PIXELS // (height * width)))

    def read_piece(self, number: int) -> np.ndarray:
        """The frames from `number * piece_length` on, `piece_length` of them or what is left."""
        raise NotImplementedError

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the first frame, frames [n, H, W, 3]) over start..stop, in order and without gaps."""
        stop = self.count if stop is None else stop
        for number in range(start // self.piece_length, -(-stop // self.piece_length)):
            first = number * self.piece_length
            low, high = max(start, first), min(stop, first + self.piece_length)
            yield low, self.read_piece(number)[low - first : high - first]

    def pick(self, numbers: Sequence[int]) -> np.ndarray:
        """The frames of these numbers [n, H, W, 3], in the order asked for; a number may repeat."""
        picked = np.empty((len(numbers), self.height, self.width, 3), np.uint8)
        for place in sorted(range(len(numbers)), key=lambda place: numbers[place]):
            piece, offset = divmod(numbers[place], self.piece_length)
            picked[place] = self.read_piece(piece)[offset]
        return picked


class ArraySource(FrameSource):
    """Frames that are in memory already: uint8 [F, H, W, 3]."""

    def __init__(self, frames: np.ndarray) -> None:
        super().__init__(*frames.shape[:3])
        self._frames = frames

    def read_piece(self, number: int) -> np.ndarray:
        """See `FrameSource`."""
        return self._frames[number * self.piece_length : (number + 1) * self.piece_length]


class FileSource(FrameSource):
    """Frames of a video file. Opening decodes it once from end to end: damage is found before anything is measured.

    Raises VideoError for a damaged file, one beyond the bounds, or (while reading) one that was changed meanwhile.
    """

    def __init__(self, path: Path, *, max_frames: int, max_pixels: int, kept_bytes: int = KEPT_BYTES) -> None:
        info = probe(path)
        pixels = info.height * info.width
        limit = min(max_frames, max_pixels // pixels)
        if info.frames > limit or limit < 1:
            raise VideoError(
                f"{path}: {info.frames or 'some'} frames of {info.width}x{info.height} exceed the bound of "
                f"{max_frames} frames and {max_pixels} pixels"
            )
        if pixels > LARGEST_PICTURE:
            raise VideoError(
                f"{path}: pictures of {info.width}x{info.height} exceed {LARGEST_PICTURE} pixels; scale the video down"
            )
        super().__init__(0, info.height, info.width)
        self.path, self.fps = path, info.fps
        self._limit = limit
        room = kept_bytes // (3 * pixels * self.piece_length)
        self._room = room if FEW < room and info.frames <= room * self.piece_length else FEW  # pieces
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._decoder: Iterator[np.ndarray] | None = None
        self._next = 0  # piece that the decoder comes to next
        self.count = self._decode_all()

    def _decode_all(self) -> int:
        count = 0
        while len(piece := self._decode_piece()):
            count += len(piece)
        return count

    def read_piece(self, number: int) -> np.ndarray:
        """See `FrameSource`."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        if self._decoder is None or number < self._next:
            self._decoder, self._next = None, 0
        expected = min(self.piece_length, self.count - number * self.piece_length)
        while self._next < number and len(self._decode_piece()):
            pass
        piece = self._decode_piece() if self._next == number else np.empty((0,))
        if len(piece) != expected:
            raise VideoError(f"{self.path}: changed while it was measured")
        return piece

    def _decode_piece(self) -> np.ndarray:
        """The next piece of the decoder, kept; empty at the end."""
        if self._decoder is None:
            self._decoder = iterate_video(self.path, self.piece_length, max_frames=self._limit)
            self._next = 0
        piece = next(self._decoder, np.empty((0,)))
        if len(piece):
            self._kept[self._next] = piece
            self._next += 1
            if len(self._kept) > self._room:
                self._room = FEW  # passes go from end to end: keeping more of it would never serve the next one
            while len(self._kept) > self._room:
                self._kept.popitem(last=False)
        else:
            self._decoder = None
        return piece
