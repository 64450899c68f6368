"""The learned block selector: what blocks are chosen by while they are in the window, and kept by when they leave it.

It starts as mean pooling, so that an untouched dense model runs with it unchanged, and learns by two paths, because the
choice itself has no gradient: a coarse branch, attention over block representatives added through a gate
that starts at zero, and a distillation loss against the true attention mass of each block.

Legend: B batch, H heads, n query blocks, W candidate blocks, T tokens per block, D head dim, N blocks, M hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_forcing.model.attention import dense_attention

HIDDEN = 16


class RetentionHead(nn.Module):
    """How much attention a block will get later, guessed from its pooled key and value and how long it has gone unused.

    A perceptron for each attention head: unit key and value (times sqrt(D), as entries of about 1) and log(1 + chunks
    unused) to HIDDEN units to a logit, whose softmax over blocks is their share of later attention. It starts at 0.

    hidden [H, 2 D + 2, M]: the last row is the bias; out [H, M].
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        inputs = 2 * head_dim + 2
        self.hidden = nn.Parameter(torch.randn(heads, inputs, HIDDEN) / inputs**0.5)
        self.out = nn.Parameter(torch.zeros(heads, HIDDEN))

    def pack(self) -> Tensor:
        """[H, 2 D + 3, M] copy of all weights, for `predict`."""
        return torch.cat([self.hidden, self.out[:, None]], 1).detach()

    def forward(self, keys: Tensor, values: Tensor, unused: Tensor) -> Tensor:
        """Logits [B, H, N]; see `predict_retention`."""
        return predict_retention(torch.cat([self.hidden, self.out[:, None]], 1), keys, values, unused)


def predict_retention(packed: Tensor, keys: Tensor, values: Tensor, unused: Tensor) -> Tensor:
    """Logits [B, H, N] of a RetentionHead with weights `packed` [H, 2 D + 3, M], in float32 or better.

    Args:
        keys, values: [B, H, N, D] pooled, keys moved to time 0; unused: [B, H, N] chunks.
    """
    dtype = torch.promote_types(keys.dtype, torch.float32)
    with torch.autocast(keys.device.type, enabled=False):  # it would round what is ranked to 8 bits
        units = [nn.functional.normalize(x.to(dtype), dim=-1) * x.shape[-1] ** 0.5 for x in (keys, values)]
        rest = [unused.to(dtype).log1p()[..., None], torch.ones_like(unused, dtype=dtype)[..., None]]
        hidden = torch.tanh(torch.cat([*units, *rest], -1) @ packed[:, :-1].to(dtype))
        return (hidden * packed[:, -1:].to(dtype)).sum(-1)


class BlockSelector(nn.Module):
    """Selector of one layer.

    Args:
        heads: attention heads.
        block_tokens: tokens of a full block.
        head_dim: dimension of a head.
        learned_retention: whether it has a `retention` head, too.

    query_weights, key_weights [H, T]: weight of each position of a block (ones: the mean);
    query_projection, key_projection [H, D, D]: linear map of the pooled vector (identity);
    gate [H]: of the coarse branch (zero).
    """

    def __init__(self, heads: int, block_tokens: int, head_dim: int, *, learned_retention: bool = False) -> None:
        super().__init__()
        self.query_weights = nn.Parameter(torch.ones(heads, block_tokens))
        self.key_weights = nn.Parameter(torch.ones(heads, block_tokens))
        self.query_projection = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.key_projection = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.gate = nn.Parameter(torch.zeros(heads))
        self.retention = RetentionHead(heads, head_dim) if learned_retention else None

    @torch.no_grad()
    def of_heads(self, heads: slice) -> BlockSelector:
        """A selector of some of the heads, with their weights as they are now."""
        count, tokens = self.query_weights[heads].shape
        part = BlockSelector(
            count, tokens, self.query_projection.shape[-1], learned_retention=self.retention is not None
        )
        part = part.to(self.gate)  # before the weights, which it would round
        part.load_state_dict({name: weights[heads] for name, weights in self.state_dict().items()})
        return part


def map_heads(pooled: Tensor, projection: Tensor) -> Tensor:
    """A linear map per head: [B, H, N, D] by [H, D, D]."""
    return pooled @ projection.to(pooled.dtype)


def coarse_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of block representatives: [B, H, n, D] over [B, H, W, D] -> [B, H, n, D]."""
    tokens = (x.to(query.dtype).transpose(1, 2) for x in (query, key, value))
    return dense_attention(*tokens).transpose(1, 2)


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
