"""A round of every kind of tests/faults/sweep.py, which people run for longer."""

from __future__ import annotations

import pytest

from tests.faults.sweep import sweep


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["generate", "resume", "evaluate", "encode", "train", "train-2", "flip-model", "flip-video", "flip-shard"]
)
def test_nothing_is_lost(kind: str) -> None:
    said: list[str] = []
    assert sweep(1, seed=1, kinds=[kind], say=said.append) == 0, "\n".join(said)
