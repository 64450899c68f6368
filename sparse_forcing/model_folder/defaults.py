"""Defaults of a model: what a prompt alone means. `pipeline.json` holds them; presets are published ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import NUM_TRAIN_TIMESTEPS, SamplerConfig
from sparse_forcing.model.geometry import VideoGeometry

MAX_FPS = 1000


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Defaults of a model: what `pipe(prompt)` does when nothing else is said.

    Args:
        fps: pixel frames per second the model was trained at.
        height, width, num_frames: pixels and pixel frames of a default video.
        negative_prompt: what guidance leads away from.
        text_encoder, vae: kinds of the parts beside the transformer.
        preset: name of the preset these defaults began as, None for none; it changes nothing.
        bidirectional: the weights see all frames at once, as plain Wan's; a video is one chunk unless `chunk_frames`
            says otherwise.
        chunk_frames: latent frames generated at a time; None for what the transformer's config says.
        first_chunk_frames: latent frames of the first chunk when it differs (Self-Forcing's independent frame: 1).
        context_timestep: timestep of the pass that leaves a finished chunk in the memory.
    """

    fps: float = 16.0
    height: int = 480
    width: int = 832
    num_frames: int = 81
    negative_prompt: str = ""
    text_encoder: str = "umt5"
    vae: str = "wan"
    preset: str | None = None
    bidirectional: bool = False
    chunk_frames: int | None = None
    first_chunk_frames: int | None = None
    context_timestep: float = 0.0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        if not 0 < self.fps <= MAX_FPS:
            raise ConfigError(f"fps: above 0, at most {MAX_FPS}, got {self.fps}")
        if min(self.height, self.width, self.num_frames) < 1:
            raise ConfigError(
                f"height, width and num_frames: at least 1, got {self.height}, {self.width} and {self.num_frames}"
            )
        for name in ("chunk_frames", "first_chunk_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}: at least 1 latent frame, got {value}")
        if not 0 <= self.context_timestep <= NUM_TRAIN_TIMESTEPS:
            raise ConfigError(f"context_timestep: from 0 to {NUM_TRAIN_TIMESTEPS}, got {self.context_timestep}")

    def fit_geometry(self, geometry: VideoGeometry) -> VideoGeometry:
        """The geometry of a model's videos with the chunks that these defaults ask for."""
        return replace(
            geometry,
            whole_video=self.bidirectional and self.chunk_frames is None,
            chunk_frames=self.chunk_frames or geometry.chunk_frames,
            first_chunk_frames=self.first_chunk_frames or geometry.first_chunk_frames,
        )
