"""CPU backend (placeholder for the chunked gather): the reference forward, gradients by recomputation."""

from __future__ import annotations

from torch import Tensor


def why_unavailable(query: Tensor) -> str | None:
    """Not built yet."""
    return "the CPU path is not built yet"
