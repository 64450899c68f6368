"""Checkpoints by a commit protocol: temporary folder, files flushed, manifest with hashes last, rename, then prune.

`out/step-N` exists only when it is complete. It holds one file per part (model, optimizers, averages) with whole
tensors, so that it loads at any number of processes, and each process's random state.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sparse_forcing.errors import OutputError, SparseForcingError, WeightsError
from sparse_forcing.files import find_system_error, sha256_file
from sparse_forcing.processes import any_rank, barrier, from_first, rank, world_size
from sparse_forcing.training.engine.parallel import full_state, shard_like
from sparse_forcing.weights.safe_load import load_pt

_MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-step-"


class Stateful(Protocol):
    """A part of a checkpoint. One with `waivable = True` may be missing from it, and `--allow-changes` skips it."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class RandomState:
    """State of this process's global random generators, as a part that each process saves for itself."""

    def state_dict(self) -> dict[str, Any]:
        version, numbers, gauss = random.getstate()
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


class _Saving:
    """Collects the first failure of this process, so that all processes keep calling collectives in step; what was
    written until then goes, for a full disk needs the room."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.error: Exception | None = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SparseForcingError) as error:
            self.error = self.error or error

    def agree(self, what: str) -> None:
        """Raise on every process when one of them failed."""
        if any_rank(self.error is not None):
            if rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise OutputError(f"cannot save {what}: {self.error or 'another process failed'}") from self.error


def _write(path: Path, data: Any) -> None:
    try:
        with path.open("wb") as file:
            torch.save(data, file)
            _flush(file)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        said = find_system_error(error)
        reason = str(error).splitlines()[0] if said is None else said.strerror or said
        raise OutputError(f"cannot write {path} ({_size(data)} bytes): {reason}") from error


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _size(data: Any) -> int:
    if isinstance(data, torch.Tensor):
        return data.nbytes
    values = data.values() if isinstance(data, dict) else data if isinstance(data, (list, tuple)) else ()
    return sum(_size(value) for value in values)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    out: Path,
    step: int,
    parts: dict[str, Stateful],
    config: dict,
    *,
    keep: int = 2,
    random_state: bool = False,
    window: Sequence[dict[str, float]] = (),
) -> Path:
    """Write every part's state under `out/step-N`; older checkpoints go only after the new one is complete.

    Every process must call it; when one fails, all raise and the checkpoints before are untouched.

    Args:
        keep: complete checkpoints that stay, at least two.
        random_state: whether to save, too, every process's random state.
        window: numbers of the steps since the last row of metrics, for the manifest.

    Raises:
        OutputError: what could not be written, and how many bytes it needs.
    """
    final, temporary = out / f"step-{step:08d}", out / f"{_TEMPORARY}{step:08d}"
    saving = _Saving(temporary)
    with saving.attempt():
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    saving.agree(str(final))
    for name, part in parts.items():
        state = full_state(part.state_dict())
        if rank() == 0 and saving.error is None:
            with saving.attempt():
                _write(temporary / f"{name}.pt", state)
    if random_state and saving.error is None:
        with saving.attempt():
            _write(temporary / f"random-{rank()}.pt", RandomState().state_dict())
    saving.agree(str(final))
    if rank() == 0:
        with saving.attempt():
            _commit(
                temporary, final, {"step": step, "processes": world_size(), "config": config, "window": list(window)}
            )
    saving.agree(str(final))
    if rank() == 0:
        _prune(final, max(keep, 2))
    barrier()
    return final


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
    _write_manifest(temporary / _MANIFEST, manifest)
    _sync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync_folder(final.parent)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(manifest, file, indent=1)
        _flush(file)


def _prune(final: Path, keep: int) -> None:
    """Remove all that is older than the `keep` complete checkpoints up to `final`, and what interrupted saves left.

    Later ones, damaged or of a course that was given up, do not count.
    """
    out = final.parent
    folders = sorted((folder for folder in out.glob("step-*") if folder.name <= final.name), reverse=True)
    kept = [folder for folder in folders if (folder / _MANIFEST).is_file()][:keep]
    for old in [*(folder for folder in folders if folder < kept[-1]), *out.glob(f"{_TEMPORARY}*")]:
        try:
            _remove(old)
        except OSError as error:
            warnings.warn(f"cannot remove the old checkpoint {old}: {error}", stacklevel=2)


def _remove(folder: Path) -> None:
    # Without its manifest first: a removal that is interrupted must not leave a folder that looks complete.
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all match it. Raises WeightsError naming the file that does not."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        files, _ = manifest["files"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder}: incomplete checkpoint (no readable {_MANIFEST}); use an older one") from error
    for name, digest in files.items():
        try:
            found = sha256_file(folder / name)
        except OSError as error:
            raise WeightsError(f"{folder / name}: missing from the checkpoint; use an older one") from error
        if found != digest:
            raise WeightsError(f"{folder / name}: SHA-256 differs from the manifest; the file is damaged")
    return manifest


def newest_checkpoint(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and manifest of the newest complete checkpoint of `out`, None without one.

    Every process must call it; the first one looks.
    """

    def search() -> tuple[Path, dict[str, Any]] | None:
        for folder in sorted(out.glob("step-*"), reverse=True):
            try:
                return folder, read_manifest(folder)
            except WeightsError as error:
                warnings.warn(f"skipping {folder}: incomplete or damaged ({error})", stacklevel=4)
        return None

    return from_first(search)


