"""Runs a training stage as its own process or processes: `python -m tests.training.workers SETTINGS.json`.

Settings: stage, config (nested), out, and optional faults: kill_at_write (SIGKILL at the n-th file of a save),
kill_at (SIGKILL at [place, n], the n-th time a save comes to one of PLACES), term_at_step (SIGTERM to itself),
nan_at_step (on rank nan_rank), fail_write (OSError on the first rank's n-th write), step_seconds (slow steps down).
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.config import build_config
from sparse_forcing.processes import rank
from sparse_forcing.training.engine import checkpoint
from sparse_forcing.training.entry import STAGES
from sparse_forcing.training.recipes import distill
from sparse_forcing.training.recipes import shared as stage

GROUP_ALIVE = "threads of the process group outlive the training: the interpreter may die when it ends"
"""Printed by a worker, and then an error in every test."""

PLACES = ("manifest", "rename", "renamed", "removal")
"""Of a save after its files: a manifest half written, before and after the rename, an old checkpoint half removed."""


def install_kills(place: str, number: int) -> None:
    """SIGKILL at the `number`-th time a save comes to `place`."""
    passed = [0]

    def kill(here: str, damage: Callable[[], object] = lambda: None) -> None:
        passed[0] += here == place
        if here == place and passed[0] == number:
            damage()
            os.kill(os.getpid(), signal.SIGKILL)

    write_manifest, sync_folder, remove = checkpoint._write_manifest, checkpoint._sync_folder, shutil.rmtree

    def manifest(path: Path, content: dict[str, Any]) -> None:
        kill("manifest", lambda: path.write_text(json.dumps(content)[:40]))
        write_manifest(path, content)

    def sync(folder: Path) -> None:
        sync_folder(folder)
        kill("rename" if folder.name.startswith(checkpoint._TEMPORARY) else "renamed")

    def rmtree(folder: Path, **options: Any) -> None:
        if folder.is_dir() and not options:  # with options: what an earlier save left, before this one
            kill("removal", (folder / "model.pt").unlink)
        remove(folder, **options)

    checkpoint._write_manifest, checkpoint._sync_folder, checkpoint.shutil.rmtree = manifest, sync, rmtree


def install_faults(settings: dict[str, Any]) -> None:
    write, step_of, writes = checkpoint._write, stage.optimizer_step, [0]

    def counted(path: Path, data: Any) -> None:
        writes[0] += 1
        if writes[0] == settings.get("kill_at_write"):
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        if writes[0] == settings.get("fail_write") and rank() == 0:
            raise OSError(28, "No space left on device")
        if writes[0] == settings.get("term_at_write"):
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, data)

    checkpoint._write = counted
    if "kill_at" in settings:
        install_kills(*settings["kill_at"])

    def faulty(model, optimizer, loop_config, config, step, losses, **kwargs):
        time.sleep(settings.get("step_seconds", 0))
        if step == settings.get("term_at_step"):
            os.kill(os.getpid(), signal.SIGTERM)

        def poisoned(micro_batch: int):
            for loss in losses(micro_batch):
                bad = step == settings.get("nan_at_step") and rank() == settings.get("nan_rank", 0)
                yield loss * (torch.nan if bad else 1)

        return step_of(model, optimizer, loop_config, config, step, poisoned, **kwargs)

    distill.optimizer_step = stage.optimizer_step = faulty


def run(settings_path: Path) -> int:
    settings = json.loads(settings_path.read_text())
    torch.set_num_threads(1)
    module_name, config_class = STAGES[settings["stage"]]
    module = importlib.import_module(module_name)
    kind = getattr(module, config_class)
    install_faults(settings)
    try:
        return module.train(build_config(kind, settings["config"]), Path(settings["out"]))
    finally:
        if "pt_gloo_runloop" in thread_names():
            print(GROUP_ALIVE, file=sys.stderr)


def thread_names() -> list[str]:
    """Names of this process's threads, Python's and others (Linux)."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    code = run(Path(sys.argv[1]))
    print(f"worker ends with {code}", file=sys.stderr)  # torchrun does not say it
    sys.exit(code)
