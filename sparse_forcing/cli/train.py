"""Train a model, one stage at a time; resumes from the newest complete checkpoint of its output folder."""

from __future__ import annotations

import argparse

from sparse_forcing.cli.flags import path
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import is_file
from sparse_forcing.training.entry import STAGES, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="STAGE", choices=STAGES, help=f"one of: {', '.join(STAGES)}")
    parser.add_argument("--config", type=path, metavar="PATH", help="YAML file of settings (default: the stage's own)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one setting; repeatable")
    parser.add_argument("--output", type=path, metavar="PATH", required=True, help="folder for checkpoints and metrics")
    parser.add_argument(
        "--resume-from", type=path, metavar="PATH", help="a checkpoint (RUN/step-N) to go on from in a new --output"
    )
    parser.add_argument("--allow-changes", action="store_true", help="resume with settings other than the checkpoint's")


def run(arguments: argparse.Namespace) -> int:
    """Train; returns 0 when the stage is complete, 143 when it stopped early to be resumed."""
    if arguments.config is not None and not is_file(arguments.config, ConfigError):
        raise ConfigError(f"--config {arguments.config}: no such file")
    return train(
        arguments.stage,
        arguments.config,
        arguments.set,
        arguments.output,
        checkpoint=arguments.resume_from,
        allow_changes=arguments.allow_changes,
    )
