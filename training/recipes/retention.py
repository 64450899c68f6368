"""Recipe: heads that say which blocks to keep, taught by a memory that forgets nothing.

True clips go through the frozen model chunk by chunk, every block kept and attended to. What each block that had left
the window is attended to later in the same clip is what its layer's head is to guess from what there was to see when it
left (`memory.retention.learned`). Inference never sees that future; nothing but the heads is trained, so a step costs
the forward passes of its clips alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig, make_model_memory
from sparse_forcing.memory.retention.learned import RetentionTeacher
from sparse_forcing.model.attention import AttentionPolicy
from sparse_forcing.model.flow import add_noise
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.data.sources import DataConfig
from sparse_forcing.training.engine.loop import run
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.recipes.shared import (
    OneNetwork,
    add_selector,
    autocast,
    draw_number,
    generators,
    noise_like,
)


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """Training of retention heads; all other weights stay.

    Args:
        model: pipeline folder (or `tiny`); it gets selectors and heads where it has none.
        memory: the sparse memory that the trained model uses by default, with `learned` as its rule; the heads learn
            for its tile and window. The model's default when None.
        query_noise: noise level, from 0 to 1, of the frames whose attention is learned from: most of what a rollout
            recalls it asks for while a chunk is still noise.
    """

    loop: LoopConfig
    query_noise: float
    model: str = "tiny"
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.98)))
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.query_noise < 1:
            raise ConfigError(f"query_noise: must lie in [0, 1), got {self.query_noise:g}")

    @property
    def lora(self) -> None:
        """Heads train whole."""
        return None

    @property
    def shift(self) -> float:
        """Of a noise grid that this stage does not draw from."""
        return 1.0


class RetentionRecipe(OneNetwork):
    """State and steps of one run."""

    config: RetentionConfig
    loss_name = "retention"

    def __init__(self, config: RetentionConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.memory = replace(self.memory, retention="learned")

    def load(self) -> SparseForcingPipeline:
        pipe = super().load()
        add_selector(pipe, self.config.memory, learned_retention=True)
        return pipe

    def freeze(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(".selector.retention." in name)

    def losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """The one loss of a micro-batch: what the heads guess against what is attended to later."""
        loop = self.config.loop
        draw = draw_number(loop, step, micro_batch)
        latents, prompts = self.source.clips(draw, loop.micro_batch)
        sources = generators(loop.seed, draw, len(latents), stream=2)
        with torch.no_grad(), autocast(self.device, loop):
            teacher = self.watch(latents.to(self.device), self.pipe.text.encode(prompts), sources)
        yield teacher.loss(self.model.selectors)

    def watch(self, latents: Tensor, text: Tensor, sources: list[torch.Generator]) -> RetentionTeacher:
        """What a memory of everything sees of clips [B, F, C, H, W]."""
        chunks = self.chunks(latents.shape[1])
        _, down, across = self.model.config.patch_size
        layout = TileLayout(chunks[0], latents.shape[3] // down, latents.shape[4] // across, self.memory.tile)
        everything = replace(self.memory, density=1.0, persistent_blocks=len(chunks) * layout.num_blocks)
        teacher = RetentionTeacher(everything, denoising=True)
        memory = make_model_memory(self.model, everything, latents, rule=teacher)
        level = self.config.query_noise
        noisy = add_noise(latents, noise_like(latents, sources), torch.full(latents.shape[:2], level).to(latents))
        for part, clean in zip(noisy.split(chunks, 1), latents.split(chunks, 1)):
            memory.begin_chunk(part.shape[1])
            self.run(part, 1000 * level, text, memory.denoising_pass())
            self.run(clean, 0.0, text, memory.clean_pass())
        memory.begin_chunk(chunks[0])  # what a chunk attended to is noted when the next one begins
        return teacher

    def run(self, latents: Tensor, timestep: float, text: Tensor, policy: AttentionPolicy) -> None:
        times = torch.full((len(latents),), timestep, device=latents.device)
        self.model(latents.transpose(1, 2), times, text, policy=policy)


def train(config: RetentionConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the stage; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: RetentionRecipe(config, accelerator), config.loop, config, out, resume)
