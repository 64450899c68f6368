"""The definition of persistent block-sparse attention: one masked softmax over the whole pool, in plain torch.

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


def listed_slots(block_index: Tensor, slots: int) -> Tensor:
    """[B, H, Nq, M] lists -> [B, H, Nq, S] bool, True where a query block lists a slot (-1 lists nothing)."""
    spare = torch.where(block_index < 0, slots, block_index).long()
    listed = torch.zeros((*block_index.shape[:-1], slots + 1), dtype=torch.bool, device=block_index.device)
    return listed.scatter(-1, spare, True)[..., :slots]


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

    softmax over {(s, t): s in block_index[b, h, i], t < key_sizes[b, h, s]} of scale * <q, k>, computed in float32
    (float64 for float64 input). Stored padding is zeroed first: NaN * 0 is NaN, so a mask on the scores is not enough.
    """
    B, H, Nq, Tq, _ = query.shape
    S, T = key_pool.shape[2:4]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype), key_pool.to(dtype), value_pool.to(dtype)
    visible = listed_slots(block_index, S)[:, :, :, None, :, None].expand(B, H, Nq, Tq, S, T)
    key_valid, query_valid = valid_tokens(key_sizes, T), valid_tokens(query_sizes, Tq)
    if key_valid is not None:
        k = k.masked_fill(~key_valid.unsqueeze(-1), 0)
        v = v.masked_fill(~key_valid.unsqueeze(-1), 0)
        visible = visible & key_valid[:, :, None, None]
    if query_valid is not None:
        q = q.masked_fill(~query_valid.unsqueeze(-1), 0)
        visible = visible & query_valid[None, None, :, :, None, None]

    scores = torch.einsum("bhnqd,bhstd->bhnqst", q, k) * scale
    scores = scores.masked_fill(~visible, float("-inf")).flatten(-2)
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0)  # an empty row: avoid -inf - -inf
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    probs = (weights / total).unflatten(-1, (S, T))
    out = torch.einsum("bhnqst,bhstd->bhnqd", probs, v)
    lse = (total.log() + highest).masked_fill(empty, float("-inf")).squeeze(-1)
    if return_mass:
        per_slot = probs.detach().sum(dim=(3, 5))
        mass = per_slot.gather(-1, block_index.clamp(min=0).long()).masked_fill(block_index < 0, 0)
    else:
        mass = lse.new_zeros((B, H, Nq, 0))
    return out.to(query.dtype), lse, mass
