"""What the recipes share: loading a model, the frozen parts around it, one micro-batched optimizer step, exports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparse_forcing.config import constructor_settings
from sparse_forcing.devices import compute_dtype
from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import FlowSchedule
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.folder import find_model, write_pipeline
from sparse_forcing.processes import rank
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.data.identity import DataIdentity
from sparse_forcing.training.data.shards import Shards, StoredText
from sparse_forcing.training.data.sources import DataConfig, Source, VideoFormat, make_source
from sparse_forcing.training.engine.checkpoint import Stateful
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.engine.loop import Recipe
from sparse_forcing.training.engine.lora import AdapterState, LoraConfig, add_adapters, merge_adapters, save_adapters
from sparse_forcing.training.engine.optim import OptimizerConfig, apply_gradients, make_optimizer
from sparse_forcing.training.engine.parallel import full_state, shard, shard_layers
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.recipes.validation import swap_in_average, write_samples

Metrics = dict[str, float]


def draw_number(loop: LoopConfig, step: int, micro_batch: int) -> int:
    """Number of a micro-batch since the start of training, the same however many processes share the work."""
    return step * loop.micro_batches + micro_batch


def generators(seed: int, draw: int, count: int, *, stream: int) -> list[torch.Generator]:
    """One random generator per sample of a draw; `stream` keeps purposes apart."""
    base = (seed * 1_000_003 + draw) * 65_536
    return [torch.Generator().manual_seed(((base + sample) * 16 + stream) % 2**64) for sample in range(count)]


def noise_like(x: Tensor, sources: list[torch.Generator]) -> Tensor:
    """Normal noise of x's shape, sample by sample."""
    return torch.stack([torch.randn(x.shape[1:], generator=g) for g in sources]).to(x)


def autocast(device: torch.device, loop: LoopConfig) -> torch.autocast:
    """Computation in the configured type. Without autocast's cache: it would keep a weight that was first used without
    gradients, and later passes with gradients would lose theirs."""
    half = compute_dtype(loop.dtype, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def load_pipeline(model: str, data: DataConfig, loop: LoopConfig, device: torch.device) -> SparseForcingPipeline:
    """A model folder's pipeline with the transformer still where it was loaded (see `prepare`).

    The text encoder is on the device (sharded, if configured), or not loaded at all when the data holds embeddings.
    """
    stored = None
    if data.kind == "shards" and data.stored_text:
        assert data.path is not None
        stored = StoredText(Shards(data.path))
    pipe = SparseForcingPipeline.from_pretrained(model, {"transformer": torch.float32}, text_encoder=stored)
    if pipe.defaults.bidirectional:  # plain Wan: what is trained from it samples in chunks, by this project's defaults
        pipe = pipe.with_defaults(PipelineConfig())
    width = pipe.transformer.config.text_dim
    if stored is not None and stored.dim != width:
        raise ConfigError(
            f"data.path: {data.path} holds text embeddings of {stored.dim} numbers, {model} takes {width}"
        )
    for part in (pipe.text_encoder, pipe.vae):
        assert isinstance(part, nn.Module)
        part.requires_grad_(False)
        if loop.parallel == "fsdp" and part is pipe.text_encoder and stored is None:
            shard_layers(part, param_dtype=_shard_dtype(loop, device))
        part.to(device)
    return pipe


def make_own_source(data: DataConfig, seed: int, pipe: SparseForcingPipeline) -> Source:
    """The data of a stage, in the format of the pipeline's own videos."""
    own = VideoFormat(height=pipe.defaults.height, width=pipe.defaults.width, fps=pipe.defaults.fps)
    return make_source(data, seed, pipe.autoencoder, own)


def _shard_dtype(loop: LoopConfig, device: torch.device) -> torch.dtype | None:
    """Type of gathered weights; None: that of the shards, which is float32."""
    dtype = compute_dtype(loop.dtype, device)
    return None if dtype == torch.float32 else dtype


def add_selector(pipe: SparseForcingPipeline, memory: MemoryConfig | None, *, learned_retention: bool = False) -> None:
    """Give the transformer a learned block selector for the memory's tiles, unless it has one. It starts as the mean.

    Args:
        learned_retention: with heads for the `learned` rule of retention, which know nothing yet.

    Raises:
        ConfigError: the memory has no blocks to select.
    """
    memory = memory or pipe.default_memory
    if memory.kind != "sparse":
        raise ConfigError(f"learned_selector: needs memory.kind sparse, got {memory.kind}")
    old = pipe.transformer
    if old.selectors and not (learned_retention and old.selectors[0].retention is None):
        return
    settings = constructor_settings(old.config) | {"selector_tokens": math.prod(memory.tile)}
    settings["learned_retention"] = learned_retention
    new = CausalWanTransformer3DModel(**settings)
    missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected
    assert all(".selector." in name for name in missing)
    pipe.transformer = new.to(old.device)


def prepare(
    model: CausalWanTransformer3DModel,
    loop: LoopConfig,
    device: torch.device,
    *,
    train: bool,
    lora: LoraConfig | None = None,
) -> None:
    """Put a network where it computes, sharded if configured; frozen when it is not trained, but for its adapters."""
    model.requires_grad_(train)
    if lora is not None:
        add_adapters(model, lora, loop.seed)
    model.gradient_checkpointing = loop.gradient_checkpointing  # a frozen score too: SiD's gradient goes through it
    if loop.parallel == "fsdp":  # block by block onto the device: the whole network is never there
        shard(model, param_dtype=_shard_dtype(loop, device))
    model.to(device)


def select_trained_part(model: CausalWanTransformer3DModel, lora: LoraConfig | None, base: str | None) -> Stateful:
    """What a checkpoint holds of a network."""
    return model if lora is None else AdapterState(model, base)


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loop: LoopConfig,
    config: OptimizerConfig,
    step: int,
    losses: Callable[[int], Iterable[Tensor]],
    *,
    name: str,
    ema: ParameterEma | None = None,
) -> Metrics:
    """One step of one network: the mean loss of this process's micro-batches, averaged gradients, guard, update.

    Args:
        losses: micro-batch number -> terms whose sum is the micro-batch's loss; each is backpropagated at once, so
            that its graph is freed before the next is built.
        name: name of the network in metrics and messages.
    """
    own = loop.own_micro_batches()
    total = 0.0
    for micro_batch in own:
        for loss in losses(micro_batch):
            (loss / len(own)).backward()
            total += loss.item() / len(own)
    return apply_gradients(
        model,
        [optimizer],
        step,
        name=name,
        loss=total,
        rate=config.rate(step, loop.steps),
        max_grad_norm=loop.max_grad_norm,
        ema=ema,
    )


