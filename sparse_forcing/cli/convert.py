"""Convert weights to a diffusers folder: original Wan or Self-Forcing checkpoints (.pt, .safetensors, or a folder)."""

from __future__ import annotations

import argparse
import json

from sparse_forcing.cli import say
from sparse_forcing.cli.flags import path, whole_number
from sparse_forcing.errors import ConfigError, OutputError, WeightsError
from sparse_forcing.files import (
    check_writable,
    holds_nothing,
    is_file,
    is_folder,
    output_lock,
    without_empty_folders,
)
from sparse_forcing.inputs import check_targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=path, help="weight file or folder; pickled code is refused")
    parser.add_argument("target", metavar="TARGET", type=path, help="new folder to write")
    parser.add_argument(
        "--part", metavar="NAME", help="part of the checkpoint (default: generator_ema, else generator)"
    )
    parser.add_argument(
        "--head-dim", type=whole_number, metavar="N", default=128, help="numbers in an attention head (default: 128)"
    )
    parser.add_argument("--json", action="store_true", help="print the files written and their SHA-256 as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns 0. The target must be new or empty: converted weights never mix with older ones."""
    source, target = arguments.source, arguments.target
    if arguments.head_dim < 1:
        raise ConfigError(f"--head-dim must be at least 1, got {arguments.head_dim}")
    if not (is_file(source, WeightsError) or is_folder(source, WeightsError)):
        raise WeightsError(f"{source}: no such weight file or folder")
    if target.exists() and (not target.is_dir() or not holds_nothing(target)):
        raise OutputError(f"{target} exists already; name a new folder")
    check_targets([], [], sealed=[source], added_to=[target])
    with without_empty_folders([target]):
        check_writable(target, folder=True)
        from sparse_forcing.model_folder.convert import convert_checkpoint
        from sparse_forcing.weights.manifest import write_manifest

        with output_lock(target):
            convert_checkpoint(source, target, which=arguments.part, head_dim=arguments.head_dim)
            hashes = write_manifest(target)
    if arguments.json:
        say(json.dumps({"target": str(target), "sha256": hashes}))
    else:
        say(f"{target}: {len(hashes)} files")
    return 0
