"""Starts training processes and reads what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.errors import WeightsError
from sparse_forcing.training.engine.checkpoint import read_manifest
from tests.forked import Forked
from tests.training import workers

ROOT = Path(__file__).parents[2]


def small_config(model: Path, stage: str = "forcing", *, steps: int = 4, **loop: Any) -> dict[str, Any]:
    """A stage of a few steps on 2 x 2 samples."""
    settings = {
        "steps": steps,
        "global_batch": 4,
        "micro_batch": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "trackers": [],
        **loop,
    }
    config: dict[str, Any] = {
        "loop": settings,
        "model": str(model),
        "data": {"size": 32, "latent_frames": 4, "caption_dropout": 0.2},
    }
    if stage == "distill":
        config |= {
            "teacher": str(model),
            "sampler": {"steps": 2},
            "rollout_frames": 4,
            "critic_ratio": 2,
            "ema_start": 2,
            "generator": {"learning_rate": 1e-3},
            "critic": {"learning_rate": 1e-3},
        }
    return config


class Run:
    """A training run: forked processes, or those that torchrun starts."""

    def __init__(self, settings: Path, processes: int, torchrun: bool) -> None:
        self.log = settings.with_suffix(".log")
        self.process: Forked | subprocess.Popen[bytes]
        if not torchrun:
            self.process = Forked(self.log, workers.run, settings, processes=processes)
            return
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "-m", "tests.training.workers", str(settings)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
            )

    def terminate(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)

    @property
    def running(self) -> bool:
        return self.process.running if isinstance(self.process, Forked) else self.process.poll() is None

    def finish(self, timeout: float = 400) -> tuple[int, str]:
        """(exit code, output)."""
        code = self.process.finish(timeout)[0] if isinstance(self.process, Forked) else self.process.wait(timeout)
        output = self.log.read_text()
        assert code is not None, f"still running: {output[-2000:]}"
        assert workers.GROUP_ALIVE not in output, output
        return code, output


def start(
    tmp_path: Path,
    config: dict[str, Any],
    out: Path,
    *,
    stage: str = "forcing",
    processes: int = 1,
    torchrun: bool = False,
    **faults: Any,
) -> Run:
    """Start a run; `faults` as in workers.py."""
    settings = tmp_path / f"settings-{len(list(tmp_path.glob('settings-*.json')))}.json"
    settings.write_text(json.dumps({"stage": stage, "config": config, "out": str(out), **faults}))
    return Run(settings, processes, torchrun)


def run(tmp_path: Path, config: dict[str, Any], out: Path, **options: Any) -> tuple[int, str]:
    """Run to the end: (exit code, output)."""
    return start(tmp_path, config, out, **options).finish()


def state(folder: Path) -> dict[str, Any]:
    """Every tensor file of a checkpoint."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


def newest(out: Path) -> Path:
    return max(out.glob("step-*"))


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Names of what differs between two nested states, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [name for key in a for name in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        return [name for i, (x, y) in enumerate(zip(a, b)) for name in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest difference of two flat states of tensors."""
    return max(
        (a[name].double() - b[name].double()).abs().max().item() for name in a if isinstance(a[name], torch.Tensor)
    )


def is_complete(folder: Path) -> bool:
    """True when the manifest exists and every file matches its hash."""
    try:
        read_manifest(folder)
    except WeightsError:
        return False
    return True


def losses(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows]
