"""What the settings of a run mean for the model that was loaded: numbers in place of defaults, checked against it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparse_forcing.devices import is_out_of_memory
from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.sampling.generation.jobs import (
    MAX_FRAMES,
    MAX_SIDE,
    MEMORY_KNOBS,
    REWRITTEN,
    GenerateConfig,
    Job,
    flag,
)

if TYPE_CHECKING:
    from sparse_forcing.memory.config import MemoryConfig
    from sparse_forcing.model.flow import SamplerConfig
    from sparse_forcing.model.geometry import Start
    from sparse_forcing.model_folder.defaults import PipelineConfig
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

ROUNDING = 1e-6  # frames: 17.6 s are 440.00000000000006 frames at 25 a second
FEW_STEPS, MANY_STEPS = 4, 50  # of a sampler that takes the place of a model's own
WATCHABLE_SIDE = 256  # pictures are enlarged by a whole number up to this many pixels on the short side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run generates, in numbers.

    height, width: pixels that are generated; scale: pixels of the mp4 for each; num_frames: pixel frames wanted;
    prompt_changes: further prompts by the frame from which each holds.
    """

    height: int
    width: int
    scale: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    memory: MemoryConfig
    prompt_changes: dict[int, str]


def choose_defaults(config: GenerateConfig, own: PipelineConfig | None = None) -> PipelineConfig:
    """The defaults of the model's folder (or `own`), or of a preset, with what the run changes of them; no weights are
    read.

    Raises:
        ConfigError: a preset or chunk for a model that has its own; WeightsError: no such model.
    """
    from sparse_forcing.model_folder.folder import find_model, read_defaults

    defaults = own = own or read_defaults(find_model(config.model))
    if config.preset is not None:
        from sparse_forcing.model_folder.presets import preset

        if own.vae != "wan":
            raise ConfigError(
                f"--preset {config.preset} is for Wan's weights; {config.model} samples as it was trained"
            )
        defaults = preset(config.preset)
    changes = {name: value for name in ("negative_prompt", "chunk_frames", "fps") if (value := getattr(config, name))}
    if config.negative_prompt is not None:
        changes["negative_prompt"] = config.negative_prompt
    return dataclasses.replace(defaults, sampler=_sampler(config, defaults.sampler), **changes)


def _sampler(config: GenerateConfig, default: SamplerConfig) -> SamplerConfig:
    """The sampler with --sampler and --shift; a list of few steps belongs to that sampler alone, others take fifty."""
    if config.sampler in (None, default.kind):
        return dataclasses.replace(default, shift=config.shift or default.shift)
    steps = FEW_STEPS if config.sampler == "few_step" else MANY_STEPS
    return dataclasses.replace(
        default, kind=config.sampler, shift=config.shift or default.shift, steps=steps, step_list=None, warp_steps=True
    )


def chunk_remarks(defaults: PipelineConfig) -> list[str]:
    """What to say of the chunks a run generates in, where that is not what the weights were trained for."""
    if not defaults.bidirectional or defaults.chunk_frames is None:
        return []
    return [
        f"these weights saw whole videos in training (plain Wan): in chunks of {defaults.chunk_frames} latent frames "
        "they are sampled as what they are not; leave out --chunk-frames, or train a causal model from them"
    ]


def resolve_settings(config: GenerateConfig, pipe: SparseForcingPipeline) -> Settings:
    """The settings of every video of the run. Raises ConfigError for what this model cannot take."""
    defaults = pipe.defaults
    _check_guidance(config, defaults)
    height, width = config.height or defaults.height, config.width or defaults.width
    guidance, num_frames = config.guidance_scale, _num_frames(config, pipe)
    return Settings(
        height=height,
        width=width,
        scale=picture_scale(config.scale, height, width),
        num_frames=num_frames,
        num_inference_steps=config.num_inference_steps or defaults.sampler.steps,
        guidance_scale=defaults.sampler.guidance_scale if guidance is None else guidance,
        memory=_check_whole(config, pipe) or memory_config(config, pipe.default_memory),
        prompt_changes=_prompt_changes(config, pipe, num_frames),
    )


def stream_arguments(config: GenerateConfig, settings: Settings, job: Job) -> dict[str, Any]:
    """Arguments of `pipe.stream` for one video, but for its prompt and what it starts from."""
    import torch

    graphs: dict[str, Any] = {} if config.cuda_graphs is None else {"cuda_graphs": config.cuda_graphs}
    return {
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(job.seed),
        "memory": settings.memory,
        "prompt_changes": settings.prompt_changes,
        "recache": config.recache,
        **graphs,
    }


