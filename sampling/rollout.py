"""The rollout: one chunk loop for inference and training.

Per chunk: make room in the memory, denoise while attending to it, hand the chunk out, then one clean pass at timestep 0
that leaves its keys and values for the chunks after it (Sparse Forcing, arXiv 2604.21221); none follows the last one.
Training runs the same loop with an exit step and gradients.

Legend: B batch, f latent frames of a chunk, C channels; latents at pipeline level [B, F, C, H, W].
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_forcing.memory import RolloutMemory
from sparse_forcing.model.flow import FlowSchedule, SamplerConfig, add_noise
from sparse_forcing.model.layers import is_hooked
from sparse_forcing.model.transformer import CausalWanTransformer3DModel, TextKeysValues
from sparse_forcing.sampling.graphs import RecordedPasses, Recorder, keep_in_place, why_not_recorded
from sparse_forcing.sampling.noise import NoiseSource
from sparse_forcing.sampling.samplers import go_on, guide, sample_chunk


@dataclass(kw_only=True)
class DenoisingStep:
    """A denoising step that was just made, and what to go on with, which its callback may change.

    latents: [B, f, C, H, W] it led to; text, unconditional_text: [B, T, text_dim] to follow from the next step on;
    guidance_scale: to follow it with, None without guidance; interrupt: end the chunk with the latents as they are, and
    the video with the chunk.
    """

    chunk: int
    step: int
    timestep: Tensor
    latents: Tensor
    text: Tensor
    unconditional_text: Tensor | None
    guidance_scale: float | None = None
    interrupt: bool = False


StepCallback = Callable[[DenoisingStep], None]


def remember_nothing() -> None:
    """The clean pass of a chunk that owes none."""


def no_state() -> dict[str, Any]:
    """The state of a rollout that none can go on from."""
    raise NotImplementedError


@dataclass(frozen=True)
class RolloutChunk:
    """A finished chunk.

    latents: [B, f, C, H, W]; start_frame: latent frame it begins at; seconds: wall time it took to come, the clean pass
    of the chunk before it included; cache_bytes: bytes the memory holds with it.
    remember: runs its clean pass, unless it has run. The rollout does so when it is asked for the next chunk, so only
        who wants it earlier (while a decoder works), or after the last one, has to call it.
    state: what a rollout of the same arguments goes on from with the chunk after this one (`resumed`), its clean pass
        run for that. Its tensors are those of the rollout, good until that is asked for the next chunk.
    """

    index: int
    start_frame: int
    latents: Tensor
    seconds: float
    cache_bytes: int
    remember: Callable[[], None] = field(default=remember_nothing, repr=False, compare=False)
    state: Callable[[], dict[str, Any]] = field(default=no_state, repr=False, compare=False)


@dataclass
class RolloutTrace:
    """What a rollout without gradients leaves of each chunk, to take its exit step again with them.

    exits: [B, f, C, H, W] latents that the exit step began from; contexts: the same of what the clean pass read.
    """

    exits: list[Tensor] = field(default_factory=list)
    contexts: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainingRollout:
    """What differs in training, as in Self-Forcing (arXiv 2506.08009).

    Args:
        exit_steps: per chunk, the denoising step whose x0 is the chunk; it alone carries gradients.
        gradient_from_frame: latent frame from which chunks carry gradients.
        context_noise: noise the context before the clean pass as Self-Forcing's trainer does (its grid has no zero,
            so timestep 0 means sigma of the last entry).
        trace: is given every chunk's exit.
    """

    exit_steps: list[int]
    gradient_from_frame: int = 0
    context_noise: bool = False
    trace: RolloutTrace | None = None


def rollout(
    model: CausalWanTransformer3DModel,
    text: Tensor,
    chunks: list[int],
    memory: RolloutMemory,
    noise: NoiseSource,
    sampler: SamplerConfig,
    *,
    unconditional_text: Tensor | None = None,
    text_at: Callable[[int], Tensor | None] | None = None,
    initial_latents: Iterable[Tensor] | None = None,
    context_timestep: float = 0.0,
    training: TrainingRollout | None = None,
    callback: StepCallback | None = None,
    record: Recorder | None = None,
    scheduler: Any = None,
    resumed: Mapping[str, Any] | None = None,
    recache: bool = False,
) -> Iterator[RolloutChunk]:
    """Generate a video chunk by chunk; each chunk is yielded as soon as its latents are final.

    Args:
        text: [B, T, text_dim]; unconditional_text: the same for the empty prompt, needed when guidance is not 1.
        text_at: asked with the number of every chunk but the first for the text [B, T, text_dim] from there on, or None
            to go on as before. What is in the memory stays as it was written, unless
        recache: write the window's chunks again, by clean passes with the new text.
        chunks: latent frames of each chunk to generate.
        initial_latents: [B, f, C, H, W] chunks of given frames, written to the memory first.
        context_timestep: timestep of the clean pass.
        scheduler: a diffusers scheduler to take the sampler's steps with, in place of the sampler's own.
        record: record the passes of steady chunks and replay them (graphs.py), where nothing rules that out.
        resumed: state of another rollout's chunk (`RolloutChunk.state`) to go on from; `initial_latents` is in it.
    """
    network = _Network(model, memory, sampler.guidance_scale, unconditional_text, training, record, recache)
    network.read(text)
    begin, start = (0, network.take(initial_latents or ())) if resumed is None else network.go_on(resumed, noise)
    owed = CleanPass()
    for index, frames in enumerate(chunks[begin:], begin):
        owed.run()
        changed = text_at(index) if index and text_at is not None else None  # it may wait for somebody who types
        began = time.perf_counter() - owed.seconds
        if changed is not None:
            network.change(changed, context_timestep)
        network.begin(index, start, frames)
        after = go_on if callback is None else partial(network.report, callback)
        exit_step = training.exit_steps[index] if training else None
        latents = sample_chunk(
            sampler, network.flow, noise.chunk(frames), partial(noise.fresh, frames), exit_step, after, scheduler
        )
        context = _context(latents.detach(), noise, sampler.shift, training)
        owed = CleanPass(partial(network.clean, context, context_timestep) if memory.remembers else None)
        if training and index < len(chunks) - 1:  # before anybody changes the weights
            owed.run()
        seconds = _wait_for(latents) - began
        state = partial(network.state, owed.run, noise, index + 1, start + frames)
        yield RolloutChunk(index, start, latents, seconds, memory.cache_bytes, owed.run, state)
        if network.interrupted:
            return
        start += frames


def _only_infers(model: Any) -> bool:
    """Whether a model is called as it is, on a CPU: not compiled, without hooks, its weights plain tensors."""
    if not isinstance(model, nn.Module) or getattr(model, "_compiled_call_impl", None) is not None:
        return False
    if any(map(is_hooked, model.modules())):
        return False
    return all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in model.parameters())


def _wait_for(latents: Tensor) -> float:
    """The time by when they are computed: seconds are of the work, not of its launch."""
    if latents.device.type != "cpu":
        torch.accelerator.synchronize(latents.device)
    return time.perf_counter()


def _context(latents: Tensor, noise: NoiseSource, shift: float, training: TrainingRollout | None) -> Tensor:
    """What later chunks see of finished latents. Noise is drawn after the last chunk, too: whoever draws next counts on
    it."""
    if training is not None and training.context_noise:
        sigma = FlowSchedule(shift).sigma_at(torch.zeros(len(latents)))
        latents = add_noise(latents, noise.fresh(latents.shape[1]), sigma.to(latents.device))
    if training is not None and training.trace is not None:
        training.trace.contexts.append(latents)
    return latents


class CleanPass:
    """A clean pass that is still to be run, or none: `run` runs it once and `seconds` is what that took."""

    def __init__(self, clean: Callable[[], None] | None = None) -> None:
        self._clean = clean
        self.seconds = 0.0

    def run(self) -> None:
        clean, self._clean = self._clean, None
        if clean is not None:
            began = time.perf_counter()
            clean()
            self.seconds = time.perf_counter() - began


class _Network:
    """The model bound to one rollout: text keys and values, guidance, which pass carries gradients."""

    def __init__(
        self,
        model: CausalWanTransformer3DModel,
        memory: RolloutMemory,
        guidance_scale: float,
        unconditional_text: Tensor | None,
        training: TrainingRollout | None,
        record: Recorder | None,
        recache: bool,
    ) -> None:
        self.model, self.memory, self.training = model, memory, training
        self.guidance_scale = guidance_scale if guidance_scale != 1.0 else None
        self.unconditional_text = unconditional_text
        self.index, self.start, self.interrupted = 0, 0, False
        recorded = record is not None and why_not_recorded(model, memory, training is not None) is None
        self.passes = RecordedPasses(memory, record) if record is not None and recorded else None
        self.recent: deque[Tensor] | None = deque() if recache else None
        self.infers = (
            self.passes is None and training is None and memory.cache_gradient == "none" and _only_infers(model)
        )
        self.text: Tensor | None = None
        self.text_keys_values: TextKeysValues | None = None

    @torch.no_grad()
    def read(self, text: Tensor) -> None:
        """Follow this text [B, T, text_dim] from now on."""
        if self.guidance_scale is not None:
            assert self.unconditional_text is not None, "guidance needs the unconditional text"
            text = torch.cat([text, self.unconditional_text])
        with self.mode():
            keys_values = self.model.encode_text(text)
        if self.passes is not None:  # recorded passes read the text where it was
            text, keys_values = (
                keep_in_place(self.text, text.clone() if self.text is None else text),
                keep_in_place(self.text_keys_values, keys_values),
            )
        self.text, self.text_keys_values = text, keys_values

    def change(self, text: Tensor, timestep: float) -> None:
        """Follow another text; where recent chunks are kept, those of the window are written again with it."""
        self.read(text)
        if self.recent is None:
            return
        again = list(self.recent)
        self.recent.clear()
        with self.mode():
            kept = self.memory.rewind([part.shape[1] for part in again])
        for latents in again[len(again) - kept :]:
            with self.mode():
                self.memory.begin_again(latents.shape[1])
            self.clean(latents, timestep)

    def take(self, chunks: Iterable[Tensor]) -> int:
        """Leave chunks of given frames [B, f, C, H, W] in the memory; returns how many frames they are."""
        count = 0
        for given in chunks:
            with self.mode():
                self.memory.begin_chunk(given.shape[1])
            self.clean(given, 0.0)
            count += given.shape[1]
        return count

    def begin(self, index: int, start: int, frames: int) -> None:
        """Begin a chunk of `frames` latent frames, the video's frame `start` the first of them."""
        self.index, self.start = index, start
        with self.mode():
            self.memory.begin_chunk(frames)

    def mode(self) -> AbstractContextManager[object]:
        """How the model and the memory are called: on a CPU, where nothing wants a gradient, as inference, whose calls
        cost autograd nothing. Then all they make is made and changed in it; what leaves is a copy."""
        return torch.inference_mode() if self.infers else nullcontext()

    def state(self, remember: Callable[[], None], noise: NoiseSource, index: int, start: int) -> dict[str, Any]:
        """What `go_on` takes before chunk `index`, which begins at latent frame `start`."""
        remember()
        assert self.text is not None
        return {
            "chunk": index,
            "start": start,
            "text": self._conditional(self.text),
            "unconditional_text": self.unconditional_text,
            "memory": self.memory.state_dict(),
            "noise": noise.state_dict(),
            "recent": None if self.recent is None else list(self.recent),
        }

    def go_on(self, state: Mapping[str, Any], noise: NoiseSource) -> tuple[int, int]:
        """Take all that `state` gave; returns the number of the chunk to generate and its first latent frame."""
        with self.mode():
            self.memory.load_state_dict(state["memory"])
        noise.load_state_dict(state["noise"])
        self.unconditional_text = state["unconditional_text"]
        self.recent = None if state["recent"] is None else deque(state["recent"])
        self.read(state["text"])
        return state["chunk"], state["start"]

    def _conditional(self, text: Tensor) -> Tensor:
        return text if self.guidance_scale is None else text.chunk(2)[0]

    def _needs_gradient(self, step: int) -> bool:
        if self.training is None:
            return False
        return step == self._exit_step and self.start >= self.training.gradient_from_frame

    @property
    def _exit_step(self) -> int:
        """The step that makes the current chunk in training."""
        assert self.training is not None
        return self.training.exit_steps[self.index]

    def flow(self, x: Tensor, timestep: Tensor, step: int) -> Tensor:
        """v of the current chunk x [B, f, C, H, W]."""
        gradient = self._needs_gradient(step)
        if self.training is not None and self.training.trace is not None and step == self._exit_step:
            self.training.trace.exits.append(x.detach())
        with torch.set_grad_enabled(gradient):
            # In a pass with gradients the text projections take part in it, so they are computed afresh.
            flow = self._run(x, timestep, False, None if gradient else self.text_keys_values)
            assert flow is not None, "only clean passes end early"
            return flow

    def report(self, callback: StepCallback, step: int, timestep: Tensor, x: Tensor) -> tuple[Tensor, bool]:
        """Tell the callback what a step led to, and take what it changed: a hook of the samplers."""
        assert self.text is not None
        text = self._conditional(self.text)
        made = DenoisingStep(
            chunk=self.index,
            step=step,
            timestep=timestep,
            latents=x.detach(),
            text=text,
            unconditional_text=self.unconditional_text,
            guidance_scale=self.guidance_scale,
        )
        callback(made)
        if self.guidance_scale is not None and made.guidance_scale is not None:
            self.guidance_scale = made.guidance_scale
        if made.text is not text or made.unconditional_text is not self.unconditional_text:
            self.unconditional_text = made.unconditional_text
            self.read(made.text)
        self.interrupted = made.interrupt
        return made.latents, not made.interrupt

    @torch.no_grad()
    def clean(self, x0: Tensor, timestep: float) -> None:
        """Leave the finished chunk's keys and values in the memory."""
        t = torch.full((), timestep, dtype=torch.float32, device=x0.device)
        self._run(x0, t, True, self.text_keys_values)
        if self.recent is not None:
            self.recent.append(x0)
            while sum(part.shape[1] for part in self.recent) > (self.memory.config.window or 0):
                self.recent.popleft()

    def _run(self, x: Tensor, timestep: Tensor, clean: bool, text_keys_values: TextKeysValues | None) -> Tensor | None:
        doubled = torch.cat([x, x]) if self.guidance_scale is not None else x
        t = timestep.to(x.device).expand(len(doubled))

        def run(latents: Tensor, t: Tensor) -> Tensor | None:
            policy = self.memory.clean_pass() if clean else self.memory.denoising_pass()
            with self.mode(), self._first_passes_as_they_are():
                return self.model(latents, t, self.text, policy=policy, text_keys_values=text_keys_values)

        latents = doubled.transpose(1, 2)
        found = run(latents, t) if self.passes is None else self.passes(run, latents, t, clean=clean)
        if found is None:
            return None
        flow = (found.clone() if self.infers else found).transpose(1, 2)
        return flow if self.guidance_scale is None else guide(flow, self.guidance_scale)

    def _first_passes_as_they_are(self) -> AbstractContextManager[object]:
        """A compiled model is not compiled before the memory has made its state."""
        if getattr(self.model, "_compiled_call_impl", None) is None or self.memory.shapes is not None:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")
