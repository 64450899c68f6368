"""The learned block selector: what compresses a block of queries or keys to the vector that blocks are chosen by.

It starts as mean pooling, so that an untouched dense model runs with it unchanged, and learns by two paths, because the
choice itself has no gradient: a coarse branch, attention over block representatives added through a gate
that starts at zero, and a distillation loss against the true attention mass of each block.

Legend: B batch, H heads, n query blocks, W candidate blocks, T tokens per block, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_forcing.kernels.block_selection.interface import block_scores


class BlockSelector(nn.Module):
    """Selector of one layer.

    Args:
        heads: attention heads.
        block_tokens: tokens of a full block.
        head_dim: dimension of a head.

    query_weights, key_weights [H, T]: weight of each position of a block (ones: the mean);
    query_projection, key_projection [H, D, D]: linear map of the pooled vector (identity);
    gate [H]: of the coarse branch (zero).
    """

    def __init__(self, heads: int, block_tokens: int, head_dim: int) -> None:
        super().__init__()
        self.query_weights = nn.Parameter(torch.ones(heads, block_tokens))
        self.key_weights = nn.Parameter(torch.ones(heads, block_tokens))
        self.query_projection = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.key_projection = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.gate = nn.Parameter(torch.zeros(heads))


def map_heads(pooled: Tensor, projection: Tensor) -> Tensor:
    """A linear map per head: [B, H, N, D] by [H, D, D]."""
    return pooled @ projection.to(pooled.dtype)


def coarse_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of block representatives: [B, H, n, D] over [B, H, W, D] -> [B, H, n, D]."""
    return (block_scores(query, key).softmax(-1) @ value.to(torch.promote_types(value.dtype, torch.float32))).to(query)


def selection_loss(scores: Tensor, mass: Tensor) -> Tensor:
    """Mean KL(p || softmax(scores)) over query blocks, with p the attention mass of each block, normalised.

    Args:
        scores: [B, H, n, W] of the selector; mass: [B, H, n, W], not negative, taken as constant.
    """
    target = mass.detach().to(scores.dtype)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    return nn.functional.kl_div(scores.log_softmax(-1), target, reduction="none").sum(-1).mean()


def recall(scores: Tensor, mass: Tensor, top_k: int) -> Tensor:
    """[B, H] share of true attention mass inside each query block's `top_k` best-scored blocks (1: nothing is lost)."""
    chosen = scores.topk(min(top_k, scores.shape[-1]), -1).indices
    return mass.gather(-1, chosen).sum((-1, -2)) / mass.sum((-1, -2))
