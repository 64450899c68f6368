"""A scalar whose gradient is taken at once, so that what it was computed from need not wait for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def with_gradient(scalar: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`scalar(*inputs)`, differentiable (once) in `inputs` alone: parameters that it uses besides get no gradient."""
    if not torch.is_grad_enabled():
        return scalar(*inputs)
    return _WithGradient.apply(scalar, *inputs)


def _same(x: Tensor) -> Tensor:
    return x


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scalar: Callable[..., Tensor], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        # Hooks of our own: those of a checkpointed block around this would run it again, now.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            leaves = [x.detach().requires_grad_() for x in inputs]
            value = scalar(*leaves)
            ctx.save_for_backward(*torch.autograd.grad(value, leaves))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *(upstream.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors)
