"""Make data to train on.

clips      captioned clips of moving shapes as mp4 files, and their manifest; with --world clips in which something goes
           out of sight and comes back, and worlds.jsonl, which says what comes back when and where
encode     latents and text embeddings of videos (or of clips made on the fly) as shards that training reads
ode-pairs  a teacher's trajectories at the student's noise levels, as shards for the stage `ode`

clips takes the flags from --num-clips on; encode and ode-pairs take --config and --set, go on where they stopped, and
share the work of one launch (torchrun, accelerate launch) on as many devices.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_forcing.cli.flags import number, path, whole_number
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import atomic_write_text, check_writable, output_lock, remove_file, without_empty_folders
from sparse_forcing.inputs import check_targets, config_inputs
from sparse_forcing.scenes.worlds.config import GROUNDS, SPLITS
from sparse_forcing.scenes.worlds.config import KINDS as WORLDS

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("clips", "encode", "ode-pairs")
MANIFEST, WORLD_TRUTH = "manifest.jsonl", "worlds.jsonl"
MAX_CLIPS = 10**6
_CLIPS = {"num_clips": 16, "num_frames": 80, "fps": 16, "size": 64, "scale": 1, "split": "train", "seed": 0}
_OF_WORLDS = ("gap", "ground", "frame_noise")
_FROM_CONFIG = {
    "encode": ("sparse_forcing.training.data.encode", "EncodeConfig", "encode"),
    "ode-pairs": ("sparse_forcing.training.data.pairs", "PairsConfig", "make_pairs"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="WHAT", choices=KINDS, help=f"one of: {', '.join(KINDS)}")
    parser.add_argument("output", metavar="OUTPUT", type=path, help="folder to write")
    parser.add_argument("--config", type=path, metavar="PATH", help="YAML file of settings (encode, ode-pairs)")
    parser.add_argument("--set", action="append", metavar="A.B=C", help="change one setting (encode, ode-pairs)")
    parser.add_argument("--num-clips", type=whole_number, metavar="N", help="default: 16")
    parser.add_argument("--num-frames", type=whole_number, metavar="N", help="default: 80")
    parser.add_argument("--fps", type=whole_number, metavar="N", help="frames per second (default: 16)")
    parser.add_argument("--size", type=whole_number, metavar="N", help="pixels to the side (default: 64)")
    parser.add_argument("--scale", type=whole_number, metavar="N", help="enlarge every pixel N x N")
    parser.add_argument("--split", choices=SPLITS, help="seen combinations (default), held-out ones, or all")
    parser.add_argument("--two-objects", action="store_true", default=None, help="two objects in every clip")
    parser.add_argument("--world", choices=WORLDS, help="clips in which something comes back")
    parser.add_argument("--gap", type=_gap, metavar="N[-N]", help="frames out of sight (default: all that fits)")
    parser.add_argument("--ground", choices=GROUNDS, help="one kind of ground (default: all)")
    parser.add_argument("--frame-noise", type=number, metavar="X", help="noise of every frame, in 8-bit levels")
    parser.add_argument("--seed", type=whole_number, metavar="N", help="default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")


def run(arguments: argparse.Namespace) -> int:
    """Make the data; returns 0. A flag that has no effect on WHAT is an error."""
    clips = arguments.kind == "clips"
    strangers = ("config", "set") if clips else (*_CLIPS, "two_objects", "world", *_OF_WORLDS)
    for name in strangers:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect on data {arguments.kind}")
    needless = ("two_objects",) if arguments.world else _OF_WORLDS
    for name in needless:
        if getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect {'with' if arguments.world else 'without'} --world")
    with without_empty_folders([arguments.output]):
        answer = _render(arguments) if clips else _prepare(arguments)
    if answer is not None:
        lines = ", ".join(f"{name}: {value}" for name, value in answer.items())
        print(json.dumps(answer) if arguments.json else lines)
    return 0


def _gap(text: str) -> tuple[int, int]:
    """ "16-32", or "16" for exactly that."""
    least, _, most = text.partition("-")
    return int(least), int(most or least)


_gap.__name__ = "N[-N]"  # argparse puts it into "invalid ... value"


def _prepare(arguments: argparse.Namespace) -> dict[str, object] | None:
    """Write shards by a config; the first process of a launch answers for all."""
    import torch

    from sparse_forcing.config import load_config
    from sparse_forcing.devices import resolve_device
    from sparse_forcing.launch import join_launch
    from sparse_forcing.training.data.shards import Shards, read_refused_samples, shard_files

    module_name, config_class, function = _FROM_CONFIG[arguments.kind]
    module = importlib.import_module(module_name)
    config = load_config(getattr(module, config_class), arguments.config, arguments.set or [])
    paths, models = config_inputs(config)
    if arguments.config is not None:
        paths.append(arguments.config)
    check_targets(shard_files(arguments.output), paths, sealed=models, added_to=[arguments.output])
    output: Path = check_writable(arguments.output, folder=True)
    with join_launch() as launch, launch.hold(lambda: output_lock(output)):
        device = torch.device(resolve_device(launch.device("auto")))
        written = getattr(module, function)(config, output, device)
        if launch.number != 0:
            return None
        return {
            "folder": str(output),
            "items": len(Shards(output)),
            "refused": len(read_refused_samples(output)),
            "shards_written": written,
        }


def _render(arguments: argparse.Namespace) -> dict[str, object]:
    """Render clips. The manifest is written last, so a folder with a manifest is complete."""
    for name, default in _CLIPS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    for name in ("num_clips", "num_frames", "fps", "size", "scale"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.num_clips > MAX_CLIPS:
        raise ConfigError(f"--num-clips {arguments.num_clips}: at most {MAX_CLIPS} have names of their own")
    if not 0 <= arguments.seed < 2**62:
        raise ConfigError(f"--seed must be between 0 and 2^62, got {arguments.seed}")
    output: Path = check_writable(arguments.output, folder=True)
    with output_lock(output):
        entries = [_write_clip(arguments, number) for number in range(arguments.num_clips)]
        if arguments.world:
            truth = [{"video": entry["video"], **entry.pop("truth")} for entry in entries]
            atomic_write_text(output / WORLD_TRUTH, _as_lines(truth))
        atomic_write_text(output / MANIFEST, _as_lines(entries))
    return {"manifest": str(output / MANIFEST), "clips": len(entries)}


def _write_clip(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    """Render clip `number`; returns its line of the manifest. Before the first one takes its place, the manifest goes
    that says what was there."""
    from einops import rearrange

    from sparse_forcing.media.video import VideoWriter

    pixels, entry = _draw_world(arguments, number) if arguments.world else _draw_scene(arguments, number)
    path, size = arguments.output / f"{number:06d}.mp4", arguments.size
    with VideoWriter(path, fps=arguments.fps, height=size, width=size, scale=arguments.scale) as writer:
        writer.write(rearrange(pixels * 0.5 + 0.5, "f c h w -> f h w c").numpy())
        if number == 0:
            for name in (MANIFEST, WORLD_TRUTH):
                remove_file(arguments.output / name)
    return {"video": path.name, **entry}


def _as_lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _draw_scene(arguments: argparse.Namespace, number: int) -> tuple[Tensor, dict[str, Any]]:
    """Frames [F, 3, H, W] in [-1, 1] and what the manifest says of them, from a seed of the clip's own, so that it does
    not depend on how many are made."""
    import torch

    from sparse_forcing.scenes.captions import caption
    from sparse_forcing.scenes.render import render
    from sparse_forcing.scenes.sample import sample_scenes

    seed = random.Random(f"{arguments.seed}/{number}").getrandbits(62)
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(1, generator, two_object_fraction=float(bool(arguments.two_objects)), split=arguments.split)
    text = caption(scenes.scenes()[0], random.Random(seed))
    return render(scenes, arguments.num_frames, arguments.size)[0], {"prompt": text, "index": 0, "seed": seed}


def _draw_world(arguments: argparse.Namespace, number: int) -> tuple[Tensor, dict[str, Any]]:
    """Frames [F, 3, H, W] in [-1, 1] of world `number` of the seed; its line says what comes back and how to draw the
    world again."""
    from sparse_forcing.scenes.worlds.batch import draw_world
    from sparse_forcing.scenes.worlds.config import WorldConfig
    from sparse_forcing.scenes.worlds.draw import render_world
    from sparse_forcing.scenes.worlds.record import list_returns, write_record

    config = WorldConfig(
        frames=arguments.num_frames,
        gap=arguments.gap,
        split=arguments.split,
        frame_noise=arguments.frame_noise or 0.0,
        grounds=(arguments.ground,) if arguments.ground else GROUNDS,
    )
    world = draw_world(arguments.world, arguments.seed, number, config)
    entry = {
        "prompt": world.story,
        "index": 0,
        "seed": arguments.seed,
        "returns": list_returns(world),
        "truth": write_record(world, config),  # in a file of its own: manifests hold what evaluation knows, and no more
    }
    return render_world(world, arguments.size), entry
