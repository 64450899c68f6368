"""Memories from configurations: of a geometry, or of a model and the latents it generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sparse_forcing.memory.base import MemoryGeometry, RolloutMemory
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.dense import DenseMemory
from sparse_forcing.memory.eight_bit import EightBitMemory
from sparse_forcing.memory.heavy_hitter import HeavyHitterMemory
from sparse_forcing.memory.retention import RetentionRule
from sparse_forcing.memory.sparse import SparseMemory

if TYPE_CHECKING:
    from sparse_forcing.model.transformer import CausalWanTransformer3DModel


def make_memory(
    config: MemoryConfig,
    geometry: MemoryGeometry,
    *,
    cache_gradient: str = "none",
    selectors: list | None = None,
    backend: str = "auto",
    rule: RetentionRule | None = None,
) -> RolloutMemory:
    """A fresh, empty memory of the configured kind; a sparse one may get a rule of retention that has no name."""
    if config.kind == "sparse":
        sparse = SparseMemory if config.cache_dtype is None else EightBitMemory
        return sparse(config, geometry, cache_gradient, selectors=selectors, backend=backend, rule=rule)
    kind = HeavyHitterMemory if config.kind == "heavy_hitter" else DenseMemory
    return kind(config, geometry, cache_gradient)


def make_model_memory(
    model: CausalWanTransformer3DModel,
    config: MemoryConfig,
    latents: Tensor,
    *,
    cache_gradient: str = "none",
    rule: RetentionRule | None = None,
) -> RolloutMemory:
    """An empty memory of `model` for latents [B, F, C, H, W]; rule: see `make_memory`."""
    _, ph, pw = model.config.patch_size
    geometry = MemoryGeometry.of(model.config, latents.shape[3] // ph, latents.shape[4] // pw)
    return make_memory(config, geometry, cache_gradient=cache_gradient, selectors=model.selectors, rule=rule)
