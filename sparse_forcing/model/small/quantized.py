"""Linear layers whose weights are stored in 8 bits, with a scale for every output channel: half of bfloat16's bytes.

int8 holds whole numbers up to 127, fp8 floating-point numbers (e4m3). Either is turned back when it is used: a product
needs the bytes of one layer's weight beside those stored. For users of a library that does this (torchao, bitsandbytes)
diffusers' `quantization_config` is passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError

Storage = Literal["int8", "fp8"]
STORAGES = get_args(Storage)
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
_SCALE_BYTES = 4
_BLOCKS = ("blocks.", "encoder.block.")  # of the transformer, of umT5
_WHOLE = ("selector",)  # small, and read by memories


class QuantizedLinear(nn.Module):
    """A linear layer in 8 bits.

    Args:
        linear: whose weights are rounded.
        storage: what to.
    """

    weight: Tensor  # [out, in] int8, or the bits of fp8 as int8: no change of a model's type may touch them
    scale: Tensor  # [out, 1] float32
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, storage: Storage) -> None:
        super().__init__()
        self.in_features, self.out_features, self.storage = linear.in_features, linear.out_features, storage
        wide = linear.weight.detach().float()
        scale = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST[storage]
        wide = wide / scale
        codes = wide.round().to(torch.int8) if storage == "int8" else wide.to(torch.float8_e4m3fn).view(torch.int8)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", linear.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """As for every module, but that scales stay in float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in] weights in another type."""
        codes = self.weight if self.storage == "int8" else self.weight.view(torch.float8_e4m3fn)
        return codes.to(dtype) * self.scale.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the type of x."""
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"


def check_storage(name: str, value: Any) -> Storage | None:
    """`value` itself. Raises ConfigError for what is no storage."""
    if value is not None and value not in STORAGES:
        raise ConfigError(f"{name}: expected one of {', '.join(STORAGES)}, got {value!r:.60}")
    return value


def quantize_(model: nn.Module, storage: Storage) -> nn.Module:
    """Put the linear layers of a model's blocks into 8 bits, in place, one after the other; returns the model.

    Raises:
        ConfigError: there are none.
    """
    found = list(_linears(model))
    if not found:
        raise ConfigError(f"weights: {type(model).__name__} has no blocks with linear layers to store as {storage}")
    for name, linear in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, QuantizedLinear(linear, storage))
    return model


def stored_bytes(model: nn.Module, item: int, storage: Storage | None) -> int:
    """Bytes of a model's weights with `item` of each number, once those of its blocks are stored as `storage`; nothing
    is looked at but shapes."""
    numbers = sum(x.numel() for x in model.parameters())
    if storage is None:
        return item * numbers
    linears = [linear for _, linear in _linears(model)]
    small = sum(linear.weight.numel() for linear in linears)
    return item * (numbers - small) + small + _SCALE_BYTES * sum(linear.out_features for linear in linears)


def is_quantized(model: nn.Module | None) -> bool:
    """Whether any layer of a model is stored in 8 bits by this module."""
    return model is not None and any(isinstance(each, QuantizedLinear) for each in model.modules())


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        inside = name.startswith(_BLOCKS) and not any(part in _WHOLE for part in name.split("."))
        if inside and type(module) is nn.Linear:
            yield name, module
