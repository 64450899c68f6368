"""The definition of persistent block-sparse attention: one masked softmax over the listed blocks, in plain torch.

Slow and memory hungry on purpose: every faster path is tested against it. Autograd differentiates it as it stands.

Shape legend: problem.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.problem import Problem


def why_unavailable(query: Tensor) -> str | None:
    """The reference runs wherever torch runs."""
    return None


def valid_tokens(sizes: Tensor | None, tokens: int) -> Tensor | None:
    """[..., N] sizes -> [..., N, tokens] bool, True where a token of a block is real; None stays None (all real)."""
    if sizes is None:
        return None
    return torch.arange(tokens, device=sizes.device) < sizes.unsqueeze(-1)


def forward(problem: Problem, return_mass: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """out [B,H,Nq,Tq,D], lse [B,H,Nq,Tq] (natural log), mass [B,H,Nq,M] (M = 0 unless `return_mass`).

    softmax of scale * <q, k> over the tokens t < key_sizes[b, h, s] of the slots s in block_index[b, h, i], computed
    in float32 (float64 for float64 input). Padding is zeroed first: NaN * 0 is NaN, so masked scores are not enough.
    """
    query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale, _ = problem
    B, H, _, Tq, _ = query.shape
    M, T = block_index.shape[-1], key_pool.shape[3]
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


def gradients(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key_pool and value_pool by autograd; differentiable again where autograd is recording."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        query, key_pool, value_pool = (_connect(x) for x in problem.inputs)
        problem = problem._replace(query=query, key_pool=key_pool, value_pool=value_pool)
        out, lse, _ = forward(problem)
        outputs, upstream = ([out], [grad_out]) if grad_lse is None else ([out, lse], [grad_out, grad_lse])
        dq, dk, dv = torch.autograd.grad(
            outputs, problem.inputs, upstream, create_graph=recording, materialize_grads=True
        )
        return dq, dk, dv


def second_gradients(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of grad_out, grad_lse, query, key_pool and value_pool through `gradients`, whose results have the
    gradients `upstream`."""
    recording = torch.is_grad_enabled()
    if problem.empty:
        given = (grad_out, grad_lse, *problem.inputs)
        return [None if x is None else torch.zeros_like(x) for x in given]
    with torch.enable_grad():
        query, key_pool, value_pool = (_connect(x) for x in problem.inputs)
        grad_out, grad_lse = _connect(grad_out), None if grad_lse is None else _connect(grad_lse)
        connected = problem._replace(query=query, key_pool=key_pool, value_pool=value_pool)
        first = gradients(connected, grad_out, grad_lse)
        pairs = [(x, grad) for x, grad in zip(first, upstream) if grad is not None and x.requires_grad]
        if not pairs:
            return [None] * (2 + len(first))
        sources = (grad_out, grad_lse, query, key_pool, value_pool)
        wanted = [x for x in sources if x is not None]
        results, of_results = zip(*pairs)
        found = iter(torch.autograd.grad(results, wanted, of_results, create_graph=recording, materialize_grads=True))
        return [None if x is None else next(found) for x in sources]


def _connect(x: Tensor) -> Tensor:
    """x as a tensor of its own to differentiate by, in the graph of x where it has one."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
