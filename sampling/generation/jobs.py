"""What to generate and into which files: settings, checked, and the list of jobs they mean. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from sparse_forcing.errors import ConfigError, OutputError
from sparse_forcing.files import is_folder
from sparse_forcing.media.listing import VIDEO_SUFFIXES
from sparse_forcing.sampling.generation.paths import check_distinct, safe_name
from sparse_forcing.sampling.generation.prompts import (
    MAX_SEED,
    check_new_name,
    check_prompt,
    check_prompts,
    check_utf8,
)
from sparse_forcing.sampling.generation.rows import PromptRow, read_rows
from sparse_forcing.shards import check_shard, take_shard

MAX_FRAMES = 1_000_000
MAX_SIDE = 16_384  # pixels of a picture: that of sparse_forcing/media/video.py, which is too heavy to import here
MAX_BLOCKS = 1_000_000
MAX_JOBS = 100_000
MAX_GRID = 64  # videos side by side
USUAL_CHECKPOINTS = 20  # chunks between them in a run that can be resumed
Preset = Literal[
    "wan-1.3b", "wan-14b", "self-forcing", "self-forcing-framewise", "causvid", "longlive", "sparse-forcing"
]
PRESETS = get_args(Preset)
"""Names in sparse_forcing/model_folder/presets.py, which is too heavy to import here."""
GRID_SUFFIXES = (".webp", ".gif")
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, MAX_SEED), "num_samples": (1, MAX_JOBS), "num_frames": (1, MAX_FRAMES), "height": (1, MAX_SIDE),
    "width": (1, MAX_SIDE), "num_inference_steps": (1, 1000), "guidance_scale": (0, 100), "scale": (1, 64),
    "window_frames": (1, MAX_FRAMES), "sink_frames": (1, MAX_FRAMES), "persistent_blocks": (0, MAX_BLOCKS),
    "tile": (1, MAX_SIDE), "shift": (0.01, 100), "chunk_frames": (1, MAX_FRAMES), "fps": (0.1, 1000),
    "checkpoint_every": (1, MAX_FRAMES),
}  # fmt: skip
WRITTEN = ("output", "grid", "prompt_cache")  # paths of a config that are not read
MAX_SECONDS = MAX_FRAMES / BOUNDS["fps"][0]
_OTHER_SUFFIXES = frozenset(
    ".3g2 .3gp .apng .asf .avif .bmp .csv .divx .f4v .flac .flv .h264 .h265 .hevc .jpeg .jpg .json .jsonl .m1v .m2ts "
    ".m2v .m4a .mjpeg .mp3 .mp4v .mpe .mts .mxf .ogg .ogv .png .qt .rm .swf .tif .tiff .txt .vob .wav .webp .wmv .y4m "
    ".yuv".split()
).union(VIDEO_SUFFIXES) - {".mp4"}
# Which memory kinds each knob means something to.
MEMORY_KNOBS = {
    "window_frames": ("window", "sink", "sparse", "heavy_hitter"),
    "sink_frames": ("sink",),
    "persistent_blocks": ("sparse", "heavy_hitter"),
    "density": ("sparse",),
    "retention": ("sparse",),
    "cache_dtype": ("sparse",),
    "tile": ("sparse", "heavy_hitter"),
    "positions": ("full", "window", "sink", "sparse", "heavy_hitter"),
}
REWRITTEN = ("window", "sink", "sparse")  # that in sparse_forcing/memory/base.py, which is too heavy to import here


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to generate and where to; the command line has one flag for each. None: the model's own default.

    prompts, prompt_file: one of the two; see `read_rows`.
    model: `tiny`, or a local diffusers folder.
    output: an .mp4 file for a single video, else a folder. A video of the same prompt and seed is replaced.
    seed: sample k of every prompt uses seed + k.
    then: further prompts and the second from which each holds (the next chunk to begin takes it), for one prompt.
    recache: at such a change, write what the window holds again with the new prompt (window, sink and sparse memories).
    image, video: the first frame, or a video whose last whole chunks are gone on from; one of the two.
    num_frames, seconds: length, in pixel frames or in seconds; one of the two.
    preset: how weights that others published are sampled, by name; what is given beside it changes it.
    sampler, shift, negative_prompt, chunk_frames (latent frames at a time), fps (of the file): see PipelineConfig.
    memory and its knobs (latent frames, blocks, share of the window's blocks): see MemoryConfig.
    text_encoder_device: where umT5 reads the prompts, if not on `device`; it is gone before the video begins.
    prompt_cache: folder that keeps what umT5 read prompts as, so that it is not loaded for them again.
    weights: how the linear layers of the transformer and of umT5 are stored, if not as they compute.
    offload: what waits in the CPU's memory until it computes: each part of the model, or each block of the transformer.
    tiny_vae: a TAEHV file to decode with; tiled_decoding: decode tiles of the picture one after the other.
    scale: enlarge every pixel to scale x scale in the mp4.
    overlay: also write a video in which the persistent blocks (heavy hitters) light up.
    live: also write live/NAME.mp4, which can be watched while it grows; it goes when the video is complete.
    grid: also write all videos side by side as one animated picture, a .webp or .gif file.
    skip_existing: leave out videos that are already there.
    resume: go on where a killed run of the same settings left a video; implies skip_existing.
    checkpoint_every: chunks between what a killed run can go on from; None: a usual number with `resume`, else never.
    shard: (i, n): every n-th video from the i-th on, so that n machines share a list of prompts.
    sequence_parallel: all processes of a launch make each video together, instead of sharing the videos.
    cuda_graphs: replay the passes of steady chunks as CUDA graphs; None: where that can be. compile: the transformer,
        with torch.compile.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"top_k": "density"}

    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    then: tuple[tuple[float, str], ...] = ()
    recache: bool = False
    model: str = "tiny"
    output: Path = Path("outputs")
    seed: int = 0
    num_samples: int = 1
    image: Path | None = None
    video: Path | None = None
    num_frames: int | None = None
    seconds: float | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    preset: Preset | None = None
    sampler: Literal["few_step", "euler", "diffusers_euler", "unipc", "wan_unipc"] | None = None
    shift: float | None = None
    chunk_frames: int | None = None
    fps: float | None = None
    memory: Literal["full", "window", "sink", "sparse", "heavy_hitter"] | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    persistent_blocks: int | None = None
    density: float | None = None
    retention: str | None = None
    cache_dtype: Literal["int8"] | None = None
    tile: tuple[int, int, int] | None = None
    positions: Literal["absolute", "relative"] | None = None
    device: str = "auto"
    text_encoder_device: str | None = None
    prompt_cache: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    weights: Literal["int8", "fp8"] | None = None
    offload: Literal["none", "model", "blocks"] = "none"
    tiny_vae: Path | None = None
    tiled_decoding: bool = False
    scale: int | None = None
    overlay: bool = False
    live: bool = False
    grid: Path | None = None
    skip_existing: bool = False
    resume: bool = False
    checkpoint_every: int | None = None
    shard: tuple[int, int] | None = None
    sequence_parallel: bool = False
    cuda_graphs: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.seconds is not None:
            raise ConfigError("give --num-frames or --seconds, not both")
        if self.prompts and self.prompt_file is not None:
            raise ConfigError("give prompts or --prompt-file, not both")
        if self.recache and not self.then and self.prompt_file is None:
            raise ConfigError("--recache has no effect without --then")
        if self.image is not None and self.video is not None:
            raise ConfigError("give --image or --video, not both")
        if self.tiny_vae is not None and self.tiled_decoding:
            raise ConfigError("give --tiny-vae or --tiled-decoding, not both: the tiny decoder needs no tiles")
        if self.resume:
            object.__setattr__(self, "skip_existing", True)
        for name in BOUNDS:
            _check_bounds(name, getattr(self, name))
        check_samples(self.seed, self.num_samples, flag("seed"))
        for name in ("model", "image", "video", "tiny_vae"):
            check_utf8(str(getattr(self, name)), flag(name))
        for name in WRITTEN:
            check_new_name(str(getattr(self, name)), flag(name))
        if self.negative_prompt:
            check_prompt(self.negative_prompt, "--negative-prompt")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(f"--seconds must be above 0, got {self.seconds:g}")
        for (before, _), (seconds, prompt) in zip([(0.0, ""), *self.then], self.then):
            if not before < seconds:
                raise ConfigError(f"--then {seconds:g}: times must rise and be above 0, this comes after {before:g}")
            if seconds > MAX_SECONDS:
                raise ConfigError(f"--then {seconds:g}: no video is longer than {MAX_SECONDS:g} s")
            check_prompt(prompt, f"--then {seconds:g}: prompt")
        for name, kinds in MEMORY_KNOBS.items():
            if getattr(self, name) is not None and self.memory is not None and self.memory not in kinds:
                raise ConfigError(
                    f"{flag(name)} has no effect with --memory {self.memory}; it is for {', '.join(kinds)}"
                )
        if self.recache and self.memory not in (None, *REWRITTEN):
            raise ConfigError(f"--recache has no effect with --memory {self.memory}; it is for {', '.join(REWRITTEN)}")
        if self.overlay and self.memory not in (None, *MEMORY_KNOBS["persistent_blocks"]):
            raise ConfigError(
                f"--overlay shows persistent blocks, which --memory {self.memory} does not have; use sparse"
            )
        if self.grid is not None and self.grid.suffix.lower() not in GRID_SUFFIXES:
            raise ConfigError(f"--grid {self.grid}: only {' and '.join(GRID_SUFFIXES)} files are written")
        if self.output.suffix.lower() in _OTHER_SUFFIXES:
            raise ConfigError(f"--output {self.output}: only .mp4 files are written")
        if self.sequence_parallel:
            self._check_together()
        if self.shard is not None:
            check_shard(self.shard)
            if self.to_file:
                raise ConfigError(f"--output {self.output} is one video, which --shard cannot divide; give a folder")
            if self.grid is not None:
                raise ConfigError(
                    "--grid shows all videos of a list, of which --shard makes a part; leave out one of the two"
                )

    def _check_together(self) -> None:
        """Raise ConfigError for what one process of several, which has the cache of its heads, cannot do."""
        for name in ("overlay", "resume", "checkpoint_every", "cuda_graphs", "compile"):
            if getattr(self, name):
                raise ConfigError(
                    f"{flag(name)} needs the whole model in one process; leave out either it or --sequence-parallel"
                )
        if self.retention == "random":
            raise ConfigError(
                "--retention random counts all heads together, and a process of --sequence-parallel has only some"
            )

    @property
    def checkpoints(self) -> int | None:
        """Chunks between checkpoints; None where none are made."""
        return self.checkpoint_every or (USUAL_CHECKPOINTS if self.resume else None)

    @property
    def to_file(self) -> bool:
        """True when `output` names the one video itself, not a folder."""
        return self.output.suffix.lower() == ".mp4" and not is_folder(self.output, OutputError)


def _check_bounds(name: str, value: Any) -> None:
    low, high = BOUNDS[name]
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and not low <= number <= high:
            raise ConfigError(f"{flag(name)} must be between {low:g} and {high:g}, got {number!s:.40}")


def check_samples(seed: int, count: int, where: str) -> None:
    """Sample k of a prompt uses seed + k. Raises ConfigError where the last one has no seed left."""
    if seed + count - 1 > MAX_SEED:
        raise ConfigError(f"{where} {seed}: with {count} samples the seeds go beyond {MAX_SEED}; choose a smaller one")


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to generate. `original_prompt`: what evaluation compares with, when `prompt` is a rewritten one;
    `negative_prompt`, `start_image`, `start_video`, `then`: its own, in place of the run's."""

    prompt: str
    seed: int
    video: Path
    sidecar: Path
    index: int = 0
    original_prompt: str | None = None
    negative_prompt: str | None = None
    start_image: Path | None = None
    start_video: Path | None = None
    then: tuple[tuple[float, str], ...] = ()

    def config(self, run: GenerateConfig) -> GenerateConfig:
        """The run's config with what this job has of its own. Raises ConfigError where they do not go together."""
        changes: dict[str, Any] = {}
        if self.start_image is not None or self.start_video is not None:
            changes |= {"image": self.start_image, "video": self.start_video}
        changes |= {name: value for name in ("negative_prompt", "then") if (value := getattr(self, name))}
        return replace(run, **changes) if changes else run

    def texts(self, run: GenerateConfig) -> list[str]:
        """Every prompt that is read for this video, but the model's own negative prompt."""
        changes = [prompt.strip() for _, prompt in self.config(run).then]
        return [self.prompt, *changes, *([] if self.negative_prompt is None else [self.negative_prompt])]


