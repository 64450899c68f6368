"""Train a model, one stage at a time; resumes from the newest complete checkpoint of its output folder."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from sparse_forcing.cli.flags import path
from sparse_forcing.config import load_config
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import check_writable

# stage: (module, config class, function of config and output folder that may return an exit code)
STAGES = {
    "pretrain": ("sparse_forcing.training.pretrain", "PretrainConfig", "pretrain"),
    "forcing": ("sparse_forcing.training.forcing", "ForcingConfig", "train"),
    "distill": ("sparse_forcing.training.distill", "DistillConfig", "train"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="STAGE", choices=STAGES, help=f"one of: {', '.join(STAGES)}")
    parser.add_argument("--config", type=path, metavar="PATH", help="YAML file of settings (default: the stage's own)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting; repeatable")
    parser.add_argument("--output", type=path, metavar="PATH", required=True, help="folder for checkpoints and metrics")


def run(arguments: argparse.Namespace) -> int:
    """Train; returns 0 when the stage is complete, 143 when it stopped early to be resumed."""
    if arguments.config is not None and not Path(arguments.config).is_file():
        raise ConfigError(f"--config {arguments.config}: no such file")
    check_writable(arguments.output, folder=True)
    module, config_class, function = STAGES[arguments.stage]
    recipe = importlib.import_module(module)
    config = load_config(getattr(recipe, config_class), arguments.config, arguments.set)
    return getattr(recipe, function)(config, arguments.output) or 0
