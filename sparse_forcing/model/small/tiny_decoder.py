"""A tiny decoder of Wan 2.1's latents for previews and small GPUs: TAEHV's, under the names its files have.

Its files (`taew2_1`, .pth or .safetensors) are published apart from Wan's. A latent frame becomes four pixel frames;
each block sees the frame before, so a stream needs one frame of every block. The first latent frame is one pixel frame,
the last of its four. Legend: latents [B, C, f, h, w] as the transformer makes them, pixels [B, 3, F, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sparse_forcing.errors import WeightsError
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.weights.safe_load import check_state_dict, load_weights, not_finite

LATENT_CHANNELS = 16
WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)
"""Frames that each stage makes of one."""


def _conv(channels: int, out: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Latents, bent into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class PairBlock(nn.Module):
    """Three convolutions over a frame and the one before it; residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Both [N, C, H, W] -> the same."""
        return torch.relu(self.conv(torch.cat([x, before], 1)) + x)


class Grow(nn.Module):
    """`frames` of one."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N * frames, C, H, W], those of one after the other."""
        return rearrange(self.conv(x), "n (f c) h w -> (n f) c h w", f=self.frames)


class TinyDecoder(nn.Module):
    """The decoder; `decoder` is numbered as in its files."""

    temporal_stride = 4
    spatial_stride = 8
    latent_channels = LATENT_CHANNELS

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [SoftClamp(), _conv(LATENT_CHANNELS, WIDTHS[0]), nn.ReLU()]
        for width, wider, frames in zip(WIDTHS, WIDTHS[1:], GROWTH):
            layers += [PairBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, frames), _conv(width, wider, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(WIDTHS[-1], 3))

    @classmethod
    def from_file(cls, path: Path) -> TinyDecoder:
        """The decoder of a published file, whose encoder is left alone. Raises WeightsError."""
        given = load_weights(path)
        found = {name: x for name, x in given.items() if not name.startswith("encoder.")} if _is_state(given) else {}
        first = found.get("decoder.1.weight")
        if first is None or first.ndim != 4:
            raise WeightsError(f"{path}: not a TAEHV file (no decoder.1.weight); Wan 2.1's is called taew2_1")
        if first.shape[1] != LATENT_CHANNELS:
            raise WeightsError(
                f"{path}: decodes latents of {first.shape[1]} channels, Wan 2.1's have {LATENT_CHANNELS}"
            )
        with torch.device("meta"):
            model = cls()
        expected = model.state_dict()
        for name, wanted in expected.items():  # some files hold twice the frames where one is made: the last ones count
            x = found.get(name)
            if name.endswith(".conv.weight") and x is not None and x.ndim == 4 and len(x) > len(wanted):
                found[name] = x[-len(wanted) :]
        check_state_dict(expected, found, source=str(path))
        if bad := not_finite(found):
            raise WeightsError(f"{path}: tensor {bad} holds NaN or infinite numbers")
        model.load_state_dict(found, assign=True)
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor], carried: list[Any] | None = None) -> Iterator[Tensor]:
        """Pixels of each chunk of a video that starts with the first one, or goes on from the frames `carried`; one
        latent frame at a time, so that they do not depend on where chunks end. Computes where the latents are, in their
        type."""
        carried = [] if carried is None else carried
        for chunk in chunks:
            self.to(chunk.device, chunk.dtype)
            first = not carried
            frames = [self._step(latent, carried) for latent in chunk.unbind(2)]
            if first:
                frames[0] = frames[0][:, :, -1:]
            yield torch.cat(frames, 2).clamp(0, 1) * 2 - 1

    def _step(self, latent: Tensor, carried: list[Any]) -> Tensor:
        """Pixels [B, 3, 4, H, W] in about [0, 1] of one latent frame [B, C, h, w]; `carried`: the last frame that each
        block saw."""
        x, batch = latent, len(latent)
        seen: list[Tensor] = []
        for layer in self.decoder:
            if isinstance(layer, PairBlock):
                video = rearrange(x, "(b f) c h w -> b f c h w", b=batch)
                last = carried[len(seen)].to(video) if carried else torch.zeros_like(video[:, :1])
                seen.append(video[:, -1:].clone())
                x = layer(x, rearrange(torch.cat([last, video[:, :-1]], 1), "b f c h w -> (b f) c h w"))
            else:
                x = layer(x)
        carried[:] = seen
        return rearrange(x, "(b f) c h w -> b c f h w", b=batch)


class DecodedByTiny:
    """An autoencoder whose decoder a tiny one takes the place of."""

    def __init__(self, whole: VideoAutoencoder, tiny: TinyDecoder) -> None:
        self.whole, self.tiny = whole, tiny
        self.temporal_stride, self.spatial_stride = whole.temporal_stride, whole.spatial_stride
        self.first_frame_alone, self.latent_channels = whole.first_frame_alone, whole.latent_channels
        self.lead_frames = sum(isinstance(layer, PairBlock) for layer in tiny.decoder)  # each looks one frame back

    def encode(self, pixels: Tensor) -> Tensor:
        return self.whole.encode(pixels)

    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.whole.encode_stream(pieces)

    def decode(self, latents: Tensor) -> Tensor:
        return next(self.decode_stream([latents]))

    def decode_stream(self, chunks: Iterable[Tensor], carried: list[Any] | None = None) -> Iterator[Tensor]:
        return self.tiny.decode_stream(chunks, carried)


def _is_state(given: object) -> bool:
    return isinstance(given, dict) and all(isinstance(x, Tensor) for x in given.values())
