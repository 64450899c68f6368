"""Frames, tokens, tiles and blocks: the only place where they are computed.

Legend: F latent frames, R x C token rows and columns of a latent frame, N = R * C tokens per frame, T tokens per tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError

if TYPE_CHECKING:
    from sparse_forcing.model.vae import VideoAutoencoder


Start = Literal["nothing", "picture", "video"]
"""What a video goes on from."""


@dataclass(frozen=True, kw_only=True)
class VideoGeometry:
    """How pixel frames become latent frames and tokens, and how many latent frames make a chunk.

    Args:
        temporal_stride: pixel frames per latent frame (Wan: 4).
        spatial_stride: pixels per latent row and column (Wan: 8).
        first_frame_alone: whether the first latent frame holds a single pixel frame (Wan's causal autoencoder).
        patch_size: latent (frames, rows, columns) per token (Wan: (1, 2, 2)).
        chunk_frames: latent frames generated at a time (Self-Forcing: 3).
        first_chunk_frames: latent frames of the first chunk when it differs (Self-Forcing's independent frame: 1).
        whole_video: True when all latent frames of a video are one chunk (Wan's bidirectional weights).
    """

    temporal_stride: int
    spatial_stride: int
    first_frame_alone: bool
    patch_size: tuple[int, int, int] = (1, 2, 2)
    chunk_frames: int = 3
    first_chunk_frames: int | None = None
    whole_video: bool = False

    def __post_init__(self) -> None:
        if min(self.temporal_stride, self.spatial_stride, self.chunk_frames, *self.patch_size) < 1:
            raise ConfigError(f"geometry: strides, patch and chunk must be at least 1, got {self}")
        if self.patch_size[0] != 1:
            raise ConfigError(
                f"geometry.patch_size: only one latent frame per token is supported, got {self.patch_size}"
            )

    @classmethod
    def of(cls, vae: VideoAutoencoder, transformer: Mapping[str, Any]) -> VideoGeometry:
        """The geometry of a model, from its autoencoder and its transformer's config."""
        return cls(
            temporal_stride=vae.temporal_stride,
            spatial_stride=vae.spatial_stride,
            first_frame_alone=vae.first_frame_alone,
            patch_size=tuple(transformer["patch_size"]),
            chunk_frames=transformer["chunk_frames"],
        )

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` decode to."""
        return self.temporal_stride * latent_frames - (self.temporal_stride - 1 if self.first_frame_alone else 0)

    def latent_frames(self, num_frames: int) -> int:
        """Least number of latent frames that decode to at least `num_frames` pixel frames."""
        if num_frames < 1:
            raise ConfigError(f"num_frames: at least 1 pixel frame is needed, got {num_frames}")
        extra = self.temporal_stride - 1 if self.first_frame_alone else 0
        return math.ceil((num_frames + extra) / self.temporal_stride)

    @property
    def chunk_pixel_frames(self) -> int:
        """Pixel frames of a video that is one chunk long."""
        return self.pixel_frames(self.chunk_frames)

    def whole_chunk_frames(self, num_frames: int) -> int:
        """Most pixel frames, at most `num_frames`, that encode to whole chunks; 0 when there are too few."""
        extra = self.temporal_stride - 1 if self.first_frame_alone else 0
        step = self.temporal_stride * self.chunk_frames
        whole = (num_frames + extra) // step * step
        return max(0, whole - extra)

    def chunks(self, latent_frames: int) -> list[int]:
        """Chunk sizes of a video that covers at least `latent_frames`."""
        if self.whole_video:
            return [latent_frames] if latent_frames > 0 else []
        sizes = [self.first_chunk_frames] if self.first_chunk_frames and latent_frames > 0 else []
        rest = max(0, latent_frames - sum(sizes))
        return sizes + [self.chunk_frames] * math.ceil(rest / self.chunk_frames)

    def timeline(self, num_frames: int, start: Start = "nothing") -> tuple[list[int], list[int]]:
        """Latent frames of each chunk to generate for `num_frames` pixel frames, and the pixel frame each begins with.

        Args:
            start: what the video goes on from. A picture is its first pixel frame and counts, and so every chunk is a
                usual one; frames of another video do not count.
        """
        latent_frames = self.latent_frames(num_frames)
        if start == "nothing":
            chunks = self.chunks(latent_frames)
            before = accumulate(chunks[:-1], initial=0)
            return chunks, [self.pixel_frames(n) if n else 0 for n in before]
        shown, step = int(start == "picture"), self.temporal_stride * self.chunk_frames
        count = max(1, math.ceil((num_frames - shown) / step))
        return [self.chunk_frames] * count, [shown + step * number for number in range(count)]

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of a `height` x `width` video; raises ConfigError when the size does not fit."""
        for name, size, patch in (("height", height, self.patch_size[1]), ("width", width, self.patch_size[2])):
            step = self.spatial_stride * patch
            if size < step or size % step:
                raise ConfigError(
                    f"{name}: {size} pixels is not a positive multiple of {step}; try {nearest(size, step)}"
                )
        return height // self.spatial_stride, width // self.spatial_stride

    def token_size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Token rows and columns of one latent frame."""
        _, ph, pw = self.patch_size
        if latent_height % ph or latent_width % pw:
            raise ConfigError(f"latents: {latent_height}x{latent_width} is not a multiple of the patch {ph}x{pw}")
        return latent_height // ph, latent_width // pw


def nearest(size: int, step: int) -> int:
    """The positive multiple of `step` nearest to `size`."""
    return max(step, round(size / step) * step)


@dataclass(frozen=True)
class TileLayout:
    """Cuts one chunk of F x R x C tokens into spatio-temporal tiles that are contiguous in memory.

    A tile (block) holds at most `tile[0] * tile[1] * tile[2]` tokens; grids that tiles do not divide leave short tiles.
    """

    frames: int
    rows: int
    cols: int
    tile: tuple[int, int, int]

    @cached_property
    def _tiles(self) -> list[Tensor]:
        index = torch.arange(self.frames * self.rows * self.cols).view(self.frames, self.rows, self.cols)
        return [
            part.flatten()
            for frames in index.split(self.tile[0], 0)
            for rows in frames.split(self.tile[1], 1)
            for part in rows.split(self.tile[2], 2)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.frames * self.rows * self.cols

    @property
    def num_blocks(self) -> int:
        """Blocks of the chunk, short ones included."""
        frames, rows, cols = self.tile  # spelled out: torch.compile cannot look into a generator
        return -(-self.frames // frames) * -(-self.rows // rows) * -(-self.cols // cols)

    @property
    def block_tokens(self) -> int:
        """Capacity of a block in tokens (the full tile, also where this grid only has short ones)."""
        frames, rows, cols = self.tile
        return frames * rows * cols

    @cached_property
    def order(self) -> Tensor:
        """[L] token index (frame-major) at each place of the tile order."""
        return torch.cat(self._tiles)

    @cached_property
    def inverse(self) -> Tensor:
        """[L] place in tile order of each frame-major token."""
        return self.order.argsort()

    @cached_property
    def sizes(self) -> Tensor:
        """[num_blocks] int32 tokens of each block."""
        return torch.tensor([len(tile) for tile in self._tiles], dtype=torch.int32)

    @property
    def uniform(self) -> bool:
        """True when every block is full, so that blocks are a plain view of the tile order."""
        return self.num_blocks * self.block_tokens == self.num_tokens

    @cached_property
    def first_frame(self) -> Tensor:
        """[num_blocks] first frame of each block, relative to the chunk."""
        return torch.stack([tile[0] // (self.rows * self.cols) for tile in self._tiles])

    @cached_property
    def padded(self) -> Tensor:
        """[num_blocks, block_tokens] place in tile order of each block's tokens; padding repeats the last."""
        starts = torch.cumsum(self.sizes, 0) - self.sizes
        offset = torch.arange(self.block_tokens)[None].minimum(self.sizes[:, None] - 1)
        return starts[:, None] + offset

    @cached_property
    def unpadded(self) -> Tensor:
        """[L] place of each tile-order token in the padded [num_blocks * block_tokens] sequence."""
        valid = torch.arange(self.block_tokens)[None] < self.sizes[:, None]
        return valid.flatten().nonzero().flatten()

    def on(self, device: torch.device) -> TileLayout:
        """The same layout with its tables on `device`, copied once: a copy in every layer would wait for the GPU."""
        if device.type == "cpu":
            return self
        if device not in self._copies:
            self._copies[device] = twin = replace(self)
            for name in ("order", "inverse", "sizes", "first_frame", "padded", "unpadded"):
                twin.__dict__[name] = getattr(self, name).to(device)
        return self._copies[device]

    def ragged_sizes(self, device: torch.device) -> Tensor | None:
        """`sizes` on `device`; None while every block is full, which attention and pooling need not count."""
        return None if self.uniform else self.on(device).sizes

    @cached_property
    def _copies(self) -> dict[torch.device, TileLayout]:
        return {}

    def to_blocks(self, x: Tensor) -> Tensor:
        """[B, L, H, D] in tile order -> [B, H, num_blocks, block_tokens, D] (a view when every block is full)."""
        b, _, h, d = x.shape
        x = x.transpose(1, 2)
        if not self.uniform:
            x = x[:, :, self.on(x.device).padded.flatten()]
        return x.unflatten(2, (self.num_blocks, self.block_tokens)) if x.numel() else x.view(b, h, 0, 0, d)

    def from_blocks(self, x: Tensor) -> Tensor:
        """[B, H, num_blocks, block_tokens, D] -> [B, L, H, D] in tile order."""
        x = x.flatten(2, 3)
        if not self.uniform:
            x = x[:, :, self.on(x.device).unpadded]
        return x.transpose(1, 2)

    def add_to_tokens(self, x: Tensor, blocks: Tensor) -> Tensor:
        """x [B, L, H, D] in tile order, plus what each of its blocks gets: [B, H, num_blocks, 1, D]."""
        if self.uniform:
            by_block = x.unflatten(1, (self.num_blocks, self.block_tokens))
            return (by_block + blocks.permute(0, 2, 3, 1, 4)).flatten(1, 2)
        return x + self.from_blocks(blocks.expand(-1, -1, -1, self.block_tokens, -1))
