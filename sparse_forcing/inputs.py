"""What a run reads is never what it writes: compared before anything is written, by file and not by name.

A file has many names: links, hard links, paths through other folders. Device and inode number tell whether two names
are one file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparse_forcing.errors import OutputError
from sparse_forcing.files import PathLike

_Identity = tuple[int, int]
_EMBEDDED = Path(__file__).parent / "models"  # that in sparse_forcing/model_folder/folder.py, which imports torch
_MODEL_FILES = ("pipeline.json", "model_index.json", "config.json", "manifest.json", "transformer/config.json")


def check_targets(
    targets: Iterable[PathLike],
    inputs: Iterable[PathLike],
    *,
    sealed: Iterable[PathLike] = (),
    added_to: Iterable[PathLike] = (),
) -> None:
    """Refuse targets that would replace what the run reads.

    Args:
        targets: files, and folders as a whole, that will be written or removed; most need not exist.
        inputs: files and folders that are read.
        sealed: folders of models and weights, in which a further file would be damage, too; their parts may be links.
        added_to: folders that get files; they may hold inputs, but not be one.

    Raises:
        OutputError: a target is an input or holds one, or it lies in a sealed folder.
    """
    targets, added_to, sealed = list(targets), list(added_to), list(sealed)
    closed = _by_identity(path for folder in sealed for path in (folder, *_parts(Path(folder))))
    for target in [*targets, *added_to] if closed else ():
        for folder in _itself_and_parents(target):
            if folder in closed:
                raise OutputError(f"cannot write {os.fspath(target)}: {closed[folder]}, which this run reads, holds it")
    written = _by_identity([*targets, *added_to])
    folders = {identity: path for identity, path in _by_identity(targets).items() if path.is_dir()}
    for source in [*inputs, *sealed, *_files(closed.values())]:
        taken = written.get(_identity(source))
        if taken is None and folders:
            taken = next((folders[folder] for folder in _itself_and_parents(source) if folder in folders), None)
        if taken is not None:
            raise OutputError(
                f"cannot write {taken}: it is or holds {os.fspath(source)}, which this run reads; choose another output"
            )


def config_inputs(config: Any) -> tuple[list[Path], list[Path]]:
    """(files and data folders, model folders) that a config names anywhere in it."""
    values = list(_values(config))
    texts = [Path(value) for value in values if isinstance(value, str) and value and "\0" not in value]
    paths = [value for value in values if isinstance(value, Path)]
    return [*paths, *(text for text in texts if os.path.isfile(text))], model_folders(texts)


def model_folders(paths: Iterable[PathLike]) -> list[Path]:
    """The folders of a model or checkpoint that `paths` name: `tiny` is an embedded one, and may be a folder that has
    nothing to do with it."""
    folders = dict.fromkeys(folder for path in paths if path for folder in (_EMBEDDED / path, Path(path)))
    return [folder for folder in folders if any(os.path.isfile(folder / name) for name in _MODEL_FILES)]


def _values(config: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from _values(getattr(config, field.name))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _values(value)
    else:
        yield config


def _identity(path: PathLike) -> _Identity | None:
    """What tells a file or folder from all others; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _by_identity(paths: Iterable[PathLike]) -> dict[_Identity | None, Path]:
    """Those of some paths that are there, by their identity."""
    return {identity: Path(path) for path in paths if (identity := _identity(path)) is not None}


def _itself_and_parents(path: PathLike) -> Iterator[_Identity]:
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        return
    for folder in (real, *real.parents):
        if (identity := _identity(folder)) is not None:
            yield identity


def _parts(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.glob("*") if path.is_dir())


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    """Files of model folders, their parts' included: hard links to them may lie anywhere."""
    for folder in folders:
        for pattern in ("*", "*/*"):
            yield from (path for path in folder.glob(pattern) if path.is_file())
