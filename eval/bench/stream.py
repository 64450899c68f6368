"""How fast and how large a rollout of a published model size is on this machine, with random weights.

Speed and bytes depend on sizes alone, so nothing is downloaded: the transformer is built from its published config, the
prompt is random numbers, and the latents are not decoded (no autoencoder and no text encoder is timed or counted).
Everything else is what `generate` runs: the rollout, its memories, few-step sampling and a clean pass per chunk. The
memories take turns chunk by chunk in one process, so that whatever else the machine does slows them all alike.

    sparse-forcing bench stream --model-size wan-1.3b --memories full sparse --output outputs/stream

Legend: B batch (1), C latent channels, F latent frames, H x W latent rows and columns.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_forcing.config import constructor_settings, to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.eval.bench.options import StreamBenchConfig
from sparse_forcing.eval.bench.stream_report import (
    heading,
    project_memories,
    projection_tables,
    ratio,
    summarize,
    table,
    write,
)
from sparse_forcing.eval.measuring.roofline import GPUS, ChunkSizes
from sparse_forcing.files import check_writable, read_json
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.memory.config import parse_memory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.text import WAN_TEXT_LEN
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import VideoAutoencoder, WanAutoencoder
from sparse_forcing.model_folder.folder import EMBEDDED_AUTOENCODERS, EMBEDDED_MODELS, PipelineConfig, read_defaults
from sparse_forcing.sampling.graphs import check_cuda_graphs, cuda_recorder
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.rollout import RolloutChunk, rollout

HEAD_STD = 0.02
"""Of the output head's random weights: small enough for flows of about unit size, not silent as before training."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model size fixes.

    Args:
        transformer, vae: settings of their constructors.
        text_len: tokens of a prompt.
        channels: channels of latents.
    """

    transformer: dict[str, Any]
    defaults: PipelineConfig
    geometry: VideoGeometry
    text_len: int
    channels: int
    vae: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Everything the rollouts share: model, prompt [1, T, text_dim], sampler, video size in tokens and latents."""

    architecture: Architecture
    model: CausalWanTransformer3DModel
    text: Tensor
    sampler: SamplerConfig
    latent_size: tuple[int, int]
    seed: int
    graphs: bool = False
    vae: VideoAutoencoder | None = None

    @property
    def device(self) -> torch.device:
        return self.text.device

    def memory(self, words: str) -> MemoryConfig:
        """A memory in words (sparse_forcing.memory.config), the rest as the model's default has it."""
        return parse_memory(words, self.architecture.defaults.memory)

    def rollout(self, memory: MemoryConfig, chunks: int) -> Iterator[RolloutChunk]:
        """A rollout from noise; the same noise for every memory."""
        geometry = self.architecture.geometry
        frames = chunks * geometry.chunk_frames
        tokens = geometry.token_size(*self.latent_size)
        sizes = MemoryGeometry.of(self.model.config, *tokens, capacity_frames=frames)
        shape = (self.architecture.channels, *self.latent_size)
        noise = SeededNoise([torch.Generator().manual_seed(self.seed)], shape, self.device, self.text.dtype)
        state = make_memory(memory, sizes, selectors=self.model.selectors)
        record = cuda_recorder() if self.graphs else None
        return rollout(self.model, self.text, geometry.chunks(frames), state, noise, self.sampler, record=record)


@dataclass
class Measured:
    """One memory's rollout, chunk by chunk; what only a GPU that torch counts can tell is None elsewhere.

    launches, busy_seconds: kernels of a chunk and how long they ran. decode_seconds: of each chunk, where chunks are
    decoded.
    """

    seconds: list[float] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    gpu_peak_bytes: int | None = None
    launches: int | None = None
    busy_seconds: float | None = None
    decode_seconds: list[float] = field(default_factory=list)


