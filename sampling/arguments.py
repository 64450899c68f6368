"""What a caller hands to the pipeline, checked before anything is computed: each error names the argument. What the
arguments of a stream come to is its `VideoPlan`.

Shapes: B videos, F frames, H x W pixels, C channels and h x w of latents, T text tokens.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.base import REWRITTEN, RolloutMemory
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.sampling.generation.jobs import BOUNDS
from sparse_forcing.sampling.noise import GivenNoise, NoiseSource, SeededNoise
from sparse_forcing.sampling.starts import GivenFrames

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE_KEYS = set("chunk start text unconditional_text memory noise recent decoder".split())
"""Of what `VideoChunk.state()` gives."""
PromptChanges = Mapping[int, str | list[str]] | Callable[[int], str | list[str] | None]
"""New prompts by the pixel frame from which they hold, or a function that is asked with the first pixel frame of every
chunk but the video's first and answers None to go on as before. A list has a prompt for each one the video began with.
"""
StepEnd = Callable[..., Mapping[str, Tensor] | None]
"""Called as diffusers' pipelines do after every denoising step, with the pipeline, the step within the chunk
(`current_chunk` of `num_timesteps` steps), the timestep and tensors by name: `latents` [B, f, C, h, w], `prompt_embeds`
and `negative_prompt_embeds` [B, T, text_dim]. What it returns takes their place; setting the pipeline's `_interrupt`
ends the video with this chunk."""


@dataclass(frozen=True, kw_only=True)
class VideoLayout:
    """The sizes of a video and what it goes on from.

    size: height and width in pixels; latent_size: rows and columns of its latents.
    chunks: latent frames of each chunk to generate; starts: the pixel frame that each begins with.
    """

    size: tuple[int, int]
    latent_size: tuple[int, int]
    chunks: list[int]
    starts: list[int]
    given: GivenFrames | None

    @property
    def latent_frames(self) -> int | None:
        """Latent frames in all, given ones among them; None where it is not known how many are given."""
        before = 0 if self.given is None else self.given.latent_frames
        return None if before is None else before + sum(self.chunks)


@dataclass(frozen=True)
class VideoPlan:
    """Everything that a rollout is started with.

    text: [B, T, text_dim]; unconditional_text, text_at, recache: see `rollout`.
    single: whether one video was asked for by itself, so that its frames have no batch dimension.
    """

    layout: VideoLayout
    sampler: SamplerConfig
    text: Tensor
    unconditional_text: Tensor | None
    text_at: Callable[[int], Tensor | None] | None
    noise: NoiseSource
    memory: RolloutMemory
    recache: bool
    single: bool


def whole_number(name: str, value: Any, default: int) -> int:
    """`value` as an int, `default` for None. Raises ConfigError for anything else, 2.0 included, and for what is above
    all bounds."""
    try:
        return default if value is None else check_most(name, operator.index(value))
    except TypeError as error:
        raise ConfigError(f"{name}: expected a whole number, got {value!r:.60}") from error


def check_most(name: str, value: Any) -> Any:
    """`value` itself. Raises ConfigError when it is more than the flag of that name takes; infinity is told apart
    by whoever uses it."""
    if name in BOUNDS and (most := BOUNDS[name][1]) < value < math.inf:
        raise ConfigError(f"{name}: at most {most:.12g}, got {value!s:.40}")
    return value


def check_type(name: str, value: Any, kind: type) -> Any:
    """`value` itself. Raises ConfigError when it is of another type."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r:.60}")
    return value


