"""Convert published weights (Wan, Self-Forcing, CausVid, LongLive, ComfyUI) to a folder that generates, or back."""

from __future__ import annotations

import argparse
import json

from sparse_forcing.cli import note, say
from sparse_forcing.cli.flags import Parser, number, path, whole_number
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
from sparse_forcing.sampling.generation.jobs import PRESETS

_FORWARD = ("part", "head_dim", "base", "preset", "config", "lora", "lora_scale", "keep_lora")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=path,
        help="weight file, folder of shards, an original Wan's folder, or a model folder; pickled code is refused",
    )
    parser.add_argument("target", metavar="TARGET", type=path, help="new folder to write")
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        type=path,
        help="model to take text encoder, tokenizer and autoencoder from, in diffusers' layout (linked) or Wan's own",
    )
    parser.add_argument("--preset", choices=PRESETS, help="how the weights are sampled (default: told from the file)")
    parser.add_argument("--config", metavar="FILE", type=path, help="Self-Forcing's YAML file, in place of a preset")
    parser.add_argument("--lora", metavar="FILE", type=path, help="adapter to merge into the weights")
    parser.add_argument("--keep-lora", action="store_true", help="keep the adapter beside the weights instead")
    parser.add_argument("--lora-scale", metavar="X", type=number, help="factor of the adapter's change (default: 1)")
    parser.add_argument(
        "--part", metavar="NAME", help="part of the checkpoint (default: generator_ema, else generator)"
    )
    parser.add_argument(
        "--head-dim",
        type=whole_number,
        metavar="N",
        help="numbers in an attention head (default: a config's beside the weights or of --base, else 128)",
    )
    parser.add_argument(
        "--to", choices=("wan", "self-forcing"), help="write a model folder back as their programs load it"
    )
    parser.add_argument("--json", action="store_true", help="print the files written and their SHA-256 as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns 0. The target must be new or empty: converted weights never mix with older ones."""
    source, target = arguments.source, arguments.target
    if arguments.head_dim is not None and arguments.head_dim < 1:
        raise ConfigError(f"--head-dim must be at least 1, got {arguments.head_dim}")
    if arguments.to and (given := [name for name in _FORWARD if getattr(arguments, name)]):
        raise ConfigError(f"--{given[0].replace('_', '-')} has no effect with --to, which writes weights as they are")
    if not (is_file(source, WeightsError) or is_folder(source, WeightsError)):
        raise WeightsError(f"{source}: no such weight file or folder")
    for given in (arguments.config, arguments.lora):
        if given is not None and not is_file(given, WeightsError):
            raise WeightsError(f"{given}: no such file")
    if target.exists() and (not target.is_dir() or not holds_nothing(target)):
        raise OutputError(f"{target} exists already; name a new folder")
    base = [] if arguments.base is None else [arguments.base]
    inputs = [given for given in (arguments.config, arguments.lora) if given is not None]
    check_targets([], inputs, sealed=[source, *base], added_to=[target])
    with without_empty_folders([target]):
        check_writable(target, folder=True)
        with output_lock(target):
            answer = _convert_back(arguments) if arguments.to else _convert(arguments)
    for remark in answer["remarks"]:
        note(f"remark: {remark}")
    if arguments.json:
        say(json.dumps({"target": str(target), **answer}))
    else:
        sampled = f", sampled as {answer['preset']}" if answer["preset"] else ""
        say(f"{target}: {len(answer['sha256'])} files, {answer['tensors']} tensors equal bit by bit{sampled}")
    return 0


def _convert(arguments: argparse.Namespace) -> dict:
    from sparse_forcing.model_folder.convert import ConvertOptions, convert
    from sparse_forcing.weights.manifest import write_manifest

    options = ConvertOptions(
        which=arguments.part,
        head_dim=arguments.head_dim,
        base=arguments.base,
        preset=arguments.preset,
        config=arguments.config,
        lora=arguments.lora,
        lora_scale=arguments.lora_scale,
        keep_lora=arguments.keep_lora,
    )
    done = convert(arguments.source, arguments.target, options)
    hashes = write_manifest(arguments.target)
    return {"sha256": hashes, "tensors": done.tensors, "preset": done.preset, "remarks": done.remarks}


def _convert_back(arguments: argparse.Namespace) -> dict:
    from sparse_forcing.model_folder.written import write_back
    from sparse_forcing.weights.manifest import write_manifest

    tensors, remarks = write_back(arguments.source, arguments.target, arguments.to)
    hashes = write_manifest(arguments.target)
    return {"sha256": hashes, "tensors": tensors, "preset": None, "remarks": remarks}
