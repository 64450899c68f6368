"""Exponential moving average of parameters, with a decay that grows from zero so that early weights are forgotten."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ParameterEma:
    """Float32 shadow of a module's state.

    Args:
        decay: final decay; step n uses min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names, parameters = zip(*module.named_parameters())
        shadow = [self.shadow[name] for name in names]
        torch._foreach_lerp_(shadow, [p.float() for p in parameters], 1 - decay)

    @torch.no_grad()
    def reset(self, module: nn.Module) -> None:
        """Forget the past: the averages become the present weights."""
        self.updates = 0
        for name, parameter in module.named_parameters():
            self.shadow[name].copy_(parameter)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor | int]:
        return {**self.shadow, "__updates__": self.updates}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["__updates__"])
        for name, tensor in self.shadow.items():
            value = state[name]
            assert isinstance(value, Tensor)
            tensor.copy_(value)
