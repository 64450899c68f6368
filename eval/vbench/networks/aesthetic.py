"""The LAION aesthetic predictor: one linear layer on normalised CLIP ViT-L/14 image features, scores about 1..10."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sparse_forcing.eval.vbench.networks.loading import load_into, need, read_state_dict


def load_aesthetic_head(path: Path) -> nn.Linear:
    """Load `sa_0_4_vit_l_14_linear.pth`. Raises WeightsError."""
    state = read_state_dict(path)
    head = nn.Linear(need(state, "weight", path).shape[1], 1)
    load_into(head, state, path)
    return head
