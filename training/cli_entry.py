"""From the command line to a recipe: `train(stage, config file, overrides, output folder)`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sparse_forcing.config import load_config, read_settings
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import PathLike

STAGES: dict[str, tuple[str, str, str]] = {
    "autoencoder": ("sparse_forcing.training.autoencode", "AutoencoderConfig", "train"),
    "pretrain": ("sparse_forcing.training.pretrain", "PretrainConfig", "pretrain"),
    "forcing": ("sparse_forcing.training.forcing", "ForcingConfig", "train"),
    "ode": ("sparse_forcing.training.ode", "OdeConfig", "train"),
    "distill": ("sparse_forcing.training.distill", "DistillConfig", "train"),
}
"""stage: (module, config class, function of config and output folder)."""

_WITH_EXIT_CODE = ("forcing", "ode", "distill")
"""Stages whose function returns an exit code; the others return nothing, or a count."""


def load_stage(stage: str, config_path: PathLike | None, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """(config, function) of a stage. Raises ConfigError for an unknown stage or a bad config."""
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: expected one of {', '.join(STAGES)}")
    function = getattr(importlib.import_module(STAGES[stage][0]), STAGES[stage][2])
    return load_config(_config_class(stage), config_path, overrides), function


def _config_class(stage: str) -> Any:
    module_name, config_class, _ = STAGES[stage]
    return getattr(importlib.import_module(module_name), config_class)


def guess_stage(config_path: PathLike) -> str:
    """The stage a config file is for: the one that knows most of its settings.

    Raises:
        ConfigError: the file cannot be read.
    """
    keys = set(read_settings(config_path))

    def fit(stage: str) -> tuple[int, int]:
        settings = fields(_config_class(stage))
        known = {setting.name for setting in settings}
        needed = {x.name for x in settings if x.default is MISSING and x.default_factory is MISSING}
        return len(keys & known) - len(keys - known), -len(needed - keys)

    return max(STAGES, key=fit)


def train(stage: str, config_path: PathLike | None, overrides: Sequence[str], output: PathLike) -> int:
    """Run or resume a stage; returns the exit code (143 after a stop that saved)."""
    config, function = load_stage(stage, config_path, overrides)
    result = function(config, Path(output))
    return result if stage in _WITH_EXIT_CODE else 0