def _check_guidance(config: GenerateConfig, defaults: PipelineConfig) -> None:
    scale = defaults.sampler.guidance_scale if config.guidance_scale is None else config.guidance_scale
    if config.negative_prompt and scale <= 1:
        raise ConfigError(f"--negative-prompt has no effect with --guidance-scale {scale:g}; set it above 1")


def _check_whole(config: GenerateConfig, pipe: SparseForcingPipeline) -> MemoryConfig | None:
    """The memory of a video that is made all at once, which keeps nothing; None where videos are made in chunks.

    Raises:
        ConfigError: settings that need chunks.
    """
    if not pipe.geometry.whole_video:
        return None
    for name in ("memory", *MEMORY_KNOBS, "overlay", "image", "video"):
        if getattr(config, name):
            raise ConfigError(
                f"{flag(name)} has no effect with {config.model}: plain Wan weights make all frames at once; "
                "--chunk-frames 3 makes them go chunk by chunk, although they were not trained for it"
            )
    return pipe.default_memory


def _num_frames(config: GenerateConfig, pipe: SparseForcingPipeline) -> int:
    if config.seconds is None:
        return config.num_frames or pipe.defaults.num_frames
    wanted = max(1.0, config.seconds * pipe.fps)
    if wanted > MAX_FRAMES:
        raise ConfigError(f"--seconds {config.seconds:g} are {wanted:g} frames; at most {MAX_FRAMES} are made")
    return round(wanted)


def _prompt_changes(config: GenerateConfig, pipe: SparseForcingPipeline, num_frames: int) -> dict[int, str]:
    """The prompts of --then by the frame that the next chunk begins with. Raises ConfigError where none does."""
    if not config.then:
        return {}
    from sparse_forcing.sampling.arguments import assign_to_chunks

    start: Start = "picture" if config.image is not None else "video" if config.video is not None else "nothing"
    starts = pipe.geometry.timeline(num_frames, start)[1]
    wanted = [(math.ceil(seconds * pipe.fps - ROUNDING), prompt.strip()) for seconds, prompt in config.then]
    return {starts[number]: prompt for number, prompt in assign_to_chunks(wanted, starts, "--then", pipe.fps).items()}


def picture_scale(scale: int | None, height: int, width: int) -> int:
    """How often a pixel is repeated in the mp4; by default until the short side has about 256.

    Raises:
        ConfigError: the enlarged picture is larger than a video can be.
    """
    largest = MAX_SIDE // max(height, width)
    if (scale or 1) > largest:
        raise ConfigError(
            f"--scale {scale or 1}: pictures of {width}x{height} would be more than {MAX_SIDE} pixels wide or high; "
            f"the largest scale for them is {largest}"
        )
    return scale or max(1, min(WATCHABLE_SIDE // min(height, width), largest))


def memory_config(config: GenerateConfig, default: MemoryConfig) -> MemoryConfig:
    """The model's default memory with what the config changes. Raises ConfigError on values that do not fit."""
    changes = {name: value for name in MEMORY_KNOBS if (value := getattr(config, name)) is not None}
    if config.memory is not None:
        changes["kind"] = config.memory
    kind = changes.get("kind", default.kind)
    for name in changes:
        if name in MEMORY_KNOBS and kind not in MEMORY_KNOBS[name]:
            raise ConfigError(
                f"{flag(name)} has no effect with the model's memory, {kind}; add --memory {MEMORY_KNOBS[name][0]}"
            )
    if config.recache and kind not in REWRITTEN:
        raise ConfigError(
            f"--recache has no effect with the model's memory, {kind}; add --memory {' or '.join(REWRITTEN)}"
        )
    memory = dataclasses.replace(default, **changes)
    if config.overlay and (kind not in MEMORY_KNOBS["persistent_blocks"] or not memory.persistent_blocks):
        raise ConfigError(
            f"--overlay shows persistent blocks; this {kind} memory keeps none, use --memory sparse "
            "with --persistent-blocks above 0"
        )
    return memory


@contextmanager
def explain_out_of_memory(settings: Settings, config: GenerateConfig | None = None) -> Iterator[None]:
    """Running out of memory becomes a SparseForcingError that says at what size, what took it, and which flags help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        from sparse_forcing.sampling.generation.preflight import relief

        took, helps = relief(config) if config else ("", [])
        kind = settings.memory.kind
        grows = ("persistent_blocks", "window_frames", "tile")
        knobs = [flag(name) for name in grows if kind in MEMORY_KNOBS[name]] or [flag("num_frames")]
        advice = "".join(f"use {flags}, or " for flags in helps) + f"lower {', '.join(knobs)}, --height or --width"
        if kind == "full":
            advice += ", or use --memory window or sparse"
        raise SparseForcingError(
            f"out of memory at size {settings.width}x{settings.height}, {settings.num_frames} frames, with --memory "
            f"{kind}{took}; {advice}"
        ) from error
