"""Wan's autoencoder in tiles of the picture, as diffusers has it (`vae.enable_tiling()`), but chunk by chunk.

Each tile goes on from chunk to chunk, so that a stream equals the whole video decoded in tiles. What a tile keeps of
the frames before is most of what a decoder holds: between two chunks it lies in the host's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Caches = dict[tuple[int, int], list[Any]]
"""What the decoder keeps of the frames before, by the corner of a tile."""


def is_tiled(vae: Any, latents: Tensor) -> bool:
    """Whether an AutoencoderKLWan is set to decode latents [B, C, f, h, w] in tiles, and they are larger than one."""
    ratio = vae.spatial_compression_ratio
    height, width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    return vae.use_tiling and (latents.shape[3] > height or latents.shape[4] > width)


def decode_tiles(vae: Any, latents: Tensor, caches: Caches) -> Tensor:
    """Pixels [B, 3, F, H, W] of the next latents [B, C, f, h, w] of a video, in the decoder's own numbers; `caches` go
    on with it and are empty before its first ones."""
    ratio = vae.spatial_compression_ratio
    rows = []
    for top in range(0, latents.shape[3], vae.tile_sample_stride_height // ratio):
        row = []
        for left in range(0, latents.shape[4], vae.tile_sample_stride_width // ratio):
            bottom, right = top + vae.tile_sample_min_height // ratio, left + vae.tile_sample_min_width // ratio
            cache = _moved(caches.get((top, left)), latents.device)
            tile, cache = decode_frames(vae, latents[:, :, :, top:bottom, left:right], cache)
            row.append(tile)
            caches[top, left] = _moved(cache, torch.device("cpu")) or []
        rows.append(row)
    return _blended(vae, rows)


def decode_frames(vae: Any, latents: Tensor, cache: list[Any] | None) -> tuple[Tensor, list[Any]]:
    """Pixels of the next latents of a video or of a tile of it, and what the next ones need of them; no cache before
    the first ones."""
    first = cache is None
    cache = [None] * vae._cached_conv_counts["decoder"] if cache is None else cache
    frames = []
    for latent in latents.split(1, 2):
        hidden = vae.post_quant_conv(latent)
        frames.append(vae.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=first))
        first = False
    return torch.cat(frames, 2), cache


def _moved(cache: list[Any] | None, device: torch.device) -> list[Any] | None:
    """A cache elsewhere; what is in it beside tensors are marks."""
    return cache and [x.to(device) if isinstance(x, Tensor) else x for x in cache]


def _blended(vae: Any, rows: list[list[Tensor]]) -> Tensor:
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
