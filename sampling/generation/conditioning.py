"""What a video starts from, if anything: a picture, or the last whole chunks of another video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparse_forcing.errors import ConfigError
from sparse_forcing.media.images import fit, read_image
from sparse_forcing.media.video import read_video
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.settings import Settings

if TYPE_CHECKING:
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline


def read_start(config: GenerateConfig) -> np.ndarray | None:
    """uint8 [F, H, W, 3] of `config.image` (one frame) or `config.video`, None for neither. Raises VideoError."""
    if config.image is not None:
        return read_image(config.image)[None]
    if config.video is not None:
        return read_video(config.video)[0]
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
