"""ViCLIP (Wang et al., InternVid, arXiv 2307.06942): CLIP whose image encoder sees all frames at once.

Parameter names and the order of operations are those of the released checkpoint: every frame's patches get the
spatial embedding of CLIP and a temporal embedding, and one class token (of the first frame) attends to all of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from sparse_forcing.eval.vbench.networks.clip import TextEncoder, Transformer, text_sizes
from sparse_forcing.eval.vbench.networks.loading import count_blocks, load_into, need, read_state_dict


class VideoEncoder(nn.Module):
    """Frames [B, T, 3, R, R] -> [B, E], not normalised; T must be what the checkpoint was trained with."""

    def __init__(self, *, width: int, layers: int, patch: int, positions: int, embedding: int, frames: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, frames, width))
        self.proj = nn.Parameter(torch.zeros(width, embedding))
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(rearrange(frames, "b t c h w -> b c t h w"))
        patches = rearrange(patches, "b d t h w -> b (h w) t d")
        patches = patches + self.positional_embedding[1:, None] + self.temporal_positional_embedding
        start = (self.class_embedding + self.positional_embedding[0]).expand(len(frames), 1, -1)
        x = torch.cat([start, rearrange(patches, "b l t d -> b (l t) d")], dim=1)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class ViClip(nn.Module):
    """The video and the text encoder of a ViCLIP checkpoint."""

    def __init__(self, *, vision_encoder: VideoEncoder, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.text_encoder = text_encoder
        self.temp = nn.Parameter(torch.zeros(()))

    @property
    def frames(self) -> int:
        """Frames that the video encoder expects."""
        return self.vision_encoder.temporal_positional_embedding.shape[1]

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """[B, T, 3, R, R] -> [B, E]."""
        return self.vision_encoder(frames)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N] -> [B, E]."""
        return self.text_encoder.encode_text(tokens)


def load_viclip(path: Path) -> ViClip:
    """Build and load ViCLIP from the official file. Raises WeightsError."""
    state = read_state_dict(path)
    kernel = need(state, "vision_encoder.conv1.weight", path)
    text = {
        name.removeprefix("text_encoder."): value for name, value in state.items() if name.startswith("text_encoder.")
    }
    network = ViClip(
        vision_encoder=VideoEncoder(
            width=kernel.shape[0],
            layers=count_blocks(state, "vision_encoder.transformer.resblocks."),
            patch=kernel.shape[-1],
            positions=need(state, "vision_encoder.positional_embedding", path).shape[0],
            embedding=need(state, "vision_encoder.proj", path).shape[1],
            frames=need(state, "vision_encoder.temporal_positional_embedding", path).shape[1],
        ),
        text_encoder=TextEncoder(**text_sizes(text, path)),
    )
    load_into(network, state, path, ignore=("text_encoder.logit_scale",))
    return network
