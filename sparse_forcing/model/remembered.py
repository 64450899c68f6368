"""Tensors that are the same in every pass, made once for each device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Made = TypeVar("Made", bound=Callable[..., Tensor])


def remember(make: Made) -> Made:
    """`make`, whose tensors are kept by its arguments: bringing numbers to a GPU waits for it. They serve training,
    too, whoever asks first; where tensors are traced or have no storage, none is kept and none used."""
    kept = lru_cache(maxsize=64)(make)

    @wraps(make)
    def find(*arguments: Any) -> Tensor:
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return make(*arguments)
        with torch.inference_mode(False):
            return kept(*arguments)

    return cast(Made, find)
