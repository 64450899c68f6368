"""Video files with captions: found, decoded within bounds and in full, brought to a model's size and frame rate.

Decoding happens in the training process. There are no worker processes that could die or hang: a clip is a function of
its number, so a slow disk or decoder is answered by preparing latents once (`sparse-forcing data encode`), which
training then only reads, and not by a pool of workers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError, VideoError
from sparse_forcing.files import parse_json
from sparse_forcing.media.video import iter_frames, probe
from sparse_forcing.model.vae import VideoAutoencoder
from sparse_forcing.sampling.generation.prompts import MAX_FILE_BYTES, check_prompt


@dataclass(frozen=True)
class CaptionedVideo:
    path: Path
    prompt: str


def list_videos(path: Path) -> list[CaptionedVideo]:
    """Videos of a folder (x.mp4 beside x.txt) or of a JSONL manifest ({"video": ..., "prompt": ...} per line).

    Raises:
        ConfigError: nothing there, a video without a caption, or a line that is not an entry. Nothing is decoded.
    """
    if path.is_dir():
        manifest = path / "manifest.jsonl"
        found = _from_manifest(manifest) if manifest.is_file() else _from_folder(path)
    else:
        found = _from_manifest(path)
    if not found:
        raise ConfigError(f"{path}: holds no videos (x.mp4 with its caption in x.txt, or a manifest.jsonl)")
    return found


def _from_folder(folder: Path) -> list[CaptionedVideo]:
    return [
        CaptionedVideo(video, check_prompt(_text(video.with_suffix(".txt")), str(video.with_suffix(".txt"))))
        for video in sorted(folder.glob("*.mp4"))
    ]


def _from_manifest(path: Path) -> list[CaptionedVideo]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        entry: Any = parse_json(line, source=where)
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("video", "prompt")):
            raise ConfigError(f'{where}: expected {{"video": "file.mp4", "prompt": "..."}}')
        found.append(CaptionedVideo(path.parent / entry["video"], check_prompt(entry["prompt"], where)))
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error


def read_clip(path: Path, *, frames: int, size: tuple[int, int], fps: float) -> Tensor:
    """The first `frames` frames of a video at `fps`, filling `size` (height, width): [3, F, H, W] in [-1, 1].

    A faster video loses frames, a slower one repeats none: it is refused. The picture is scaled to cover the size and
    its middle is cut out. The whole file is decoded, because only its end tells whether it is complete.

    Raises:
        VideoError: damaged, cut short, too short or too slow.
    """
    info = probe(path)
    if info.fps < fps * 0.99:
        raise VideoError(f"{path}: has {info.fps:g} frames per second, fewer than the {fps:g} asked for")
    wanted = [round(index * info.fps / fps) for index in range(frames)]
    kept: list[np.ndarray] = []
    for index, frame in enumerate(iter_frames(path)):
        if len(kept) < frames and index == wanted[len(kept)]:
            kept.append(_cover(frame, size))
    if len(kept) < frames:
        raise VideoError(f"{path}: too short: {frames} frames at {fps:g} per second need {wanted[-1] + 1} of its own")
    return torch.from_numpy(np.stack(kept)).permute(3, 0, 1, 2).float() / 127.5 - 1


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
    def counting(self, path: Path) -> Iterator[None]:
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
