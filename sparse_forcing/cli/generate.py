"""Generate videos from prompts: an mp4 for each, written as its chunks arrive, and a JSON file beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sparse_forcing.cli import note, say
from sparse_forcing.cli.flags import Parser, add_config_flags, number, read_config, shard
from sparse_forcing.errors import ConfigError
from sparse_forcing.launch import Launch, join_launch
from sparse_forcing.sampling.generation.jobs import GenerateConfig, Job, check_samples, plan
from sparse_forcing.sampling.generation.outputs import is_finished

SUITES = ("vbench",)
_FIRST_WITHOUT_SPACES = "\u2e80"  # Unicode's first block of East Asian characters
FLAGS = {
    "prompt_file": "read prompts from a file: one a line, # begins a comment, or JSONL: `prompt`, and "
    "what is said of one video alone (`seed`, `image`, `then`, `output`, ...)",
    "model": "`tiny` (embedded, the default), or a local diffusers folder",
    "output": "an .mp4 file for one video, or a folder (default: outputs); same prompt and seed replace the old file",
    "seed": "sample k of a prompt uses seed + k (default: 0)",
    "num_samples": "videos for each prompt (default: 1)",
    "recache": "when the prompt changes, compute the window's keys anew with it (memory window, sink or sparse)",
    "image": "a picture that is the first frame (scaled and cut to the size that is generated)",
    "video": "go on from a video of any length; only what follows is written",
    "num_frames": "length in frames; what does not fill whole chunks is generated and cut off",
    "seconds": "length in seconds, instead of --num-frames",
    "height": "pixels",
    "width": "pixels",
    "num_inference_steps": "denoising steps of a chunk",
    "guidance_scale": "classifier-free guidance; 1 or less is none",
    "negative_prompt": "what guidance leads away from (default: the model's)",
    "preset": "how published weights are sampled (default: what the folder says of itself)",
    "sampler": "few_step (Self-Forcing), euler, diffusers_euler and unipc (diffusers' grids) or wan_unipc (Wan's own)",
    "shift": "of the noise levels towards noise",
    "chunk_frames": "latent frames generated at a time; plain Wan weights make all at once",
    "fps": "frames per second of the video (default: the model's)",
    "memory": "what earlier chunks leave behind: everything, a window, a window and the first frames, the window's "
    "best blocks and a persistent set, or a window and the tokens attended to most (default: the model's)",
    "window_frames": "latent frames in the window, the current chunk included",
    "sink_frames": "latent frames kept from the start of the video",
    "persistent_blocks": "blocks for each layer and head kept from all that left the window; heavy_hitter: as many "
    "tokens as they have",
    "density": "share of the window's blocks that a query block sees, above 0 up to 1",
    "retention": "rule that says which blocks persist; a name that is none lists them (default: the model's)",
    "cache_dtype": "keep a sparse memory's keys and values in 8 bits: half of bfloat16's bytes",
    "tile": "latent frames, token rows and token columns of a block",
    "positions": "absolute as in Self-Forcing, or relative, which has no limit on length",
    "device": "cpu, cuda, ... (default: the GPU if there is one)",
    "text_encoder_device": "where prompts are read, if elsewhere: cpu leaves a GPU's memory to the video model",
    "prompt_cache": "folder that keeps what prompts were read as: umT5 is not loaded for a prompt again",
    "dtype": "number format of the weights (default: the model's)",
    "weights": "store the linear layers in 8 bits: half of bfloat16's bytes, slower, less exact",
    "offload": "what waits in the CPU's memory until it computes: each part of the model, or each of its blocks",
    "tiny_vae": "decode with a TAEHV file (taew2_1): a quarter of the memory, previews rather than pictures",
    "tiled_decoding": "decode tiles of the picture one after the other: a quarter of the memory, slower",
    "scale": "enlarge every pixel N x N in the mp4 (default: until the short side has about 256)",
    "overlay": "also write overlay/NAME.mp4, in which the persistent blocks light up",
    "live": "also write live/NAME.mp4, which plays while it is made; it goes when the video is complete",
    "grid": "also write all videos side by side as one animated picture (.webp or .gif)",
    "skip_existing": "leave out videos that are there already, however they were made",
    "resume": "go on where a killed run of this command left its videos; videos that are there are left out",
    "checkpoint_every": "chunks between checkpoints that --resume goes on from (default: 20 with --resume, else none)",
    "sequence_parallel": "make each video by all processes of a launch (torchrun) together: tokens and heads are split",
    "cuda_graphs": "replay the passes of a chunk as CUDA graphs (default: on a CUDA GPU, where nothing rules it out)",
    "compile": "compile the model with torch.compile: minutes before the first video, faster passes after",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", default=argparse.SUPPRESS, help="what the video shows")
    parser.add_argument(
        "--then",
        nargs=2,
        action="append",
        metavar=("SECONDS", "PROMPT"),
        default=argparse.SUPPRESS,
        help="another prompt from this second on (from the next chunk that begins); may be given again",
    )
    add_config_flags(parser, GenerateConfig, FLAGS)
    parser.add_argument("--suite", choices=SUITES, help="generate a benchmark's prompts under its names; resumes")
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="every N-th video from the I-th (of a suite: prompt), for several machines",
    )
    parser.add_argument("--check", action="store_true", help="check each video against its caption (model tiny)")
    parser.add_argument("--json", action="store_true", help="print one JSON array of what was written")


def run(arguments: argparse.Namespace) -> int:
    """Generate; returns 0, or 1 when `--check` finds a video of the launch unlike its caption. Checks come before heavy
    imports."""
    if "then" in arguments:
        arguments.then = [(_seconds(text), prompt) for text, prompt in arguments.then]
    _check_quoting(getattr(arguments, "prompts", []))
    config = read_config(GenerateConfig, arguments)
    if config.then and (arguments.check or arguments.suite):
        other = "--check" if arguments.check else f"--suite {arguments.suite}"
        raise ConfigError(f"{other} judges a video by one prompt; leave out --then")
    jobs = _suite_jobs(config, arguments) if arguments.suite else plan(config)
    if not jobs:
        note("no videos to make: all are there, or none belongs to this shard")
    if arguments.check:
        if any(job.then for job in jobs):
            raise ConfigError("--check judges a video by one prompt; leave out `then`")
        from sparse_forcing.scenes.captions import parse_caption

        for job in jobs:
            parse_caption(job.prompt, required=("colour",))

    with join_launch(together=config.sequence_parallel) as launch:
        config = dataclasses.replace(config, device=launch.device(config.device))
        records = _generate(config, jobs, arguments, launch)
        unlike = any(not record["caption_check"]["all"] for record in records if arguments.check)
        return int(any(launch.gather(unlike)))


def _generate(
    config: GenerateConfig, jobs: Sequence[Job], arguments: argparse.Namespace, launch: Launch
) -> list[dict[str, Any]]:
    """Generate this process's share and print what was made, as JSON by the first one for all; returns its records."""
    from sparse_forcing.cli.progress import TerminalProgress
    from sparse_forcing.sampling.generation.generate import generate

    records: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] | None = None
    try:
        with TerminalProgress(launch) as progress:
            for record in generate(config, jobs, progress, launch):
                records.append(record)
                if arguments.check:
                    record["caption_check"] = _check_caption(record)
                if not arguments.json:
                    say(_line(record))
        everything = [record for share in launch.gather(records) for record in share]
    finally:
        made = records if everything is None else everything
        if arguments.json and launch.number == 0 and (made or everything is not None):  # before a failure, too
            places = {str(job.video): place for place, job in enumerate(jobs)}
            say(json.dumps(sorted(made, key=lambda record: places[record["path"]])))
    return records


