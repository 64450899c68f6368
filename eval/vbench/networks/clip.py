"""CLIP's two transformers (Radford et al., arXiv 2103.00020) under OpenAI's parameter names.

Sizes are read from the checkpoint. Shapes: B items, N tokens, D width, E embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sparse_forcing.eval.vbench.networks.loading import count_blocks, load_into, need, read_state_dict

HEAD_DIM = 64
_NOT_PARAMETERS = ("input_resolution", "context_length", "vocab_size")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP over [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; `mask` [N, N] is added to attention scores."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        heads = max(1, width // HEAD_DIM)
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ImageEncoder(nn.Module):
    """Images [B, 3, R, R] -> [B, E], not normalised."""

    def __init__(self, *, width: int, layers: int, patch: int, positions: int, embedding: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.proj = nn.Parameter(torch.zeros(width, embedding))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = rearrange(self.conv1(images), "b d h w -> b (h w) d")
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class TextEncoder(nn.Module):
    """Token ids [B, N] (0 after the end token, which has the largest id) -> [B, E], not normalised."""

    def __init__(self, *, width: int, layers: int, context: int, vocabulary: int, embedding: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        self.text_projection = nn.Parameter(torch.zeros(width, embedding))
        self.transformer = Transformer(width, layers)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.ln_final = nn.LayerNorm(width)

    @property
    def context(self) -> int:
        """Longest text in tokens, start and end included."""
        return self.positional_embedding.shape[0]

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """The feature at the end token, projected: [B, E]."""
        length = tokens.shape[1]
        causal = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, causal))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


class Clip(TextEncoder):
    """Both encoders; the text encoder's parameters sit at the top level, the image encoder's under `visual`."""

    def __init__(self, *, visual: ImageEncoder, **text: int) -> None:
        super().__init__(**text)
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, R, R] -> [B, E]."""
        return self.visual(images)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Cosine similarities [images, texts]."""
        pictures = F.normalize(self.encode_image(images), dim=-1)
        return pictures @ F.normalize(self.encode_text(tokens), dim=-1).T


def text_sizes(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, int]:
    """Sizes of the text encoder in a checkpoint."""
    vocabulary, width = need(state, "token_embedding.weight", path).shape
    return {
        "width": width,
        "layers": count_blocks(state, "transformer.resblocks."),
        "context": need(state, "positional_embedding", path).shape[0],
        "vocabulary": vocabulary,
        "embedding": need(state, "text_projection", path).shape[1],
    }


def load_clip(path: Path) -> Clip:
    """Build the ViT CLIP that an OpenAI checkpoint describes and load it in float32. Raises WeightsError."""
    state = read_state_dict(path)
    kernel = need(state, "visual.conv1.weight", path)
    visual = ImageEncoder(
        width=kernel.shape[0],
        layers=count_blocks(state, "visual.transformer.resblocks."),
        patch=kernel.shape[-1],
        positions=need(state, "visual.positional_embedding", path).shape[0],
        embedding=need(state, "visual.proj", path).shape[1],
    )
    network = Clip(visual=visual, **text_sizes(state, path))
    load_into(network, state, path, ignore=_NOT_PARAMETERS)
    return network
