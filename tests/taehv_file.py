"""A TAEHV file for Wan 2.1 with random tensors, under the names and in the shapes of the published taew2_1."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = {3: 256, 9: 128, 15: 64}
"""Width of each stage of a TAEHV decoder by the number of its first layer."""


def published(first_growth: int = 1) -> dict[str, Tensor]:
    """Random tensors under the names and in the shapes of taew2_1, written down from the published layout."""
    torch.manual_seed(0)
    state = {"decoder.1.weight": torch.randn(256, 16, 3, 3) * 0.05, "decoder.1.bias": torch.zeros(256)}
    for start, width in WIDTHS.items():
        for block in range(start, start + 3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                state[f"decoder.{block}.conv.{layer}.weight"] = torch.randn(width, inputs, 3, 3) / (3 * inputs**0.5)
                state[f"decoder.{block}.conv.{layer}.bias"] = torch.zeros(width)
        grown = first_growth if start == 3 else 2
        state[f"decoder.{start + 4}.conv.weight"] = torch.randn(width * grown, width, 1, 1) / width**0.5
        wider = {256: 128, 128: 64, 64: 64}[width]
        state[f"decoder.{start + 5}.weight"] = torch.randn(wider, width, 3, 3) / (3 * width**0.5)
    state |= {"decoder.22.weight": torch.randn(3, 64, 3, 3) * 0.02, "decoder.22.bias": torch.full((3,), 0.5)}
    return state | {"encoder.0.weight": torch.zeros(64, 3, 3, 3), "encoder.0.bias": torch.zeros(64)}
