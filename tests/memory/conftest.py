"""A transformer small enough for float64 rollouts, with every parameter random (the usual start has a silent head)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_forcing.memory import MemoryConfig, MemoryGeometry, RolloutMemory, make_memory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.rollout import rollout

CHUNK, ROWS, COLS, CHANNELS, LAYERS, HORIZON = 3, 4, 6, 4, 2, 21


class Rollout:
    """Rollouts of one fixed model; `self.memory` is the last rollout's memory."""

    memory: RolloutMemory

    def __init__(self, **settings) -> None:
        torch.manual_seed(0)
        self.model = CausalWanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=8,
            freq_dim=16,
            ffn_dim=48,
            num_layers=LAYERS,
            chunk_frames=CHUNK,
            horizon_frames=HORIZON,
            **settings,
        ).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        self.text = torch.randn(2, 5, 8, dtype=torch.float64)

    def make(self, config: MemoryConfig, **kwargs) -> RolloutMemory:
        geometry = MemoryGeometry(
            rows=ROWS, cols=COLS, num_layers=LAYERS, chunk_frames=CHUNK, horizon_frames=kwargs.pop("horizon", HORIZON)
        )
        return make_memory(config, geometry, **kwargs)

    @torch.no_grad()
    def __call__(self, config: MemoryConfig, chunks: int, steps: int = 2, **kwargs) -> Tensor:
        """[B, F, C, h, w] latents."""
        self.memory = self.make(config, **kwargs)
        noise = SeededNoise(
            [torch.Generator().manual_seed(seed) for seed in (1, 2)],
            (CHANNELS, 2 * ROWS, 2 * COLS),
            torch.device("cpu"),
            torch.float64,
        )
        sampler = SamplerConfig(steps=steps)
        parts = rollout(self.model, self.text, [CHUNK] * chunks, self.memory, noise, sampler)
        return torch.cat([part.latents for part in parts], 1)


@pytest.fixture(scope="session")
def run() -> Rollout:
    return Rollout()
