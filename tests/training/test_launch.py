"""Under `accelerate launch` a stopped launcher stops the training; trackers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.tracking import get_available_trackers

from sparse_forcing.config import build_config
from sparse_forcing.training.engine.settings import TRACKERS
from sparse_forcing.training.recipes.forcing import ForcingConfig, train
from tests.training.helpers import ROOT, is_complete, newest, small_config


def launch(tmp_path: Path, config: dict, out: Path, **faults: float) -> tuple[subprocess.Popen, Path]:
    """`accelerate launch` of the tests' worker, its output in a file."""
    settings, log = tmp_path / "settings.json", tmp_path / "launch.log"
    settings.write_text(json.dumps({"stage": "forcing", "config": config, "out": str(out), **faults}))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--module"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*accelerate, "tests.training.workers", str(settings)], cwd=ROOT, stdout=file, stderr=file, env=environment
        )
    return process, log


def wait_for(condition, log: Path, seconds: float = 120) -> None:
    """Until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is noticed through prctl")
def test_a_stopped_launcher_stops_the_training_after_a_save(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "out"
    config = small_config(model_folder, steps=10_000, checkpoint_every=10_000)
    process, log = launch(tmp_path, config, out, step_seconds=0.05)
    wait_for((out / "metrics.jsonl").exists, log)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    wait_for(lambda: "stopped at step" in log.read_text(), log)
    wait_for(lambda: list(out.glob("step-*")) and is_complete(newest(out)), log)


def test_tensorboard_is_written_and_a_missing_tracker_is_named(tmp_path: Path, model_folder: Path) -> None:
    pytest.importorskip("tensorboard")
    missing = next(name for name in TRACKERS if name not in map(str, get_available_trackers()))
    settings = small_config(model_folder, steps=1, trackers=["tensorboard", missing])
    with pytest.warns(UserWarning, match=f"tracker not installed: {missing}"):
        assert train(build_config(ForcingConfig, settings), tmp_path / "out") == 0
    assert list((tmp_path / "out" / "training").glob("events.out.tfevents.*"))
