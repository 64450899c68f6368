"""What to generate and into which files: settings, checked, and the list of jobs they mean. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from sparse_forcing.errors import ConfigError, OutputError
from sparse_forcing.files import is_folder, safe_name
from sparse_forcing.media.listing import VIDEO_SUFFIXES
from sparse_forcing.sampling.generation.prompts import check_prompt, check_prompts, read_prompts
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
    "seed": (0, 2**62), "num_samples": (1, MAX_JOBS), "num_frames": (1, MAX_FRAMES), "height": (1, MAX_SIDE),
    "width": (1, MAX_SIDE), "num_inference_steps": (1, 1000), "guidance_scale": (0, 100), "scale": (1, 64),
    "window_frames": (1, MAX_FRAMES), "sink_frames": (1, MAX_FRAMES), "persistent_blocks": (0, MAX_BLOCKS),
    "tile": (1, MAX_SIDE), "shift": (0.01, 100), "chunk_frames": (1, MAX_FRAMES), "fps": (0.1, 1000),
    "checkpoint_every": (1, MAX_FRAMES),
}  # fmt: skip
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
    "tile": ("sparse", "heavy_hitter"),
    "positions": ("full", "window", "sink", "sparse", "heavy_hitter"),
}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to generate and where to; the command line has one flag for each. None: the model's own default.

    prompts, prompt_file: one of the two; see `read_prompts`.
    model: `tiny`, or a local diffusers folder.
    output: an .mp4 file for a single video, else a folder. A video of the same prompt and seed is replaced.
    seed: sample k of every prompt uses seed + k.
    then: further prompts and the second from which each holds (the next chunk to begin takes it), for one prompt.
    image, video: start from a picture, or go on from the last whole chunks of a video; one of the two.
    num_frames, seconds: length, in pixel frames or in seconds; one of the two.
    preset: how weights that others published are sampled, by name; what is given beside it changes it.
    sampler, shift, negative_prompt, chunk_frames (latent frames at a time), fps (of the file): see PipelineConfig.
    memory and its knobs (latent frames, blocks, share of the window's blocks): see MemoryConfig.
    text_encoder_device: where prompts are read, if not on `device`: for GPUs that cannot hold umT5 beside the model.
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
    sampler: Literal["few_step", "euler", "unipc", "wan_unipc"] | None = None
    shift: float | None = None
    chunk_frames: int | None = None
    fps: float | None = None
    memory: Literal["full", "window", "sink", "sparse", "heavy_hitter"] | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    persistent_blocks: int | None = None
    density: float | None = None
    retention: str | None = None
    tile: tuple[int, int, int] | None = None
    positions: Literal["absolute", "relative"] | None = None
    device: str = "auto"
    text_encoder_device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
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
        if self.image is not None and self.video is not None:
            raise ConfigError("give --image or --video, not both")
        if self.resume:
            object.__setattr__(self, "skip_existing", True)
        for name in BOUNDS:
            _check_bounds(name, getattr(self, name))
        for name in ("model", "image", "video"):
            _check_utf8(name, str(getattr(self, name)))
        if self.negative_prompt:
            check_prompt(self.negative_prompt, "--negative-prompt")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(f"--seconds must be above 0, got {self.seconds:g}")
        for (before, _), (seconds, prompt) in zip([(0.0, ""), *self.then], self.then):
            if not before < seconds < math.inf:
                raise ConfigError(f"--then {seconds:g}: times must rise and be above 0, this comes after {before:g}")
            check_prompt(prompt, f"--then {seconds:g}: prompt")
        for name, kinds in MEMORY_KNOBS.items():
            if getattr(self, name) is not None and self.memory is not None and self.memory not in kinds:
                raise ConfigError(
                    f"{flag(name)} has no effect with --memory {self.memory}; it is for {', '.join(kinds)}"
                )
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
                raise ConfigError(f"--output {self.output} is one video, of which --shard makes no part; give a folder")
            if self.grid is not None:
                raise ConfigError("--grid shows all videos of a list; leave it or --shard out")

    def _check_together(self) -> None:
        """Raise ConfigError for what one process of several, which has the cache of its heads, cannot do."""
        for name in ("overlay", "resume", "checkpoint_every", "cuda_graphs", "compile"):
            if getattr(self, name):
                raise ConfigError(
                    f"{flag(name)} needs the whole model in one process; leave it or --sequence-parallel out"
                )
        if self.retention == "random":
            raise ConfigError(
                "--retention random counts all heads, of which each process of --sequence-parallel has some"
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


def _check_utf8(name: str, text: str) -> None:
    """Names of inputs go into the JSON beside the video."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{flag(name)} {text!r}: the name is not valid UTF-8; rename it") from error


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to generate. `original_prompt`: what evaluation compares with, when `prompt` is a rewritten one."""

    prompt: str
    seed: int
    video: Path
    sidecar: Path
    index: int = 0
    original_prompt: str | None = None


def plan(config: GenerateConfig) -> list[Job]:
    """Jobs of the config's prompts, checked: names stay inside the output and differ. Raises ConfigError."""
    prompts = read_prompts(config.prompt_file) if config.prompt_file else check_prompts(config.prompts)
    if config.then and len(prompts) > 1:
        raise ConfigError(f"--then goes on from one prompt, not from {len(prompts)}; run them one by one")
    count = len(prompts) * config.num_samples
    if count > MAX_JOBS:
        raise ConfigError(f"{count} videos are more than the {MAX_JOBS} that one run makes; split the prompts")
    if config.grid is not None and count > MAX_GRID:
        raise ConfigError(f"--grid {config.grid}: {count} videos are more than the {MAX_GRID} that it shows")
    if config.to_file:
        if count > 1:
            raise ConfigError(f"--output {config.output} is one file for {count} videos; give a folder")
        sidecar = config.output.with_suffix(".json")
        return [Job(prompt=prompts[0], seed=config.seed, video=config.output, sidecar=sidecar)]
    jobs = []
    for number, prompt in enumerate(prompts):
        for sample in range(config.num_samples):
            video = config.output / safe_name(prompt, number, extra=f"seed{config.seed + sample}")
            jobs.append(
                Job(
                    prompt=prompt,
                    seed=config.seed + sample,
                    index=sample,
                    video=video,
                    sidecar=video.with_suffix(".json"),
                )
            )
    return take_shard(jobs, config.shard)
