"""Text to video: weights, text, rollout, streaming decode. diffusers' names throughout.

pipe = SparseForcingPipeline.from_pretrained("tiny")
video = pipe("a small red circle moves right on a black background").frames[0]
for chunk in pipe.stream("a large blue star spins clockwise on white", num_frames=400): ...
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_forcing.devices import memory_explained
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import atomic_write_json
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, RolloutMemory, make_memory
from sparse_forcing.memory.whole import WholeVideo
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.text import TextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.model_folder.fit import check_fit, not_finite_error
from sparse_forcing.model_folder.folder import (
    PIPELINE_FILE,
    PipelineConfig,
    find_model,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_defaults,
    save_part,
)
from sparse_forcing.sampling.arguments import (
    PromptChanges,
    changed_chunks,
    changed_sampler,
    check_embeddings,
    dtype_of,
    instance_of,
    noise_source,
    prompt_list,
    start_frames,
    whole_number,
)
from sparse_forcing.sampling.decoding import VideoChunk, decode_chunks
from sparse_forcing.sampling.graphs import check_cuda_graphs, cuda_recorder, why_not_recorded
from sparse_forcing.sampling.rollout import rollout
from sparse_forcing.weights.manifest import model_hash, write_manifest
from sparse_forcing.weights.parts import explained

OUTPUT_TYPES = ("np", "pt", "latent")
PARTS = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class SparseForcingPipelineOutput:
    """frames: one video per prompt and sample: [B, F, H, W, 3] array, [B, F, 3, H, W] tensor, or latents."""

    frames: Any


class SparseForcingPipeline:
    """A transformer, its text encoder and its autoencoder, bound to a geometry and defaults."""

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        text_encoder: TextEncoder,
        vae: VideoAutoencoder,
        config: PipelineConfig,
        weights_sha256: str | None = None,
    ) -> None:
        self.transformer, self.text_encoder, self.vae = transformer, text_encoder, vae
        self.config, self.weights_sha256 = config, weights_sha256
        self.geometry = config.fitted(VideoGeometry.of(vae, transformer.config))

    def with_defaults(self, config: PipelineConfig) -> SparseForcingPipeline:
        """The same parts with other defaults."""
        return type(self)(self.transformer, self.text_encoder, self.vae, config, self.weights_sha256)

    @property
    def fps(self) -> float:
        """Frames per second of the model's videos."""
        return self.config.fps

    @property
    def default_memory(self) -> MemoryConfig:
        """The memory that a prompt alone means."""
        return self.config.memory

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def pass_operations(self, height: int, width: int) -> float:
        """Operations of one pass over a chunk of so many pixels: two for each parameter and token.

        Attention, a small part of small models, is left out.
        """
        rows, cols = self.geometry.token_size(*self.geometry.latent_size(height, width))
        parameters = sum(x.numel() for x in self.transformer.parameters())
        return 2.0 * parameters * self.geometry.chunk_frames * rows * cols

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the transformer's weights."""
        return next(self.transformer.parameters()).dtype

    def to(
        self, device: str | torch.device, *, text_encoder_device: str | torch.device | None = None
    ) -> SparseForcingPipeline:
        """Move the model; the text encoder elsewhere if it would take too much memory there (umT5 is four times as
        large as Wan 2.1 1.3B)."""
        for part in (self.transformer, self.text_encoder, self.vae):
            assert isinstance(part, torch.nn.Module)
            where = (text_encoder_device or device) if part is self.text_encoder else device
            with memory_explained(f"the model was moved to {where}"):
                part.to(where)
        return self

    @classmethod
    def from_pretrained(
        cls, model: str, torch_dtype: torch.dtype | str | None = None, text_encoder: TextEncoder | None = None
    ) -> SparseForcingPipeline:
        """Load an embedded model by name, a folder that `save_pretrained` wrote, or a diffusers Wan folder.

        Args:
            torch_dtype: type of the weights, also by name ("bfloat16"); the model's own when None.
            text_encoder: takes the place of the folder's own, which is then not loaded.

        Raises:
            WeightsError: unknown model, missing or damaged file, parts that do not fit together.
            SparseForcingError: out of memory.
        """
        dtype, folder = dtype_of(torch_dtype), find_model(model)
        with memory_explained(f"model {model} was loaded"):
            with explained(folder):
                digest = model_hash(folder)
            transformer = load_transformer(folder, dtype)
            text = load_text_encoder(folder, dtype) if text_encoder is None else text_encoder
            vae, defaults = load_autoencoder(folder, dtype), read_defaults(folder)
            check_fit(folder, transformer, text if text_encoder is None else None, vae)
            with explained(folder, "its parts do not fit together"):
                return cls(transformer, text, vae, defaults, digest)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads, hashes included (embedded kinds of parts only)."""
        folder = Path(folder)
        for name in PARTS:
            save_part(getattr(self, name), folder / name)
        atomic_write_json(folder / PIPELINE_FILE, asdict(self.config))
        write_manifest(folder)

    def prompt_remarks(self, prompts: list[str]) -> list[str]:
        """What of the prompts has no effect, or not the one meant: unknown words, or more than the encoder reads."""
        return self.text_encoder.remarks(prompts)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """[B, text_len, dim]; warns with `prompt_remarks`."""
        with memory_explained("the text encoder read the prompt"):
            return self.text_encoder.encode(prompts)

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
        video: np.ndarray | None = None,
        memory: MemoryConfig | None = None,
        reserve_cache: bool = True,
        callback_on_step_end: Callable[[int, int, Tensor], None] | None = None,
        cuda_graphs: bool | None = None,
    ) -> Iterator[VideoChunk]:
        """Generate chunk by chunk; whole chunks are yielded, so the last one may go beyond `num_frames`.

        Args:
            num_frames: pixel frames to cover, those of `video` not counted.
            latents: [B, F, C, h, w] noise of the whole video instead of random noise.
            prompt_changes: {pixel frame: prompt}, each from the first chunk on that begins there or later; or a
                function of a chunk's first pixel frame that returns a new prompt or None, asked when it is wanted.
            image, video: [H, W, 3] or [F, H, W, 3], uint8 or floats in [0, 1], to continue from; they must fill whole
                chunks (an image is held for one chunk). [B, F, H, W, 3]: a video for each prompt.
            negative_prompt: what guidance leads away from; the model's default when None.
            prompt_embeds: [B, T, text_dim] instead of `prompt`; zeros follow where T is less than the model reads.
            guidance_scale: 1 or less is none, as in diffusers.
            memory: kind of memory; the model's default when None.
            reserve_cache: take the memory of a `full` cache at once, instead of as it grows.
            cuda_graphs: replay the passes of steady chunks as CUDA graphs; by default where the model is on a CUDA
                device and nothing rules it out.

        Raises:
            ConfigError: an argument is of the wrong type, shape or size; at once, not with the first chunk (what a
                function in `prompt_changes` returns: with its chunk).
        """
        config = self.config
        graphs = check_cuda_graphs(self.device, cuda_graphs)
        sampler = changed_sampler(config.sampler, steps=num_inference_steps, guidance_scale=guidance_scale)
        size = whole_number("height", height, config.height), whole_number("width", width, config.width)
        latent_size = self.geometry.latent_size(*size)
        memory = config.memory if memory is None else instance_of("memory", memory, MemoryConfig)
        negative = (
            config.negative_prompt if negative_prompt is None else instance_of("negative_prompt", negative_prompt, str)
        )
        if negative_prompt and sampler.guidance_scale == 1.0:
            warnings.warn("negative_prompt has no effect without guidance; set guidance_scale above 1", stacklevel=2)
        if self.geometry.whole_video and (image is not None or video is not None):
            raise ConfigError(
                "image and video: these weights make all frames at once and cannot go on from given ones; only with "
                "chunk_frames (--chunk-frames) they can, which they were not trained for"
            )
        start = start_frames(image, video, self.geometry, size)
        frames, continued = whole_number("num_frames", num_frames, config.num_frames), start is not None
        chunks = self.geometry.chunks(self.geometry.latent_frames(frames, continued=continued))
        repeats = whole_number("num_videos_per_prompt", num_videos_per_prompt, 1)
        text = self._texts(prompt, prompt_embeds, repeats)
        starts = self.geometry.chunk_starts(chunks, continued=continued)
        shape = (len(text), sum(chunks), self.vae.latent_channels, *latent_size)
        noise = noise_source(generator, latents, shape, self.device, self.dtype)
        initial = None if start is None else self._initial_latents(start, len(text))
        given = 0 if initial is None else initial.shape[1]
        state = self._empty_memory(memory, latent_size, sum(chunks) + given if reserve_cache else None)
        if cuda_graphs and (reason := why_not_recorded(self.transformer, state, training=False)):
            warnings.warn(f"no CUDA graphs: {reason}; passes are launched one call at a time", stacklevel=2)
        unconditional = None
        if sampler.guidance_scale != 1.0:
            unconditional = self.encode_prompt([negative]).to(text).expand_as(text)
        parts = rollout(
            self.transformer,
            text,
            chunks,
            state,
            noise,
            sampler,
            unconditional_text=unconditional,
            text_at=self._text_changes(prompt_changes, starts, len(text) // repeats, repeats),
            initial_latents=initial,
            initial_chunks=[self.geometry.chunk_frames] * (given // self.geometry.chunk_frames),
            context_timestep=config.context_timestep,
            callback=callback_on_step_end,
            record=cuda_recorder() if graphs else None,
        )
        single = isinstance(prompt, str) and repeats == 1
        return decode_chunks(
            self.vae, parts, state, count=len(chunks), device=self.device, given=initial, single=single,
            not_finite=self._not_finite,
        )  # fmt: skip

    def _not_finite(self, index: int) -> Exception:
        """What to raise when a chunk is not finite, with the part to blame."""
        return not_finite_error({name: getattr(self, name) for name in PARTS}, f"chunk {index + 1} of the video")

    def _empty_memory(
        self, config: MemoryConfig, latent_size: tuple[int, int], latent_frames: int | None
    ) -> RolloutMemory:
        """A memory for videos of this size and length; it grows with the video where the length is None."""
        trained = self.transformer.config.selector_tokens
        if config.kind == "sparse" and trained and math.prod(config.tile) != trained:
            raise ConfigError(
                f"memory.tile (--tile): {' x '.join(map(str, config.tile))} is not a block of {trained} tokens, for "
                "which this model's selector was trained"
            )
        geometry = MemoryGeometry.of(
            self.transformer.config, *self.geometry.token_size(*latent_size), capacity_frames=latent_frames,
            chunk_frames=self.geometry.chunk_frames,
        )  # fmt: skip
        if self.geometry.whole_video:
            return WholeVideo(geometry)
        return make_memory(config, geometry, selectors=self.transformer.selectors)

    def _texts(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None, repeats: int) -> Tensor:
        if (prompt is None) == (prompt_embeds is None):
            raise ConfigError("prompt: give either prompt or prompt_embeds")
        if repeats < 1:
            raise ConfigError(f"num_videos_per_prompt: at least 1, got {repeats}")
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompt_list(prompt))
        prompt_embeds = check_embeddings(prompt_embeds, self.text_encoder.text_len, self.transformer.config.text_dim)
        return prompt_embeds.to(self.device, self.dtype).repeat_interleave(repeats, 0)

    def _text_changes(
        self, changes: PromptChanges | None, starts: list[int], num_prompts: int, repeats: int
    ) -> Callable[[int], Tensor | None] | None:
        """`text_at` of a rollout whose chunks begin with the pixel frames `starts`."""

        def texts(prompt: str | list[str]) -> Tensor:
            prompts = prompt_list(prompt, "prompt_changes")
            if len(prompts) not in (1, num_prompts):
                raise ConfigError(f"prompt_changes: {len(prompts)} prompts for {num_prompts} that the video began with")
            return self._texts(prompts * (num_prompts // len(prompts)), None, repeats)

        if changes is None:
            return None
        if callable(changes):
            return lambda index: None if (prompt := changes(starts[index])) is None else texts(prompt)
        pairs = instance_of("prompt_changes", changes, Mapping).items()
        return {number: texts(prompt) for number, prompt in changed_chunks(pairs, starts).items()}.get

    @torch.no_grad()
    def _initial_latents(self, frames: np.ndarray, batch: int) -> Tensor:
        """Frames [B or 1, F, H, W, 3] in [0, 1] as the latents [B, F, C, h, w] that the videos start with."""
        if len(frames) != 1 and batch % len(frames):
            raise ConfigError(f"video: {len(frames)} videos for {batch} that are to go on from them")
        pixels = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) * 2 - 1
        latents = self.vae.encode(pixels.to(self.device)).transpose(1, 2).to(self.dtype)
        return latents.repeat_interleave(batch // len(latents), 0)

    def __call__(
        self, prompt: str | list[str] | None = None, *, output_type: str = "np", **kwargs: Any
    ) -> SparseForcingPipelineOutput:
        """Generate whole videos: the arguments of `stream`, the chunks joined and cut to `num_frames` (latents
        are not cut)."""
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        batch = [prompt] if isinstance(prompt, str) else prompt
        chunks = list(self.stream(batch, **kwargs))
        if output_type == "latent":
            return SparseForcingPipelineOutput(torch.cat([chunk.latents for chunk in chunks], 1))
        frames = np.concatenate([chunk.frames for chunk in chunks], 1)
        wanted = kwargs.get("num_frames")
        frames = frames[:, : self.config.num_frames if wanted is None else wanted]
        if output_type == "pt":
            return SparseForcingPipelineOutput(torch.from_numpy(frames).permute(0, 1, 4, 2, 3))
        return SparseForcingPipelineOutput(frames)
