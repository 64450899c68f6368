"""Latent chunks to frames, as they come: decoded beside the rollout where the device can do two things at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sparse_forcing.memory import RolloutMemory
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.sampling.rollout import RolloutChunk, no_state
from sparse_forcing.sampling.starts import EncodedStart


def no_map(chunk: int) -> None:
    """Of a chunk whose memory is elsewhere."""


@dataclass(frozen=True)
class VideoChunk:
    """Frames as soon as they exist.

    frames: float32 [F, H, W, 3] in [0, 1] ([B, F, H, W, 3] for a list of prompts), those of the first chunk after the
    picture that the video starts from; latents: [B, f, C, h, w] that were generated; seconds: model time;
    persistent: [F, H, W] in [0, 1], where the persistent blocks of a sparse memory come from, or None;
    persistent_of: the same for those of one chunk alone, by its number in the rollout, where chunks that were given
        count, too; good until the next chunk is asked for.
    state: what `pipe.stream` goes on from with the chunk after this one (`resumed`); see `RolloutChunk.state`.
    """

    index: int
    frames: np.ndarray
    latents: Tensor
    seconds: float
    decode_seconds: float
    cache_bytes: int
    persistent: np.ndarray | None
    persistent_of: Callable[[int], np.ndarray | None] = field(default=no_map, repr=False, compare=False)
    state: Callable[[], dict[str, Any]] = field(default=no_state, repr=False, compare=False)


class SideStream:
    """A second CUDA stream for work that nothing on the current one waits for; elsewhere there is one stream of work.

    Between `enter` and `leave` everything is launched on it.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._main: torch.cuda.Stream | None = None

    def enter(self, *inputs: Tensor) -> None:
        """`inputs` were made on the current stream, which may forget them before this one has read them; without any
        there is nothing to wait for."""
        if self._side is None or self._main is not None:
            return
        self._main = torch.cuda.current_stream(self._side.device)
        if inputs:
            self._side.wait_stream(self._main)
        for x in inputs:
            x.record_stream(self._side)
        torch.cuda.set_stream(self._side)

    def leave(self) -> None:
        if self._main is not None:
            torch.cuda.set_stream(self._main)
            self._main = None


@torch.no_grad()
def decode_chunks(
    vae: VideoAutoencoder,
    parts: Iterator[RolloutChunk],
    memory: RolloutMemory,
    *,
    count: int,
    device: torch.device,
    given: EncodedStart | None,
    single: bool,
    not_finite: Callable[[int], Exception],
    resumed: Mapping[str, Any] | None = None,
) -> Iterator[VideoChunk]:
    """Decode the `count` chunks of a rollout, timing model and decoder apart.

    On a GPU the decoder works on a stream of its own while the clean pass runs, so a chunk is handed out when both have
    been launched and the decoder is done; elsewhere before the clean pass.

    Args:
        memory: of the rollout. given: what the rollout takes first, whose last latents lead the decoder in, and whose
            picture is the first frame of the first chunk. single: leave out the dimension of the batch.
        not_finite: what to raise for a chunk of this number with NaN or infinity in it.
        resumed: state of a chunk (`VideoChunk.state`) that the rollout goes on from, and the decoder with it.
    """
    carried: list[Any] = [] if resumed is None else list(resumed["decoder"])
    arrived: list[tuple[RolloutChunk, float]] = []
    side = SideStream(device)

    stream = vae.decode_stream(_hand_over(parts, given, arrived, side), carried)
    try:
        for pixels in stream:
            if not arrived:  # of what leads in
                continue
            part, came = arrived.pop()
            finite = part.latents.isfinite().all() & pixels.isfinite().all()
            shown = rearrange(((pixels.float() + 1) / 2).clamp(0, 1), "b c f h w -> b f h w c")
            side.leave()
            persistent_of = partial(_map_to_pixels, memory, tuple(shown.shape[1:4]))
            persistent = persistent_of(None)
            if device.type == "cuda" and part.index < count - 1:
                part.remember()
            frames = _on_host(shown, side)
            if not bool(_on_host(finite, side)):
                raise not_finite(part.index)
            if given is not None and given.picture is not None and part.index == 0:
                frames, persistent = _with_picture(given.picture, frames, persistent)
            yield VideoChunk(
                index=part.index,
                frames=frames[0] if single else frames,
                latents=part.latents,
                seconds=part.seconds,
                decode_seconds=time.perf_counter() - came,
                cache_bytes=part.cache_bytes,
                persistent=persistent,
                persistent_of=persistent_of,
                state=partial(_state, part, carried),
            )
    finally:
        side.leave()


def _hand_over(
    parts: Iterator[RolloutChunk],
    given: EncodedStart | None,
    arrived: list[tuple[RolloutChunk, float]],
    side: SideStream,
) -> Iterator[Tensor]:
    """Latents [B, C, f, h, w] for the decoder, after those that lead it in; `arrived` tells which chunk and when."""
    for part in parts:
        if given is not None and part.index == 0 and given.lead is not None:
            yield given.lead.transpose(1, 2)
        arrived.append((part, time.perf_counter()))
        side.enter(part.latents)
        yield part.latents.transpose(1, 2)


def _with_picture(
    picture: np.ndarray, frames: np.ndarray, persistent: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Frames [B, F, H, W, 3] after a picture [B or 1, 1, H, W, 3], and the same of the map of what persists."""
    frames = np.concatenate([picture.repeat(len(frames) // len(picture), 0), frames], 1)
    return frames, None if persistent is None else np.concatenate([persistent[:1], persistent])


def _state(part: RolloutChunk, carried: list[Any]) -> dict[str, Any]:
    """The rollout's state, and the decoder's."""
    return {**part.state(), "decoder": list(carried)}


@torch.no_grad()
def skip_decoding(parts: Iterator[RolloutChunk], size: tuple[int, int], *, single: bool) -> Iterator[VideoChunk]:
    """The chunks of a rollout that another process decodes: videos of this size without frames."""
    for part in parts:
        frames = np.empty((len(part.latents), 0, *size, 3), np.float32)
        yield VideoChunk(
            index=part.index,
            frames=frames[0] if single else frames,
            latents=part.latents,
            seconds=part.seconds,
            decode_seconds=0.0,
            cache_bytes=part.cache_bytes,
            persistent=None,
        )


def _on_host(frames: Tensor, side: SideStream) -> np.ndarray:
    """Copied by the stream that decoded them: it does not wait for the clean pass."""
    side.enter()
    try:
        return frames.cpu().numpy()
    finally:
        side.leave()


def _map_to_pixels(memory: RolloutMemory, size: tuple[int, ...], chunk: int | None) -> np.ndarray | None:
    """The memory's map [f, rows, cols] of what persists as [F, H, W], by repetition."""
    tokens = memory.persistent_map(chunk)
    if tokens is None:
        return None
    return torch.nn.functional.interpolate(tokens[None, None], size=size, mode="nearest")[0, 0].cpu().numpy()
