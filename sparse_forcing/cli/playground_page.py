"""The playground's page, made of gradio: a screen, a prompt that may change while it runs, and settings of a video."""

from __future__ import annotations

import base64
import io
import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio
import numpy as np
from PIL import Image

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.memory.config import KINDS
from sparse_forcing.sampling.jobs import GenerateConfig
from sparse_forcing.sampling.live import LivePicture, LiveVideo
from sparse_forcing.sampling.settings import resolve_settings

MAX_MINUTES = 60
LOSSLESS_SIDE = 256  # pixels: larger pictures go to the browser as JPEG
FONT = ("system-ui", "sans-serif")  # gradio's own would be fetched from the network
PROMPT = "a large red circle moves right on a black background"


def serve(page: gradio.Blocks, host: str, port: int) -> None:
    """Until interrupted. Raises OSError when the address cannot be listened on."""
    page.launch(server_name=host, server_port=port, theme=gradio.themes.Default(font=FONT), footer_links=[])


def build_page(pipe: Any) -> Any:
    """The page as gradio's Blocks."""
    videos: dict[str | None, LiveVideo] = {}  # by browser session

    def stop(request: gradio.Request) -> None:
        if video := videos.pop(request.session_hash, None):
            video.stop()

    def start(
        prompt: str, minutes: float, seed: float, memory: str, overlay: bool, request: gradio.Request
    ) -> Iterator[tuple[str, str]]:
        stop(request)
        with _explained():
            config = GenerateConfig(seconds=minutes * 60, seed=int(seed), memory=memory, overlay=overlay)  # type: ignore[arg-type]
            video = LiveVideo(pipe, prompt, resolve_settings(config, pipe), seed=config.seed, overlay=overlay)
            videos[request.session_hash] = video
            for picture in video.pictures():
                yield picture_html(picture.pixels), status(picture, pipe.fps, pipe.prompt_remarks([picture.prompt]))

    def say(prompt: str, request: gradio.Request) -> None:
        if (video := videos.get(request.session_hash)) is None:
            raise gradio.Error("No video is running yet.", print_exception=False)
        with _explained():
            video.say(prompt)

    with gradio.Blocks(analytics_enabled=False, title="Sparse Forcing") as page:
        with gradio.Row():
            with gradio.Column(scale=2):
                screen, line = gradio.HTML(picture_html(None)), gradio.Markdown("Nothing is running.")
            with gradio.Column():
                prompt = gradio.Textbox(PROMPT, label="Prompt", info="Enter: follow it from the next chunk on", lines=1)
                with gradio.Row():
                    begin, change = gradio.Button("Start", variant="primary"), gradio.Button("Change the prompt")
                    end = gradio.Button("Stop")
                minutes = gradio.Slider(0.1, MAX_MINUTES, value=2, label="Minutes")
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
                memory = gradio.Radio(list(KINDS), value=pipe.default_memory.kind, label="Memory")
                overlay = gradio.Checkbox(label="Light up the persistent blocks")
        begin.click(start, [prompt, minutes, seed, memory, overlay], [screen, line], show_progress="hidden")
        for event in (change.click, prompt.submit):
            event(say, [prompt], None, show_progress="hidden")
        end.click(stop)
        page.unload(stop)
    return page


@contextmanager
def _explained() -> Iterator[None]:
    """Our own errors become the browser's messages."""
    try:
        yield
    except SparseForcingError as error:
        raise gradio.Error(str(error), print_exception=False) from error


def picture_html(pixels: np.ndarray | None) -> str:
    """A picture [H, W, 3] as an element that holds all of it, enlarged without smoothing; None: an empty screen."""
    style = "width:100%;aspect-ratio:1;background:#888;border-radius:8px;image-rendering:pixelated"
    if pixels is None:
        return f'<div style="{style}"></div>'
    kind = "PNG" if max(pixels.shape[:2]) <= LOSSLESS_SIDE else "JPEG"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=90)
    style = style.replace("aspect-ratio:1", "height:auto")
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
    """Markdown that shows the text as it is."""
    return "".join(f"\\{letter}" if letter in string.punctuation else letter for letter in text)
