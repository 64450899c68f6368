"""From the command line to a recipe: `train(stage, config file, overrides, output folder)`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparse_forcing.config import load_config, read_settings
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import PathLike, check_writable
from sparse_forcing.inputs import check_targets, config_inputs

STAGES: dict[str, tuple[str, str]] = {
    "autoencoder": ("sparse_forcing.training.recipes.embedded.autoencoder", "AutoencoderConfig"),
    "pretrain": ("sparse_forcing.training.recipes.embedded.pretrain", "PretrainConfig"),
    "forcing": ("sparse_forcing.training.recipes.forcing", "ForcingConfig"),
    "consistency": ("sparse_forcing.training.recipes.consistency", "ConsistencyConfig"),
    "ode": ("sparse_forcing.training.recipes.ode", "OdeConfig"),
    "retention": ("sparse_forcing.training.recipes.retention", "RetentionConfig"),
    "distill": ("sparse_forcing.training.recipes.distill", "DistillConfig"),
}
"""stage: (module, config class). The module has `train(config, output folder, resume)`; a line here adds a stage."""

WRITTEN = ("metrics.jsonl", "resumed-from.txt", "pipeline", "vae", "samples")
"""What stages write into their output folder, checkpoints apart."""


def load_stage(stage: str, config_path: PathLike | None, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """(config, function) of a stage. Raises ConfigError for an unknown stage or a bad config."""
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: expected one of {', '.join(STAGES)}")
    function = importlib.import_module(STAGES[stage][0]).train
    return load_config(_config_class(stage), config_path, overrides), function


def _config_class(stage: str) -> Any:
    module_name, config_class = STAGES[stage]
    return getattr(importlib.import_module(module_name), config_class)


def guess_stage(config_path: PathLike) -> str:
    """The stage a config file is for: the one that knows most of its settings and takes their values.

    All settings of `ode` are settings of `forcing` too, so a file without any that is forcing's own is taken for ode's.

    Raises:
        ConfigError: the file cannot be read, or several stages take it.
    """
    keys = set(read_settings(config_path))
    settings = {stage: {x.name for x in fields(_config_class(stage))} for stage in STAGES}
    most = max(len(keys & names) for names in settings.values())
    likely = [stage for stage, names in settings.items() if len(keys & names) == most]
    if len(likely) > 1:
        likely = [stage for stage in likely if _takes(stage, config_path)] or likely
    narrowest = [stage for stage in likely if all(settings[stage] <= settings[other] for other in likely)]
    if len(narrowest) != 1:
        raise ConfigError(f"{config_path}: may be for stage {' or '.join(likely)}; say which with --stage")
    return narrowest[0]


def _takes(stage: str, config_path: PathLike) -> bool:
    try:
        load_stage(stage, config_path)
    except ConfigError:
        return False
    return True


def train(stage: str, config_path: PathLike | None, overrides: Sequence[str], output: PathLike, **resume: Any) -> int:
    """Run or resume a stage; returns the exit code (143 after a stop that saved). `resume`: fields of `Resume`."""
    from sparse_forcing.training.engine.resume import Resume

    config, function = load_stage(stage, config_path, overrides)
    out = Path(output)
    paths, models = config_inputs(config)
    files = [Path(config_path)] if config_path is not None else []
    checkpoints = [checkpoint] if (checkpoint := resume.get("checkpoint")) is not None else []
    written = [out / name for name in WRITTEN]
    check_targets(written, [*paths, *files], sealed=[*models, *checkpoints], added_to=[out])
    return function(config, check_writable(out, folder=True), Resume(**resume))
