"""What a video needs of a device's memory, before any weight is read: from configs and shapes alone.

Weights and caches are counted; a pass and the decoder run on tensors without storage, with attention as fused kernels
do it. What an allocator wastes comes on top: `HEADROOM`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.config import constructor_settings
from sparse_forcing.errors import WeightsError
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.geometry import TileLayout, VideoGeometry
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.folder import find_model, usual_dtype
from sparse_forcing.model_folder.live_bytes import peak_bytes
from sparse_forcing.model_folder.presets import PRESETS, preset
from sparse_forcing.model_folder.recognise import read_table
from sparse_forcing.model_folder.sizes import ModelSizes, autoencoder_of, model_sizes, on_meta
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.settings import Settings, chosen_defaults, resolve_settings

HEADROOM = 1.1
GIB = 2**30
_DECODED = 3  # latent frames after which every further one needs what the one before did
_SMALLER = ((480, 832), (320, 576), (256, 448))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes on the device: weights of the three parts, the cache, what a denoising pass and decoding make meanwhile.

    text_stays: whether the text encoder is still there then; umT5 reads the prompts first and goes.
    """

    transformer: int
    text_encoder: int
    autoencoder: int
    cache: int
    activations: int
    decoding: int
    text_stays: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what takes them."""
        return {name: size for name, size in dataclasses.asdict(self).items() if name != "text_stays"}

    @property
    def total(self) -> int:
        """Weights, cache and the larger of what a pass and decoding make, which never run at once; or umT5 alone."""
        video = self.transformer + self.autoencoder + self.cache + max(self.activations, self.decoding)
        most = video + self.text_encoder if self.text_stays else max(video, self.text_encoder)
        return round(HEADROOM * most)


@dataclasses.dataclass(frozen=True)
class Outline:
    """As much of a pipeline as settings are checked against."""

    defaults: PipelineConfig
    geometry: VideoGeometry
    sizes: ModelSizes
    autoencoder: Any

    @property
    def fps(self) -> float:
        return self.defaults.fps

    @property
    def default_memory(self) -> MemoryConfig:
        return self.defaults.memory


def outline(config: GenerateConfig) -> Outline:
    """The model of a run from its folder's configs, or as published if only its name is known. Raises WeightsError."""
    sizes = model_sizes(config.model)
    try:
        folder: Path | None = find_model(config.model)
        defaults = chosen_defaults(config)
    except WeightsError:
        folder = None
        defaults = chosen_defaults(config, preset(config.model if config.model in PRESETS else "self-forcing"))
    vae = {} if folder is None else constructor_settings(read_table(folder / "vae" / "config.json"))
    with torch.device("meta"):
        autoencoder = autoencoder_of(defaults.vae, vae)
    geometry = VideoGeometry.of(autoencoder, on_meta(sizes.transformer).config)
    return Outline(defaults, defaults.fitted(geometry), sizes, autoencoder)


def needs(config: GenerateConfig, model: Outline, device: str = "cuda") -> Needs:
    """What a video of these settings takes on `device`. Raises ConfigError for settings the model cannot take."""
    settings = resolve_settings(config, model)  # type: ignore[arg-type]
    dtype = _dtype(config, device)
    size = torch.empty((), dtype=dtype).element_size()
    batch = 2 if settings.guidance_scale > 1 else 1
    transformer = on_meta(model.sizes.transformer)
    elsewhere = config.text_encoder_device not in (None, config.device, device)
    per_float = size / torch.finfo(torch.float32).bits * 8
    chunks = model.geometry.chunks(model.geometry.latent_frames(settings.num_frames))
    latent = model.geometry.latent_size(settings.height, settings.width)
    return Needs(
        transformer=size * sum(x.numel() for x in transformer.parameters()),
        text_encoder=0 if elsewhere else round(per_float * model.sizes.text_bytes),
        autoencoder=round(per_float * model.sizes.autoencoder_bytes),
        cache=batch * size * cache_numbers(model, settings, sum(chunks)),
        activations=_activations(model, max(chunks), latent, batch, dtype),
        decoding=_decoding(model, max(chunks), latent, dtype),
        text_stays=model.defaults.text_encoder == "words",
    )


