"""SHA-256 manifests of model folders: weight formats do not notice a flipped bit, so every file is hashed.

`manifest.json` holds {"files": {relative path: hex digest}} for every file of the folder, Markdown aside. Parts that
are put beside those it lists (a text encoder copied to a converted transformer) are not its business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import PathLike, atomic_write_json, read_json, sha256_file

MANIFEST = "manifest.json"
MAX_BYTES = 4 << 20  # of a manifest
_FILES = "files"
_PARTS = ("transformer", "vae", "adapter", "scheduler")
_SETTINGS = ("pipeline.json", "model_index.json")


def write_manifest(folder: PathLike) -> dict[str, str]:
    """Hash every file below `folder` into its manifest.json; return {relative path: SHA-256}. Raises OutputError."""
    root = Path(folder)
    hashes = {name: sha256_file(root / name) for name in _content(root)}
    atomic_write_json(root / MANIFEST, {_FILES: hashes})
    return hashes


def verify_manifest(folder: PathLike) -> dict[str, str] | None:
    """Check every file below `folder` against its manifest.json; return {relative path: SHA-256}, None without one.

    Raises:
        WeightsError: a file is missing, was added to one of the folders listed, or differs by as little as one bit; the
            message names it.
    """
    root = Path(folder)
    if not (root / MANIFEST).is_file():
        return None
    hashes = _read(root).get(_FILES)
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise WeightsError(f"{root / MANIFEST}: not a manifest of SHA-256 sums")
    for name, expected in hashes.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise WeightsError(f"{root / MANIFEST}: {name!r:.100} lies outside the folder")
        if not (root / name).is_file():
            raise WeightsError(f"{root / name}: listed in {MANIFEST} but missing; download or convert the model again")
        if sha256_file(root / name) != expected:
            raise WeightsError(f"{root / name}: SHA-256 differs from {MANIFEST}; the file is damaged or was changed")
    covered = {name.rpartition("/")[0] for name in hashes}
    if extra := sorted(name for name in set(_content(root)) - set(hashes) if name.rpartition("/")[0] in covered):
        raise WeightsError(f"{root / extra[0]}: not listed in {MANIFEST}; remove it or write the manifest again")
    return dict(hashes)


def unknown_entries(folder: Path) -> list[str]:
    """What a manifest says beside the hashes, by name; nothing here uses it. Raises WeightsError for a damaged one."""
    return sorted(_read(folder).keys() - {_FILES}) if (folder / MANIFEST).is_file() else []


def _read(root: Path) -> dict[str, Any]:
    try:
        manifest = read_json(root / MANIFEST, max_bytes=MAX_BYTES)
    except ConfigError as error:
        raise WeightsError(f"{error}; the manifest is damaged") from error
    return manifest if isinstance(manifest, dict) else {}


def folder_hash(folder: PathLike) -> str:
    """One SHA-256 over the weights below `folder`, verified first when it has a manifest: names a model in a report."""
    root = Path(folder)
    return _combine(verify_manifest(root) or {name: sha256_file(root / name) for name in _content(root)})


def model_hash(folder: Path) -> str:
    """What names a model folder: `folder_hash` where its manifest lists all of it. What else a video depends on counts,
    too (a foreign folder has no manifest, parts may be links), but not the tens of gigabytes of a text encoder."""
    hashes = verify_manifest(folder) or {}
    covered = {name.split("/")[0] for name in hashes}
    for part in _PARTS:
        if part not in covered and ((folder / part).is_dir() or not hashes):
            hashes[part] = folder_hash(folder / part)
    for name in _SETTINGS:
        if name not in covered and (folder / name).is_file():
            hashes[name] = sha256_file(folder / name)
    return _combine(hashes)


def _combine(hashes: Mapping[str, str]) -> str:
    """One SHA-256 of several, by name."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(hashes.items())]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def _content(root: Path) -> list[str]:
    """Relative names of the files that count, sorted: not the manifest, Markdown, hidden files or caches."""
    if not root.is_dir():
        raise WeightsError(f"{root}: no such model folder")
    names = []
    for path in root.rglob("*"):
        name = path.relative_to(root)
        ignored = path.suffix == ".md" or any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not ignored and name.as_posix() != MANIFEST:
            names.append(name.as_posix())
    return sorted(names)
