"""Problems, the float64 answer, and guarded memory for the interpreted Triton tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention import reference
from sparse_forcing.kernels.block_sparse_attention.gpu.backend import run
from sparse_forcing.kernels.block_sparse_attention.gpu.launch import plan_backward, plan_forward
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}
MARGIN = 64  # elements of canary on either side of every output


def problem(
    B: int = 1,
    H: int = 2,
    Nq: int = 3,
    Tq: int = 16,
    S: int = 5,
    T: int = 16,
    D: int = 32,
    M: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ragged: bool = False,
    scale: float | None = None,
    lengths: list[int] | None = None,
) -> Problem:
    """Random tensors; each list holds distinct slots in random order, with random length unless given."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key_pool, value_pool = random(B, H, Nq, Tq, D), random(B, H, S, T, D), random(B, H, S, T, D)
    order = torch.rand(B, H, Nq, S, generator=generator).argsort(-1)[..., :M].to(torch.int32)
    length = torch.randint(0, M + 1, (B, H, Nq, 1), generator=generator)
    if lengths is not None:
        length = torch.tensor(lengths).reshape(1, 1, Nq, 1)
    query_sizes = torch.randint(1, Tq + 1, (Nq,), generator=generator, dtype=torch.int32) if ragged else None
    key_sizes = torch.randint(0, T + 1, (B, H, S), generator=generator, dtype=torch.int32) if ragged else None
    return Problem(
        query=query,
        key_pool=key_pool,
        value_pool=value_pool,
        block_index=order.masked_fill(torch.arange(M) >= length, -1),
        query_sizes=query_sizes,
        key_sizes=key_sizes,
        scale=D**-0.5 if scale is None else scale,
        num_persistent=0,
    )


def gradients_in(p: Problem, through_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Random gradients of out (its type) and of lse (float32; 0 unless `through_lse`)."""
    generator = torch.Generator().manual_seed(99)
    grad_out = torch.randn(p.query.shape, generator=generator).to(p.query.dtype)
    return grad_out, torch.randn(p.query.shape[:-1], generator=generator) * through_lse


def answer(p: Problem, through_lse: bool = True) -> dict[str, Tensor]:
    """Everything in float64 from the reference and autograd; rows without keys have no lse gradient."""
    q, k, v = (x.double().requires_grad_() for x in (p.query, p.key_pool, p.value_pool))
    out, lse, mass = reference.forward(p._replace(query=q, key_pool=k, value_pool=v), True)
    grad_out, grad_lse = gradients_in(p, through_lse)
    finite = lse.masked_fill(lse == float("-inf"), 0)
    dq, dk, dv = torch.autograd.grad((out * grad_out).sum() + (finite * grad_lse).sum(), (q, k, v))
    return {"out": out.detach(), "lse": lse.detach(), "mass": mass, "dq": dq, "dk": dk, "dv": dv}


@contextmanager
def guarded() -> Iterator[None]:
    """torch.empty gives NaN (or a huge integer) inside canaries, and the canaries are checked at the end."""
    empty, buffers = torch.empty, []

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        plain = empty(*args, **kwargs)
        bad = float("nan") if plain.is_floating_point() else 2**30
        buffer = empty(plain.numel() + 2 * MARGIN, dtype=plain.dtype).fill_(bad)
        for edge in (buffer[:MARGIN], buffer[plain.numel() + MARGIN :]):
            edge.fill_(7)
            buffers.append(edge)
        return buffer[MARGIN : plain.numel() + MARGIN].view(plain.shape)

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty
    assert all(bool((edge == 7).all()) for edge in buffers), "a kernel wrote outside its output"


def measured(
    p: Problem,
    forward: str | None,
    backward: str | None,
    *,
    mass: bool = False,
    through_lse: bool = True,
    keep_rest: bool = True,
    arch: str = "interpreter",
) -> dict[str, Tensor]:
    """Run the kernels on guarded memory; names as in `answer`. Forward None and backward "auto": the table chooses."""
    grad_out, grad_lse = gradients_in(p, through_lse)
    with guarded():
        keep_rest = keep_rest and backward is not None
        plan = plan_forward(p, arch, return_mass=mass, keep_rest=keep_rest, variant=forward)
        run(plan.launches, p.query.device)
        found = {"out": plan.out, "lse": plan.lse} | ({"mass": plan.mass} if mass else {})
        if backward is not None:
            chosen = None if backward == "auto" else backward
            back = plan_backward(p, arch, grad_out, grad_lse, plan.out, plan.out_rest, plan.lse, variant=chosen)
            run(back.launches, p.query.device)
            found |= {"dq": back.grad_query, "dk": back.grad_key, "dv": back.grad_value}
    return found


class _Float32Scores(torch.autograd.Function):
    """q k^T summed in float32, as the hardware does at best; everything else, its gradient too, in float64."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return (q.float() @ k.float().mT).double()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        return grad @ k, grad.mT @ q


def float32_scores(p: Problem) -> dict[str, Tensor]:
    """What float64 arithmetic makes of scores that were summed in float32: nobody with such scores can do better.

    A score of size s carries an error near 2^-24 s, and its probability the same error relative to itself. For full
    blocks and full lists, gradient through out alone; names as in `answer`.
    """
    assert p.query_sizes is None
    assert p.key_sizes is None
    q, k, v = (x.double().requires_grad_() for x in (p.query, p.key_pool, p.value_pool))
    grad_out, _ = gradients_in(p)
    batch, head = torch.arange(len(q)).view(-1, 1, 1, 1), torch.arange(q.shape[1]).view(-1, 1, 1)
    keys, values = (x[batch, head, p.block_index.long()].flatten(3, 4) for x in (k, v))
    scores = _Float32Scores.apply(q, keys) * p.scale
    out, lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
    dq, dk, dv = torch.autograd.grad((out * grad_out).sum(), (q, k, v))
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm over finite entries; infinite where NaN or where infinities differ."""
    finite = torch.isfinite(wanted)
    if found.isnan().any() or not torch.equal(torch.isinf(found), ~finite):
        return float("inf")
    found = found.detach()
    return float((found.double() - wanted)[finite].norm() / wanted[finite].norm().clamp_min(1e-9))


def check(p: Problem, found: dict[str, Tensor], wanted: dict[str, Tensor] | None = None) -> None:
    """Every tensor within the tolerance of its type."""
    wanted = answer(p) if wanted is None else wanted
    errors = {name: error(tensor, wanted[name]) for name, tensor in found.items()}
    assert max(errors.values()) <= TOLERANCE[p.query.dtype], errors


def strided(p: Problem) -> Problem:
    """The same values in views with other strides and NaN between and around them."""

    def spread(x: Tensor) -> Tensor:
        B, H, N, T, D = x.shape
        buffer = torch.full((B, N + 2, T + 1, H, D + 3), float("nan"), dtype=x.dtype)
        view = buffer.permute(0, 3, 1, 2, 4)[:, :, 1 : N + 1, :T, 1 : D + 1]
        view.copy_(x)
        return view

    return p._replace(query=spread(p.query), key_pool=spread(p.key_pool), value_pool=spread(p.value_pool))
