"""The playground's page, made of gradio: a screen, a prompt that may change while it runs, and settings of a video."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio

from sparse_forcing.cli.playground.pictures import curve_html, picture_html, plain
from sparse_forcing.cli.playground.visitors import GONE, MAX_MINUTES, View, Visitors
from sparse_forcing.cli.playground.worlds import Worlds
from sparse_forcing.errors import SparseForcingError
from sparse_forcing.memory.config import KINDS

FONT = ("system-ui", "sans-serif")  # gradio's own would be fetched from the network
KEPT_SECONDS = 3600  # of files that gradio copied for a download
EXAMPLES = [
    "a large red circle moves right on a black background",
    "a small yellow star spins clockwise on a navy background",
    "a blue ring moves up and a pink square moves left on white",
    "a cyan triangle bounces left and right on a brown background",
]


def serve(visitors: Visitors, host: str, port: int) -> None:
    """Serve the page until interrupted."""
    page = make_page(visitors)
    page.launch(
        server_name=host,
        server_port=port,
        theme=gradio.themes.Default(font=FONT),
        footer_links=[],
        show_error=True,
        prevent_thread_lock=True,
    )
    try:
        threading.Event().wait()  # gradio's own waiting swallows signals
    finally:
        page.close()


class _Buttons:
    """What the buttons do, for the visitor who pressed them."""

    def __init__(self, visitors: Visitors) -> None:
        self.visitors = visitors

    def start(
        self, prompt: Any, minutes: Any, seed: Any, memory: Any, overlay: Any, request: gradio.Request
    ) -> Iterator[tuple[Any, ...]]:
        with _explain_errors():
            for view in self.visitors.start(request.session_hash, prompt, minutes, seed, memory, overlay):
                yield _show(view)

    def say(self, prompt: Any, request: gradio.Request) -> None:
        with _explain_errors():
            self.visitors.say(request.session_hash, prompt)

    def stop(self, request: gradio.Request) -> None:
        self.visitors.stop(request.session_hash)

    def seen(self, request: gradio.Request) -> None:
        self.visitors.seen(request.session_hash)

    def bye(self, request: gradio.Request) -> None:
        self.visitors.bye(request.session_hash)


class _WorldButtons:
    """What the buttons of the worlds do."""

    def __init__(self, worlds: Worlds) -> None:
        self.worlds = worlds

    def pan_back(self, number: Any, place: Any) -> tuple[Any, ...]:
        return self._pan(number, place, -1)

    def pan_on(self, number: Any, place: Any) -> tuple[Any, ...]:
        return self._pan(number, place, 1)

    def _pan(self, number: Any, place: Any, step: int) -> tuple[Any, ...]:
        with _explain_errors():
            place, line, picture = self.worlds.pan(number, place, step)
            return place, line, f'<div style="max-width:20rem">{picture_html(picture)}</div>'

    def go_on(self, number: Any) -> Iterator[tuple[Any, ...]]:
        with _explain_errors():
            for look in self.worlds.go_on(number):
                pictures = (look.way_out, look.way_back)
                yield look.line, *(gradio.skip() if one is None else picture_html(one) for one in pictures)


def _show(view: View) -> tuple[Any, ...]:
    """Screen, line, curve and file; what stays as it is is left out."""
    lines = [view.line] if view.picture is None else [view.line, plain(view.picture.prompt)]
    return (
        gradio.skip() if view.picture is None else picture_html(view.picture.pixels),
        "\n\n".join([*lines, *map(plain, view.remarks)]),
        curve_html(view.points),
        gradio.DownloadButton(value=None if view.file is None else str(view.file), interactive=view.file is not None),
    )


def make_page(visitors: Visitors) -> gradio.Blocks:
    buttons = _Buttons(visitors)
    files = (KEPT_SECONDS, KEPT_SECONDS)
    with gradio.Blocks(analytics_enabled=False, title="Sparse Forcing", delete_cache=files) as page:
        gradio.Markdown("# Sparse Forcing")
        with gradio.Tab("A video"):
            _add_video(buttons, visitors.pipe.default_memory.kind)
        with gradio.Tab("What comes back"):
            _add_worlds(_WorldButtons(Worlds(visitors.pipe, visitors.room)))
        gradio.Timer(GONE / 10).tick(buttons.seen, show_progress="hidden")
        page.unload(buttons.bye)
    return page


def _add_video(buttons: _Buttons, default_memory: str) -> None:
    """The screen and what steers it."""
    gradio.Markdown("Type what the video shows, start it, and change the prompt while it runs.")
    with gradio.Row():
        with gradio.Column(scale=2):
            screen, line = gradio.HTML(picture_html(None)), gradio.Markdown("Nothing is running.")
            curve, file = gradio.HTML(curve_html([])), gradio.DownloadButton("Save the video", interactive=False)
        with gradio.Column():
            prompt = gradio.Textbox(EXAMPLES[0], label="Prompt", info="Enter: follow it from the next chunk on")
            gradio.Examples([[text] for text in EXAMPLES], prompt, label="Examples")
            with gradio.Row():
                begin, change = gradio.Button("Start", variant="primary"), gradio.Button("Change the prompt")
                end = gradio.Button("Stop")
            minutes = gradio.Slider(0.1, MAX_MINUTES, value=2, label="Minutes")
            seed = gradio.Textbox("0", label="Seed", info="the same video as with --seed on the command line")
            memory = gradio.Radio(list(KINDS), value=default_memory, label="Memory")
            overlay = gradio.Checkbox(label="Light up what is kept (sparse, heavy_hitter)")
    # Values come as they are: what cannot be used is refused by `read_form`, in its words.
    begin.click(
        buttons.start,
        [prompt, minutes, seed, memory, overlay],
        [screen, line, curve, file],
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="multiple",
        preprocess=False,
    )
    for event in (change.click, prompt.submit):
        event(buttons.say, [prompt], None, show_progress="hidden", preprocess=False, concurrency_limit=None)
    end.click(buttons.stop)


def _add_worlds(buttons: _WorldButtons) -> None:
    """A world to pan, and the way back by two memories."""
    gradio.Markdown(
        "A camera goes along a strip of objects, turns at a wall and comes back. Pan along the way out; then two "
        "memories draw the way back. The row of pictures lights up what the sparse memory keeps of the way out."
    )
    place = gradio.State(0)
    with gradio.Row():
        number = gradio.Textbox("0", label="World", info="a whole number")
        back, on = gradio.Button("\u25c0 Pan back"), gradio.Button("Pan on \u25b6")
        begin = gradio.Button("Go back by memory", variant="primary")
    line = gradio.Markdown("Nothing is shown yet.")
    way_out, screen = gradio.HTML(""), gradio.HTML("")
    for button, pan in ((back, buttons.pan_back), (on, buttons.pan_on)):
        button.click(pan, [number, place], [place, line, screen], show_progress="hidden")
    begin.click(
        buttons.go_on,
        [number],
        [line, way_out, screen],
        show_progress="hidden",
        concurrency_limit=None,
        preprocess=False,
    )


@contextmanager
def _explain_errors() -> Iterator[None]:
    """Errors become the browser's messages; those that are not ours are printed here, too."""
    try:
        yield
    except Exception as error:
        raise gradio.Error(
            str(error) or type(error).__name__, print_exception=not isinstance(error, SparseForcingError)
        ) from error