def _check_quoting(prompts: Sequence[str]) -> None:
    """Refuse prompts that look like one prompt without its quotes: single words in a row, each of which would become a
    video. Scripts that write no spaces (Chinese, Japanese) are left alone."""
    words = [len(prompt.split()) == 1 and max(prompt) < _FIRST_WITHOUT_SPACES for prompt in prompts]
    if any(one and two for one, two in pairwise(words)):
        whole = " ".join(prompts)
        raise ConfigError(
            f'{len(prompts)} prompts would make {len(prompts)} videos; put one prompt in quotes: "{whole:.60}" '
            "(prompts of a single word go into a --prompt-file)"
        )


def _seconds(text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        raise ConfigError(f"--then {text!r:.40}: give seconds and a prompt, as in --then 5 {text!r:.40}") from error


def _suite_jobs(config: GenerateConfig, arguments: argparse.Namespace) -> list[Job]:
    """VBench's prompts: videos in OUTPUT/videos under the official names, sidecars apart in OUTPUT/sidecars.

    The official tool takes the file type from whatever it lists first, so its folder must hold nothing but videos.
    """
    from sparse_forcing.eval.vbench.suites import SAMPLES, vbench_work_list

    if config.prompts or config.prompt_file:
        raise ConfigError(f"--suite {arguments.suite} brings its own prompts; give none")
    if config.to_file:
        raise ConfigError(f"--output {config.output}: --suite {arguments.suite} writes a folder")
    if config.overlay:
        raise ConfigError(f"--overlay would put files among those of --suite {arguments.suite}; leave one of them out")
    if config.grid is not None:
        raise ConfigError(f"--grid is for prompts of your own, not for --suite {arguments.suite}")
    samples = arguments.num_samples if "num_samples" in arguments else SAMPLES
    check_samples(config.seed, samples, "--seed")
    work = vbench_work_list(samples, config.shard or (0, 1))
    jobs = {}
    for prompt, name, original, index in work:
        video = config.output / "videos" / name
        sidecar = config.output / "sidecars" / f"{name}.json"
        job = Job(
            prompt=prompt,
            original_prompt=original,
            index=index,
            seed=config.seed + index,
            video=video,
            sidecar=sidecar,
        )
        if not is_finished(job):
            jobs[name] = job
    return list(jobs.values())


def _check_caption(record: dict[str, Any]) -> dict[str, bool | None]:
    """What the caption checker says of the written file, at the size it was generated in; None: not in the caption."""
    import torch
    from einops import rearrange

    from sparse_forcing.eval.scene_checker.caption import ATTRIBUTES, check_clip
    from sparse_forcing.media.video import read_video

    frames, scale = read_video(record["path"])[0], record["scale"]
    native = rearrange(frames, "f (h p) (w q) c -> f c h w (p q)", p=scale, q=scale).mean(-1).round()
    result = check_clip(torch.from_numpy(native.astype("uint8")), record["prompt"])
    return {"all": result.all, **{name: result.verdict(name) for name in ATTRIBUTES}}


def _line(record: dict[str, Any]) -> str:
    size = f"{record['width']}x{record['height']}"
    speed = record["generated_fps_with_decoding"]
    parts = [
        f"{record['num_frames']} frames of {size}",
        f"first after {record['time_to_first_frame']:.2f} s",
        f"{speed:.1f} frames/s" if speed else "",
        f"cache {record['cache_bytes_peak'] / 1e6:.1f} MB",
    ]
    line = f"{record['path']}: {', '.join(part for part in parts if part)}"
    if "caption_check" in record:
        check = record["caption_check"]
        verdicts = (f"{name} {'right' if value else 'wrong'}" for name, value in check.items() if value is not None)
        line += f"\n{record['prompt']!r}: {', '.join(verdicts)}"
    return line
