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
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_forcing.config import constructor_settings, to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.eval.bench.options import StreamBenchConfig
from sparse_forcing.files import atomic_write_json, atomic_write_text, check_writable, read_json
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.memory.config import KINDS
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.text import WAN_TEXT_LEN
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import WanAutoencoder
from sparse_forcing.model_folder.folder import EMBEDDED_AUTOENCODERS, EMBEDDED_MODELS, PipelineConfig, read_defaults
from sparse_forcing.sampling.rollout import RolloutChunk, SeededNoise, rollout

GIB = 1 << 30
HEAD_STD = 0.02
"""Of the output head's random weights: small enough for flows of about unit size, not silent as before training."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model size fixes.

    Args:
        transformer: settings of the constructor.
        text_len: tokens of a prompt.
        channels: channels of latents.
    """

    transformer: dict[str, Any]
    defaults: PipelineConfig
    geometry: VideoGeometry
    text_len: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Everything the rollouts share: model, prompt [1, T, text_dim], sampler, video size in tokens and latents."""

    architecture: Architecture
    model: CausalWanTransformer3DModel
    text: Tensor
    sampler: SamplerConfig
    latent_size: tuple[int, int]
    seed: int

    @property
    def device(self) -> torch.device:
        return self.text.device

    def memory(self, kind: str) -> MemoryConfig:
        """The model's default memory as another kind."""
        return replace(self.architecture.defaults.memory, kind=kind)

    def rollout(self, memory: MemoryConfig, chunks: int) -> Iterator[RolloutChunk]:
        """A rollout from noise; the same noise for every memory."""
        geometry = self.architecture.geometry
        frames = chunks * geometry.chunk_frames
        tokens = geometry.token_size(*self.latent_size)
        sizes = MemoryGeometry.of(self.model.config, *tokens, capacity_frames=frames)
        shape = (self.architecture.channels, *self.latent_size)
        noise = SeededNoise([torch.Generator().manual_seed(self.seed)], shape, self.device, self.text.dtype)
        state = make_memory(memory, sizes, selectors=self.model.selectors)
        return rollout(self.model, self.text, geometry.chunks(frames), state, noise, self.sampler)


@dataclass
class Measured:
    """One memory's rollout, chunk by chunk; gpu_peak_bytes is None where the device is not a GPU that torch counts."""

    seconds: list[float] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    gpu_peak_bytes: int | None = None


def run(config: StreamBenchConfig, published: Mapping[str, dict[str, Any]]) -> int:
    """Roll out every memory; writes stream.json and stream.md, prints a table and JSON last.

    Args:
        published: transformer settings by name of a model size, beside the embedded models.

    Returns:
        Exit code: 1 when a rollout is not finite.
    """
    architecture = find_architecture(config.model_size, published)
    unknown = [name for name in config.memories if name not in KINDS]
    if unknown:
        raise ConfigError(f"--memories: unknown {', '.join(unknown)}; known are {', '.join(KINDS)}")
    defaults = architecture.defaults
    latent_size = architecture.geometry.latent_size(config.height or defaults.height, config.width or defaults.width)
    device = torch.device(resolve_device(config.device or "auto"))
    dtype = getattr(torch, config.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    out = check_writable(config.output, folder=True) if config.output else None
    try:
        stream = build(architecture, latent_size, config, device, dtype)
        result = describe(stream, config)
        print(heading(result), flush=True)
        measured = measure(stream, config.memories, config.chunks)
    except torch.OutOfMemoryError as error:
        raise SparseForcingError(
            f"bench stream: {config.model_size} does not fit on {device} ({str(error).splitlines()[0]:.160}); "
            "fewer --chunks, a smaller --height and --width, or --memories without full need less"
        ) from error
    except FloatingPointError as error:
        print(f"bench stream: {error}; nothing is reported", file=sys.stderr)
        print(json.dumps(result | {"ok": False}))
        return 1
    result["memories"] = {name: summarize(stream, name, row) for name, row in measured.items()}
    result["full_over_sparse"] = ratio(result["memories"], "full", "sparse")
    print(table(result), end="")
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
        architecture=architecture, model=model, text=text, sampler=sampler, latent_size=latent_size, seed=config.seed
    )


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
    window = stream.architecture.defaults.memory.window_frames // stream.architecture.geometry.chunk_frames
    _turns(stream, names, min(chunks, window + 1) if stream.device.type == "cpu" else chunks, "warm-up chunk")
    return _turns(stream, names, chunks, "chunk")


