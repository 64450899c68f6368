"""The device check runs its steps in order on a CPU: no GPU minute is to be spent on a mistake in the script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.eval.bench import attention, device_check


def test_a_dry_run_leaves_what_a_run_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(attention, "run", lambda **options: asked.append(options) or 0)  # has tests of its own
    assert device_check.main([str(tmp_path), "--dry"]) == 0
    assert asked == [{"quick": True, "repeats": 1, "device": "cpu", "output": None}]
    assert json.loads((tmp_path / "stages.json").read_text("utf-8")) == {}, "no launch can be run here"
    assert json.loads((tmp_path / "graphs.json").read_text("utf-8")) == {"window": 0.0, "sparse": 0.0}
    assert set(json.loads((tmp_path / "launches" / "stream.json").read_text("utf-8"))["memories"]) == {
        "window:2",
        "sparse",
    }


def test_nothing_follows_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention, "run", lambda **options: 1)
    monkeypatch.setattr(device_check, "compare_graphs", lambda *_: pytest.fail("went on"))
    assert device_check.main([str(tmp_path), "--dry"]) == 1


def test_without_a_gpu_there_is_no_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SparseForcingError, match="--dry"):
        device_check.run(tmp_path, dry=False)
