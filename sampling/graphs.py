"""Passes of a rollout as CUDA graphs: recorded once in a steady chunk, replayed without the host from then on.

From the first steady chunk on (`RolloutMemory.shapes` stays as it is) a pass is the same kernels on the same tensors:
the memory writes its state in place, and what changes (latents, timestep) is copied into the buffers of `Buffers`, the
only static tensors there are beside the state and the weights. So two graphs serve a whole rollout: a denoising pass
and a clean pass. What stays outside, between two replays: the sampler's arithmetic, noise, and `begin_chunk`.

A pass is run as it is where a graph would not be that pass: gradients are wanted, a chunk has another size, somebody
observes the memory; `why_not_recorded` says what rules graphs out for a whole rollout, and a recording that fails ends
them with a warning. A text that changes is copied over the one before it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import RolloutMemory
from sparse_forcing.model.layers import is_hooked

Pass = Callable[[Tensor, Tensor], Tensor | None]
"""Flow of latents [B, C, f, H, W] at timesteps [B], None of a clean pass; the rest is bound."""


class Recorder(Protocol):
    """Records calls on fixed tensors."""

    def __call__(self, run: Pass, inputs: tuple[Tensor, Tensor]) -> Callable[[], Tensor | None]:
        """A function that makes the same calls on `inputs`, and returns the same tensor every time. Recording computes
        nothing."""
        ...


def cuda_recorder() -> Recorder:
    """Records CUDA graphs that share one pool of memory: they never run at once."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Pass, inputs: tuple[Tensor, Tensor]) -> Callable[[], Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = run(*inputs)

        def replay() -> Tensor | None:
            graph.replay()
            return out

        return replay

    return record


def check_cuda_graphs(device: torch.device, wanted: bool | None) -> bool:
    """Whether passes are recorded: by default on a CUDA device. Raises ConfigError where they are wanted and cannot."""
    if wanted and device.type != "cuda":
        raise ConfigError(
            f"cuda_graphs (--cuda-graphs): the model is on {device}, which has no CUDA graphs; leave it out"
        )
    return device.type == "cuda" if wanted is None else wanted


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile has nothing to compile with on this device."""
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compiler)):
        raise ConfigError(
            f"compile (--compile): there is no C++ compiler ({', '.join(compiler)}) to compile for {device}; install "
            "one, name it in CXX, or leave it out"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(f"compile (--compile): triton is not installed, which compiles for {device}; leave it out")


@dataclass(frozen=True)
class Buffers:
    """Where a recorded pass reads: latents [B, C, f, H, W] and timesteps [B]."""

    latents: Tensor
    timestep: Tensor

    def fill(self, latents: Tensor, timestep: Tensor) -> None:
        self.latents.copy_(latents)
        self.timestep.copy_(timestep)


class RecordedPasses:
    """Runs the passes of one rollout, from a recording where there can be one.

    Args:
        memory: of the rollout.
        record: how a pass is recorded.
    """

    def __init__(self, memory: RolloutMemory, record: Recorder) -> None:
        self.memory, self.record = memory, record
        self._replays: dict[bool, tuple[Hashable, Buffers, Callable[[], Tensor | None]]] = {}
        self._seen: dict[bool, tuple[Hashable, int]] = {}
        self._failed = False

    def __call__(self, run: Pass, latents: Tensor, timestep: Tensor, *, clean: bool) -> Tensor | None:
        """`run(latents, timestep)`; what it returns is valid until the next pass."""
        if self._failed or self.memory.shapes is None or torch.is_grad_enabled():
            return run(latents, timestep)
        shapes = (self.memory.shapes, latents.shape, latents.dtype)
        if clean not in self._replays or self._replays[clean][0] != shapes:
            chunk, (seen, when) = self.memory.next_frame, self._seen.get(clean, (None, 0))
            if seen != shapes or when == chunk:  # a chunk as it is: what is made on first use is made now
                self._seen[clean] = shapes, chunk
                return run(latents, timestep)
            buffers = Buffers(latents.clone(), timestep.clone())
            self._replays.pop(clean, None)
            try:
                self._replays[clean] = shapes, buffers, self.record(run, (buffers.latents, buffers.timestep))
            except RuntimeError as error:  # nothing was computed, so the pass is still to be run
                return self._give_up(error, run, latents, timestep)
        _, buffers, replay = self._replays[clean]
        buffers.fill(latents, timestep)
        return replay()

    def _give_up(self, error: RuntimeError, run: Pass, latents: Tensor, timestep: Tensor) -> Tensor | None:
        """Run this pass, and from now on all, one call at a time, and say so."""
        self._failed = True
        self._replays.clear()
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"no CUDA graphs: recording failed ({reason:.160}); passes are launched one call at a time", stacklevel=2
        )
        return run(latents, timestep)


def why_not_recorded(model: nn.Module, memory: RolloutMemory, training: bool) -> str | None:
    """Why the passes of a rollout have to be launched one call at a time, or None."""
    if training or memory.cache_gradient != "none":
        return "training needs its gradients"
    if memory.config.kind == "full":
        return "a full memory grows with every chunk"
    if getattr(model, "sequence_parallel", None) is not None:
        return "passes wait for other processes (sequence parallelism)"
    if any(each._forward_hooks or each._forward_pre_hooks or is_hooked(each) for each in model.modules()):
        return "modules of the model have hooks, which a replay would not call"
    return None


def warn_if_not_recorded(model: nn.Module, memory: RolloutMemory) -> None:
    """Warn the caller's caller that graphs were asked for and will not be recorded."""
    if reason := why_not_recorded(model, memory, training=False):
        warnings.warn(f"no CUDA graphs: {reason}; passes are launched one call at a time", stacklevel=3)


def keep_in_place(old: Any, new: Any) -> Any:
    """`new`, written into the tensors of `old` where those have its shapes, so that a recording reads it."""
    if isinstance(new, Tensor):
        fits = isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        return old.copy_(new) if fits else new
    if isinstance(old, list | tuple) and len(old) == len(new):
        return type(new)(keep_in_place(was, now) for was, now in zip(old, new))
    return new
