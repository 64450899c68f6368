"""Versions of what shapes a result: this package's, Python's, and those of other packages."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

from sparse_forcing import __version__

SHAPING = ("torch", "triton", "diffusers", "transformers", "av", "numpy")
"""Packages that a generated video depends on."""


def list_versions(packages: Sequence[str] = SHAPING) -> dict[str, str]:
    """Versions by name, this package's and Python's first; a package that is not installed is left out."""
    found = {"sparse-forcing": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
