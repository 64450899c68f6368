"""AdamW, a learning-rate schedule that is a function of the step (resuming needs no scheduler state), and the one place
where optimizers step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_forcing.errors import ConfigError
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.engine.guard import check_finite
from sparse_forcing.training.engine.parallel import average_gradients


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; the schedule is a linear warm-up, then constant, linear or cosine to `final_fraction` of the rate.

    selector_factor: learned block selectors take so many times the rate; they start as plain means beside weights that
    are already good.
    """

    learning_rate: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: str = "constant"
    final_fraction: float = 0.0
    selector_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate: must be positive, got {self.learning_rate}")
        if self.selector_factor <= 0:
            raise ConfigError(f"selector_factor: must be positive, got {self.selector_factor}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"schedule: expected constant, linear or cosine, got {self.schedule!r}")
        if not 0 <= self.final_fraction <= 1 or self.warmup_steps < 0:
            raise ConfigError("final_fraction must be in [0, 1] and warmup_steps not negative")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step out of `steps`."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        done = min(1.0, step / max(1, steps))
        fall = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[self.schedule]
        return self.learning_rate * warm * (1 - (1 - self.final_fraction) * fall)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    selectors = [p for name, p in trainable if ".selector." in name]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in trainable]}]
    if selectors and config.selector_factor != 1:
        others = [p for name, p in trainable if ".selector." not in name]
        groups = [{"params": others}, {"params": selectors, "factor": config.selector_factor}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Rate of every group, times its own factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def apply_gradients(
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    *,
    name: str,
    loss: float,
    rate: float,
    max_grad_norm: float | None,
    ema: ParameterEma | None = None,
) -> dict[str, float]:
    """Average and clip the gradients of a network, refuse numbers that are not finite, update; every process calls it.

    Args:
        optimizers: optimizers of the network's parameters; all take `rate`.
        name: name of the network in metrics and messages.
        loss: that the gradients are of.
        ema: average of the network to update, too.

    Raises:
        NotFiniteError: loss or gradient norm is NaN or infinite; the weights are as they were.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    average_gradients(parameters)
    norm = clip_gradients(parameters, max_grad_norm)
    check_finite(step, {f"{name} loss": loss, f"{name} gradient norm": norm})
    for optimizer in optimizers:
        set_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if ema is not None:
        ema.update(module)
    return {f"{name}_loss": loss, f"{name}_gradient_norm": norm}


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> float:
    """Clip to `max_norm`, if one is given, over all parameters, sharded or not; returns the norm before."""
    if max_norm is None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    else:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
