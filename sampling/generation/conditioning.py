"""What a video starts from, if anything: a picture, or the last whole chunks of another video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_forcing.errors import ConfigError
from sparse_forcing.media.images import fit, read_image
from sparse_forcing.media.video import count_frames, iterate_video, probe
from sparse_forcing.sampling.generation.jobs import MAX_FRAMES, GenerateConfig, Job
from sparse_forcing.sampling.generation.settings import Settings, choose_defaults

if TYPE_CHECKING:
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

SAME_RATE = 0.01  # relative difference of frame rates that nobody sees
PIECE_FRAMES = 64


@dataclass(frozen=True, kw_only=True)
class VideoFrames:
    """The last frames of a video file, read in pieces uint8 [F, height, width, 3] each time it is iterated.

    fps: frames per second to read it at; count: how many frames it has then; skip: how many of them are left out.
    height, width: pixels that frames are scaled and cut to; None: their own.
    """

    path: Path
    fps: float
    count: int
    skip: int = 0
    height: int | None = None
    width: int | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        left_out = self.skip
        for piece in iterate_video(self.path, PIECE_FRAMES, fps=self.fps, max_frames=MAX_FRAMES):
            kept, left_out = piece[left_out:], max(0, left_out - len(piece))
            if len(kept):
                yield kept if self.height is None or self.width is None else fit(kept, self.height, self.width)


def read_start(config: GenerateConfig, note: Callable[[str], None]) -> np.ndarray | VideoFrames | None:
    """uint8 [H, W, 3] of `config.image`, or the frames of `config.video`, None for neither.

    A video is read at the model's frames per second, by the times at which its frames are shown, so that what moves
    goes on at its speed; `note` is told. It is decoded once here, so that damage is found before a model is loaded.

    Raises:
        VideoError, WeightsError: the file cannot be read; there is no such model.
    """
    if config.image is not None:
        return read_image(config.image)
    if config.video is not None:
        own, fps = probe(config.video).fps, choose_defaults(config).fps
        if abs(own - fps) > SAME_RATE * fps:
            what = "frames in between are left out" if own > fps else "its frames are shown several times"
            note(f"{config.video}: {own:g} frames/s, the model makes {fps:g}: {what}")
        return VideoFrames(path=config.video, fps=fps, count=count_frames(config.video, fps, max_frames=MAX_FRAMES))
    return None


def start_arguments(
    config: GenerateConfig, settings: Settings, start: np.ndarray | VideoFrames | None, pipe: SparseForcingPipeline
) -> dict[str, Any]:
    """Arguments of `pipe.stream` for `start`, uint8 and fitted to the size that is generated.

    Raises:
        ConfigError: the video is shorter than one chunk.
    """
    if start is None:
        return {}
    height, width = settings.height, settings.width
    if isinstance(start, np.ndarray):
        return {"image": fit(start[None], height, width)[0]}
    whole = pipe.geometry.whole_chunk_frames(start.count)
    if not whole:
        least = pipe.geometry.chunk_pixel_frames
        raise ConfigError(f"--video {config.video}: {start.count} frames are less than one chunk of {least}")
    skip = start.count - whole
    video = VideoFrames(path=start.path, fps=start.fps, count=start.count, skip=skip, height=height, width=width)
    return {"video": video}


class Starts:
    """What the videos of a run start from: each file is read once before a model is loaded, pictures again when their
    turn comes.

    Raises:
        VideoError, WeightsError: see `read_start`.
    """

    def __init__(self, config: GenerateConfig, jobs: Sequence[Job], note: Callable[[str], None]) -> None:
        self._videos: dict[Path | None, VideoFrames] = {}
        own = (job.config(config) for job in jobs)
        for each in {(each.image, each.video): each for each in own}.values():
            start = read_start(each, note)
            if isinstance(start, VideoFrames):
                self._videos[each.video] = start

    def arguments(self, own: GenerateConfig, settings: Settings, pipe: SparseForcingPipeline) -> dict[str, Any]:
        """Arguments of `pipe.stream` for a job's config; see `start_arguments`."""
        start = self._videos.get(own.video) or read_start(own, lambda message: None)
        return start_arguments(own, settings, start, pipe)
