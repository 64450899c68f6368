"""Larger modules that begin as smaller ones: weights of a model with fewer channels, loaded into one with more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparse_forcing.errors import ConfigError


def load_leading(module: nn.Module, state: Mapping[str, Tensor], *, silent: tuple[str, ...]) -> None:
    """Load a smaller module's `state` into the leading part of each of `module`'s weights, in place.

    Beyond it weights stay as they were initialised, but are 0 where their name starts with one of `silent`: layers that
    read the new channels, which then change nothing until they have learned. Raises ConfigError where `state` is not
    the smaller one.
    """
    grown = module.state_dict()
    if grown.keys() != state.keys():
        raise ConfigError(
            f"not the same kind of module: {sorted(grown.keys() ^ state.keys())[0]} is in one of them only"
        )
    for name, value in state.items():
        target = grown[name]
        if value.ndim != target.ndim or any(old > new for old, new in zip(value.shape, target.shape)):
            raise ConfigError(f"{name}: {list(value.shape)} does not fit into {list(target.shape)}")
        if value.shape != target.shape and name.startswith(silent):
            target.zero_()
        target[tuple(slice(length) for length in value.shape)] = value
