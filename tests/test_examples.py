"""The examples run as their docstrings say, on small inputs; the figures of the documentation can be drawn again."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sparse_forcing.eval.measuring import registry
from sparse_forcing.media.video import probe, write_video
from sparse_forcing.memory.retention import base
from tests.pages import ROOT


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _registries_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METRICS", registry.all_metrics())
    monkeypatch.setattr(base, "RULES", dict(base.RULES))


@pytest.fixture
def red_video(tmp_path: Path) -> Path:
    frames = np.zeros((40, 64, 64, 3), np.uint8)
    frames[..., 0] = 200
    write_video(tmp_path / "clips" / "red.mp4", frames, 8)
    (tmp_path / "clips" / "red.txt").write_text("a large red square")
    return tmp_path / "clips" / "red.mp4"


def test_stream_writes_the_video_it_announces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "stream.mp4"
    assert load("examples/stream.py").main(["--seconds", "2", "--output", str(output)]) == 0
    assert probe(output).frames == 16
    assert "chunk 1: 8 frames" in capsys.readouterr().out


def test_own_metric_is_measured(red_video: Path, tmp_path: Path) -> None:
    assert load("examples/own_metric.py").main([str(red_video), "--output", str(tmp_path / "found")]) == 0
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert results["metrics"]["redness"]["score"] == pytest.approx(200 / 255, abs=0.03)


def test_train_on_folder_leaves_a_model(red_video: Path, tmp_path: Path) -> None:
    arguments = [str(red_video.parent), "--steps", "1", "--batch", "1", "--output", str(tmp_path / "run")]
    assert load("examples/train_on_folder.py").main(arguments) == 0
    assert (tmp_path / "run" / "pipeline" / "pipeline.json").is_file()


def test_own_retention_is_run_beside_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("examples/own_retention.py").main(["--seconds", "4"]) == 0
    assert re.findall(r"^(\w+): the last 32 frames are (?:right|wrong)$", capsys.readouterr().out, re.MULTILINE) == [
        "paper",
        "patient",
    ]


@pytest.mark.slow
def test_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figures.py", "--chunks", "8", "--output", str(tmp_path)])
    load("docs/figures.py").main()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert all(path.stat().st_size < 300_000 for path in (ROOT / "docs" / "figures").glob("*.png"))
