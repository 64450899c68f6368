"""Memory of a training stage, computed on meta tensors: nothing is allocated.

Of one of N processes, from the stage's config: parameters are counted on meta tensors, and what autograd saves of a
transformer block is traced on fake ones. The estimate is of tensors that live at the same time at the worst moment of a
step. Allocators round up and kernels take workspaces beyond it. Shards of FSDP count as equal parts; the block that is
whole at the time is among the activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_forcing.config import constructor_settings
from sparse_forcing.devices import compute_dtype, resolve_device
from sparse_forcing.errors import ConfigError
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.selector import HIDDEN
from sparse_forcing.model.vae import CLIPS_AT_ONCE, PatchAutoencoder, TokenAutoencoder
from sparse_forcing.model_folder.sizes import ModelSizes, model_sizes, on_meta
from sparse_forcing.training.engine.lora import LoraConfig
from sparse_forcing.training.memory_estimate.bytes import (
    Work,
    activation_bytes,
    cache_bytes,
    count_trained,
    graph_bytes,
    parameter_count,
)
from sparse_forcing.training.recipes.consistency import ConsistencyConfig
from sparse_forcing.training.recipes.distill import DistillConfig
from sparse_forcing.training.recipes.embedded.autoencoder import FIT_SIZE, AutoencoderConfig
from sparse_forcing.training.recipes.embedded.curriculum import PretrainConfig
from sparse_forcing.training.recipes.embedded.pretrain import make_optimizers
from sparse_forcing.training.recipes.embedded.pretrain_model import TextToVideo
from sparse_forcing.training.recipes.forcing import ForcingConfig
from sparse_forcing.training.recipes.ode import OdeConfig
from sparse_forcing.training.recipes.retention import RetentionConfig

GIB = 1 << 30
_HEAD_COPIES = 2  # of a block's key and value, in float32, that a retention head keeps: normalised, and beside others
_STATE_BYTES = 4  # weights, gradients, moments and averages are float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process. `weights`: of trained networks, `frozen`: of the other score network, `encoders`: text
    encoder and autoencoder; `cache`: keys and values of a rollout."""

    weights: int
    gradients: int
    optimizers: int
    averages: int
    frozen: int
    encoders: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def lines(self) -> list[str]:
        return [f"{name:<12} {value / GIB:9.3f} GiB" for name, value in {**asdict(self), "total": self.total}.items()]


def estimate_distillation(
    generator: dict[str, Any],
    critic: dict[str, Any],
    teacher: dict[str, Any],
    work: Work,
    *,
    shards: int = 1,
    encoders: int = 0,
    lora: LoraConfig | None = None,
    critic_lora: LoraConfig | None = None,
    scored: int | None = None,
    score_context: int = 0,
    real_passes: int = 0,
) -> MemoryEstimate:
    """Estimate of three networks. The two updates of a step follow each other: the gradients and graphs of one are gone
    when the other begins.

    Args:
        generator, critic, teacher: transformer configs; shards: processes that share every network's state.
        encoders: bytes of text encoder and autoencoder in this process.
        scored: frames of a clip that the scores compare, if not those of `work`.
        score_context: clean frames beside the noisy ones when the scores are compared (causal teachers).
        real_passes: passes of the teacher that gradients of the generator flow through, beside one of the critic (SiD);
            none otherwise (DMD).
    """
    trained = [count_trained(generator, lora), count_trained(critic, critic_lora)]
    whole = [parameter_count(generator), parameter_count(critic)]
    added = sum(count for count, adapters in zip(trained, (lora, critic_lora)) if adapters)
    at_once = replace(work, memory=None, frames=scored or work.frames, context_frames=score_context)
    left, again = graph_bytes(generator, work)
    compared = activation_bytes(critic, at_once)
    if real_passes:  # whose gradients are taken before those of the rollout
        scores = [graph_bytes(critic, at_once), *[graph_bytes(teacher, at_once, frozen=True)] * real_passes]
        found = sum(kept for kept, _ in scores) + max(more for _, more in scores)
        if work.cache_gradient == "clean":  # nothing of the rollout is there yet, which is taken again
            compared = max(compared, found)
        else:
            again = max(again, found)
    return MemoryEstimate(
        weights=(sum(whole) + added) // shards * _STATE_BYTES,
        gradients=max(trained) // shards * _STATE_BYTES,
        optimizers=2 * sum(trained) // shards * _STATE_BYTES,
        averages=trained[0] // shards * _STATE_BYTES,
        frozen=parameter_count(teacher) // shards * _STATE_BYTES,
        encoders=encoders,
        cache=cache_bytes(generator, work),
        activations=max(left + again, compared),
    )


