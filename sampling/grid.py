"""Videos side by side as one animated picture, for pages that show pictures but play no video."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_forcing.files import atomic_path
from sparse_forcing.video import iter_frames, probe

GAP = 4  # white pixels between videos
QUALITY = 85  # of .webp, up to 100


def write_grid(videos: Sequence[Path], path: Path) -> None:
    """Write videos of one size, row by row, as an animated .webp or .gif that repeats for ever.

    The grid is as wide as high, or wider. Shorter videos end with a still picture.

    Raises:
        VideoError, OutputError: a video cannot be read; the picture cannot be written.
    """
    frames = (Image.fromarray(picture) for picture in _pictures(videos))
    first = next(frames)
    milliseconds = round(1000 / probe(videos[0]).fps)
    with atomic_path(path) as temporary:  # .gif has no quality, and ignores it
        first.save(temporary, save_all=True, append_images=frames, duration=milliseconds, loop=0, quality=QUALITY)


def _pictures(videos: Sequence[Path]) -> Iterator[np.ndarray]:
    """[H, W, 3] uint8, one for every frame of the longest video."""
    info = probe(videos[0])
    columns = math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    height, width = info.height + GAP, info.width + GAP
    picture = np.full((rows * height - GAP, columns * width - GAP, 3), 255, np.uint8)
    for frames in zip_longest(*(iter_frames(video) for video in videos)):
        for number, frame in enumerate(frames):
            if frame is not None:
                top, left = number // columns * height, number % columns * width
                picture[top : top + info.height, left : left + info.width] = frame
        yield picture.copy()