def plan(config: GenerateConfig) -> list[Job]:
    """Jobs of the config's prompts, checked: names stay inside the output and differ. Raises ConfigError."""
    if config.prompt_file is None:
        rows = [PromptRow(prompt=prompt) for prompt in check_prompts(config.prompts)]
    else:
        rows = read_rows(config.prompt_file)
    if config.then and len(rows) > 1:
        raise ConfigError(f"--then goes on from one prompt, not from {len(rows)}; run them one by one")
    count = len(rows) * config.num_samples
    if count > MAX_JOBS:
        raise ConfigError(f"{count} videos are more than the {MAX_JOBS} that one run makes; split the prompts")
    if config.grid is not None and count > MAX_GRID:
        raise ConfigError(f"--grid {config.grid}: {count} videos are more than the {MAX_GRID} that it shows")
    if config.to_file and (count > 1 or rows[0].output):
        what = f"{count} videos" if count > 1 else f"a prompt that names its own ({rows[0].output})"
        raise ConfigError(f"--output {config.output} is one file for {what}; give a folder")
    jobs = [job for number, row in enumerate(rows) for job in _jobs(config, row, number)]
    check_distinct(jobs)
    return take_shard(jobs, config.shard)


def _jobs(config: GenerateConfig, row: PromptRow, number: int) -> Iterator[Job]:
    """The samples of a row."""
    seed = config.seed if row.seed is None else row.seed
    check_samples(seed, config.num_samples, f"{row.where}: seed")
    for sample in range(config.num_samples):
        video = config.output
        if not config.to_file:
            extra = f"seed{seed + sample}"
            video /= safe_name(row.prompt, number, extra=extra) if row.output is None else row.output
            if row.output is not None and config.num_samples > 1:
                video = video.with_name(f"{video.stem}-{extra}.mp4")
        job = Job(
            prompt=row.prompt,
            seed=seed + sample,
            index=sample,
            video=video,
            sidecar=video.with_suffix(".json"),
            original_prompt=row.original_prompt,
            negative_prompt=row.negative_prompt,
            start_image=row.image,
            start_video=row.video,
            then=row.then,
        )
        try:
            job.config(config)
        except ConfigError as error:
            raise ConfigError(f"{row.where}: {error}") from error
        yield job
