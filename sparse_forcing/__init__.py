"""Sparse Forcing: autoregressive video generation with persistent block-sparse attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparse_forcing.model.transformer import CausalWanTransformer3DModel
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

# Public names resolve on first use, so that `import sparse_forcing` and `--help` never import torch.
_EXPORTS = {
    "SparseForcingPipeline": "sparse_forcing.sampling.pipeline",
    "CausalWanTransformer3DModel": "sparse_forcing.model.transformer",
}
__all__ = ["CausalWanTransformer3DModel", "SparseForcingPipeline", "__version__"]


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