def prompt_list(prompt: str | Sequence[str] | None, name: str = "prompt") -> list[str]:
    """One prompt or several, as a list that is not empty; `name` is the argument's."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ConfigError(f"{name}: expected text, or a list of texts that is not empty, got {prompt!r:.60}")
    return [check_type(name, each, str) for each in prompts]


def assign_to_chunks(
    changes: Iterable[tuple[Any, T]], starts: Sequence[int], name: str = "prompt_changes", fps: float | None = None
) -> dict[int, T]:
    """New prompts by the number of the chunk that each holds from: the first that begins at its frame or after it.

    Args:
        changes: pixel frames and prompts.
        starts: pixel frame that each chunk begins with.
        name, fps: what the caller called them, and the frame rate where they were given in seconds, for messages.
    """

    def when(frame: int) -> str:
        return f"frame {frame}" if fps is None else f"{frame / fps:g} s"

    chunks: dict[int, T] = {}
    for given, prompt in changes:
        frame = whole_number(name, given, 0)
        if not 0 < frame <= starts[-1]:
            raise ConfigError(
                f"{name}: no chunk begins at {when(frame)} or later; the first one has `prompt`, the last one begins "
                f"at {when(starts[-1])}"
            )
        number = bisect_left(starts, frame)
        if number in chunks:
            raise ConfigError(f"{name}: the chunk that begins at {when(starts[number])} has two prompts")
        chunks[number] = prompt
    return chunks


def resolve_dtype(value: Any) -> torch.dtype | None:
    """`torch_dtype`: a type of torch or its name. Raises ConfigError for one that weights cannot have."""
    dtype = DTYPES.get(value) if isinstance(value, str) else value
    if value is not None and dtype not in DTYPES.values():
        raise ConfigError(f"torch_dtype: expected one of {', '.join(DTYPES)}, as text or of torch, got {value!r:.60}")
    return dtype


def resolve_dtypes(value: Any) -> Any:
    """`torch_dtype`, which may be a table {part or "default": type}, with types of torch. Raises ConfigError."""
    if isinstance(value, Mapping):
        return {name: resolve_dtype(each) for name, each in value.items()}
    return resolve_dtype(value)


def change_sampler(sampler: SamplerConfig, *, steps: Any, guidance_scale: Any) -> SamplerConfig:
    """The sampler with what the caller changed; a step list only fits its own length. Guidance of 1 or less is none, as
    in diffusers: the conditional prediction alone."""
    steps = whole_number("num_inference_steps", steps, sampler.steps)
    scale = sampler.guidance_scale
    if guidance_scale is not None:
        scale = check_most("guidance_scale", check_type("guidance_scale", guidance_scale, Real))
    steps_given = sampler.step_list if steps == sampler.steps else None
    changed = replace(sampler, steps=steps, guidance_scale=scale, step_list=steps_given)
    return replace(changed, guidance_scale=max(1.0, changed.guidance_scale))


def _generator_list(generator: Any) -> list[torch.Generator] | None:
    """The generators of a list, or None for a single one or none, which is checked, too."""
    if isinstance(generator, list | tuple):
        return [check_type("generator", each, torch.Generator) for each in generator]
    if generator is not None:
        check_type("generator", generator, torch.Generator)
    return None


def noise_source(
    generator: Any,
    latents: Tensor | None,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> NoiseSource:
    """Noise of latents `shape` [B, F, C, h, w], drawn chunk by chunk or given."""
    batch, generators = shape[0], _generator_list(generator)
    if generators is None:
        # One stream per sample: a sample's noise must not depend on how many others are generated with it.
        # One given generator is used as it is for one video, and seeds one of each video's own otherwise.
        seeds = torch.randint(2**62, (batch,), generator=generator) if generator is None or batch > 1 else None
        generators = [generator] if seeds is None else [torch.Generator().manual_seed(s) for s in seeds.tolist()]
    if len(generators) != batch:
        raise ConfigError(f"generator: {len(generators)} generators for {batch} videos")
    seeded = SeededNoise(generators, shape[2:], device, dtype)
    return seeded if latents is None else GivenNoise(check_noise(latents, shape).to(device, dtype), seeded)


def check_memory(memory: MemoryConfig, *, recache: bool) -> MemoryConfig:
    """`memory` itself. Raises ConfigError when it is none, or its window cannot be written again and has to be."""
    check_type("memory", memory, MemoryConfig)
    if recache and memory.kind not in REWRITTEN:
        raise ConfigError(
            f"recache (--recache): the window of a {memory.kind} memory cannot be written again; use "
            f"{' or '.join(REWRITTEN)}"
        )
    return memory


def check_state(state: Any) -> Mapping[str, Any] | None:
    """`resumed` itself, which may be None. Raises ConfigError for what is no state of a chunk."""
    if state is not None and not (isinstance(state, Mapping) and state.keys() >= STATE_KEYS):
        raise ConfigError(f"resumed: expected what `VideoChunk.state()` of an earlier stream gave, got {state!r:.60}")
    return state


def on_device(state: Any, device: torch.device) -> Any:
    """All tensors within dicts and lists on the device."""
    if isinstance(state, Tensor):
        return state.to(device)
    if isinstance(state, Mapping):
        return {name: on_device(each, device) for name, each in state.items()}
    return [on_device(each, device) for each in state] if isinstance(state, list) else state


def check_embeddings(embeddings: Tensor, text_len: int | None, text_dim: int) -> Tensor:
    """`prompt_embeds` [B, T, text_dim], floating point and finite, with zeros up to `text_len` rows, all of which the
    model attends to; as they are where that is not known."""
    check_type("prompt_embeds", embeddings, Tensor)
    if embeddings.ndim != 3 or embeddings.shape[2] != text_dim or not embeddings.is_floating_point():
        raise ConfigError(
            f"prompt_embeds: expected floats of shape [B, T, {text_dim}], got {embeddings.dtype} of shape "
            f"{list(embeddings.shape)}"
        )
    text_len = max(1, embeddings.shape[1]) if text_len is None else text_len
    if not (len(embeddings) and 1 <= embeddings.shape[1] <= text_len):
        raise ConfigError(
            f"prompt_embeds: expected at least one prompt of 1 to {text_len} tokens, got shape {list(embeddings.shape)}"
        )
    if not embeddings.isfinite().all():
        raise ConfigError("prompt_embeds: holds NaN or infinite numbers")
    return torch.nn.functional.pad(embeddings, (0, 0, 0, text_len - embeddings.shape[1]))


def check_noise(latents: Tensor, expected: tuple[int, ...]) -> Tensor:
    """`latents` [B, F, C, h, w], of at least as many frames as `expected`."""
    check_type("latents", latents, Tensor)
    fits = latents.ndim == len(expected) and latents.shape[1] >= expected[1]
    if not fits or (latents.shape[0], *latents.shape[2:]) != (expected[0], *expected[2:]):
        raise ConfigError(
            f"latents: expected shape {list(expected)} (more frames are left unused), got {list(latents.shape)}"
        )
    return latents
