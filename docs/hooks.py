"""What mkdocs needs to know of this repository's layout, before it reads a page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
AREAS = ("kernels", "sampling", "training", "eval")


def on_startup(**_: Any) -> None:
    """Copy the package to build/api, links followed, with an `__init__.py` in each of the four linked folders.

    mkdocstrings reads modules without importing them, and does not look into a folder of a package that lacks one.
    """
    target = ROOT / "build" / "api" / "sparse_forcing"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "sparse_forcing", target, ignore=_no_module)
    for area in AREAS:
        (target / area / "__init__.py").touch()


def _no_module(folder: str, names: list[str]) -> set[str]:
    """The names that are neither modules nor folders of modules."""
    kept = {name for name in names if name.endswith(".py") or (Path(folder) / name).is_dir()}
    return set(names) - kept | {"__pycache__", "models"} & set(names)
