"""Weights of products with one factor in common, side by side in memory, so that one product serves them all.

The layers keep their names, weights and gradients: only the place of their numbers changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_forcing.model.layers import RMSNorm, is_hooked, is_plain

LARGEST_WEIGHT = 1 << 19
"""Numbers of a weight. With more, three products take as long as one, and what is laid together would be a second copy
of what lies in the file that is mapped."""


@dataclass(frozen=True)
class JoinedWeights:
    """Weights [N * C, C] and biases [N * C] of N linear layers as one; norms: [M, C] weights of norms."""

    weight: Tensor
    bias: Tensor
    norms: Tensor

    @classmethod
    def of(cls, layers: Sequence[nn.Linear], norms: Sequence[RMSNorm]) -> JoinedWeights | None:
        """Lay the weights of these layers side by side; None where one is more than its weights (adapted, quantized,
        hooked) or too large to gain by it."""
        if not _are_plain(layers, norms) or any(x.weight.is_inference() for x in layers):
            return None
        if any(x.weight.numel() > LARGEST_WEIGHT for x in layers):
            return None
        with torch.inference_mode(False), torch.no_grad():  # they stay what they were, whoever trains them later
            weight, bias, norm = _parts(layers, norms)
            joined = cls(torch.cat(weight), torch.cat(bias), torch.stack(norm))
            for parts, whole in zip((weight, bias, norm), (joined.weight, joined.bias, joined.norms)):
                for part, place in zip(parts, whole.chunk(len(parts))):
                    part.data = place.view_as(part)
        return joined

    def holds(self, layers: Sequence[nn.Linear], norms: Sequence[RMSNorm]) -> bool:
        """Whether these are still the weights of these layers."""
        if not _are_plain(layers, norms):
            return False
        wholes = self.weight, self.bias, self.norms
        return all(_lie_in(whole, parts) for whole, parts in zip(wholes, _parts(layers, norms)))


def _are_plain(layers: Sequence[nn.Linear], norms: Sequence[RMSNorm]) -> bool:
    return all(map(is_plain, layers)) and not any(map(is_hooked, (*layers, *norms)))


def _parts(layers: Sequence[nn.Linear], norms: Sequence[RMSNorm]) -> tuple[list[Tensor], ...]:
    return [x.weight for x in layers], [x.bias for x in layers], [x.weight for x in norms]


def _lie_in(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether the parts are this tensor, one after the other."""
    start, step = whole.data_ptr(), whole.nbytes // len(parts)
    return all(part.data_ptr() == start + i * step and part.dtype == whole.dtype for i, part in enumerate(parts))
