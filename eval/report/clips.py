"""Clips on the page: which are best and worst, filmstrips of them, and the videos themselves."""

from __future__ import annotations

import base64
import html
import os
import urllib.parse
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image

from sparse_forcing.errors import VideoError
from sparse_forcing.media.video import iter_frames

FRAMES, HEIGHT = 8, 96
EMBED_ONE, EMBED_ALL = 2 << 20, 24 << 20  # bytes of one embedded video, and of all on a page


def rank(results: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Measured videos from best to worst: mean z-score over metrics whose better direction is known."""
    records = [record for record in results["videos"] if "error" not in record]
    scores: dict[int, list[float]] = {number: [] for number in range(len(records))}
    for name, entry in results["metrics"].items():
        if entry["higher_is_better"] is None:
            continue
        known = {
            number: row["value"]
            for number, record in enumerate(records)
            if (row := record["metrics"].get(name)) and row["value"] is not None
        }
        spread = float(np.std(list(known.values()))) if known else 0.0
        if spread > 0:
            sign = 1.0 if entry["higher_is_better"] else -1.0
            mean = float(np.mean(list(known.values())))
            for number, value in known.items():
                scores[number].append(sign * (value - mean) / spread)
    ranked = [(float(np.mean(values)) if values else 0.0, records[number]) for number, values in scores.items()]
    return sorted(ranked, key=lambda pair: -pair[0])


def filmstrip(path: Path, frames: int) -> str | None:
    """An <img> of evenly spaced frames, decoded one at a time; None when the video is gone or damaged."""
    wanted = {round(at) for at in np.linspace(0, max(0, frames - 1), FRAMES)}
    pictures = []
    try:
        for number, frame in enumerate(iter_frames(path, max_frames=frames)):
            if number in wanted:
                image = Image.fromarray(frame)
                width = max(1, round(image.width * HEIGHT / image.height))
                method = Image.Resampling.NEAREST if image.height < HEIGHT else Image.Resampling.LANCZOS
                pictures.append(np.asarray(image.resize((width, HEIGHT), method)))
    except VideoError:
        return None
    strip = np.concatenate([np.pad(picture, ((0, 0), (0, 2), (0, 0)), constant_values=255) for picture in pictures], 1)
    data = base64.b64encode(iio.imwrite("<bytes>", strip, plugin="pillow", extension=".jpeg", quality=85)).decode()
    return f'<img class="strip" alt="{len(pictures)} frames" src="data:image/jpeg;base64,{data}">'


class VideoTags:
    """<video> tags: small files inside the page while there is room, otherwise by path relative to the page."""

    def __init__(self, page: Path, embed: bool) -> None:
        self.folder = page.parent.resolve()
        self.room = EMBED_ALL if embed else 0

    def tag(self, path: Path) -> str:
        """The player of one video, or a note that the file is gone."""
        if not path.is_file():
            return '<span class="note">file not found</span>'
        size = path.stat().st_size
        if path.suffix.lower() == ".mp4" and size <= min(EMBED_ONE, self.room):
            self.room -= size
            source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
        else:
            source = html.escape(urllib.parse.quote(os.path.relpath(path.resolve(), self.folder)))
        return f'<video controls loop muted preload="metadata" src="{source}"></video>'
