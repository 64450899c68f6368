"""Persistent block-sparse attention over a pool of key/value blocks. `README.md` beside this file holds the maths."""

from __future__ import annotations

from sparse_forcing.kernels.block_sparse_attention.interface import (
    BACKENDS,
    BlockSparseOutput,
    block_sparse_attention,
    checked_values,
    why_unavailable,
)

__all__ = ["BACKENDS", "BlockSparseOutput", "block_sparse_attention", "checked_values", "why_unavailable"]