def _turns(stream: Stream, names: tuple[str, ...], chunks: int, title: str) -> dict[str, Measured]:
    found = {name: Measured() for name in names}
    rollouts = {name: stream.rollout(stream.memory(name), chunks) for name in found}
    meter = GpuMeter(stream.device)
    for number in range(chunks):
        for name, row in found.items():
            with meter.turn(name):
                chunk = next(rollouts[name])
            if not bool(torch.isfinite(chunk.latents).all()):
                raise FloatingPointError(f"{name}: {title} {number + 1} is not finite")
            row.seconds.append(chunk.seconds)
            row.cache_bytes.append(chunk.cache_bytes)
            row.gpu_peak_bytes = meter.peaks.get(name)
        times = "  ".join(f"{name} {row.seconds[-1]:.3f} s" for name, row in found.items())
        print(f"{title} {number + 1}/{chunks}: {times}", flush=True)
    return found


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
        "decoding": "not included",
    }


def summarize(stream: Stream, name: str, row: Measured) -> dict[str, Any]:
    """One row of the table. `last_third_seconds`: median of the last third of the chunks, when the window is full."""
    geometry = stream.architecture.geometry
    last = statistics.median(row.seconds[-max(1, len(row.seconds) // 3) :])
    return {
        "memory": asdict(stream.memory(name)),
        "chunk_seconds": row.seconds,
        "last_third_seconds": last,
        "latent_frames_per_second": geometry.chunk_frames / last,
        "pixel_frames_per_second": geometry.chunk_frames * geometry.temporal_stride / last,
        "cache_bytes": row.cache_bytes,
        "cache_bytes_peak": max(row.cache_bytes),
        "gpu_peak_bytes": row.gpu_peak_bytes,
    }


def ratio(rows: Mapping[str, dict[str, Any]], slow: str, fast: str) -> float | None:
    """Seconds per chunk of one memory over those of another; None unless both were measured."""
    if slow not in rows or fast not in rows:
        return None
    return rows[slow]["last_third_seconds"] / rows[fast]["last_third_seconds"]


def heading(result: Mapping[str, Any]) -> str:
    """One line: model, size, machine, what is left out."""
    return (
        f"{result['config']['model_size']} ({result['parameters'] / 1e9:.2f} B random weights, {result['dtype']}), "
        f"{result['width']}x{result['height']}, {result['config']['chunks']} chunks of {result['chunk_latent_frames']} "
        f"latent frames = {result['chunk_tokens']} tokens, {result['sampler']['steps']} steps and a clean pass; "
        f"{result['device_name']}, torch {result['torch']}; decoding not included"
    )


def table(result: Mapping[str, Any]) -> str:
    """Markdown table of a result."""
    lines = [
        "| memory | s per chunk, last third | latent frames/s | pixel frames/s | cache GiB, peak | GPU GiB, peak |",
        "|" + "---|" * 6,
    ]
    for name, row in result["memories"].items():
        gpu = "-" if row["gpu_peak_bytes"] is None else f"{row['gpu_peak_bytes'] / GIB:.2f}"
        lines.append(
            f"| {name} | {row['last_third_seconds']:.3f} | {row['latent_frames_per_second']:.2f} | "
            f"{row['pixel_frames_per_second']:.2f} | {row['cache_bytes_peak'] / GIB:.3f} | {gpu} |"
        )
    if result["full_over_sparse"] is not None:
        lines += ["", f"A chunk of `full` takes {result['full_over_sparse']:.2f} times as long as one of `sparse`."]
    return "\n".join(lines) + "\n"


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """stream.json and stream.md."""
    atomic_write_json(folder / "stream.json", dict(result))
    atomic_write_text(
        folder / "stream.md",
        f"{heading(result)}. Videos play at {result['fps']:g} frames per second.\n\n{table(result)}",
    )
