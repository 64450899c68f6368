"""The one loop that every stage trains in: resume, update, guard, log, checkpoint, sample, stop, export.

A recipe is an object with `parts` (what a checkpoint holds) and `update(step) -> metrics`. Randomness and data of a
step are functions of (seed, step, micro-batch), never of how many processes share the work; so a resumed run, or one on
another number of processes, sees the same samples in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, set_seed

from sparse_forcing.config import to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.files import output_lock
from sparse_forcing.processes import leave_group, rank
from sparse_forcing.training.engine.checkpoint import Stateful, save_checkpoint
from sparse_forcing.training.engine.guard import STOPPED, StopRequest, explain_failures, stop_with_launcher
from sparse_forcing.training.engine.metrics import RunLog
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import RunConfig

PATIENCE = timedelta(hours=1)
"""How long processes wait for the first one, which writes and hashes checkpoints alone (340 GB of a 14B student),
before they take it for dead; NCCL's default is ten minutes."""


class Recipe(Protocol):
    """A recipe, as the loop sees it (above).

    parts: what a checkpoint holds; steps: optimizer steps from first to last; geometry: what a step computes, in words.
    """

    parts: dict[str, Stateful]
    steps: int
    geometry: str

    def begin(self, step: int) -> None:
        """Do what comes before the first step of this process, once `parts` are those of `step`."""
        return

    def update(self, step: int) -> dict[str, float]:
        """One optimizer step; returns numbers to log. Raises before the weights change when they are not finite."""
        ...

    def validate(self, step: int, folder: Path) -> None:
        """Write sample videos of the present weights; every process calls it, the first one writes."""
        ...

    def export(self, folder: Path) -> None:
        """Write what was trained as a model folder; every process calls it, the first one writes."""
        ...


def make_accelerator(loop: RunConfig, out: Path) -> Accelerator:
    """Process group, device and trackers. Under torchrun or `accelerate launch` it joins the other processes."""
    device = torch.device(resolve_device(loop.device, "loop.device:"))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    ready = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in loop.trackers if name not in ready]:
        warnings.warn(
            f'tracker not installed: {", ".join(missing)} (pip install "sparse-forcing[train]" has tensorboard); '
            "metrics.jsonl is written all the same",
            stacklevel=2,
        )
    trackers = [name for name in loop.trackers if name in ready]
    group = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(
        cpu=device.type == "cpu", log_with=trackers or None, project_dir=str(out), kwargs_handlers=[group]
    )


def run(
    build: Callable[[Accelerator], Recipe], loop: RunConfig, config: Any, out: Path, resume: Resume | None = None
) -> int:
    """Train to the end or to SIGTERM; returns 0, or 143 after a stop that saved.

    Args:
        build: function that makes the recipe once the processes are known.
        config: the whole stage's config, for the checkpoint's manifest.
        out: folder of checkpoints, `metrics.jsonl`, `samples` and the exported model, `pipeline`.
        resume: checkpoint to go on from, the newest checkpoint of `out` by default.

    Raises:
        ConfigError: the launch does not fit the config, or memory is not enough.
        InUseError: another run trains into `out`.
        NotFiniteError: a loss or gradient is NaN or infinite; nothing of that step is saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    with leave_group():
        return _run(build, loop, config, out, resume or Resume())


def _run(build: Callable[[Accelerator], Recipe], loop: RunConfig, config: Any, out: Path, resume: Resume) -> int:
    accelerator = make_accelerator(loop, out)
    loop.check_launch()
    for remark in loop.remarks(accelerator.device) if rank() == 0 else ():
        warnings.warn(remark, stacklevel=2)
    stop_with_launcher()
    with StopRequest() as stop, output_lock(out) if rank() == 0 else nullcontext():
        set_seed(loop.seed + rank())
        with explain_failures("before the first step", loop.relief):
            recipe = build(accelerator)
            log = RunLog(accelerator, out, steps=recipe.steps, every=loop.log_every, config=to_plain(config))
            begun = resume.load(
                out, recipe.parts, config, random_state=True, allow_missing_random=loop.allow_missing_random
            )
            step = saved = begun.step
            log.begin(step, begun.window)
            recipe.begin(step)
        while step < recipe.steps:
            with explain_failures(f"in step {step} ({recipe.geometry})", loop.relief, saved):
                metrics = recipe.update(step)
            step += 1
            log.add(step, metrics)
            stopping = stop.is_requested()
            if stopping or step == recipe.steps or step % loop.checkpoint_every == 0:
                save_checkpoint(
                    out,
                    step,
                    recipe.parts,
                    to_plain(config),
                    keep=loop.keep_checkpoints,
                    random_state=True,
                    window=log.window,
                )
                saved = step
            if stopping and step < recipe.steps:
                log.note(f"stopped at step {step}; run the same command to go on")
                log.end()
                return STOPPED
            if loop.validate_every and step % loop.validate_every == 0:
                recipe.validate(step, out / "samples")
        recipe.export(out / "pipeline")
        log.end()
    return 0
