"""What a video starts from, if anything: a picture, or the last whole chunks of another video."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sparse_forcing.errors import ConfigError
from sparse_forcing.media.images import fit, read_image
from sparse_forcing.media.video import probe, read_video
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.settings import Settings, chosen_defaults

if TYPE_CHECKING:
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

SAME_RATE = 0.01  # relative difference of frame rates that nobody sees


def read_start(config: GenerateConfig, note: Callable[[str], None]) -> np.ndarray | None:
    """uint8 [F, H, W, 3] of `config.image` (one frame) or `config.video`, None for neither.

    A video is read at the model's frames per second, so that what moves goes on at its speed; `note` is told.

    Raises:
        VideoError, WeightsError: the file cannot be read; there is no such model.
    """
    if config.image is not None:
        return read_image(config.image)[None]
    if config.video is not None:
        own, fps = probe(config.video).fps, chosen_defaults(config).fps
        if abs(own - fps) > SAME_RATE * fps:
            what = "frames in between are left out" if own > fps else "its frames are shown several times"
            note(f"{config.video}: {own:g} frames/s, the model makes {fps:g}: {what}")
        return read_video(config.video, fps=fps)[0]
    return None


def start_arguments(
    config: GenerateConfig, settings: Settings, start: np.ndarray | None, pipe: SparseForcingPipeline
) -> dict[str, np.ndarray]:
    """Arguments of `pipe.stream` for `start`, uint8 and fitted to the size that is generated.

    Raises:
        ConfigError: the video is shorter than one chunk.
    """
    if start is None:
        return {}
    height, width = settings.height, settings.width
    if config.image is not None:
        return {"image": fit(start, height, width)[0]}
    whole = pipe.geometry.whole_chunk_frames(len(start))
    if not whole:
        least = pipe.geometry.chunk_pixel_frames
        raise ConfigError(f"--video {config.video}: {len(start)} frames are less than one chunk of {least}")
    return {"video": fit(start[-whole:], height, width)}
