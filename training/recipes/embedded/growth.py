"""Larger modules that begin as smaller ones: weights of a model with fewer channels, loaded into one with more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparse_forcing.errors import ConfigError


def load_leading(
    module: nn.Module, state: Mapping[str, Tensor], *, readers: tuple[str, ...], writers: tuple[str, ...]
) -> None:
    """Load the `state` of a module with fewer channels into the leading part of `module`'s weights, in place.

    Only layers whose names start with one of `readers` or `writers` may be larger. What is new in a reader is 0, so
    that the new channels change nothing until it has learned; a writer's is as it was initialised. Raises ConfigError
    where another layer differs, or a smaller module was expected.
    """
    grown = module.state_dict()
    if grown.keys() != state.keys():
        raise ConfigError(
            f"{min(grown.keys() ^ state.keys())}: only one of the two models has this tensor; both need the same layers"
        )
    for name, value in state.items():
        target = grown[name]
        fits = value.ndim == target.ndim and all(old <= new for old, new in zip(value.shape, target.shape))
        if value.shape != target.shape and not (fits and name.startswith((*readers, *writers))):
            raise ConfigError(f"{name}: shape {list(value.shape)} cannot grow into {list(target.shape)}")
    for name, value in state.items():
        target = grown[name]
        if value.shape != target.shape and name.startswith(readers):
            target.zero_()
        target[tuple(slice(length) for length in value.shape)] = value
