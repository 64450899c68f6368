"""A round of every kind of tests/faults/sweep.py, which people run for longer."""

from __future__ import annotations

import random

import pytest

from tests.faults.sweep import Sweep

pytestmark = pytest.mark.xdist_group("sweep")  # one process makes what is ill-treated for all


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = Sweep(tmp_path_factory.mktemp("sweep"), seed=1)
    sweep.prepare()
    return sweep


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["generate", "resume", "evaluate", "encode", "train", "train-2", "flip-model", "flip-video", "flip-shard"]
)
def test_nothing_is_lost(work: Sweep, kind: str) -> None:
    work.random = random.Random(1)
    work.round(kind)
