"""Text to video: weights, text, rollout, streaming decode. diffusers' names throughout.

pipe = SparseForcingPipeline.from_pretrained("tiny")
video = pipe("a small red circle moves right on a black background").frames[0]
for chunk in pipe.stream("a large blue star spins clockwise on white", num_frames=400): ...
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, RolloutMemory, make_memory
from sparse_forcing.memory.whole import WholeVideo
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model_folder.fit import not_finite_error
from sparse_forcing.sampling.arguments import (
    PromptChanges,
    StepEnd,
    VideoLayout,
    VideoPlan,
    assign_to_chunks,
    change_sampler,
    check_embeddings,
    check_memory,
    check_state,
    check_type,
    noise_source,
    on_device,
    prompt_list,
    whole_number,
)
from sparse_forcing.sampling.components import MODELS, PipelineComponents
from sparse_forcing.sampling.decoding import VideoChunk, decode_chunks, skip_decoding
from sparse_forcing.sampling.graphs import check_cuda_graphs, cuda_recorder, warn_if_not_recorded
from sparse_forcing.sampling.noise import NoiseSource
from sparse_forcing.sampling.rollout import DenoisingStep, RolloutChunk, StepCallback, rollout
from sparse_forcing.sampling.starts import EncodedStart, GivenFrames, check_start

OUTPUT_TYPES = ("np", "pt", "latent")


@dataclass
class SparseForcingPipelineOutput(BaseOutput):
    """Whole videos, one for each prompt and sample.

    frames: [B, F, H, W, 3] array, [B, F, 3, H, W] tensor, or latents [B, F, C, h, w].
    """

    frames: Any


class SparseForcingPipeline(PipelineComponents):
    """Videos from prompts, chunk by chunk. What belongs to a diffusers pipeline is inherited: components, loading and
    saving, offloading, adapters."""

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _interrupt = False
    _guidance_scale = 1.0
    _num_chunks = _num_timesteps = _current_chunk = 0

    @property
    def interrupt(self) -> bool:
        """Whether a callback set `_interrupt`, as diffusers' callbacks do, to end the video with the present chunk and
        its latents as they are."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Of the video that was begun last. A callback may set `_guidance_scale`, as diffusers' callbacks do: it holds
        from the next step on, 1 or less is none. A video that began without guidance stays without."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of each chunk of the video that was begun last."""
        return self._num_timesteps

    @property
    def current_chunk(self) -> int:
        """Number of the chunk that a callback is called in."""
        return self._current_chunk

    def pass_operations(self, height: int, width: int) -> float:
        """Operations of one pass over a chunk of so many pixels: two for each parameter and token.

        Attention, a small part of small models, is left out.
        """
        rows, cols = self.geometry.token_size(*self.geometry.latent_size(height, width))
        parameters = sum(x.numel() for x in self.transformer.state_dict().values())
        return 2.0 * parameters * self.geometry.chunk_frames * rows * cols

    def stream(
        self,
        prompt: str | list[str] | None,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_changes: PromptChanges | None = None,
        image: np.ndarray | None = None,
        video: np.ndarray | Iterable[np.ndarray] | None = None,
        memory: MemoryConfig | None = None,
        reserve_cache: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cuda_graphs: bool | None = None,
        resumed: Mapping[str, Any] | None = None,
        recache: bool = False,
    ) -> Iterator[VideoChunk]:
        """Generate chunk by chunk; whole chunks are yielded, so the last one may go beyond `num_frames`.

        Args:
            prompt, prompt_embeds: one of them; [B, T, text_dim], T at most what the model reads: zeros follow.
            negative_prompt, guidance_scale: what guidance leads away from; 1 or less is none, as in diffusers.
            num_frames: pixel frames to cover, `image` among them, those of `video` not.
            latents: [B, F, C, h, w] noise of the whole video instead of random noise.
            prompt_changes, image, video: see `PromptChanges` and `check_start`.
            memory, reserve_cache: the kind; a `full` cache takes its memory at once instead of as it grows.
            callback_on_step_end: see `StepEnd`; it is given what `callback_on_step_end_tensor_inputs` names.
            cuda_graphs: replay passes as CUDA graphs; None: on a CUDA device, where nothing rules it out.
            resumed: `VideoChunk.state` of an earlier stream with the same arguments, to go on from.
            recache: write the window again when the prompt changes, with the new one (`window`, `sink`, `sparse`).

        Raises:
            ConfigError: an argument of the wrong type, shape or size; at once, but for what `prompt_changes` returns.
        """
        graphs = check_cuda_graphs(self._execution_device, cuda_graphs)
        layout = self._layout(height, width, num_frames, image, video)
        sampler = change_sampler(self.defaults.sampler, steps=num_inference_steps, guidance_scale=guidance_scale)
        config = check_memory(self.defaults.memory if memory is None else memory, recache=recache)
        repeats = whole_number("num_videos_per_prompt", num_videos_per_prompt, 1)
        text = self._texts(prompt, prompt_embeds, repeats)
        negative = self._negative_text(negative_prompt, text, sampler)
        changes = self._text_changes(prompt_changes, layout.starts, len(text) // repeats, repeats)
        callback = self._step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        noise = self._noise(generator, latents, layout, len(text))
        state = self._empty_memory(config, layout, reserved=reserve_cache)
        single = isinstance(prompt, str) and repeats == 1
        plan = VideoPlan(layout, sampler, text, negative, changes, noise, state, recache, single)
        if cuda_graphs:
            warn_if_not_recorded(self.transformer, state)
        return self._run(plan, callback, on_device(check_state(resumed), self._execution_device), graphs=graphs)

    def _layout(self, height: Any, width: Any, num_frames: Any, image: Any, video: Any) -> VideoLayout:
        """The sizes of a video, the defaults' where none are given, and the frames it goes on from."""
        size = whole_number("height", height, self.defaults.height), whole_number("width", width, self.defaults.width)
        latent_size = self.geometry.latent_size(*size)
        given = check_start(image, video, self.geometry, size)
        frames = whole_number("num_frames", num_frames, self.defaults.num_frames)
        chunks, starts = self.geometry.timeline(frames, "nothing" if given is None else given.kind)
        return VideoLayout(size=size, latent_size=latent_size, chunks=chunks, starts=starts, given=given)

    def _run(
        self, plan: VideoPlan, callback: StepCallback | None, resumed: Mapping[str, Any] | None, *, graphs: bool
    ) -> Iterator[VideoChunk]:
        """Start the rollout of a plan and decode it; offloaded parts leave the device after it."""
        given = plan.layout.given
        initial = None if given is None or resumed is not None else self._encode_start(given, len(plan.text))
        parts = rollout(
            self.transformer,
            plan.text,
            plan.layout.chunks,
            plan.memory,
            plan.noise,
            plan.sampler,
            unconditional_text=plan.unconditional_text,
            text_at=plan.text_at,
            initial_latents=initial,
            context_timestep=self.defaults.context_timestep,
            callback=callback,
            scheduler=self.scheduler,
            record=cuda_recorder() if graphs else None,
            resumed=resumed,
            recache=plan.recache,
        )
        self._interrupt, self._num_chunks, self._num_timesteps = False, len(plan.layout.chunks), plan.sampler.steps
        self._guidance_scale = plan.sampler.guidance_scale
        return self._until_the_end(self._decode(plan, parts, initial, resumed))

    def _decode(
        self,
        plan: VideoPlan,
        parts: Iterator[RolloutChunk],
        given: EncodedStart | None,
        resumed: Mapping[str, Any] | None,
    ) -> Iterator[VideoChunk]:
        """The video's chunks; of several processes that make it together, the first one decodes."""
        parallel = self.transformer.sequence_parallel
        if parallel is not None and parallel.rank > 0:
            return skip_decoding(parts, plan.layout.size, single=plan.single)
        return decode_chunks(
            self.autoencoder,
            parts,
            plan.memory,
            count=len(plan.layout.chunks),
            device=self._execution_device,
            given=given,
            single=plan.single,
            not_finite=self._not_finite,
            resumed=resumed,
        )

    def _noise(self, generator: Any, latents: Tensor | None, layout: VideoLayout, batch: int) -> NoiseSource:
        """The noise of so many videos; without a generator, drawn the same in all processes of a video."""
        parallel = self.transformer.sequence_parallel
        if parallel is not None and generator is None:
            generator = parallel.same_generator(self._execution_device)
        shape = (batch, sum(layout.chunks), self.autoencoder.latent_channels, *layout.latent_size)
        return noise_source(generator, latents, shape, self._execution_device, self.dtype)

    def _negative_text(self, given: str | None, text: Tensor, sampler: SamplerConfig) -> Tensor | None:
        """What guidance leads away from, like `text` [B, T, text_dim]; None without guidance."""
        guided = sampler.guidance_scale != 1.0
        prompt = self.defaults.negative_prompt if given is None else check_type("negative_prompt", given, str)
        if given and not guided:
            warnings.warn("negative_prompt has no effect without guidance; set guidance_scale above 1", stacklevel=3)
        return self.encode_prompt([prompt]).to(text).expand_as(text) if guided else None

    def _encode_start(self, given: GivenFrames, batch: int) -> EncodedStart:
        """The latents that so many videos start with."""
        return EncodedStart(given, self.autoencoder, batch, self._execution_device, self.dtype)

    def _until_the_end(self, stream: Iterator[VideoChunk]) -> Iterator[VideoChunk]:
        """The stream; offloaded parts leave the device after it."""
        try:
            yield from stream
        finally:
            self.maybe_free_model_hooks()

    def _not_finite(self, index: int) -> Exception:
        """What to raise when a chunk is not finite, with the part to blame."""
        parts = {name: part for name in MODELS if (part := getattr(self, name)) is not None}
        return not_finite_error(parts, f"chunk {index + 1} of the video")

    def _step_callback(self, callback: Any, names: Sequence[str]) -> StepCallback | None:
        """The rollout's callback for one of diffusers' form."""
        if callback is None:
            return None
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        if not callable(callback) or not isinstance(names, list | tuple | set):
            raise ConfigError("callback_on_step_end: expected a function, and a list of names as its tensor inputs")
        if unknown := sorted(set(names) - set(self._callback_tensor_inputs)):
            raise ConfigError(
                f"callback_on_step_end_tensor_inputs: {', '.join(unknown)} not among "
                f"{', '.join(self._callback_tensor_inputs)}"
            )

        def after(made: DenoisingStep) -> None:
            self._current_chunk = made.chunk
            tensors: dict[str, Any] = dict(
                zip(self._callback_tensor_inputs, (made.latents, made.text, made.unconditional_text))
            )
            changed = tensors | dict(callback(self, made.step, made.timestep, {x: tensors[x] for x in names}) or {})
            latents = changed["latents"]
            if check_type("callback_on_step_end: latents", latents, Tensor).shape != made.latents.shape:
                raise ConfigError(
                    f"callback_on_step_end: returned latents of shape {list(latents.shape)}, expected "
                    f"{list(made.latents.shape)}"
                )
            made.latents, made.text, made.unconditional_text = (changed[x] for x in self._callback_tensor_inputs)
            made.guidance_scale, made.interrupt = max(1.0, self._guidance_scale), self._interrupt

        return after

    def _empty_memory(self, config: MemoryConfig, layout: VideoLayout, *, reserved: bool) -> RolloutMemory:
        """A memory for videos of this size; it has room for the whole length at once, or grows with the video."""
        trained = self.transformer.config.selector_tokens
        if config.kind == "sparse" and trained and math.prod(config.tile) != trained:
            raise ConfigError(
                f"memory.tile (--tile): {' x '.join(map(str, config.tile))} is not a block of {trained} tokens, for "
                "which this model's selector was trained"
            )
        geometry = MemoryGeometry.of(
            self.transformer.config,
            *self.geometry.token_size(*layout.latent_size),
            capacity_frames=layout.latent_frames if reserved else None,
            chunk_frames=self.geometry.chunk_frames,
        )
        if self.geometry.whole_video:
            return WholeVideo(geometry)
        selectors, parallel = self.transformer.selectors, self.transformer.sequence_parallel
        if parallel is not None:
            if config.kind == "sparse" and config.retention == "random":
                raise ConfigError("memory.retention: random counts all heads together; here a process has only some")
            selectors = parallel.own_selectors(selectors)
        return make_memory(config, geometry, selectors=selectors)

    def _texts(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None, repeats: int) -> Tensor:
        if (prompt is None) == (prompt_embeds is None):
            raise ConfigError("prompt: give either prompt or prompt_embeds")
        if repeats < 1:
            raise ConfigError(f"num_videos_per_prompt: at least 1, got {repeats}")
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompt_list(prompt))
        prompt_embeds = check_embeddings(prompt_embeds, self.text_len, self.transformer.config.text_dim)
        return prompt_embeds.to(self._execution_device, self.dtype).repeat_interleave(repeats, 0)

    def _text_changes(
        self, changes: PromptChanges | None, starts: list[int], num_prompts: int, repeats: int
    ) -> Callable[[int], Tensor | None] | None:
        """`text_at` of a rollout whose chunks begin with the pixel frames `starts`."""

        def texts(prompt: str | list[str]) -> Tensor:
            prompts = prompt_list(prompt, "prompt_changes")
            if len(prompts) not in (1, num_prompts):
                raise ConfigError(
                    f"prompt_changes: {len(prompts)} prompts for {num_prompts}; give one, or as many as at first"
                )
            return self._texts(prompts * (num_prompts // len(prompts)), None, repeats)

        if changes is None:
            return None
        if callable(changes):
            return lambda index: None if (prompt := changes(starts[index])) is None else texts(prompt)
        pairs = check_type("prompt_changes", changes, Mapping).items()
        return {number: texts(prompt) for number, prompt in assign_to_chunks(pairs, starts).items()}.get

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        """Generate whole videos: the arguments of `stream`, the chunks joined and cut to `num_frames` (latents
        are not cut). Returns a SparseForcingPipelineOutput, or a tuple of its one field with `return_dict` False."""
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        names = callback_on_step_end_tensor_inputs
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            names = callback_on_step_end.tensor_inputs

        def count_step(*step: Any) -> Mapping[str, Tensor] | None:
            changed = None if callback_on_step_end is None else callback_on_step_end(*step)
            bar.update()
            return changed

        stream = self.stream(
            [prompt] if isinstance(prompt, str) else prompt,
            callback_on_step_end=count_step,
            callback_on_step_end_tensor_inputs=names,
            **kwargs,
        )
        with self.progress_bar(total=self._num_chunks * self._num_timesteps) as bar:
            frames = self._join(list(stream), output_type, kwargs.get("num_frames"))
        return SparseForcingPipelineOutput(frames) if return_dict else (frames,)

    def _join(self, chunks: list[VideoChunk], output_type: str, num_frames: int | None) -> Any:
        """The frames of a video, cut to length, or its latents."""
        if output_type == "latent":
            return torch.cat([chunk.latents for chunk in chunks], 1)
        frames = np.concatenate([chunk.frames for chunk in chunks], 1)
        frames = frames[:, : self.defaults.num_frames if num_frames is None else num_frames]
        return frames if output_type == "np" else rearrange(torch.from_numpy(frames), "b f h w c -> b f c h w")


def _all_arguments() -> inspect.Signature:
    """Those of a call: its own, and those of `stream`, which it passes on."""
    own, passed = (
        inspect.signature(each).parameters for each in (SparseForcingPipeline.__call__, SparseForcingPipeline.stream)
    )
    named = [each for each in own.values() if each.kind is not each.VAR_KEYWORD]
    return inspect.Signature([*named, *(each for name, each in passed.items() if name not in own)])


SparseForcingPipeline.__call__.__signature__ = _all_arguments()  # type: ignore[attr-defined]
