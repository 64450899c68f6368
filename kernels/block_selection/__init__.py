"""Which key blocks a query block attends to, and which blocks persist. `README.md` beside this file holds the maths."""

from __future__ import annotations

from sparse_forcing.kernels.block_selection.interface import (
    block_importance,
    block_scores,
    build_block_index,
    checked_values,
    choose_blocks,
    choose_lists,
    pool_blocks,
    select_blocks,
    update_persistent,
)

__all__ = [
    "block_importance",
    "block_scores",
    "build_block_index",
    "checked_values",
    "choose_blocks",
    "choose_lists",
    "pool_blocks",
    "select_blocks",
    "update_persistent",
]