def run(config: StreamBenchConfig, published: Mapping[str, dict[str, Any]]) -> int:
    """Roll out every memory; writes stream.json and stream.md, prints a table and JSON last.

    Args:
        published: transformer settings by name of a model size, beside the embedded models.

    Returns:
        Exit code: 1 when a rollout is not finite.
    """
    architecture = find_architecture(config.model_size, published)
    defaults = architecture.defaults
    for words in config.memories:
        parse_memory(words, defaults.memory)
    latent_size = architecture.geometry.latent_size(config.height or defaults.height, config.width or defaults.width)
    device = torch.device(resolve_device(config.device or "auto") if config.chunks else "meta")
    dtype = getattr(torch, config.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    out = check_writable(config.output, folder=True) if config.output else None
    try:
        stream = build(architecture, latent_size, config, device, dtype)
        result = describe(stream, config)
        print(heading(result), flush=True)
        measured = measure(stream, config.memories, config.chunks) if config.chunks else {}
    except torch.OutOfMemoryError as error:
        raise SparseForcingError(
            f"bench stream: {config.model_size} does not fit on {device} ({str(error).splitlines()[0]:.160}); "
            "fewer --chunks, a smaller --height and --width, or --memories without full need less"
        ) from error
    except FloatingPointError as error:
        print(f"bench stream: {error}; nothing is reported", file=sys.stderr)
        print(json.dumps(result | {"ok": False}))
        return 1
    result["memories"] = {
        name: {"memory": asdict(stream.memory(name)), **summarize(result, row)} for name, row in measured.items()
    }
    result["full_over_sparse"] = ratio(result["memories"], "full", "sparse")
    result["projection"] = project(stream, config.memories)
    print(f"{table(result)}{projection_tables(result)}", end="")
    if out is not None:
        write(out, result)
    print(json.dumps(result))
    return 0


def find_architecture(name: str, published: Mapping[str, dict[str, Any]]) -> Architecture:
    """The sizes of an embedded model or a published one. Raises ConfigError naming what is known."""
    embedded = sorted(path.parent.parent.name for path in EMBEDDED_MODELS.glob("*/transformer/config.json"))
    if name in embedded:
        folder = EMBEDDED_MODELS / name
        transformer, text, vae_config = (_settings(folder / part) for part in ("transformer", "text_encoder", "vae"))
        defaults, text_len = read_defaults(folder), text["text_len"]
    elif name in published:
        transformer, vae_config, defaults, text_len = dict(published[name]), {}, PipelineConfig(), WAN_TEXT_LEN
    else:
        raise ConfigError(f"--model-size: unknown {name!r}; known are {', '.join([*published, *embedded])}")
    with torch.device("meta"):
        sizes = CausalWanTransformer3DModel(**transformer).config
        vae = _autoencoder(defaults.vae, vae_config)
    return Architecture(
        transformer=transformer,
        defaults=defaults,
        geometry=VideoGeometry.of(vae, sizes),
        text_len=text_len,
        channels=sizes.in_channels,
        vae=vae_config,
    )


def _settings(folder: Path) -> dict[str, Any]:
    return constructor_settings(read_json(folder / "config.json"))


def _autoencoder(kind: str, config: dict[str, Any]) -> Any:
    """An autoencoder on whatever device is current: only its strides are read."""
    if kind in EMBEDDED_AUTOENCODERS:
        return EMBEDDED_AUTOENCODERS[kind](**config)
    from diffusers import AutoencoderKLWan

    return WanAutoencoder(AutoencoderKLWan(**config))


def build(
    architecture: Architecture,
    latent_size: tuple[int, int],
    config: StreamBenchConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Stream:
    """Random weights and a random prompt, made on the device in the type they are used in."""
    torch.manual_seed(config.seed)
    with torch.device(device), default_dtype(dtype):
        model = CausalWanTransformer3DModel(**architecture.transformer).eval().requires_grad_(False)
        nn.init.normal_(model.proj_out.weight, std=HEAD_STD)
        text = torch.randn(1, architecture.text_len, model.config.text_dim)
    sampler = SamplerConfig(
        kind="few_step", steps=config.num_inference_steps, shift=architecture.defaults.sampler.shift
    )
    return Stream(
        architecture=architecture,
        model=model,
        text=text,
        sampler=sampler,
        latent_size=latent_size,
        seed=config.seed,
        graphs=check_cuda_graphs(device, config.cuda_graphs),
        vae=build_autoencoder(architecture, device) if config.decode else None,
    )


def build_autoencoder(architecture: Architecture, device: torch.device) -> VideoAutoencoder:
    """The model's autoencoder with random weights, in the type it decodes in (float32)."""
    with torch.device(device):
        return _autoencoder(architecture.defaults.vae, architecture.vae).to(device).eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating point type of tensors made inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure(stream: Stream, names: tuple[str, ...], chunks: int) -> dict[str, Measured]:
    """Rollouts of all memories in turns, after some that do not count: on an accelerator of the same length, because
    libraries prepare kernels for every length of the keys; elsewhere until the window has moved once.

    Raises:
        FloatingPointError: latents are not finite.
    """
    frames = max(stream.memory(name).window or 0 for name in names)
    window = frames // stream.architecture.geometry.chunk_frames
    _turns(stream, names, min(chunks, window + 1) if stream.device.type == "cpu" else chunks, "warm-up chunk")
    found = _turns(stream, names, chunks, "chunk")
    if stream.device.type == "cuda":
        for name, row in found.items():
            row.launches, row.busy_seconds = profile_last_chunk(stream, name, chunks)
    return found


def profile_last_chunk(stream: Stream, name: str, chunks: int) -> tuple[int, float]:
    """(kernels, seconds that the GPU was busy) of the last chunk of one more rollout."""
    from torch.profiler import ProfilerActivity, profile

    parts = stream.rollout(stream.memory(name), chunks)
    for _ in range(chunks - 1):
        next(parts)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        next(parts)
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    return sum(event.count for event in kernels), sum(event.self_device_time_total for event in kernels) / 1e6


def _turns(stream: Stream, names: tuple[str, ...], chunks: int, title: str) -> dict[str, Measured]:
    found = {name: Measured() for name in names}
    rollouts = {name: stream.rollout(stream.memory(name), chunks) for name in found}
    decoders = {name: Decoder(stream.vae) for name in found} if stream.vae is not None else {}
    meter = GpuMeter(stream.device)
    for number in range(chunks):
        for name, row in found.items():
            with meter.turn(name):
                chunk = next(rollouts[name])
            if not bool(torch.isfinite(chunk.latents).all()):
                raise FloatingPointError(f"{name}: {title} {number + 1} is not finite")
            row.seconds.append(chunk.seconds)
            if decoders:
                row.decode_seconds.append(decoders[name].seconds(chunk.latents))
            row.cache_bytes.append(chunk.cache_bytes)
            row.gpu_peak_bytes = meter.peaks.get(name)
        times = "  ".join(f"{name} {row.seconds[-1]:.3f} s" for name, row in found.items())
        print(f"{title} {number + 1}/{chunks}: {times}", flush=True)
    return found


class Decoder:
    """Decodes the chunks of one video one after the other, and tells how long each took, until its pixels are there."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        self._next: Tensor | None = None
        self._pixels = vae.decode_stream(iter(self._take, None))

    def _take(self) -> Tensor | None:
        return self._next

    @torch.no_grad()
    def seconds(self, latents: Tensor) -> float:
        """Decode latents [B, F, C, H, W]."""
        self._next = latents.float().transpose(1, 2)
        began = time.perf_counter()
        next(self._pixels).cpu()
        return time.perf_counter() - began


class GpuMeter:
    """Peak bytes that each of several rollouts in one process would need alone: what they share and its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shared = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.held: dict[str, int] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """What is allocated inside belongs to `name`."""
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        held = self.held.get(name, 0)
        peak = self.shared + held + torch.cuda.max_memory_allocated(self.device) - before
        self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self.held[name] = held + torch.cuda.memory_allocated(self.device) - before


def project(stream: Stream, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What these rollouts would take on each GPU of the roofline (eval/measuring/roofline.py)."""
    config, geometry = stream.model.config, stream.architecture.geometry
    rows, cols = geometry.token_size(*stream.latent_size)
    sizes = ChunkSizes(
        frames=geometry.chunk_frames,
        rows=rows,
        cols=cols,
        dim=config.num_attention_heads * config.attention_head_dim,
        ffn_dim=config.ffn_dim,
        layers=config.num_layers,
        text_tokens=stream.architecture.text_len,
        passes=stream.sampler.steps + 1,
    )
    pixel_frames = geometry.chunk_frames * geometry.temporal_stride
    memories = {name: stream.memory(name) for name in names}
    fps = stream.architecture.defaults.fps
    return {gpu.name: project_memories(memories, sizes, gpu, pixel_frames=pixel_frames, fps=fps) for gpu in GPUS}


def describe(stream: Stream, config: StreamBenchConfig) -> dict[str, Any]:
    """What was measured, and on what."""
    geometry, device = stream.architecture.geometry, stream.device
    rows, cols = geometry.token_size(*stream.latent_size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    parameters = list(stream.model.parameters())
    return {
        "ok": True,
        "config": to_plain(config),
        "device": str(device),
        "device_name": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(stream.text.dtype).removeprefix("torch."),
        "height": stream.latent_size[0] * geometry.spatial_stride,
        "width": stream.latent_size[1] * geometry.spatial_stride,
        "fps": stream.architecture.defaults.fps,
        "parameters": sum(p.numel() for p in parameters),
        "weights_bytes": sum(p.nbytes for p in parameters),
        "chunk_latent_frames": geometry.chunk_frames,
        "chunk_pixel_frames": geometry.chunk_frames * geometry.temporal_stride,
        "chunk_tokens": geometry.chunk_frames * rows * cols,
        "sampler": asdict(stream.sampler),
        "weights": "random",
        "decoding": "timed apart" if stream.vae is not None else "not included",
        "cuda_graphs": stream.graphs,
    }
