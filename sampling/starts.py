"""What videos go on from: a picture, which is their first frame, or another video; encoded a chunk at a time.

A picture is one latent frame and the first chunk by itself. An autoencoder whose first latent frame holds one pixel
frame (Wan's) encodes it as it is. One whose latent frames all hold several (the embedded models') is given it that many
times over; of these the video shows one.

Shapes: B videos, F frames, f frames of a chunk, H x W pixels; latents [B, f, C, h, w].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.geometry import Start, VideoGeometry
from sparse_forcing.model.vae import VideoAutoencoder


@dataclass(frozen=True, kw_only=True)
class GivenFrames:
    """Frames that videos go on from.

    kind: see `VideoGeometry.timeline`; chunks: float32 [B, f, H, W, 3] in [0, 1], a chunk's at a time; B is 1 where all
    start alike. latent_frames: of all chunks together, None where that is not known beforehand.
    picture: [B, 1, H, W, 3] the frame that the video shows first.
    """

    kind: Start
    chunks: Iterable[np.ndarray]
    latent_frames: int | None
    picture: np.ndarray | None = None


def check_start(image: Any, video: Any, geometry: VideoGeometry, size: tuple[int, int]) -> GivenFrames | None:
    """What a caller gave to start from, checked; None for nothing.

    Args:
        image, video: [H, W, 3] or [F, H, W, 3], uint8 or floats in [0, 1]; at most one of them. A video may have a
            batch dimension in front, one for each prompt, or come in pieces: an iterable of [F, H, W, 3].
        size: height and width they must have.

    Raises:
        ConfigError: pixels of another shape, size or range, or frames that are not whole chunks (of a video in pieces:
            when its end is reached).
    """
    if image is not None and video is not None:
        raise ConfigError("image and video: give one of them")
    if image is None and video is None:
        return None
    if geometry.whole_video:
        raise ConfigError(
            "image and video: these weights make all frames at once and cannot go on from given ones; with "
            "chunk_frames (--chunk-frames) they can, although they were not trained for it"
        )
    if image is not None:
        picture = _pixels("image", image, "HW3", size)[None, None]
        held = picture.repeat(geometry.pixel_frames(1), 1)
        return GivenFrames(kind="picture", chunks=[held], latent_frames=1, picture=picture)
    if isinstance(video, Iterable) and not (hasattr(video, "__array__") or isinstance(video, list | tuple | str)):
        pieces = (_pixels("video", piece, "FHW3", size)[None] for piece in video)
        return GivenFrames(kind="video", chunks=_whole_chunks(pieces, geometry), latent_frames=None)
    frames = _pixels("video", video, "FHW3", size, batched=True)
    frames = frames if frames.ndim == 5 else frames[None]
    count = frames.shape[1]
    chunks = list(_whole_chunks(iter([frames]), geometry))
    return GivenFrames(kind="video", chunks=chunks, latent_frames=geometry.latent_frames(count))


def _whole_chunks(pieces: Iterator[np.ndarray], geometry: VideoGeometry) -> Iterator[np.ndarray]:
    """Pieces [B, F, H, W, 3] of any length, cut anew into chunks: those of a video that begins with the first one."""
    held: list[np.ndarray] = []
    total, wanted = 0, geometry.chunk_pixel_frames
    for piece in pieces:
        held.append(piece)
        total += piece.shape[1]
        while (count := sum(part.shape[1] for part in held)) >= wanted:
            joined = np.concatenate(held, 1) if len(held) > 1 else held[0]
            yield joined[:, :wanted]
            held = [joined[:, wanted:]] if count > wanted else []
            wanted = geometry.temporal_stride * geometry.chunk_frames
    if held or not total:
        whole = geometry.whole_chunk_frames(total) or geometry.chunk_pixel_frames
        raise ConfigError(f"video: {total} frames are not whole chunks; give {whole}, for example")


def _pixels(name: str, given: Any, dims: str, size: tuple[int, int], *, batched: bool = False) -> np.ndarray:
    """Pixels as float32 in [0, 1] of the wanted size; uint8 are divided by 255. `batched`: a batch may be in front."""
    frames = _unit_range(name, given)
    if frames.ndim not in (len(dims), len(dims) + batched) or frames.shape[-1] != 3:
        raise ConfigError(f"{name}: expected [{', '.join(dims)}], got {list(frames.shape)}")
    if frames.shape[-3:-1] != size:
        height, width = frames.shape[-3:-1]
        raise ConfigError(
            f"{name}: {width}x{height} pixels for a video of {size[1]}x{size[0]}; scale it, or set the size"
        )
    return frames


def _unit_range(name: str, given: Any) -> np.ndarray:
    try:
        pixels = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}: not an array of pixels ({str(error).splitlines()[0]:.100})") from error
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ConfigError(f"{name}: expected uint8 or floats in [0, 1], got {pixels.dtype}")
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN, too
        raise ConfigError(f"{name}: values must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}")
    return pixels.astype(np.float32)


class EncodedStart:
    """Latents of given frames, encoded chunk by chunk as they are asked for, and those that a decoder is led in with.

    Args:
        batch: videos that go on from them.
    """

    def __init__(
        self, given: GivenFrames, vae: VideoAutoencoder, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.picture = given.picture
        self._given, self._vae, self._batch, self._device, self._dtype = given, vae, batch, device, dtype
        self._last: deque[Tensor] = deque()

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        pixels = (rearrange(torch.from_numpy(x), "b f h w c -> b c f h w") * 2 - 1 for x in self._given.chunks)
        for encoded in self._vae.encode_stream(part.to(self._device) for part in pixels):
            latents = encoded.transpose(1, 2).to(self._dtype)
            if self._batch % len(latents):
                raise ConfigError(f"video: {len(latents)} videos for {self._batch} prompts; give one, or one for each")
            latents = latents.repeat_interleave(self._batch // len(latents), 0)
            self._last.append(latents)
            while self._last and self._held - self._last[0].shape[1] >= self._vae.lead_frames:
                self._last.popleft()
            yield latents

    @property
    def _held(self) -> int:
        return sum(latents.shape[1] for latents in self._last)

    @property
    def lead(self) -> Tensor | None:
        """The last latents, as many as what is decoded after them depends on; None where it does on none."""
        return torch.cat(list(self._last), 1) if self._last else None
