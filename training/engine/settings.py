"""Settings of the one loop, spelled the same in every stage's config, under `loop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import LoggerType

from sparse_forcing.devices import multiplies_bfloat16
from sparse_forcing.errors import ConfigError
from sparse_forcing.processes import rank, world_size

TRACKERS = tuple(sorted(str(kind) for kind in LoggerType if kind != LoggerType.ALL))
LARGEST_SEED = 2**31 - 1


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed that random generators or the numbers made of it cannot have."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed: must lie from 0 to {LARGEST_SEED}, got {seed}")


"""Every generator of the stages takes it, with the number of a process or a purpose added (NumPy's end at 32 bits)."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run is kept and told, whatever it trains. Such a stage trains in one process.

    Args:
        device: device that computes, "auto" for the GPU where there is one; under torchrun a process has its own GPU.
        max_grad_norm: gradients are clipped to it; null for none.
        checkpoint_every, log_every, validate_every: optimizer steps between checkpoints, rows of metrics and sample
            videos (0: no videos).
        trackers: any tracker accelerate knows by name; metrics.jsonl is always written.
        allow_missing_random: resume although the checkpoint has no random state for this process.
    """

    seed: int = 0
    device: str = "auto"
    max_grad_norm: float | None = 10.0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    validate_every: int = 0
    trackers: tuple[str, ...] = ("tensorboard",)
    allow_missing_random: bool = False

    def __post_init__(self) -> None:
        self._at_least_one("checkpoint_every", "keep_checkpoints", "log_every")
        check_seed(self.seed)
        if self.validate_every < 0:
            raise ConfigError(f"validate_every: must not be negative, got {self.validate_every}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ConfigError(f"max_grad_norm: must be positive, or null for none, got {self.max_grad_norm:g}")
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            raise ConfigError(f"trackers: {unknown[0]!r} is not one of {', '.join(TRACKERS)}")

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")

    @property
    def relief(self) -> str:
        """What to do where a step takes too much memory."""
        return "lower batch_size or the size of the model"

    def check_launch(self) -> None:
        """Raise ConfigError when the processes of this launch cannot share the work."""
        if world_size() > 1:
            raise ConfigError(
                f"this stage trains in one process, this launch has {world_size()}; start it without torchrun"
            )

    def remarks(self, device: torch.device) -> list[str]:
        """What a user may not want, to be said once the device is known."""
        return []


@dataclass(frozen=True, kw_only=True)
class LoopConfig(RunConfig):
    """Settings of the loop for a stage whose processes share every step's samples.

    Args:
        steps: optimizer steps of the stage.
        global_batch: samples per step over all processes; micro_batch: samples per forward pass. The rest accumulates.
        processes: number that a launch must have; another number is refused (None: any that shares the batch evenly).
        parallel: "replicate" (every process holds the weights) or "fsdp" (sharded per block).
        dtype: type of computation (float32, bfloat16, or auto: bfloat16 where that saves time); weights and optimizers
            stay float32.
    """

    steps: int
    global_batch: int = 8
    micro_batch: int = 8
    processes: int | None = None
    parallel: str = "replicate"
    dtype: str = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("steps", "global_batch", "micro_batch")
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"processes: must be at least 1, got {self.processes}")
        if self.global_batch % self.micro_batch:
            raise ConfigError(f"global_batch: {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.parallel not in ("replicate", "fsdp"):
            raise ConfigError(f"parallel: expected replicate or fsdp, got {self.parallel!r}")
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise ConfigError(f"dtype: expected float32, bfloat16 or auto, got {self.dtype!r}")

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step over all processes."""
        return self.global_batch // self.micro_batch

    @property
    def relief(self) -> str:
        return (
            "lower micro_batch (the global batch stays, gradients accumulate), turn on gradient_checkpointing, shard "
            "with parallel: fsdp, or shorten the rollout"
        )

    def check_launch(self) -> None:
        """Raise ConfigError when the launch has another number of processes than asked for, or one that cannot share
        the batch. `accelerate launch` starts one process, without a word, where it knows no device for more."""
        if self.processes not in (None, world_size()):
            raise ConfigError(
                f"loop.processes: {self.processes} were asked for, this launch has {world_size()}; use "
                "torchrun --nproc-per-node and --nnodes, or set loop.processes"
            )
        self.own_micro_batches()

    def own_micro_batches(self) -> range:
        """Numbers of the micro-batches this process computes. Raises ConfigError when they cannot be shared out."""
        if self.micro_batches % world_size():
            raise ConfigError(
                f"global_batch: {self.micro_batches} micro-batches of {self.micro_batch} cannot be shared by "
                f"{world_size()} processes; lower micro_batch or change global_batch"
            )
        return range(rank(), self.micro_batches, world_size())

    def remarks(self, device: torch.device) -> list[str]:
        slow = self.dtype == "bfloat16" and not multiplies_bfloat16(device)
        return ["loop.dtype: bfloat16 is far slower than float32 on this CPU; auto avoids it"] if slow else []


def check_bounds(settings: Any, limits: dict[str, tuple[int, int]]) -> None:
    """Raise ConfigError for the first of the named whole-number settings that is outside its (least, greatest)."""
    for name, (least, greatest) in limits.items():
        if not least <= getattr(settings, name) <= greatest:
            raise ConfigError(f"{name}: must lie from {least} to {greatest}, got {getattr(settings, name)}")
