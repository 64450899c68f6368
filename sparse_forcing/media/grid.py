"""Videos side by side as one animated picture, for pages that show pictures but play no video."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from sparse_forcing.errors import OutputError, VideoError
from sparse_forcing.files import atomic_path
from sparse_forcing.media.video import VideoInfo, iter_frames, probe

GAP = 4  # white pixels between videos
QUALITY = 85  # of .webp, up to 100
LARGEST_SIDE = {".webp": 16_383, ".gif": 65_535}  # pixels, of the formats
TICK = {".webp": 1, ".gif": 10}  # milliseconds: frames last whole numbers of these
MAX_PIXELS = 1 << 28  # over all frames, which the writer keeps: 1.1 GB


def check_grid(path: Path, count: int, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Columns, and height and width in pixels, of a grid of videos of this size; it is as wide as high, or wider.

    Raises:
        OutputError: the picture would be larger than its format or memory takes.
    """
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    height, width = rows * (height + GAP) - GAP, columns * (width + GAP) - GAP
    side = LARGEST_SIDE[path.suffix.lower()]
    if max(height, width) > side or frames * height * width > MAX_PIXELS:
        raise OutputError(
            f"--grid {path}: {frames} frames of {width}x{height} are more than an animated picture holds (sides up to "
            f"{side}, {MAX_PIXELS} pixels in all); lower --scale, or show fewer or shorter videos"
        )
    return columns, height, width


def write_grid(videos: Sequence[Path], path: Path) -> None:
    """Write videos of one size and speed, row by row, as an animated .webp or .gif that repeats for ever.

    Shorter videos end with a still picture.

    Raises:
        VideoError, OutputError: a video cannot be read or is unlike the first; the picture cannot be written.
    """
    infos = [probe(video) for video in videos]
    first = infos[0]
    for video, info in zip(videos, infos):
        if (info.height, info.width, info.fps) != (first.height, first.width, first.fps):
            raise VideoError(
                f"{video}: {info.width}x{info.height}, {info.fps:g} frames/s, is unlike {videos[0]} ({first.width}x"
                f"{first.height}, {first.fps:g}); a grid shows videos of one size and speed"
            )
    length = max(info.frames for info in infos)
    layout = check_grid(path, len(videos), length, first.height, first.width)
    tick = TICK[path.suffix.lower()]
    times = [tick * round(1000 * frame / first.fps / tick) for frame in range(length + 1)]
    streams = [iter_frames(video, max_frames=length) for video in videos]
    # A .gif has no quality, and ignores it.
    options: dict[str, Any] = {
        "loop": 0,
        "quality": QUALITY,
        "duration": [end - start for start, end in pairwise(times)],
    }
    with atomic_path(path) as temporary, iio.imopen(temporary, "w", plugin="pillow", extension=path.suffix) as file:
        for picture in _pictures(streams, first, *layout):
            file.write(picture, **options)


def _pictures(
    streams: Sequence[Iterator[np.ndarray]], size: VideoInfo, columns: int, height: int, width: int
) -> Iterator[np.ndarray]:
    """[height, width, 3] uint8, one for every frame of the longest video; its last frame stays where one has ended."""
    picture = np.full((height, width, 3), 255, np.uint8)
    for frames in zip_longest(*streams):
        for number, frame in enumerate(frames):
            if frame is not None:
                top, left = number // columns * (size.height + GAP), number % columns * (size.width + GAP)
                picture[top : top + size.height, left : left + size.width] = frame
        yield picture.copy()