def export_pipeline(
    base: SparseForcingPipeline,
    source: str,
    model: CausalWanTransformer3DModel,
    ema: ParameterEma | None,
    folder: Path,
    *,
    lora: LoraConfig | None = None,
    **changes: object,
) -> None:
    """Write the trained (averaged) transformer, adapters merged, as a folder of diffusers' layout.

    Args:
        source: the model folder that training started from; its text encoder and autoencoder, which did not train, are
            linked or copied into the new one.
        lora: adapters of the transformer; the adapters alone go into `folder`'s neighbour `adapter` too.
        changes: fields of the pipeline's config that training changed (sampler, memory).
    """
    state = full_state({**model.state_dict(), **(ema.shadow if ema is not None else {})})
    if rank() != 0:
        return
    if lora is not None:
        save_adapters(folder.parent / "adapter", state, model)
        state = merge_adapters(state, lora)
    fresh = CausalWanTransformer3DModel(**constructor_settings(model.config))
    fresh.load_state_dict(state)
    frozen = find_model(source)
    parts = [path for name in ("text_encoder", "tokenizer", "vae") if (path := frozen / name).is_dir()]
    write_pipeline(folder, fresh, replace(base.defaults, **changes), parts)  # type: ignore[arg-type]


class OneNetworkConfig(Protocol):
    """Settings that every recipe with a single trained network has."""

    @property
    def loop(self) -> LoopConfig: ...
    @property
    def model(self) -> str: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def memory(self) -> MemoryConfig | None: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def shift(self) -> float: ...
    @property
    def lora(self) -> LoraConfig | None: ...


class OneNetwork(Recipe):
    """A recipe that trains the transformer of one pipeline; a subclass says what the loss is.

    Class attributes:
        loss_name: name of the loss in metrics and messages.
    """

    loss_name: ClassVar[str] = "flow"

    def __init__(self, config: OneNetworkConfig, accelerator: Accelerator) -> None:
        self.config, self.device, self.steps = config, accelerator.device, config.loop.steps
        self.pipe = self.load()
        self.model = self.pipe.transformer
        self.memory = config.memory or self.pipe.default_memory
        prepare(self.model, config.loop, self.device, train=True, lora=config.lora)
        self.freeze()
        self.source = make_own_source(config.data, config.loop.seed + 1, self.pipe)
        self.schedule = FlowSchedule(config.shift)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.ema = ParameterEma(self.model, config.ema_decay)
        self.parts: dict[str, Stateful] = {
            "model": select_trained_part(self.model, config.lora, self.pipe.weights_sha256),
            "optimizer": self.optimizer,
            "ema": self.ema,
            "data": DataIdentity(self.source, config.data.path),
        }
        self.geometry = f"micro_batch {config.loop.micro_batch}, {config.data.latent_frames} latent frames"

    def load(self) -> SparseForcingPipeline:
        """The pipeline to start from."""
        return load_pipeline(self.config.model, self.config.data, self.config.loop, self.device)

    def freeze(self) -> None:
        """Stop what is not to train of the model."""

    def losses(self, step: int, micro_batch: int) -> Iterator[Tensor]:
        """Terms of the loss of a micro-batch."""
        raise NotImplementedError

    def update(self, step: int) -> Metrics:
        return optimizer_step(
            self.model,
            self.optimizer,
            self.config.loop,
            self.config.optimizer,
            step,
            lambda micro_batch: self.losses(step, micro_batch),
            name=self.loss_name,
            ema=self.ema,
        )

    def chunks(self, frames: int) -> list[int]:
        """Chunk sizes of a clip. Raises ConfigError when the model's chunks do not divide it."""
        size = self.model.config.chunk_frames
        if frames % size:
            raise ConfigError(f"data.latent_frames: {frames} is not a multiple of the model's chunk of {size} frames")
        return [size] * (frames // size)

    def validate(self, step: int, folder: Path) -> None:
        # Sharded weights arrive in the type of the computation.
        with autocast(self.device, self.config.loop), swap_in_average(self.model, self.ema):
            write_samples(self.pipe, step, folder, memory=self.memory, seed=self.config.loop.seed)

    def export(self, folder: Path) -> None:
        export_pipeline(
            self.pipe, self.config.model, self.model, self.ema, folder, lora=self.config.lora, memory=self.memory
        )
