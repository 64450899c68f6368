"""The order of a rollout: chunks before their clean passes, which only chunks that follow need."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.sampling.rollout import TrainingRollout, rollout

ROWS, COLS, STEPS = 2, 3, 2


class Told:
    """A model, a memory's passes and noise that say what is asked of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache_gradient: str = "none") -> None:
        self.events: list[str] = []
        torch.manual_seed(0)
        self.model = CausalWanTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=8,
            in_channels=2,
            out_channels=2,
            text_dim=4,
            freq_dim=8,
            ffn_dim=8,
            num_layers=1,
            chunk_frames=1,
        )
        geometry = MemoryGeometry(rows=ROWS, cols=COLS, num_layers=1, chunk_frames=1, horizon_frames=4)
        self.memory = make_memory(MemoryConfig(kind="window", window_frames=2), geometry, cache_gradient=cache_gradient)
        for name in ("begin_chunk", "denoising_pass", "clean_pass"):
            self._tell(monkeypatch, name)

    def _tell(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        whole = getattr(self.memory, name)

        def told(*args: Any) -> Any:
            self.events.append(name)
            return whole(*args)

        monkeypatch.setattr(self.memory, name, told)

    def chunk(self, frames: int) -> torch.Tensor:
        self.events.append("draw")
        return torch.randn(1, frames, 2, 2 * ROWS, 2 * COLS)

    fresh = chunk

    def rollout(self, **kwargs: Any) -> Any:
        text = torch.randn(1, 3, 4)
        return rollout(self.model, text, [1, 1], self.memory, self, SamplerConfig(steps=STEPS), **kwargs)


DENOISE = ["begin_chunk", "draw", "denoising_pass", "draw", "denoising_pass"]


def test_a_chunk_comes_before_its_clean_pass_and_none_follows_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    for _ in told.rollout(text_at=lambda index: told.events.append("text")):
        told.events.append("chunk")
    assert told.events == [*DENOISE, "chunk", "clean_pass", "text", *DENOISE, "chunk"]


def test_whoever_has_a_chunk_may_have_it_remembered_at_once_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    for chunk in told.rollout():
        chunk.remember()
        chunk.remember()
        told.events.append("chunk")
    assert told.events == 2 * [*DENOISE, "clean_pass", "chunk"]


def test_training_remembers_a_chunk_before_weights_change_and_keeps_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, "detached")
    training = TrainingRollout(exit_steps=[STEPS - 1] * 2, context_noise=True)
    for _ in told.rollout(training=training):
        told.events.append("chunk")
    assert told.events == [*DENOISE, "draw", "clean_pass", "chunk", *DENOISE, "draw", "chunk"]


def test_seconds_of_a_chunk_count_the_clean_pass_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    now = iter(range(100))
    monkeypatch.setattr("sparse_forcing.sampling.rollout.time.perf_counter", lambda: float(next(now)))
    assert [chunk.seconds for chunk in told.rollout()] == [1.0, 2.0]
