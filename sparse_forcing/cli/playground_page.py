"""The playground's page, made of gradio: a screen, a prompt that may change while it runs, and settings of a video."""

from __future__ import annotations

import base64
import io
import string
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio
import numpy as np
from PIL import Image

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.memory.config import KINDS
from sparse_forcing.sampling.generation.jobs import MEMORY_KNOBS, GenerateConfig
from sparse_forcing.sampling.generation.settings import resolve_settings
from sparse_forcing.sampling.live import LivePicture, LiveVideo

MAX_MINUTES = 10
MAX_SEED = 2**31 - 1
LOSSLESS_SIDE = 256  # pixels: larger pictures go to the browser as JPEG
FONT = ("system-ui", "sans-serif")  # gradio's own would be fetched from the network
PROMPT = "a large red circle moves right on a black background"


class Playground:
    """What the buttons do, for every browser session, and the page around them."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.videos: dict[str | None, LiveVideo] = {}

    def serve(self, host: str, port: int) -> None:
        """Until interrupted."""
        page = self.page()
        page.launch(
            server_name=host, server_port=port, theme=gradio.themes.Default(font=FONT), footer_links=[],
            show_error=True, prevent_thread_lock=True,
        )  # fmt: skip
        try:
            threading.Event().wait()  # gradio's own waiting swallows signals
        finally:
            for video in list(self.videos.values()):
                video.stop()
            page.close()

    def start(
        self, prompt: str, minutes: float, seed: float | None, memory: str, overlay: bool, request: gradio.Request
    ) -> Iterator[tuple[str, str]]:
        """Every picture of a new video, and the text below it."""
        self.stop(request)
        with _explained():
            config = GenerateConfig(
                seconds=minutes * 60, seed=int(seed or 0), memory=memory,  # type: ignore[arg-type]
                overlay=overlay and memory in MEMORY_KNOBS["persistent_blocks"],
            )  # fmt: skip
            settings = resolve_settings(config, self.pipe)
            video = LiveVideo(self.pipe, prompt, settings, seed=config.seed, overlay=config.overlay)
            self.videos[request.session_hash] = video
            try:
                for picture in video.pictures():
                    remarks = self.pipe.prompt_remarks([picture.prompt])
                    yield picture_html(picture.pixels), status(picture, self.pipe.fps, remarks)
            finally:
                if self.videos.get(request.session_hash) is video:
                    del self.videos[request.session_hash]

    def say(self, prompt: str, request: gradio.Request) -> None:
        """Change the prompt of the video that runs."""
        if (video := self.videos.get(request.session_hash)) is None:
            raise gradio.Error("No video is running yet.", print_exception=False)
        with _explained():
            video.say(prompt)

    def stop(self, request: gradio.Request) -> None:
        """Stop the video that runs, if one does."""
        if video := self.videos.pop(request.session_hash, None):
            video.stop()

    def page(self) -> gradio.Blocks:
        with gradio.Blocks(analytics_enabled=False, title="Sparse Forcing") as page:
            with gradio.Row():
                with gradio.Column(scale=2):
                    screen, line = gradio.HTML(picture_html(None)), gradio.Markdown("Nothing is running.")
                with gradio.Column():
                    prompt = gradio.Textbox(PROMPT, label="Prompt", info="Enter: follow it from the next chunk on")
                    with gradio.Row():
                        begin, change = gradio.Button("Start", variant="primary"), gradio.Button("Change the prompt")
                        end = gradio.Button("Stop")
                    minutes = gradio.Slider(0.1, MAX_MINUTES, value=2, label="Minutes")
                    seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                    memory = gradio.Radio(list(KINDS), value=self.pipe.default_memory.kind, label="Memory")
                    overlay = gradio.Checkbox(label="Light up what is kept (sparse, heavy_hitter)")
            begin.click(
                self.start, [prompt, minutes, seed, memory, overlay], [screen, line], show_progress="hidden",
                concurrency_limit=None, trigger_mode="multiple",
            )  # fmt: skip
            for event in (change.click, prompt.submit):
                event(self.say, [prompt], None, show_progress="hidden")
            end.click(self.stop)
            page.unload(self.stop)
        return page


@contextmanager
def _explained() -> Iterator[None]:
    """Errors become the browser's messages; those that are not ours are printed here, too."""
    try:
        yield
    except Exception as error:
        raise gradio.Error(
            str(error) or type(error).__name__, print_exception=not isinstance(error, SparseForcingError)
        ) from error


def picture_html(pixels: np.ndarray | None) -> str:
    """A picture [H, W, 3] as an element that holds all of it, enlarged without smoothing; None: an empty screen."""
    style = "width:100%;background:#888;border-radius:8px;image-rendering:pixelated"
    if pixels is None:
        return f'<div style="{style};aspect-ratio:1"></div>'
    kind = "PNG" if max(pixels.shape[:2]) <= LOSSLESS_SIDE else "JPEG"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=90)
    return f'<img style="{style}" src="data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}">'


def status(picture: LivePicture, fps: float, remarks: list[str]) -> str:
    """Markdown about the picture that is shown."""
    lines = [
        f"{picture.second:.1f} s of video at {fps:g} frames/s, made at {picture.frames_per_second:.1f} frames/s, "
        f"cache {picture.cache_bytes / 1e6:.1f} MB",
        *(_plain(text) for text in (picture.prompt, *remarks)),
    ]
    return "\n\n".join(lines)


def _plain(text: str) -> str:
    """Markdown that shows the text as it is, in one line."""
    return "".join(f"\\{letter}" if letter in string.punctuation else letter for letter in " ".join(text.split()))