def _dtype(config: GenerateConfig, device: str) -> torch.dtype:
    if config.dtype is not None:
        return getattr(torch, config.dtype)
    try:
        return usual_dtype(find_model(config.model), device)
    except WeightsError:
        return torch.bfloat16


def cache_numbers(model: Outline, settings: Settings, latent_frames: int) -> int:
    """Numbers in the keys and values that one video's memory holds when it is full."""
    if model.geometry.whole_video:
        return 0
    sizes, memory = on_meta(model.sizes.transformer).config, settings.memory
    rows, cols = model.geometry.token_size(*model.geometry.latent_size(settings.height, settings.width))
    tokens: float = min(memory.window or latent_frames, latent_frames) * rows * cols
    if memory.kind == "sparse":
        layout = TileLayout(model.geometry.chunk_frames, rows, cols, memory.tile)
        blocks = memory.window_frames // model.geometry.chunk_frames * layout.num_blocks + memory.persistent_blocks
        tokens = blocks * (math.prod(memory.tile) + 1 / 2)  # and what each block's keys are compressed to
    elif memory.kind == "heavy_hitter":
        tokens += memory.persistent_tokens
    return round(2 * tokens) * sizes.num_layers * sizes.num_attention_heads * sizes.attention_head_dim


def _activations(model: Outline, frames: int, latent: tuple[int, int], batch: int, dtype: torch.dtype) -> int:
    """Of one pass over the largest chunk."""
    sizes = model.sizes.transformer
    with torch.device("meta"):
        network = CausalWanTransformer3DModel(**{**sizes, "num_layers": 1})
        torch.nn.Module.to(network, dtype)  # diffusers' own warns of what only a rounding of weights would matter to
        x = torch.empty(batch, network.config.in_channels, frames, *latent, dtype=dtype)
        text = torch.empty(batch, model.sizes.text_len, network.config.text_dim, dtype=dtype)
        time = torch.empty(batch)
    return peak_bytes(lambda: network(x, time, text, policy=ParallelAttention(frames)))


def _decoding(model: Outline, frames: int, latent: tuple[int, int], dtype: torch.dtype) -> int:
    """Of one chunk: what the decoder makes of its first latent frames, and the pixels of all of them."""
    some = min(frames, _DECODED)
    autoencoder = model.autoencoder
    torch.nn.Module.to(autoencoder, dtype)
    with torch.device("meta"):
        z = torch.empty(1, autoencoder.latent_channels, some, *latent, dtype=dtype)
    stride = autoencoder.spatial_stride
    pixels = 3 * latent[0] * latent[1] * stride**2 * autoencoder.temporal_stride * (frames - some)
    return peak_bytes(lambda: next(iter(autoencoder.decode_stream([z])))) + 2 * pixels * z.element_size()


def remedies(config: GenerateConfig, model: Outline, limit: int) -> list[str]:
    """The first change of settings, or combination of changes, with which a video fits into `limit` bytes; empty where
    none does."""
    for changed, flags in _changes(config, model):
        if needs(changed, model).total <= limit:
            return flags
    return []


def _changes(config: GenerateConfig, model: Outline) -> Iterator[tuple[GenerateConfig, list[str]]]:
    """Settings that need less and less, with the flags that make them."""
    flags: list[str] = []
    if config.text_encoder_device is None:
        config, flags = dataclasses.replace(config, text_encoder_device="cpu"), ["--text-encoder-device cpu"]
        yield config, flags
    if not model.geometry.whole_video and (config.memory or model.default_memory.kind) == "full":
        config, flags = dataclasses.replace(config, memory="sparse"), [*flags, "--memory sparse"]
        yield config, flags
    height = config.height or model.defaults.height
    for smaller in _SMALLER:
        if smaller[0] < height:
            sized = dataclasses.replace(config, height=smaller[0], width=smaller[1])
            yield sized, [*flags, f"--height {smaller[0]} --width {smaller[1]}"]


def shortage(config: GenerateConfig, limit: int) -> str | None:
    """One line when a video does not fit into `limit` bytes: what it needs, and what would make it fit."""
    model = outline(config)
    need = needs(config, model).total
    if need <= limit:
        return None
    flags = remedies(config, model, limit)
    advice = f"it fits with {' '.join(flags)}" if flags else "no setting that is known makes it fit"
    return f"needs about {need / GIB:.1f} GiB, the device has {limit / GIB:.1f}: {advice}"
