"""Memory of a training stage, computed on meta tensors: nothing is allocated.

Per process: weights, gradients, AdamW's two moments and the averages of every trained network, weights of the frozen
ones, keys and values that a rollout keeps, and the activations of one layer's recomputation plus one token tensor per
checkpointed block. A floor, not a promise: allocators round up and kernels take workspaces.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.config import build_config
from sparse_forcing.files import read_json
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.pipeline import PIPELINE_FILE, PipelineConfig, find_model
from sparse_forcing.training.distill import DistillConfig
from sparse_forcing.transformer import CausalWanTransformer3DModel

GIB = 1 << 30
_STATE_BYTES = 4  # weights, gradients, moments and averages are float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process."""

    weights: int
    gradients: int
    optimizers: int
    averages: int
    frozen: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def lines(self) -> list[str]:
        return [f"{name:<12} {value / GIB:8.2f} GiB" for name, value in {**asdict(self), "total": self.total}.items()]


def parameter_count(config: dict[str, Any]) -> int:
    """Parameters of a transformer config, counted on meta tensors."""
    return sum(p.numel() for p in _on_meta(config).parameters())


def _on_meta(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return CausalWanTransformer3DModel(**config)


def cache_tokens(memory: MemoryConfig, tokens_per_frame: int, frames: int) -> int:
    """Tokens a layer keeps of a rollout of `frames` latent frames."""
    if memory.kind == "full":
        return frames * tokens_per_frame
    window = min(memory.window_frames, frames) * tokens_per_frame
    if memory.kind != "sparse":
        return window
    tile = memory.tile[0] * memory.tile[1] * memory.tile[2]
    return window + memory.persistent_blocks * tile


def estimate_distillation(
    generator: dict[str, Any],
    critic: dict[str, Any],
    teacher: dict[str, Any],
    *,
    tokens_per_frame: int,
    frames: int,
    memory: MemoryConfig,
    micro_batch: int = 1,
    shards: int = 1,
    compute_bytes: int = 2,
    checkpointing: bool = True,
) -> MemoryEstimate:
    """Estimate for distillation.

    Args:
        generator, critic, teacher: transformer configs.
        tokens_per_frame, frames: of a rollout.
        shards: processes that share every network's state (1: replicated).
        compute_bytes: bytes of a number in computation.
    """
    trained = sum(parameter_count(config) for config in (generator, critic)) // shards
    frozen = parameter_count(teacher) // shards
    model = _on_meta(generator)
    sizes = model.config
    dim, layers, chunk = sizes.num_attention_heads * sizes.attention_head_dim, sizes.num_layers, sizes.chunk_frames
    per_token = 2 * dim * compute_bytes
    kept = cache_tokens(memory, tokens_per_frame, frames)
    # Every chunk's pass with gradients keeps the cache it read: written out of place, chunk by chunk.
    cache = micro_batch * layers * per_token * sum(
        min(kept, end * tokens_per_frame) for end in range(chunk, frames + 1, chunk)
    )  # fmt: skip
    tokens = micro_batch * frames * tokens_per_frame
    inside = tokens * (10 * dim + 2 * sizes.ffn_dim) * compute_bytes
    activations = tokens * dim * compute_bytes * layers + inside if checkpointing else inside * layers
    return MemoryEstimate(
        weights=trained * _STATE_BYTES,
        gradients=trained * _STATE_BYTES,
        optimizers=2 * trained * _STATE_BYTES,
        averages=parameter_count(generator) // shards * _STATE_BYTES,
        frozen=frozen * _STATE_BYTES,
        cache=cache,
        activations=activations,
    )


def estimate_stage(config: DistillConfig, processes: int = 1) -> MemoryEstimate:
    """Estimate of a distillation config on `processes`; of the models only the configs are read.

    Raises:
        ConfigError, WeightsError: a model folder is not there or not readable.
    """
    student, teacher = (find_model(name) for name in (config.model, config.teacher))
    pipeline = build_config(PipelineConfig, read_json(student / PIPELINE_FILE), source=str(student / PIPELINE_FILE))
    generator, score = (_sizes(folder / "transformer" / "config.json") for folder in (student, teacher))
    vae = read_json(student / "vae" / "config.json")
    stride = vae["spatial_stride"] if "spatial_stride" in vae else vae["scale_factor_spatial"]
    _, rows, cols = generator["patch_size"]
    return estimate_distillation(
        generator, score, score,
        tokens_per_frame=(pipeline.height // (stride * rows)) * (pipeline.width // (stride * cols)),
        frames=config.rollout_frames, memory=config.memory or pipeline.memory, micro_batch=config.loop.micro_batch,
        shards=processes if config.loop.parallel == "fsdp" else 1,
        compute_bytes=2 if config.loop.dtype == "bfloat16" else 4, checkpointing=config.loop.gradient_checkpointing,
    )  # fmt: skip


def _sizes(path: Path) -> dict[str, Any]:
    return {name: value for name, value in read_json(path).items() if not name.startswith("_")}
