"""Whether the parts of a model folder belong together, and which of them is at fault when a video is not a video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_forcing.errors import SparseForcingError, WeightsError
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.weights.safe_load import not_finite


def check_fit(folder: Path, transformer: Any, text_dim: int | None, vae: VideoAutoencoder) -> None:
    """Raise WeightsError, in the words of the folder's configs, when numbers that parts must share differ.

    Args:
        text_dim: width of what the folder's own text encoder makes, None where another takes its place.
    """
    sizes = transformer.config
    for name in ("in_channels", "out_channels"):
        if getattr(sizes, name) != vae.latent_channels:
            raise WeightsError(
                f"{folder}: its parts do not fit together: transformer has {name} {getattr(sizes, name)}, the latents "
                f"of vae have {vae.latent_channels} channels"
            )
    if text_dim is not None and sizes.text_dim != text_dim:
        raise WeightsError(
            f"{folder}: its parts do not fit together: transformer has text_dim {sizes.text_dim}, text_encoder makes "
            f"embeddings of {text_dim} numbers"
        )


def not_finite_error(parts: Mapping[str, Any], what: str) -> SparseForcingError:
    """The error to raise when `what` came out with NaN or infinite numbers: it names the tensor that has them, too.

    Args:
        parts: modules by the names of their folders.
    """
    for part, module in parts.items():
        if tensor := not_finite(module.state_dict()):
            return WeightsError(f"{what} came out as NaN: {part} tensor {tensor} holds NaN or infinite numbers")
    return SparseForcingError(
        f"{what} came out as NaN, though all weights are finite; half precision may be too coarse for them, try "
        "--dtype float32 (torch_dtype)"
    )
