"""Muon that orthogonalizes matrices of one shape together, in the type that is fast on their device."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from sparse_forcing.devices import multiplies_bfloat16


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon with `match_rms_adamw`, its state included: updates are as large as AdamW's.

    torch's own orthogonalizes one matrix after another, always in bfloat16: on a GPU that is twenty small kernels per
    matrix, and on a CPU without bfloat16 arithmetic most of a small model's step.
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float, **settings: Any) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            averages: list[Tensor] = []
            self._init_group(group, parameters, gradients, averages)
            alike: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p, gradient, average in zip(parameters, gradients, averages):
                average.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
                alike[(p.shape, p.dtype, p.device)].append((p, update))
            for matrices in alike.values():
                _move(matrices, group)
        return loss


def _move(matrices: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
    """One step of parameters of one shape, type and device, each with its update before it is orthogonalized."""
    first = matrices[0][0]
    stacked = torch.stack([update for _, update in matrices])
    stacked = stacked.bfloat16() if multiplies_bfloat16(first.device) else stacked.float()
    stacked = orthogonalize(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(first.dtype)
    size = group["lr"] * 0.2 * max(first.shape) ** 0.5
    for (p, _), update in zip(matrices, stacked.unbind()):
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-size)


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly U V^T of every x = U S V^T [N, m, n], by Newton-Schulz iterations a y + b (y y^T) y + c (y y^T)^2 y
    (Jordan et al., 2024: https://kellerjordan.github.io/posts/muon)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
