"""What a video needs of a device's memory, before any weight is read: from configs and shapes alone.

Weights and caches are counted; a pass and the decoder run on tensors without storage, with attention as fused kernels
do it. On a GPU what its allocator wastes comes on top (`HEADROOM`), on a CPU what the process holds in any case.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.config import constructor_settings
from sparse_forcing.devices import multiplies_bfloat16, resolve_device
from sparse_forcing.errors import SparseForcingError, WeightsError
from sparse_forcing.machine_memory import held_bytes, obtainable_bytes
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.geometry import TileLayout, VideoGeometry
from sparse_forcing.model.small.quantized import Storage, quantize_, stored_bytes
from sparse_forcing.model.small.tiled_decode import count_tiles, decode_frames, is_tiled
from sparse_forcing.model.small.tiny_decoder import TinyDecoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.folder import STORED, find_model, usual_dtype
from sparse_forcing.model_folder.live_bytes import peak_bytes
from sparse_forcing.model_folder.presets import PRESETS, preset
from sparse_forcing.model_folder.recognise import read_table
from sparse_forcing.model_folder.sizes import ModelSizes, autoencoder_of, model_sizes, on_meta
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.placement import check_decoder
from sparse_forcing.sampling.generation.settings import Settings, choose_defaults, resolve_settings
from sparse_forcing.weights.safe_load import check_safetensors

HEADROOM = 1.1
GIB = 2**30
_TINY = 9_844_611  # numbers of the tiny decoder
_BLOCKS_AT_ONCE = 2  # one that computes, and the next one, which comes meanwhile
_SCALE = 2  # bytes of a channel's in blocks of 8 bits
_HELPS_ANYWHERE = {"memory", "cache_dtype", "weights", "tiled_decoding", "height", "width"}  # on a CPU, too
_DECODED = 3  # latent frames after which every further one needs what the one before did
_SMALLER = ((480, 832), (320, 576), (256, 448))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes on the device: weights of the three parts, the cache, what a denoising pass and decoding make meanwhile.

    text: keys and values of the prompt in every layer, which stay through the video.
    process: what the process holds without a model; on a GPU nothing.
    loading, reading: of a CPU, what the transformer's and umT5's files take beside the weights while those are read.
    text_stays: whether the text encoder is still there then; umT5 reads the prompts first and goes.
    by_turns: whether transformer and autoencoder wait in the CPU's memory while the other computes.
    headroom: how many times what is counted is taken.
    """

    transformer: int
    text_encoder: int
    autoencoder: int
    cache: int
    text: int
    activations: int
    decoding: int
    process: int = 0
    loading: int = 0
    reading: int = 0
    headroom: float = HEADROOM
    text_stays: bool = False
    by_turns: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what takes them."""
        return {name: size for name, size in dataclasses.asdict(self).items() if type(size) is int}

    @property
    def total(self) -> int:
        """Weights, cache and the larger of what a pass and decoding make, which never run at once; or umT5 alone; or
        weights while they are read."""
        passes, decodes = (self.transformer, self.activations), (self.autoencoder, self.decoding)
        if self.by_turns:
            video = self.cache + self.text + max(sum(passes), sum(decodes))
        else:
            video = self.cache + self.text + self.transformer + self.autoencoder + max(self.activations, self.decoding)
        loaded, text = self.transformer + self.autoencoder + self.loading, self.text_encoder
        most = max(video, loaded) + text if self.text_stays else max(video, loaded, text + self.reading)
        return self.process + round(self.headroom * most)


_measured: dict[tuple[Any, ...], int] = {}


@dataclasses.dataclass(frozen=True)
class Outline:
    """As much of a pipeline as settings are checked against."""

    defaults: PipelineConfig
    geometry: VideoGeometry
    sizes: ModelSizes
    autoencoder: Any
    folder: Path | None

    def measure(self, work: Callable[..., int], *settings: Any) -> int:
        """`work(self, *settings)`, done once for models of these sizes: a run without storage takes a second."""
        sizes = getattr(self.autoencoder, "vae", self.autoencoder).config
        key = (work, *settings, json.dumps([self.sizes.transformer, self.sizes.text_len, sizes], sort_keys=True))
        if key not in _measured:
            _measured[key] = work(self, *settings)
        return _measured[key]

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
        defaults = choose_defaults(config)
    except WeightsError:
        folder = None
        defaults = choose_defaults(config, preset(config.model if config.model in PRESETS else "self-forcing"))
    vae = {} if folder is None else constructor_settings(read_table(folder / "vae" / "config.json"))
    with torch.device("meta"):
        autoencoder = autoencoder_of(defaults.vae, vae)
    geometry = VideoGeometry.of(autoencoder, on_meta(sizes.transformer).config)
    return Outline(defaults, defaults.fit_geometry(geometry), sizes, autoencoder, folder)


def needs(config: GenerateConfig, model: Outline, device: str = "cuda") -> Needs:
    """What a video of these settings takes on `device`. Raises ConfigError for settings the model cannot take."""
    settings = resolve_settings(config, model)  # type: ignore[arg-type]
    check_decoder(config, model.defaults)
    dtype = _dtype(config, device)
    size, transformer = dtype.itemsize, on_meta(model.sizes.transformer)
    batch = 2 if settings.guidance_scale > 1 else 1
    elsewhere = config.text_encoder_device not in (None, config.device, device)
    on_cpu = device.startswith("cpu")
    per_float = size / torch.finfo(torch.float32).bits * 8
    chunks = model.geometry.chunks(model.geometry.latent_frames(settings.num_frames))
    latent = model.geometry.latent_size(settings.height, settings.width)
    return Needs(
        transformer=_on_device(model, size, config),
        text_encoder=0 if elsewhere else stored_bytes(model.sizes.text, size, config.weights),
        autoencoder=round(per_float * model.sizes.autoencoder_bytes) + (size * _TINY if config.tiny_vae else 0),
        cache=batch * cache_bytes(model, settings, sum(chunks), size),
        text=batch * _text_bytes(model, size) if config.offload == "none" else 0,
        activations=model.measure(_activations, max(chunks), latent, batch, dtype, config.weights, device),
        decoding=model.measure(
            _decoding, max(chunks), latent, dtype, config.tiny_vae is not None, config.tiled_decoding, device
        ),
        process=held_bytes() if on_cpu else 0,
        loading=_while_read(model, "transformer", transformer, dtype, config) if on_cpu else 0,
        reading=_while_read(model, "text_encoder", model.sizes.text, dtype, config) if on_cpu else 0,
        headroom=1.0 if on_cpu else HEADROOM,
        text_stays=model.defaults.text_encoder == "words",
        by_turns=config.offload == "model",
    )


def _while_read(model: Outline, part: str, network: torch.nn.Module, dtype: torch.dtype, config: GenerateConfig) -> int:
    """Bytes beside a part's weights while they are read: its files, which are mapped while their numbers are brought to
    another type, and what is given up when these come to rest in 8 bits."""
    size = dtype.itemsize
    wide = stored_bytes(network, size, None) - stored_bytes(network, size, config.weights)
    files = [] if model.folder is None else sorted((model.folder / part).glob("*.safetensors"))
    if {STORED.get(kind) for file in files for kind, _ in check_safetensors(file).values()} <= {dtype}:
        return wide
    sizes = [file.stat().st_size for file in files]
    return wide + (sum(sizes) if part == "text_encoder" else max(sizes))  # transformers maps all at once


def _on_device(model: Outline, size: int, config: GenerateConfig) -> int:
    """Bytes of the transformer that are on the device at once, with `size` bytes a number."""
    transformer = on_meta(model.sizes.transformer)
    whole = stored_bytes(transformer, size, config.weights)
    if config.offload != "blocks":
        return whole
    blocks = whole - size * sum(x.numel() for name, x in transformer.named_parameters() if "blocks." not in name)
    return whole - blocks + _BLOCKS_AT_ONCE * blocks // len(transformer.blocks)


def _dtype(config: GenerateConfig, device: str) -> torch.dtype:
    if config.dtype is not None:
        return getattr(torch, config.dtype)
    try:
        return usual_dtype(find_model(config.model), device)
    except WeightsError:  # not downloaded yet
        return torch.bfloat16 if multiplies_bfloat16(torch.device(device)) else torch.float32


def cache_bytes(model: Outline, settings: Settings, latent_frames: int, size: int) -> int:
    """Bytes of the keys and values that one video's memory holds when it is full, with `size` bytes a number."""
    if model.geometry.whole_video:
        return 0
    sizes, memory = on_meta(model.sizes.transformer).config, settings.memory
    width = sizes.num_attention_heads * sizes.attention_head_dim
    rows, cols = model.geometry.token_size(*model.geometry.latent_size(settings.height, settings.width))
    if memory.kind != "sparse":
        tokens = min(memory.window or latent_frames, latent_frames) * rows * cols
        tokens += memory.persistent_tokens if memory.kind == "heavy_hitter" else 0
        return size * 2 * tokens * sizes.num_layers * width
    layout, block = TileLayout(model.geometry.chunk_frames, rows, cols, memory.tile), 2 * math.prod(memory.tile)
    blocks = memory.window_frames // model.geometry.chunk_frames * layout.num_blocks + memory.persistent_blocks
    numbers = block * size if memory.cache_dtype is None else block + 2 * _SCALE
    shared = 0 if memory.cache_dtype is None else block * size  # the pool that all layers read from
    return blocks * width * (sizes.num_layers * (numbers + size) + shared)  # and what keys are compressed to


