"""The loop every distillation recipe runs in: resume, update, guard, log, checkpoint, stop.

A recipe is an object with `parts` (what a checkpoint holds) and `update(step) -> metrics`. Randomness and data of a
step are functions of (seed, step, micro-batch), never of how many processes share the work; so a resumed run, or one on
another number of processes, sees the same samples in the same order.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, set_seed
from torch import nn

from sparse_forcing.config import to_plain
from sparse_forcing.devices import multiplies_bfloat16
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import output_lock
from sparse_forcing.training.engine.checkpoint import Stateful, save_checkpoint
from sparse_forcing.training.engine.guard import STOPPED, StopRequest, explained_failures, stop_with_launcher
from sparse_forcing.training.engine.metrics import append_row, forget_beyond
from sparse_forcing.training.engine.parallel import barrier, leaving_group, mean_over_ranks, rank, world_size
from sparse_forcing.training.engine.resume import Resume

TRACKERS = tuple(sorted(str(kind) for kind in LoggerType if kind != LoggerType.ALL))
PATIENCE = timedelta(hours=1)
"""How long processes wait for the first one, which writes and hashes checkpoints alone (340 GB of a 14B student),
before they take it for dead; NCCL's default is ten minutes."""


class Recipe(Protocol):
    """What trains: see above."""

    parts: dict[str, Stateful]
    geometry: str

    def update(self, step: int) -> dict[str, float]:
        """One optimizer step; returns numbers to log. Raises before the weights change when they are not finite."""
        ...

    def validate(self, step: int, folder: Path) -> None:
        """Write sample videos of the present weights; called on the first process only unless weights are sharded."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained model as a folder that `from_pretrained` loads."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often, how many.

    Args:
        steps: optimizer steps of the stage.
        global_batch: samples per step over all processes; micro_batch: samples per forward pass. The rest accumulates.
        processes: how many a launch must have; another number is refused (None: any that shares the batch evenly).
        parallel: "replicate" (every process holds the weights) or "fsdp" (sharded per block).
        dtype: of computation (float32, bfloat16, or auto: bfloat16 where that saves time); weights and optimizers stay
            float32.
        trackers: any tracker accelerate knows by name; metrics.jsonl is always written.
    """

    steps: int
    seed: int = 0
    global_batch: int = 8
    micro_batch: int = 8
    processes: int | None = None
    parallel: str = "replicate"
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    max_grad_norm: float = 10.0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    validate_every: int = 0
    trackers: tuple[str, ...] = ("tensorboard",)
    allow_missing_random: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"processes: must be at least 1, got {self.processes}")
        if self.global_batch % self.micro_batch:
            raise ConfigError(f"global_batch: {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.parallel not in ("replicate", "fsdp"):
            raise ConfigError(f"parallel: expected replicate or fsdp, got {self.parallel!r}")
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise ConfigError(f"dtype: expected float32, bfloat16 or auto, got {self.dtype!r}")
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            raise ConfigError(f"trackers: {unknown[0]!r} is not one of {', '.join(TRACKERS)}")

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step over all processes."""
        return self.global_batch // self.micro_batch

    def check_processes(self) -> None:
        """Raise ConfigError when the launch has another number of processes than asked for. `accelerate launch` starts
        one process, without a word, where it knows no device for more."""
        if self.processes not in (None, world_size()):
            raise ConfigError(
                f"loop.processes: {self.processes} were asked for, this launch has {world_size()}; use "
                "torchrun --nproc-per-node and --nnodes, or set loop.processes"
            )

    def own_micro_batches(self) -> range:
        """Numbers of the micro-batches this process computes. Raises ConfigError when they cannot be shared out."""
        if self.micro_batches % world_size():
            raise ConfigError(
                f"global_batch: {self.micro_batches} micro-batches of {self.micro_batch} cannot be shared by "
                f"{world_size()} processes; lower micro_batch or change global_batch"
            )
        return range(rank(), self.micro_batches, world_size())


def make_accelerator(config: LoopConfig, out: Path, *, cpu: bool | None = None) -> Accelerator:
    """Process group, device and trackers. Under torchrun or `accelerate launch` it joins the other processes."""
    import torch

    cpu = not torch.cuda.is_available() if cpu is None else cpu
    ready = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in config.trackers if name not in ready]:
        warnings.warn(
            f'tracker not installed: {", ".join(missing)} (pip install "sparse-forcing[train]" has tensorboard); '
            "metrics.jsonl is written all the same",
            stacklevel=2,
        )
    trackers = [name for name in config.trackers if name in ready]
    group = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=cpu, log_with=trackers or None, project_dir=str(out), kwargs_handlers=[group])


def run(
    build: Callable[[Accelerator], Recipe], loop: LoopConfig, config: Any, out: Path, resume: Resume | None = None
) -> int:
    """Train to the end or to SIGTERM; returns 0, or 143 after a stop that saved.

    Args:
        build: makes the recipe once the processes are known.
        config: the whole stage's config, for the checkpoint's manifest.
        out: folder of checkpoints, `metrics.jsonl` and the exported model.
        resume: from what, the newest checkpoint of `out` by default.
    """
    out.mkdir(parents=True, exist_ok=True)
    with leaving_group():
        return _run(build, loop, config, out, resume or Resume())


def _run(build: Callable[[Accelerator], Recipe], loop: LoopConfig, config: Any, out: Path, resume: Resume) -> int:
    accelerator = make_accelerator(loop, out)
    if loop.dtype == "bfloat16" and rank() == 0 and not multiplies_bfloat16(accelerator.device):
        warnings.warn("loop.dtype: bfloat16 is far slower than float32 on this CPU; auto avoids it", stacklevel=2)
    loop.check_processes()
    loop.own_micro_batches()
    stop_with_launcher()
    with StopRequest() as stop, output_lock(out) if rank() == 0 else nullcontext():
        set_seed(loop.seed + rank())
        recipe = build(accelerator)
        log = _Log(accelerator, loop, out, to_plain(config))
        options = {"random_state": True, "allow_missing_random": loop.allow_missing_random}
        step = saved = resume.load(out, recipe.parts, config, **options)
        log.begin(step)
        while step < loop.steps:
            with explained_failures(step, recipe.geometry, saved):
                metrics = recipe.update(step)
            step += 1
            log.add(step, metrics)
            stopping = stop.requested()
            if stopping or step == loop.steps or step % loop.checkpoint_every == 0:
                save_checkpoint(
                    out, step, recipe.parts, to_plain(config), keep=loop.keep_checkpoints, random_state=True
                )
                saved = step
            if stopping and step < loop.steps:
                log.note(f"stopped at step {step}; run the same command to go on")
                log.end()
                return STOPPED
            if loop.validate_every and step % loop.validate_every == 0:
                recipe.validate(step, out / "samples")
        recipe.export(out / "pipeline")
        log.end()
    return 0


class _Log:
    """metrics.jsonl, accelerate's trackers, and one line on the terminal with the time left."""

    def __init__(self, accelerator: Accelerator, loop: LoopConfig, out: Path, config: dict[str, Any]) -> None:
        self.accelerator, self.loop, self.path = accelerator, loop, out / "metrics.jsonl"
        self.window: list[dict[str, float]] = []
        self.began = time.monotonic()
        if loop.trackers:
            accelerator.init_trackers("training", config={"config": json.dumps(config)})

    def begin(self, step: int) -> None:
        """Forget rows beyond the step a resumed run starts from."""
        self.began = time.monotonic()
        if rank() == 0:
            forget_beyond(self.path, step)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self.window.append(metrics)
        if step % self.loop.log_every and step != self.loop.steps:
            return
        names = dict.fromkeys(name for row in self.window for name in row)
        means = {n: sum(r[n] for r in self.window if n in r) / sum(n in r for r in self.window) for n in names}
        seconds = (time.monotonic() - self.began) / len(self.window)
        row = {"step": step, **mean_over_ranks(means), "seconds_per_step": seconds}
        self.window, self.began = [], time.monotonic()
        if rank() == 0:
            append_row(self.path, row)
            left = (self.loop.steps - step) * seconds / 60
            shown = " ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            self.note(f"step {step}/{self.loop.steps} {shown}, {left:.0f} min left")
        self.accelerator.log(row, step=step)

    def note(self, message: str) -> None:
        if rank() == 0:
            print(message, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Close the trackers. Processes end together: one that leaves early may look like a failure to the launcher."""
        barrier()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clip to `max_norm` over all parameters, sharded or not; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