def estimate_one_network(
    config: dict[str, Any],
    work: Work,
    *,
    shards: int = 1,
    encoders: int = 0,
    lora: LoraConfig | None = None,
    teacher: dict[str, Any] | None = None,
) -> MemoryEstimate:
    """Estimate of a stage that trains a single network. Args: as in `estimate_distillation`; teacher: config of
    a frozen transformer that it learns from."""
    trained = count_trained(config, lora)
    whole = parameter_count(config) + (trained if lora else 0)
    return MemoryEstimate(
        weights=whole // shards * _STATE_BYTES,
        gradients=trained // shards * _STATE_BYTES,
        optimizers=2 * trained // shards * _STATE_BYTES,
        averages=trained // shards * _STATE_BYTES,
        frozen=parameter_count(teacher) // shards * _STATE_BYTES if teacher else 0,
        encoders=encoders,
        cache=cache_bytes(config, work),
        activations=activation_bytes(config, work),
    )


def estimate_stage(config: Any, processes: int = 1) -> tuple[MemoryEstimate, list[str]]:
    """Estimate of a stage's config on `processes`, and notes on what was assumed. Of models only configs are read.

    Raises:
        ConfigError: the stage has no estimate, or the processes cannot share its batch.
        WeightsError: a model folder is neither there nor of a published size.
    """
    if isinstance(config, PretrainConfig):
        return estimate_pretraining(config), []
    if isinstance(config, AutoencoderConfig):
        return estimate_autoencoder(config), []
    if isinstance(config, RetentionConfig):
        return estimate_retention(config)
    if not isinstance(config, (DistillConfig, ForcingConfig, OdeConfig, ConsistencyConfig)):
        raise ConfigError(f"{type(config).__name__}: there is no estimate of what this stage needs")
    if config.loop.micro_batches % processes:
        raise ConfigError(
            f"loop.global_batch: {config.loop.micro_batches} micro-batches cannot be shared by {processes} processes"
        )
    model = model_sizes(config.model)
    shards = processes if config.loop.parallel == "fsdp" else 1
    text = 0 if config.data.kind == "shards" and config.data.stored_text else model.text_bytes // shards
    options: dict[str, Any] = {"shards": shards, "encoders": text + model.autoencoder_bytes, "lora": config.lora}
    work, notes = _work(config, model), list(model.notes)
    trained = model.transformer
    if getattr(config, "learned_selector", False) and not trained.get("selector_tokens"):
        trained = {**trained, "selector_tokens": math.prod((config.memory or model.memory).tile)}
    if work.memory and work.memory.kind == "sparse" and trained.get("selector_tokens"):
        notes.append("what the learned selector's own arithmetic keeps is not counted")
    if isinstance(config, ConsistencyConfig):
        own = model_sizes(config.teacher)
        estimate = estimate_one_network(trained, work, teacher=own.transformer, **options)
        return estimate, list(dict.fromkeys([*notes, *own.notes]))
    if not isinstance(config, DistillConfig):
        guided = isinstance(config, ForcingConfig) and config.guidance_scale != 1  # by its own starting weights
        return estimate_one_network(trained, work, teacher=model.transformer if guided else None, **options), notes
    teacher, critic = model_sizes(config.teacher), model_sizes(config.critic_model)
    estimate = estimate_distillation(
        trained,
        critic.transformer,
        teacher.transformer,
        work,
        critic_lora=config.critic_lora,
        scored=config.rollout_frames,
        score_context=config.rollout_frames if config.score.causal_window else 0,
        real_passes=(2 if config.score.real_guidance else 1) if config.loss == "sid" else 0,
        **options,
    )
    return estimate, list(dict.fromkeys([*notes, *teacher.notes, *critic.notes]))


