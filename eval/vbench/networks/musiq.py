"""MUSIQ-SPAQ image quality, through the user's installation of `pyiqa` (its licence is non-commercial)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_forcing.errors import WeightsError


def load_musiq(path: Path) -> Any:
    """pyiqa's MUSIQ with the weights at `path`: images [B, 3, H, W] in 0..1 -> scores [B, 1] in 0..100."""
    try:
        from pyiqa.archs.musiq_arch import MUSIQ
    except ImportError as error:
        raise WeightsError(f"{path}: MUSIQ needs the package pyiqa (non-commercial licence); install it") from error
    return MUSIQ(pretrained_model_path=str(path)).eval()
