"""Random block-sparse attention problems, and their float64 answer by a loop that shares no code with the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Problem:
    query: Tensor
    key_pool: Tensor
    value_pool: Tensor
    block_index: Tensor
    query_sizes: Tensor | None = None
    key_sizes: Tensor | None = None
    scale: float | None = None
    num_persistent: int = 0

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key_pool, self.value_pool

    @property
    def options(self) -> dict:
        return {
            "query_sizes": self.query_sizes,
            "key_sizes": self.key_sizes,
            "scale": self.scale,
            "num_persistent": self.num_persistent,
        }

    def with_inputs(self, query: Tensor, key_pool: Tensor, value_pool: Tensor) -> Problem:
        return replace(self, query=query, key_pool=key_pool, value_pool=value_pool)

    @property
    def padded_rows(self) -> Tensor:
        """[Nq, Tq] bool."""
        sizes = self.query.shape[3] if self.query_sizes is None else self.query_sizes.unsqueeze(-1)
        return (torch.arange(self.query.shape[3]) >= sizes).expand(self.query.shape[2:4])

    @property
    def padded_keys(self) -> Tensor:
        """[B, H, S, T] bool."""
        sizes = self.key_pool.shape[3] if self.key_sizes is None else self.key_sizes.unsqueeze(-1)
        return (torch.arange(self.key_pool.shape[3]) >= sizes).expand(self.key_pool.shape[:4])


def problem(
    B: int = 2,
    H: int = 3,
    Nq: int = 4,
    Tq: int = 5,
    S: int = 7,
    T: int = 6,
    D: int = 8,
    M: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    persistent: int = 0,
    ragged: bool = False,
    short_lists: bool = False,
    scale: float | None = None,
    seed: int = 0,
) -> Problem:
    """`persistent` entries lead every list of a head; the rest of a list is distinct and in no order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    order = torch.rand(B, H, 1, S, generator=generator).argsort(-1)
    first, others = order[..., :persistent], order[..., persistent:].expand(B, H, Nq, -1)
    shuffle = torch.rand(others.shape, generator=generator).argsort(-1)
    index = torch.cat((first.expand(B, H, Nq, -1), others.gather(-1, shuffle)[..., : M - persistent]), -1)
    if short_lists:
        length = torch.randint(persistent, M + 1, (B, H, Nq, 1), generator=generator)
        index = index.masked_fill(torch.arange(M) >= length, -1)
    query_sizes = torch.randint(0, Tq + 1, (Nq,), generator=generator).int() if ragged else None
    key_sizes = torch.randint(0, T + 1, (B, H, S), generator=generator).int() if ragged else None
    query, key_pool, value_pool = normal(B, H, Nq, Tq, D), normal(B, H, S, T, D), normal(B, H, S, T, D)
    return Problem(query, key_pool, value_pool, index.int(), query_sizes, key_sizes, scale, persistent)


def by_hand(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, mass in float64, one query block at a time; differentiable."""
    B, H, Nq, Tq, D = p.query.shape
    q, k, v = (x.double() for x in p.inputs)
    scale = D**-0.5 if p.scale is None else p.scale
    out = torch.zeros(B, H, Nq, Tq, D, dtype=torch.float64)
    lse = torch.full((B, H, Nq, Tq), float("-inf"), dtype=torch.float64)
    mass = torch.zeros(p.block_index.shape, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(Nq)).tolist():
        rows = Tq if p.query_sizes is None else int(p.query_sizes[i])
        listed = [s for s in p.block_index[b, h, i].tolist() if s >= 0]
        sizes = [p.key_pool.shape[3] if p.key_sizes is None else int(p.key_sizes[b, h, s]) for s in listed]
        if not rows or not sum(sizes):
            continue
        keys = torch.cat([k[b, h, s, :n] for s, n in zip(listed, sizes)])
        values = torch.cat([v[b, h, s, :n] for s, n in zip(listed, sizes)])
        scores = q[b, h, i, :rows] @ keys.T * scale
        probs = scores.softmax(-1)
        out[b, h, i, :rows] = probs @ values
        lse[b, h, i, :rows] = scores.logsumexp(-1)
        mass[b, h, i, : len(listed)] = torch.stack([part.sum() for part in probs.detach().split(sizes, dim=-1)])
    return out, lse, mass


def output_gradients(p: Problem, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse in float64; 0 where lse is -inf, whose gradient means nothing."""
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(p.query.shape, generator=generator, dtype=torch.float64).to(p.query.dtype).double()
    grad_lse = torch.randn(p.query.shape[:-1], generator=generator, dtype=torch.float64)
    return grad_out, grad_lse.masked_fill(lse == float("-inf"), 0)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error in the 2-norm over finite entries; infinite entries must agree exactly."""
    got, wanted = got.detach().double(), wanted.detach().double()
    finite = wanted.isfinite()
    assert torch.equal(got[~finite], wanted[~finite])
    norm = wanted[finite].norm()
    return float((got[finite] - wanted[finite]).norm() / (norm if norm > 0 else 1))
