"""Wan's autoencoder in tiles of the picture, as diffusers has it (`vae.enable_tiling()`), but chunk by chunk.

Each tile goes on from chunk to chunk, so that a stream equals the whole video decoded in tiles. What a tile keeps of
the frames before is most of what a decoder holds: between two chunks it lies in the host's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_tiled(vae: Any, latents: Tensor) -> bool:
    """Whether an AutoencoderKLWan is set to decode latents [B, C, f, h, w] in tiles, and they are larger than one."""
    ratio = vae.spatial_compression_ratio
    height, width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    return vae.use_tiling and (latents.shape[3] > height or latents.shape[4] > width)


def count_tiles(vae: Any, latents: Tensor) -> int:
    """Tiles of latents [B, C, f, h, w]."""
    ratio = vae.spatial_compression_ratio
    rows = range(0, latents.shape[3], vae.tile_sample_stride_height // ratio)
    return len(rows) * len(range(0, latents.shape[4], vae.tile_sample_stride_width // ratio))


def decode_tiles(vae: Any, latents: Tensor, carried: list[Any]) -> Tensor:
    """Pixels [B, 3, F, H, W] of the next latents [B, C, f, h, w] of a video, in the decoder's own numbers.

    carried: features of all tiles, one after the other; empty before the first latents, and brought up to date.
    """
    ratio, count = vae.spatial_compression_ratio, vae._cached_conv_counts["decoder"]
    rows: list[list[Tensor]] = []
    after: list[Any] = []
    for top in range(0, latents.shape[3], vae.tile_sample_stride_height // ratio):
        rows.append([])
        for left in range(0, latents.shape[4], vae.tile_sample_stride_width // ratio):
            bottom, right = top + vae.tile_sample_min_height // ratio, left + vae.tile_sample_min_width // ratio
            own = _move(carried[len(after) : len(after) + count], latents.device)
            rows[-1].append(decode_frames(vae, latents[:, :, :, top:bottom, left:right], own))
            after += _move(own, torch.device("cpu"))
    carried[:] = after
    return _blend(vae, rows)


def decode_frames(vae: Any, latents: Tensor, carried: list[Any]) -> Tensor:
    """Pixels of the next latents of a video or of a tile of it. carried: see `decode_tiles`, of one tile."""
    first = not carried
    if first:
        carried += [None] * vae._cached_conv_counts["decoder"]
    frames = []
    for latent in latents.split(1, 2):
        hidden = vae.post_quant_conv(latent)
        frames.append(vae.decoder(hidden, feat_cache=carried, feat_idx=[0], first_chunk=first))
        first = False
    return torch.cat(frames, 2)


def _move(features: list[Any], device: torch.device) -> list[Any]:
    """Features elsewhere; what is among them beside tensors are marks."""
    return [x.to(device) if isinstance(x, Tensor) else x for x in features]


def _blend(vae: Any, rows: list[list[Tensor]]) -> Tensor:
    """The picture of overlapping tiles, each faded into the ones above and to its left."""
    high, wide = vae.tile_sample_stride_height, vae.tile_sample_stride_width
    overlap = vae.tile_sample_min_height - high, vae.tile_sample_min_width - wide
    strips = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i:
                vae.blend_v(rows[i - 1][j], tile, overlap[0])
            if j:
                vae.blend_h(row[j - 1], tile, overlap[1])
        strips.append(torch.cat([tile[:, :, :, :high, :wide] for tile in row], 4))
    return torch.cat(strips, 3)
