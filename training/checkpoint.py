"""Checkpoints by a commit protocol: temporary folder, files flushed, manifest with hashes last, rename, then prune."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from sparse_forcing.errors import WeightsError
from sparse_forcing.files import sha256_file

_MANIFEST = "manifest.json"


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def _write(path: Path, data: Any) -> None:
    with path.open("wb") as file:
        torch.save(data, file)
        file.flush()
        os.fsync(file.fileno())


def save_checkpoint(out: Path, step: int, parts: dict[str, Stateful], config: dict, *, keep: int = 2) -> Path:
    """Write every part's state under `out/step-N`; older checkpoints go only after the new one is complete."""
    final, temporary = out / f"step-{step:08d}", out / f".tmp-step-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, part in parts.items():
        _write(temporary / f"{name}.pt", part.state_dict())
    files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
    (temporary / _MANIFEST).write_text(json.dumps({"step": step, "files": files, "config": config}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in sorted(out.glob("step-*"))[: -max(keep, 2)]:
        shutil.rmtree(old)
    return final


def is_complete(folder: Path) -> bool:
    """True when the manifest exists and every file matches its hash."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        return all(sha256_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def load_checkpoint(folder: Path, parts: dict[str, Stateful]) -> int:
    """Load every part; returns the step. Raises WeightsError when the checkpoint is damaged."""
    if not is_complete(folder):
        raise WeightsError(f"{folder}: checkpoint is incomplete or damaged; resume from an older one")
    for name, part in parts.items():
        part.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return json.loads((folder / _MANIFEST).read_text())["step"]


def latest_checkpoint(out: Path, parts: dict[str, Stateful]) -> int:
    """Load the newest complete checkpoint of `out` into `parts`; 0 when there is none."""
    for folder in sorted(out.glob("step-*"), reverse=True):
        if is_complete(folder):
            return load_checkpoint(folder, parts)
        print(f"skipping {folder}: incomplete or damaged", flush=True)
    return 0
