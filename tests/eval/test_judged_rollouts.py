"""Rollouts are judged segment by segment, and their numbers carry intervals over prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench import judging as judged_rollouts
from sparse_forcing.eval.bench.judging import RolloutSettings, judge, judge_batch, summarize_values, summarize_verdicts
from sparse_forcing.scenes.captions import parse_caption
from sparse_forcing.scenes.held_out import held_out_prompts
from sparse_forcing.scenes.render import render
from sparse_forcing.scenes.sample import batch_from_scenes

PROMPT = "a large red square stays still on a white background"


def clip(prompt: str, frames: int) -> np.ndarray:
    """[F, H, W, 3] in [0, 1] of what a prompt says."""
    generator = torch.Generator().manual_seed(0)
    video = render(batch_from_scenes([parse_caption(prompt)], generator), frames, 64)
    return ((video[0].permute(0, 2, 3, 1) + 1) / 2).numpy()


def test_verdicts_and_statistics_of_a_true_and_a_wrong_clip() -> None:
    right = judge(clip(PROMPT, 16), PROMPT, 0)
    assert right["all"] == right["attributes"] == 1
    wrong = judge(clip(PROMPT.replace("red", "blue"), 16), PROMPT, 0)
    assert wrong["colour"] == wrong["all"] == 0
    assert 0 < float(wrong["attributes"] or 0) < 1
    unsaid = judge(clip(PROMPT, 16), "a red square on a white background", 0)
    assert unsaid["motion"] is None
    assert unsaid["all"] == 1
    assert right["brightness"] != wrong["brightness"]


def test_each_horizon_sees_its_own_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 frames, clips of 4: segments begin and end inside chunks."""
    video = np.arange(12, dtype=np.float32)[None, :, None, None, None] / 12 * np.ones((2, 1, 2, 2, 3), np.float32)
    chunks = [SimpleNamespace(frames=video[:, at : at + 3], seconds=2.0, cache_bytes=10 * at) for at in range(0, 12, 3)]
    pipe: Any = SimpleNamespace(defaults=SimpleNamespace(num_frames=4), stream=lambda *a, **k: iter(chunks))
    seen: list[tuple[list[float], int]] = []

    def noted(frames: np.ndarray, prompt: str, start: int) -> dict[str, float | None]:
        seen.append(((frames[:, 0, 0, 0] * 12).round().tolist(), start))
        return {}

    monkeypatch.setattr(judged_rollouts, "judge", noted)
    batch = judge_batch(pipe, None, ["a", "b"], 0, RolloutSettings(horizons=(1, 3)))  # type: ignore[arg-type]
    assert seen == 2 * [([0, 1, 2, 3], 0)] + 2 * [([8, 9, 10, 11], 8)]
    assert batch.seconds == [1.0] * 4
    assert batch.cache_bytes == [0, 15, 30, 45]
    assert (batch.frames[:, :, 0, 0, 0] == np.round(np.array([2, 10]) / 12 * 255)).all()


def test_intervals() -> None:
    found = summarize_verdicts([1.0, 0.0, None, 1.0, 1.0])
    assert found["prompts"] == 4
    assert found["mean"] == 0.75
    assert 0 <= found["interval"][0] < 0.75 < found["interval"][1] <= 1
    assert summarize_verdicts([None])["mean"] is None
    assert summarize_values([0.2])["interval"] is None
    # No success in 200 says "at most 1.8 %", not "exactly none".
    low, high = summarize_verdicts([0.0] * 200)["interval"]
    assert low == 0
    assert (1 - high) ** 200 == pytest.approx(0.025)
    assert summarize_verdicts([1.0] * 200)["interval"] == pytest.approx([1 - high, 1])
    assert summarize_values([0.0] * 200)["interval"] == [0, 0]


def test_held_out_prompts_are_equal_for_equal_seeds() -> None:
    assert held_out_prompts(5, seed=3) == held_out_prompts(5, seed=3) != held_out_prompts(5, seed=4)
    assert held_out_prompts(9, seed=3)[:5] == held_out_prompts(5, seed=3)
    # Published numbers are of these very prompts.
    assert held_out_prompts(2, seed=0) == [
        "Over dark green, a big orange square sliding up.",
        "A medium yellow hoop bouncing horizontally against a white backdrop.",
    ]
    assert all(len(parse_caption(p).objects) == 2 for p in held_out_prompts(5, objects=2))


@pytest.mark.parametrize("horizons", [(), (0, 1), (2, 2)])
def test_bad_horizons(horizons: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="horizons"):
        RolloutSettings(horizons=horizons)
