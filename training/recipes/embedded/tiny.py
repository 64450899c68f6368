"""What a prompt alone means to the embedded models: their size, frames, sampler and memory."""

from __future__ import annotations

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.scenes.vocabulary import CLIP_FRAMES, FRAME_RATE

TINY = PipelineConfig(
    fps=float(FRAME_RATE),
    height=64,
    width=64,
    num_frames=CLIP_FRAMES,
    text_encoder="words",
    vae="token",
    sampler=SamplerConfig(kind="euler", steps=4, shift=4.0, guidance_scale=3.0),
    memory=MemoryConfig(
        kind="sparse", window_frames=4, sink_frames=1, tile=(2, 2, 4), persistent_blocks=4, density=0.5
    ),
)
