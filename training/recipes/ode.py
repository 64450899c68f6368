"""Recipe: causal start by ODE regression: the student learns to jump from a teacher's trajectory to its end.

It picks one state per chunk of the trajectories that training/data/pairs.py made and regresses x0, block-causally, at
the student's timesteps; trajectories kept at other timesteps are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.attention import ParallelAttention, block_causal_mask
from sparse_forcing.model.flow import SamplerConfig, few_step_timesteps
from sparse_forcing.training.data.pairs import GRID_TOLERANCE
from sparse_forcing.training.data.sources import DataConfig, StoredSource
from sparse_forcing.training.engine.loop import run
from sparse_forcing.training.engine.lora import LoraConfig
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.losses.flow_matching import ode_inputs, ode_regression_loss, per_chunk
from sparse_forcing.training.recipes.shared import OneNetwork, autocast, draw_number, generators


@dataclass(frozen=True, kw_only=True)
class OdeConfig:
    """ODE regression. `data` names shards that `data ode-pairs` wrote with the same `sampler`."""

    loop: LoopConfig
    data: DataConfig
    model: str = "tiny"
    memory: MemoryConfig | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(betas=(0.9, 0.999)))
    ema_decay: float = 0.99
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.data.kind != "shards":
            raise ConfigError("data.kind: ODE regression reads shards of trajectories; make them with: data ode-pairs")
        if self.memory is not None and not self.memory.sees_whole_frames:
            raise ConfigError("memory.kind: ODE regression sees noisy context in parallel; use full, window or sink")

    @property
    def shift(self) -> float:
        """Shift of the noise grid, which is the sampler's."""
        return self.sampler.shift


class OdeRecipe(OneNetwork):
    """State and steps of one run."""

    config: OdeConfig

    def __init__(self, config: OdeConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.pipe.defaults = replace(
            self.pipe.defaults, sampler=config.sampler
        )  # what it learns is what it samples with
        self.timesteps = few_step_timesteps(config.sampler)
        assert isinstance(self.source, StoredSource)
        assert self.source.shards is not None
        made_for = self.source.shards.about.get("timesteps")
        if made_for is None or not torch.allclose(torch.tensor(made_for), self.timesteps, atol=GRID_TOLERANCE):
            raise ConfigError(
                f"data.path: trajectories were kept at timesteps {made_for}, the student's are "
                f"{self.timesteps.tolist()}; make the pairs with the same sampler"
            )

    def losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """The one loss of a micro-batch."""
        loop = self.config.loop
        draw = draw_number(loop, step, micro_batch)
        trajectory, prompts = self.source.clips(draw, loop.micro_batch)
        trajectory = trajectory.to(self.device)
        frames = trajectory.shape[2]
        chunks = self.chunks(frames)
        with torch.no_grad():
            text = self.pipe.text.encode(prompts)
        sources = generators(loop.seed, draw, len(trajectory), stream=2)
        draws = torch.stack([torch.randint(0, len(self.timesteps), (frames,), generator=g) for g in sources])
        index = per_chunk(draws, chunks).to(self.device)
        timestep, x_t = self.timesteps.to(self.device)[index], ode_inputs(trajectory, index)
        window = self.config.memory.window if self.config.memory else None
        sink = self.config.memory.sink if self.config.memory else 0
        policy = ParallelAttention(frames, block_causal_mask(chunks, window=window, sink=sink))
        with autocast(self.device, loop):
            flow = self.model(x_t.transpose(1, 2), timestep, text, policy=policy).transpose(1, 2)
        yield ode_regression_loss(flow.float(), x_t, trajectory[:, -1], timestep, self.schedule)


def train(config: OdeConfig, out: Path, resume: Resume | None = None) -> int:
    """Run or resume the stage; returns 0, or 143 after SIGTERM."""
    return run(lambda accelerator: OdeRecipe(config, accelerator), config.loop, config, out, resume)