def estimate_retention(config: RetentionConfig) -> tuple[MemoryEstimate, list[str]]:
    """Estimate of training retention heads: the clips' whole memory, and of the model nothing but what the heads keep
    for their backward pass: unit keys and values, hidden units, logits of every block that has left the window."""
    model = model_sizes(config.model)
    memory = config.memory or model.memory
    sizes = {**model.transformer, "selector_tokens": math.prod(memory.tile), "learned_retention": True}
    network = on_meta(sizes)
    heads = sum(x.numel() for name, x in network.named_parameters() if ".retention." in name)
    number, work = _number_bytes(config.loop.dtype), network.config
    layout = TileLayout(work.chunk_frames, model.rows, model.cols, memory.tile)
    chunks = range(1, config.data.latent_frames // work.chunk_frames + 1)
    window = memory.window_frames // work.chunk_frames
    seen, left = (sum(counts) * layout.num_blocks for counts in (chunks, [max(0, n - window) for n in chunks]))
    vectors, rows = work.num_attention_heads * work.attention_head_dim, config.loop.micro_batch * work.num_layers
    kept = left * (2 * vectors * (number + 4 * _HEAD_COPIES) + 4 * work.num_attention_heads * (2 * HIDDEN + 3))
    slots = (max(chunks) + window) * layout.num_blocks
    tokens = slots * (layout.block_tokens + 1)  # and what stands for a block
    return MemoryEstimate(
        weights=parameter_count(sizes) * _STATE_BYTES,
        gradients=heads * _STATE_BYTES,
        optimizers=2 * heads * _STATE_BYTES,
        averages=heads * _STATE_BYTES,
        frozen=0,
        encoders=model.text_bytes + model.autoencoder_bytes,
        cache=rows * (2 * tokens * vectors * number + 4 * seen * work.num_attention_heads),
        activations=rows * kept,
    ), list(model.notes)


def estimate_pretraining(config: PretrainConfig) -> MemoryEstimate:
    """Estimate of pretraining at its largest stage; one process, no checkpointing."""
    with torch.device("meta"):
        model = TextToVideo(config, [1.0] * config.latent_channels)
    state = _bytes(model.parameters())
    moments = sum(
        _bytes(group["params"]) * (2 if isinstance(optimizer, torch.optim.AdamW) else 1)
        for optimizer in make_optimizers(model, config)
        for group in optimizer.param_groups
    )
    sizes = constructor_settings(model.transformer.config)
    activations = []
    for stage in config.stages:
        context = stage.latent_frames if stage.latent_frames > config.chunk_frames else 0
        side = stage.sizes[0] // PatchAutoencoder(1).spatial_stride  # batches of all sizes have as many tokens
        work = Work(
            frames=stage.latent_frames,
            context_frames=context,
            rows=side,
            cols=side,
            text_len=config.text_len,
            micro_batch=stage.batch_size,
            checkpointing=False,
            number_bytes=_number_bytes("auto"),
        )
        activations.append(activation_bytes(sizes, work))
    return MemoryEstimate(state, state, moments, state, 0, 0, 0, max(activations))


def estimate_autoencoder(config: AutoencoderConfig) -> MemoryEstimate:
    """Estimate of the autoencoder's training; its clips have the same number of pixels at every size."""
    with FakeTensorMode():
        vae, old = (
            TokenAutoencoder(
                channels,
                components=config.components,
                dim=config.dim,
                num_blocks=config.num_blocks,
                decoder_blocks=config.decoder_blocks,
            )
            for channels in (config.latent_channels + config.extra_channels, config.latent_channels)
        )
        shape = (config.batch_size, 3, vae.temporal_stride, config.sizes[0], config.sizes[0])
        saved: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.setdefault(x.untyped_storage()._cdata, x), lambda x: x
        ):
            vae.decode(vae.encode(torch.zeros(shape)))
        state = _bytes(vae.parameters())
        inside = sum(x.untyped_storage().nbytes() for x in saved.values())
        held = _bytes(old.parameters()) if config.extra_channels else 0
        fitted = 0 if config.init_from else _fit_bytes(config.fit_clips, vae.temporal_stride)
    return MemoryEstimate(state, state, 2 * state, 0, held, _bytes(vae.buffers()), 0, max(inside, fitted))


def _fit_bytes(clips: int, temporal_stride: int) -> int:
    """Bytes of fitting patches (`fit_patches`): all pixels, half as much to render them, some clips in float64."""
    numbers = 3 * 2 * temporal_stride * FIT_SIZE**2
    return numbers * (6 * clips + 24 * min(clips, CLIPS_AT_ONCE))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _number_bytes(dtype: str) -> int:
    """Bytes of a number of an activation, on the device that a training started here would use."""
    return compute_dtype(dtype, torch.device(resolve_device("auto"))).itemsize


def _work(config: DistillConfig | ForcingConfig | OdeConfig | ConsistencyConfig, model: ModelSizes) -> Work:
    """The micro-batch of a stage."""
    frames, context, memory = config.data.latent_frames, 0, None
    windows: tuple[int, ...] = ()
    if isinstance(config, DistillConfig):
        frames, memory = config.rollout_frames, config.memory or model.memory
        windows = (frames, *[config.window_frames or frames] * (config.windows - 1))
        if config.cache_gradient == "clean":  # the whole rollout at once, and every clean pass but the last
            frames, windows = sum(windows), ()
            context = frames - on_meta(model.transformer).config.chunk_frames
    elif isinstance(config, ConsistencyConfig) or (isinstance(config, ForcingConfig) and config.mode == "teacher"):
        memory = config.memory or model.memory
        if memory.kind == "full":  # clean and noisy frames side by side
            context, memory = frames, None
        elif config.cache_gradient == "clean":  # every chunk's clean pass but the last, which nothing reads
            context = frames - on_meta(model.transformer).config.chunk_frames
    return Work(
        frames=frames,
        context_frames=context,
        memory=memory,
        windows=windows,
        rows=model.rows,
        cols=model.cols,
        cache_gradient=getattr(config, "cache_gradient", "detached"),
        micro_batch=config.loop.micro_batch,
        text_len=model.text_len,
        number_bytes=_number_bytes(config.loop.dtype),
        checkpointing=config.loop.gradient_checkpointing,
    )