def load_checkpoint(
    folder: Path,
    parts: dict[str, Stateful],
    *,
    manifest: dict[str, Any] | None = None,
    random_state: bool = False,
    allow_missing_random: bool = False,
) -> int:
    """Load every part; returns the step. Every process must call it; when one fails, all raise.

    The first process alone compares the files with their hashes.

    Args:
        manifest: manifest of the folder, when its files were already found to match it (`newest_checkpoint`).
        random_state: whether to restore, too, this process's random state.
        allow_missing_random: whether to go on with the present one when the checkpoint has none for this process.

    Raises:
        WeightsError: damaged, of another model, or without the random state of this process.
    """
    manifest = manifest or from_first(lambda: read_manifest(folder))
    error: WeightsError | None = None
    try:
        _load(folder, manifest, parts, random_state=random_state, allow_missing_random=allow_missing_random)
    except WeightsError as failure:
        error = failure
    if any_rank(error is not None):
        raise error or WeightsError(f"{folder}: another process could not load it")
    return manifest["step"]


def _load(
    folder: Path,
    manifest: dict[str, Any],
    parts: dict[str, Stateful],
    *,
    random_state: bool,
    allow_missing_random: bool,
) -> None:
    for name, part in parts.items():
        path = folder / f"{name}.pt"
        if path.name not in manifest["files"] and getattr(part, "waivable", False):
            warnings.warn(f"{folder}: is of a version that kept no {name!r}; it is taken as it is now", stacklevel=4)
            continue
        if path.name not in manifest["files"]:
            raise WeightsError(f"{folder}: has no {name!r}; it holds {', '.join(sorted(manifest['files']))}")
        _load_part(path, part)
    if random_state:
        path = folder / f"random-{rank()}.pt"
        if path.name in manifest["files"]:
            _load_part(path, RandomState())
        elif not allow_missing_random:
            raise WeightsError(
                f"{folder}: no random state for process {rank()} (saved by {manifest.get('processes', 1)}, "
                f"now {world_size()}); resume with as many, or set allow_missing_random"
            )


def _load_part(path: Path, part: Stateful) -> None:
    try:
        # Mapped, not read: a process holds what it keeps of a file, not the whole file.
        part.load_state_dict(_cut(load_pt(path, mmap=True), part))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: does not fit this run ({' '.join(str(error).split())[:400]})") from error


def _cut(state: dict[str, Any], part: Stateful) -> dict[str, Any]:
    """Whole tensors cut as the part's own are (parts that are not sharded get them whole)."""
    if isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        # Copied, as an optimizer keeps what it is given: its state must not hang on a file that will be pruned.
        cut = {i: {k: _copy(shard_like(v, parameters[i])) for k, v in s.items()} for i, s in state["state"].items()}
        return {"state": cut, "param_groups": _own_settings(state["param_groups"], part)}
    own = part.state_dict() if isinstance(part, nn.Module) or hasattr(part, "shadow") else {}
    return {name: shard_like(value, own.get(name)) for name, value in state.items()}


def _own_settings(saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The saved groups with the settings of this run, which may have been changed on purpose (`--allow-changes`)."""
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    return [{**a, **b} for a, b in zip(saved, own)] if len(own) == len(saved) else saved


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def latest_checkpoint(out: Path, parts: dict[str, Stateful], **options: bool) -> int:
    """Load the newest complete checkpoint of `out` into `parts`; 0 when there is none. Options: `load_checkpoint`."""
    found = newest_checkpoint(out)
    return load_checkpoint(found[0], parts, manifest=found[1], **options) if found else 0
