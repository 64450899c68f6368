"""Exponential moving average of parameters, with a decay that grows from zero so that early weights are forgotten."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ParameterEma:
    """Float32 shadow of the parameters that train; frozen ones are their own average.

    Args:
        decay: final decay; step n uses min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone().float() for name, p in trained.items()}

    def _pairs(self, module: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = dict(module.named_parameters())
        return [(shadow, parameters[name]) for name, shadow in self.shadow.items()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        shadow, parameters = zip(*self._pairs(module))
        torch._foreach_lerp_(list(shadow), [p.float() for p in parameters], 1 - decay)

    @torch.no_grad()
    def reset(self, module: nn.Module) -> None:
        """Forget the past: the averages become the present weights."""
        self.updates = 0
        for shadow, parameter in self._pairs(module):
            shadow.copy_(parameter)

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """The module gets the averages, the averages its float32 weights: called again, each has its own again, bit by
        bit, and there was no copy of all of them."""
        for shadow, parameter in self._pairs(module):
            assert parameter.dtype == shadow.dtype
            kept = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {**self.shadow, "__updates__": self.updates}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["__updates__"])
        for name, tensor in self.shadow.items():
            value = state[name]
            assert isinstance(value, Tensor)
            tensor.copy_(value)
