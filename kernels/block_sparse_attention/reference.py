"""The definition of persistent block-sparse attention: one masked softmax over the listed blocks, in plain torch.

Slow and memory hungry on purpose: every faster path is tested against it. Autograd differentiates it as it stands.

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S pool slots, T tokens per slot, D head dim,
M list entries per query block, P persistent entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def why_unavailable(query: Tensor) -> str | None:
    """The reference runs wherever torch runs."""
    return None


def valid_tokens(sizes: Tensor | None, tokens: int) -> Tensor | None:
    """[..., N] sizes -> [..., N, tokens] bool, True where a token of a block is real; None stays None (all real)."""
    if sizes is None:
        return None
    return torch.arange(tokens, device=sizes.device) < sizes.unsqueeze(-1)


def forward(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    scale: float,
    num_persistent: int,
    return_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B,H,Nq,Tq,D], lse [B,H,Nq,Tq] (natural log), mass [B,H,Nq,M] (M = 0 unless `return_mass`).

    softmax of scale * <q, k> over the tokens t < key_sizes[b, h, s] of the slots s in block_index[b, h, i], computed
    in float32 (float64 for float64 input). Padding is zeroed first: NaN * 0 is NaN, so masked scores are not enough.
    """
    B, H, Nq, Tq, _ = query.shape
    M, T = block_index.shape[-1], key_pool.shape[3]
    if M == 0:
        block_index = block_index.new_full((B, H, Nq, 1), -1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch = torch.arange(B, device=query.device).view(-1, 1, 1, 1)
    head = torch.arange(H, device=query.device).view(-1, 1, 1)
    slots = block_index.clamp(min=0).long()
    visible = (block_index >= 0).unsqueeze(-1).expand(*block_index.shape, T)  # [B, H, Nq, M, T]
    key_valid, query_valid = valid_tokens(key_sizes, T), valid_tokens(query_sizes, Tq)
    if key_valid is not None:
        visible = visible & key_valid[batch, head, slots]
    keys = key_pool[batch, head, slots].to(dtype).masked_fill(~visible.unsqueeze(-1), 0).flatten(3, 4)
    values = value_pool[batch, head, slots].to(dtype).masked_fill(~visible.unsqueeze(-1), 0).flatten(3, 4)
    queries = query.to(dtype)
    seen = visible.flatten(3).unsqueeze(3)  # [B, H, Nq, 1, M * T]
    if query_valid is not None:
        queries = queries.masked_fill(~query_valid.unsqueeze(-1), 0)
        seen = seen & query_valid.unsqueeze(-1)

    scores = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0)  # an empty row: avoid -inf - -inf
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    probs = weights / total
    out = (probs @ values).masked_fill(empty, 0)  # also keeps the gradient that reaches a padded row out
    lse = (total.log() + highest).masked_fill(empty, float("-inf")).squeeze(-1)
    mass = probs.detach().unflatten(-1, (-1, T)).sum(dim=(3, 5))[..., : M if return_mass else 0]
    return out.to(query.dtype), lse, mass.contiguous()
