"""Rollout memories: what the current chunk can see of the past, with explicit state and exact byte counts."""

from __future__ import annotations

from sparse_forcing.memory.base import MemoryGeometry, MemoryPass, RolloutMemory
from sparse_forcing.memory.build import make_memory, make_model_memory
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
    "make_model_memory",
]