def _text_bytes(model: Outline, size: int) -> int:
    """Bytes of a prompt's keys and values in all layers; hooks that bring weights make each pass project its own."""
    sizes = on_meta(model.sizes.transformer).config
    return 2 * size * model.sizes.text_len * sizes.num_layers * sizes.num_attention_heads * sizes.attention_head_dim


def _activations(
    model: Outline,
    frames: int,
    latent: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    storage: Storage | None,
    device: str,
) -> int:
    """Of one pass over the largest chunk."""
    sizes = model.sizes.transformer
    with torch.device("meta"):
        network = CausalWanTransformer3DModel(**{**sizes, "num_layers": 1})
        torch.nn.Module.to(network, dtype)  # diffusers' own warns of what only a rounding of weights would matter to
        if storage is not None:
            quantize_(network, storage)
        x = torch.empty(batch, network.config.in_channels, frames, *latent, dtype=dtype)
        text = torch.empty(batch, model.sizes.text_len, network.config.text_dim, dtype=dtype)
        time = torch.empty(batch)
    return peak_bytes(lambda: network(x, time, text, policy=ParallelAttention(frames)), device)


def _decoding(
    model: Outline, frames: int, latent: tuple[int, int], dtype: torch.dtype, tiny: bool, tiled: bool, device: str
) -> int:
    """Of one chunk: what the decoder makes of its first latent frames, and the pixels of all of them."""
    some, autoencoder = min(frames, _DECODED), model.autoencoder
    decoder = TinyDecoder() if tiny else autoencoder
    torch.nn.Module.to(autoencoder, dtype)
    with torch.device("meta"):
        z = torch.empty(1, autoencoder.latent_channels, some, *latent, dtype=dtype)
    pixel_frame = 3 * z.element_size() * latent[0] * latent[1] * autoencoder.spatial_stride**2
    if hasattr(autoencoder, "vae"):
        autoencoder.vae.use_tiling = tiled
        if is_tiled(autoencoder.vae, z):  # tiles wait elsewhere for their turn; their pixels are joined in the end
            tile = z[..., : autoencoder.vae.tile_sample_min_height // 8, : autoencoder.vae.tile_sample_min_width // 8]
            carried: list[Any] = []
            one = peak_bytes(lambda: decode_frames(autoencoder.vae, tile, carried), device)
            if device.startswith("cpu"):  # there they wait beside it
                one += (count_tiles(autoencoder.vae, z) - 1) * sum(x.nbytes for x in carried if torch.is_tensor(x))
            return one + 4 * pixel_frame * autoencoder.temporal_stride * frames
    pixels = 2 * pixel_frame * autoencoder.temporal_stride * (frames - some)
    return peak_bytes(lambda: next(iter(decoder.decode_stream([z]))), device) + pixels


@dataclasses.dataclass(frozen=True)
class _Change:
    """Settings that need less, and the flags that make them."""

    settings: dict[str, Any]
    flags: str


def remedies(config: GenerateConfig, model: Outline, limit: int, device: str = "cuda") -> list[str]:
    """Flags with which a video fits into `limit` bytes, those that cost least of it first and none in vain; empty where
    no flags make it fit."""

    def fits(changes: list[_Change]) -> bool:
        changed = {name: value for change in changes for name, value in change.settings.items()}
        return needs(dataclasses.replace(config, **changed), model, device).total <= limit

    chosen: list[_Change] = []
    for change in _changes(config, model, device):
        chosen.append(change)
        if fits(chosen):
            break
    else:
        return []
    for change in chosen[:-1]:
        if fits(rest := [each for each in chosen if each is not change]):
            chosen = rest
    return [change.flags for change in chosen]


def _changes(config: GenerateConfig, model: Outline, device: str) -> Iterator[_Change]:
    """What can be given up, from what costs nothing to what is seen; on a CPU there is nowhere to put things."""
    for change in _all_changes(config, model):
        if not device.startswith("cpu") or change.settings.keys() <= _HELPS_ANYWHERE:
            yield change


def _all_changes(config: GenerateConfig, model: Outline) -> Iterator[_Change]:
    if config.text_encoder_device is None:
        yield _Change({"text_encoder_device": "cpu"}, "--text-encoder-device cpu")
    if not model.geometry.whole_video and (config.memory or model.default_memory.kind) == "full":
        yield _Change({"memory": "sparse"}, "--memory sparse")
    if model.defaults.vae == "wan" and not (config.tiny_vae or config.tiled_decoding):
        yield _Change({"tiled_decoding": True}, "--tiled-decoding")
    kind = config.memory or model.default_memory.kind
    if not model.geometry.whole_video and kind in ("full", "sparse") and config.cache_dtype is None:
        yield _Change({"memory": "sparse", "cache_dtype": "int8"}, "--memory sparse --cache-dtype int8")
    if config.weights is None:
        yield _Change({"weights": "int8"}, "--weights int8")
    if config.offload == "none":
        yield _Change({"offload": "blocks"}, "--offload blocks")
    height = config.height or model.defaults.height
    for smaller in _SMALLER:
        if smaller[0] < height:
            size = {"height": smaller[0], "width": smaller[1]}
            yield _Change(size, f"--height {smaller[0]} --width {smaller[1]}")


def relief(config: GenerateConfig) -> tuple[str, list[str]]:
    """For when memory has run out while a video is made: the two largest of what it takes, and the flags of the two
    changes beside a smaller picture that save most. Both empty where the model's sizes are not known."""
    device = resolve_device(config.device).partition(":")[0]
    try:
        model = outline(config)
        need = _without_text(needs(config, model, device))
        saved = {
            change.flags: need.total
            - _without_text(needs(dataclasses.replace(config, **change.settings), model, device)).total
            for change in _changes(config, model, device)
            if "height" not in change.settings
        }
    except SparseForcingError:
        return "", []
    held = sorted((size, name) for name, size in need.parts.items())
    took = " and ".join(f"{name} {size / GIB:.2g} GiB" for size, name in reversed(held[-2:]))
    best: list[str] = []
    for flags in sorted(saved, key=lambda flags: -saved[flags]):
        if saved[flags] > 0 and not any(flags in other or other in flags for other in best):
            best.append(flags)
    return f" ({took} of {need.total / GIB:.2g} GiB)", best[:2]


def _without_text(need: Needs) -> Needs:
    """What is left when umT5 has gone."""
    return need if need.text_stays else dataclasses.replace(need, text_encoder=0)


def memory_limit(device: str) -> int | None:
    """Bytes that a device has, of a CPU those this process can have; None where nobody tells."""
    if not device.startswith("cuda"):
        return obtainable_bytes() if device.startswith("cpu") else None
    return torch.cuda.get_device_properties(torch.device(device)).total_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """Whether a video fits: what it needs, of how much (None: unknown), and flags with which it fits if it does not."""

    need: Needs
    limit: int | None
    flags: list[str]

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.need.total <= self.limit

    @property
    def remark(self) -> str | None:
        """One line where the video does not fit."""
        if self.limit is None or self.fits:
            return None
        advice = f"it fits with {' '.join(self.flags)}" if self.flags else "no setting that is known makes it fit"
        return f"needs about {self.need.total / GIB:.1f} GiB, the device has {self.limit / GIB:.1f}: {advice}"


def answer(config: GenerateConfig, model: Outline, device: str, limit: int | None) -> Answer:
    """What `doctor` says of a video and `generate` checks. Raises ConfigError for settings the model cannot take."""
    need = needs(config, model, device)
    fits = limit is None or need.total <= limit
    return Answer(need=need, limit=limit, flags=[] if fits else remedies(config, model, limit or 0, device))
