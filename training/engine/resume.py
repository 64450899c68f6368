"""Resuming: which checkpoint a run goes on from, and that it goes on with the settings it began with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_forcing.config import build_config, to_plain
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import atomic_write_text
from sparse_forcing.processes import from_first, rank
from sparse_forcing.training.engine.checkpoint import Stateful, load_checkpoint, newest_checkpoint, read_manifest

FREE = frozenset(
    {
        "compile",
        "loop.steps",
        "loop.device",
        "loop.micro_batch",
        "loop.processes",
        "loop.parallel",
        "loop.gradient_checkpointing",
        "loop.checkpoint_every",
        "loop.keep_checkpoints",
        "loop.log_every",
        "loop.validate_every",
        "loop.trackers",
        "loop.allow_missing_random",
    }
)
"""Settings that say how long and on which machine a run trains and what it tells, not what it learns."""


_ORIGIN = "resumed-from.txt"


@dataclass(frozen=True)
class Begun:
    """Where a run goes on.

    step: number of the next optimizer step; window: numbers of the steps since the last row of metrics (`RunLog`).
    """

    step: int = 0
    window: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Resume:
    """How a run goes on.

    Args:
        checkpoint: folder `step-N` of any run to go on from; None: the newest complete one of the output folder. Once
            the output folder has later ones of this course, the newest of those, so that the same command resumes.
        allow_changes: whether to go on with settings other than the checkpoint's; they are named in a warning.
    """

    checkpoint: Path | None = None
    allow_changes: bool = False

    def load(self, out: Path, parts: dict[str, Stateful], config: Any, **options: bool) -> Begun:
        """Load the checkpoint into `parts`; returns where it stands, at 0 without one. Every process must call it.

        Args:
            config: the stage's, to be compared with the checkpoint's.
            options: options of `load_checkpoint`.

        Raises:
            ConfigError: the settings differ, or a checkpoint was named and `out` has checkpoints of its own.
            WeightsError: the named checkpoint is incomplete or damaged, or does not fit.
        """
        if self.checkpoint is None or from_first(lambda: self._went_on_from(out)):
            found = newest_checkpoint(out)
        else:
            found = self._read_named(out, self.checkpoint)
        if found is None and self.checkpoint is not None:
            raise WeightsError(
                f"{out}: no complete checkpoint; choose a new --output to start from {self.checkpoint} again"
            )
        if found is None:
            return Begun()
        folder, manifest = found
        self._compare(folder, manifest, config)
        if self.allow_changes:
            parts = {name: part for name, part in parts.items() if not getattr(part, "waivable", False)}
        step = load_checkpoint(folder, parts, manifest=manifest, **options)
        return Begun(step, tuple(manifest.get("window", ())))

    def _went_on_from(self, out: Path) -> bool:
        """Whether the checkpoints of `out` are later ones of a run that began with this very `--resume-from`."""
        origin = out / _ORIGIN
        known = origin.is_file() and any(out.glob("step-*"))
        return known and origin.read_text(encoding="utf-8") == str(self._origin())

    def _origin(self) -> Path:
        assert self.checkpoint is not None
        return self.checkpoint.resolve()

    def _read_named(self, out: Path, checkpoint: Path) -> tuple[Path, dict[str, Any]]:
        def read() -> tuple[Path, dict[str, Any]]:
            if any(out.glob("step-*")):
                # Otherwise its newer checkpoints would be taken for later ones of this run.
                raise ConfigError(
                    f"--resume-from {checkpoint}: {out} has checkpoints of its own; choose another --output, or leave "
                    "--resume-from out to go on from the newest of them"
                )
            manifest = read_manifest(checkpoint)
            atomic_write_text(out / _ORIGIN, str(self._origin()))
            return checkpoint, manifest

        return from_first(read)

    def _compare(self, folder: Path, manifest: dict[str, Any], config: Any) -> None:
        changes = list(list_changed_settings(manifest.get("config", {}), config))
        if changes and not self.allow_changes:
            raise ConfigError(
                f"{folder} was trained with other settings: {', '.join(changes)}; choose another --output for a new "
                "run, or go on with --allow-changes"
            )
        if changes and rank() == 0:
            warnings.warn(f"going on from {folder} with changed settings: {', '.join(changes)}", stacklevel=4)


def list_changed_settings(saved: dict[str, Any], config: Any) -> Iterator[str]:
    """`name: old -> new` of every setting that differs from a checkpoint's, but for those that may (`FREE`).

    A curriculum may also get more stages, and its last one another length.

    Args:
        saved: the config in the checkpoint's manifest; settings that its version did not have count as their defaults.
    """
    try:
        old = to_plain(build_config(type(config), saved))
    except ConfigError as error:
        yield f"not settings of this version ({error})"
        return
    new = to_plain(config)
    count = len(old.get("stages", ()))
    yield from _differences(_keep_begun(old, count), _keep_begun(new, count))


def _keep_begun(settings: dict[str, Any], stages: int) -> dict[str, Any]:
    """The settings without the stages beyond the first ones and without the length of the last of these."""
    if not stages:
        return settings
    *before, last = settings["stages"][:stages]
    return {**settings, "stages": [*before, {**last, "steps": None}]}


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if name in FREE:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new)):
            yield from _differences(*pair, f"{name}.{number}")
    elif old != new:
        yield f"{name}: {old} -> {new}"
