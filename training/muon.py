"""Muon in float32, for CPUs on which torch's own, which iterates in bfloat16, takes most of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_forcing.devices import multiplies_bfloat16


def make_muon(parameters: list[nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Muon:
    """torch's Muon where bfloat16 saves time on the parameters' device, the same in float32 elsewhere. The size of its
    updates is AdamW's (`match_rms_adamw`)."""
    kind = torch.optim.Muon if multiplies_bfloat16(parameters[0].device) else Float32Muon
    return kind(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon with `match_rms_adamw`, its state included, but for the type of the orthogonalization."""

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
            for p, gradient, average in zip(parameters, gradients, averages):
                average.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
                update = orthogonalize(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
        return loss


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly U V^T of x = U S V^T [m, n], by Newton-Schulz iterations a y + b (y y^T) y + c (y y^T)^2 y
    (Jordan et al., 2024: https://kellerjordan.github.io/posts/muon)."""
    a, b, c = coefficients
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if x.shape[0] > x.shape[1] else y
