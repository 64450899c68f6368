"""Video files with captions: found, decoded within bounds and in full, brought to a model's size and frame rate.

Decoding happens in the training process. There are no worker processes that could die or hang: a clip is a function of
its number, so a slow disk or decoder is answered by preparing latents once (`sparse-forcing data encode`), which
training then only reads, and not by a pool of workers.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sparse_forcing.errors import ConfigError, VideoError
from sparse_forcing.files import is_file, read_json, sha256_file
from sparse_forcing.media.listing import Row, folder_manifest, list_folder, read_caption, read_rows
from sparse_forcing.media.video import iter_frames, probe
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.sampling.generation.prompts import check_prompt


@dataclass(frozen=True)
class CaptionedVideo:
    path: Path
    prompt: str


def list_videos(path: Path) -> list[CaptionedVideo]:
    """Videos of a manifest, or of a folder with a caption for each: x.txt beside x.mp4, or the x.json of `generate`.

    Raises:
        ConfigError: nothing there, a video without a caption, or a row that is not an entry. Nothing is decoded.
    """
    manifest = folder_manifest(path) if path.is_dir() else path
    if manifest is None:
        found = [CaptionedVideo(video, _caption(video)) for video in list_folder(path)]
    else:
        found = [CaptionedVideo(row.video, _prompt(row)) for row in read_rows(manifest)]
    if not found:
        raise ConfigError(f"{path}: holds no videos (x.mp4 with its caption in x.txt, or a manifest.jsonl)")
    return found


def _prompt(row: Row) -> str:
    prompt = row.fields.get("prompt")
    if not isinstance(prompt, str):
        raise ConfigError(f'{row.where}: expected {{"video": "file.mp4", "prompt": "..."}}, with a text as prompt')
    return check_prompt(prompt, row.where)


def _caption(video: Path) -> str:
    caption, sidecar = video.with_suffix(".txt"), video.with_suffix(".json")
    if is_file(sidecar, ConfigError) and not is_file(caption, ConfigError):
        record = read_json(sidecar)
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if isinstance(prompt, str):
            return check_prompt(prompt, str(sidecar))
    return check_prompt(read_caption(caption), str(caption))


def content_digests(videos: Iterable[CaptionedVideo]) -> list[str | None]:
    """SHA-256 of each file, which says more than its name; None where it cannot be read."""
    digests: list[str | None] = []
    for video in videos:
        try:
            digests.append(sha256_file(video.path))
        except (OSError, ValueError):
            digests.append(None)
    return digests


def videos_digest(videos: Iterable[CaptionedVideo]) -> str:
    """One SHA-256 of what is in some videos and of their prompts."""
    videos = list(videos)
    lines = [f"{digest} {video.prompt!r}" for digest, video in zip(content_digests(videos), videos)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_clip(path: Path, *, frames: int, size: tuple[int, int], fps: float) -> Tensor:
    """The first `frames` frames of a video, at `fps` by their time stamps, filling `size`: [3, F, H, W] in [-1, 1].

    A faster video loses frames, a slower one repeats none: it is refused. The picture is scaled to cover the size
    (height, width), and its middle is cut out. The whole file is decoded: only its end tells whether it is complete.

    Raises:
        VideoError: damaged, cut short, too short or too slow.
    """
    info = probe(path)
    if info.fps < fps * 0.99:
        raise VideoError(f"{path}: has {info.fps:g} frames per second, fewer than the {fps:g} asked for")
    kept: list[np.ndarray] = []
    for frame in iter_frames(path, fps=fps):
        if len(kept) < frames:
            kept.append(_cover(frame, size))
    if len(kept) < frames:
        raise VideoError(f"{path}: too short: {frames / fps:g} s are needed, it has {info.duration:g}")
    return rearrange(torch.from_numpy(np.stack(kept)), "f h w c -> c f h w").float() / 127.5 - 1


def _cover(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 [H, W, 3] until it covers `size`, then cut its middle out."""
    height, width = size
    if frame.shape[:2] != size:
        from PIL import Image

        scale = max(height / frame.shape[0], width / frame.shape[1])
        scaled = (max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale)))
        frame = np.asarray(Image.fromarray(frame).resize(scaled, Image.Resampling.BICUBIC))
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return frame[top : top + height, left : left + width]


@torch.no_grad()
def encode_pixels(vae: VideoAutoencoder, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] -> latents at pipeline level [B, f, C, h, w], where the autoencoder is."""
    assert isinstance(vae, torch.nn.Module)
    where = next((x.device for x in (*vae.parameters(), *vae.buffers())), pixels.device)
    return vae.encode(pixels.to(where)).transpose(1, 2)


class BadSamples:
    """Files that could not be used: each is named once on stderr; more of them than the budget ends the run."""

    def __init__(self, budget: int, known: tuple[str, ...] = ()) -> None:
        self.budget, self.files = budget, set(known)

    def __contains__(self, path: Path) -> bool:
        return str(path) in self.files

    @contextmanager
    def count_failures(self, path: Path) -> Iterator[None]:
        """Turn a VideoError of the block into a skipped file. Raises ConfigError past the budget."""
        try:
            yield
        except VideoError as error:
            self.files.add(str(path))
            print(
                f"skipped bad sample {len(self.files)} of at most {self.budget}: {error}", file=sys.stderr, flush=True
            )
            if len(self.files) > self.budget:
                raise ConfigError(
                    f"{len(self.files)} bad samples exceed max_bad_samples {self.budget}; the last: {error}"
                ) from error
