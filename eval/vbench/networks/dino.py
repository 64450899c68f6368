"""DINO and DINOv2 vision transformers (Caron et al., arXiv 2104.14294; Oquab et al., arXiv 2304.07193).

Parameter names are those of the official checkpoints; depth and width are read from the file.

Shapes: B images, N tokens (class token first), D width, h x w patch grid (any size: position embeddings are resampled).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sparse_forcing.eval.vbench.networks.loading import count_blocks, load_into, need, read_state_dict

HEAD_DIM = 64
_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (qkv h d) -> qkv b h l d", qkv=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(mixed, "b h l d -> b l (h d)"))


class Mlp(nn.Module):
    """Two linear layers with a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel (DINOv2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block; `scaled` adds DINOv2's layer scale."""

    def __init__(self, width: int, heads: int, scaled: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches -> [B, h*w, D]."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class DinoTransformer(nn.Module):
    """The image encoder: images [B, 3, H, W] -> class-token features [B, D]."""

    def __init__(self, *, width: int, depth: int, patch: int, positions: int, scaled: bool = False) -> None:
        super().__init__()
        self.patch = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.ModuleList(Block(width, max(1, width // HEAD_DIM), scaled) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings [1, 1 + h*w, D], resampled bicubically from the trained grid.

        The scale is (h + 0.1) / trained side, as in the official code: it moves the sampling points a little.
        """
        side = int((self.pos_embed.shape[1] - 1) ** 0.5)
        if height == width == side:
            return self.pos_embed
        grid = rearrange(self.pos_embed[:, 1:], "b (h w) d -> b d h w", h=side)
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "b d h w -> b (h w) d")], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def load_dino(path: Path) -> DinoTransformer:
    """Build the transformer that a DINO or DINOv2 checkpoint describes and load it. Raises WeightsError."""
    state = read_state_dict(path)
    kernel = need(state, "patch_embed.proj.weight", path)
    network = DinoTransformer(
        width=kernel.shape[0],
        depth=count_blocks(state, "blocks."),
        patch=kernel.shape[-1],
        positions=need(state, "pos_embed", path).shape[1],
        scaled="blocks.0.ls1.gamma" in state,
    )
    load_into(network, _without_heads(state), path)
    return network


def _without_heads(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name != "mask_token" and not name.startswith("head.")}
