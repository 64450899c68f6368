"""Make data to train on. `clips`: captioned clips of moving shapes as mp4 files, and their manifest."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from sparse_forcing.cli.flags import path, whole_number
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import atomic_write_text, check_writable, output_lock

KINDS = ("clips",)
SPLITS = ("train", "heldout", "all")
MANIFEST = "manifest.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="WHAT", choices=KINDS, help=f"one of: {', '.join(KINDS)}")
    parser.add_argument("output", metavar="OUTPUT", type=path, help="folder to write")
    parser.add_argument("--num-clips", type=whole_number, default=16, metavar="N", help="default: 16")
    parser.add_argument("--num-frames", type=whole_number, default=80, metavar="N", help="default: 80")
    parser.add_argument("--fps", type=whole_number, default=16, metavar="N", help="frames per second (default: 16)")
    parser.add_argument("--size", type=whole_number, default=64, metavar="N", help="pixels to the side (default: 64)")
    parser.add_argument("--scale", type=whole_number, default=1, metavar="N", help="enlarge every pixel N x N")
    parser.add_argument("--split", choices=SPLITS, default="train", help="seen combinations, held-out ones, or all")
    parser.add_argument("--two-objects", action="store_true", help="two objects in every clip")
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")


def run(arguments: argparse.Namespace) -> int:
    """Render; returns 0. The manifest is written last, so a folder with a manifest is complete."""
    for name in ("num_clips", "num_frames", "fps", "size", "scale"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.seed < 2**62:
        raise ConfigError(f"--seed must be between 0 and 2^62, got {arguments.seed}")
    output: Path = check_writable(arguments.output, folder=True)
    with output_lock(output):
        lines = [json.dumps(_write_clip(arguments, number)) for number in range(arguments.num_clips)]
        atomic_write_text(output / MANIFEST, "\n".join(lines) + "\n")
    answer = {"manifest": str(output / MANIFEST), "clips": len(lines)}
    print(json.dumps(answer) if arguments.json else f"{answer['manifest']}: {len(lines)} clips")
    return 0


def _write_clip(arguments: argparse.Namespace, number: int) -> dict[str, object]:
    """Render clip `number` from a seed of its own, so that it does not depend on how many are made."""
    import torch

    from sparse_forcing.scenes.captions import caption
    from sparse_forcing.scenes.render import render
    from sparse_forcing.scenes.sample import sample_scenes
    from sparse_forcing.video import write_video

    seed = random.Random(f"{arguments.seed}/{number}").getrandbits(62)
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(1, generator, two_object_fraction=float(arguments.two_objects), split=arguments.split)
    pixels = render(scenes, arguments.num_frames, arguments.size)[0].permute(0, 2, 3, 1)
    text = caption(scenes.scenes()[0], random.Random(seed))
    name = f"{number:06d}.mp4"
    write_video(arguments.output / name, (pixels * 0.5 + 0.5).numpy(), arguments.fps, scale=arguments.scale)
    return {"video": name, "prompt": text, "index": 0, "seed": seed}
