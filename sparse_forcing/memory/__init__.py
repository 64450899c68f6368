"""Rollout memories: what the current chunk can see of the past, with explicit state and exact byte counts."""

from __future__ import annotations

from sparse_forcing.memory.base import MemoryGeometry, MemoryPass, RolloutMemory
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.dense import DenseMemory
from sparse_forcing.memory.heavy_hitter import HeavyHitterMemory
from sparse_forcing.memory.sparse import SparseMemory

__all__ = [
    "DenseMemory",
    "HeavyHitterMemory",
    "MemoryConfig",
    "MemoryGeometry",
    "MemoryPass",
    "RolloutMemory",
    "SparseMemory",
    "make_memory",
]


def make_memory(
    config: MemoryConfig,
    geometry: MemoryGeometry,
    *,
    cache_gradient: str = "none",
    selectors: list | None = None,
    backend: str = "auto",
) -> RolloutMemory:
    """A fresh, empty memory of the configured kind."""
    if config.kind == "sparse":
        return SparseMemory(config, geometry, cache_gradient, selectors=selectors, backend=backend)
    kind = HeavyHitterMemory if config.kind == "heavy_hitter" else DenseMemory
    return kind(config, geometry, cache_gradient)
