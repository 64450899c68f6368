"""A video that is watched while it is made, and the page that shows it (with gradio, where that is installed)."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_forcing.cli import run_module
from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.sampling.live import LiveVideo

FPS, CHUNK = 8.0, 4
SETTINGS: Any = SimpleNamespace(
    height=8, width=8, num_frames=14, num_inference_steps=1, guidance_scale=1.0, memory=MemoryConfig()
)


class Clock:
    """Time that only sleeping moves."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class StubPipeline:
    """Chunks of equal frames, numbered by their brightness, four at most."""

    fps = FPS

    def __init__(self, on_chunk: Callable[[int], None] = lambda index: None) -> None:
        self.on_chunk, self.made = on_chunk, 0

    def stream(self, prompt: str, *, prompt_changes: Callable[[int], str | None], **settings: Any) -> Iterator[Any]:
        if prompt == "refused":
            raise ConfigError("prompt: refused")
        return self._chunks(prompt_changes)

    def _chunks(self, prompt_changes: Callable[[int], str | None]) -> Iterator[Any]:
        for index in range(4):
            if index:
                prompt_changes(index * CHUNK)
            self.on_chunk(index)
            self.made += 1
            frames = np.full((CHUNK, 8, 8, 3), index / 10, np.float32)
            mask = np.zeros((CHUNK, 8, 8), np.float32)
            times = {"seconds": 0.1, "decode_seconds": 0.1}
            yield SimpleNamespace(frames=frames, persistent=mask, cache_bytes=1000 + index, **times)


def live(pipe: Any = None, prompt: str = "a ball", **settings: Any) -> LiveVideo:
    return LiveVideo(pipe or StubPipeline(), prompt, SETTINGS, **settings)


def test_pictures_come_at_their_pace_and_end_at_the_wanted_length() -> None:
    clock = Clock()
    shown = [(clock.now, picture) for picture in live(clock=lambda: clock.now, sleep=clock.sleep).pictures()]
    assert [time for time, _ in shown] == pytest.approx([number / FPS for number in range(14)])
    assert [picture.second for _, picture in shown] == pytest.approx([number / FPS for number in range(14)])
    assert [int(picture.pixels[0, 0, 0]) for _, picture in shown] == [0] * 4 + [26] * 4 + [51] * 4 + [76] * 2
    assert {picture.frames_per_second for _, picture in shown} == {CHUNK / 0.2}
    assert shown[-1][1].cache_bytes == 1003


def test_a_late_picture_delays_those_after_it_instead_of_hurrying_them() -> None:
    clock = Clock()
    times = []
    for picture in live(clock=lambda: clock.now, sleep=clock.sleep).pictures():
        times.append(clock.now)
        if picture.second == 0.5:
            clock.now += 2.0
    assert np.diff(times) == pytest.approx([1 / FPS] * 4 + [2.0] + [1 / FPS] * 8)


def test_a_prompt_is_followed_from_the_next_chunk_that_is_begun() -> None:
    may_go_on = threading.Event()
    video = live(StubPipeline(lambda index: index == 1 and may_go_on.wait(10)), sleep=lambda seconds: None)
    prompts = []
    for picture in video.pictures():
        prompts.append(picture.prompt)
        if len(prompts) == CHUNK:  # the second chunk is being made with the first prompt
            video.say(" a cube ")
            may_go_on.set()
    assert prompts == ["a ball"] * 8 + ["a cube"] * 6
    with pytest.raises(ConfigError, match="prompt is empty"):
        video.say(" ")


def test_who_stops_watching_stops_the_making() -> None:
    pipe = StubPipeline()
    pictures = live(pipe, sleep=lambda seconds: None).pictures()
    next(pictures)
    pictures.close()  # type: ignore[attr-defined]
    time.sleep(0.3)
    assert pipe.made <= 3  # shown, waiting, being made

    video = live(StubPipeline(lambda index: time.sleep(0.05)), sleep=lambda seconds: None)
    seen = 0
    for _ in video.pictures():
        seen += 1
        video.stop()
    assert seen == CHUNK  # what was made is shown


def test_errors_reach_whoever_watches() -> None:
    def fail(index: int) -> None:
        if index == 2:
            raise RuntimeError("out of luck")

    pictures = live(StubPipeline(fail), sleep=lambda seconds: None).pictures()
    with pytest.raises(RuntimeError, match="out of luck"):
        list(pictures)
    for prompt, message in (("", "prompt is empty"), ("refused", "prompt: refused")):
        with pytest.raises(ConfigError, match=message):
            live(prompt=prompt)


def test_persistent_blocks_light_up() -> None:
    frames = [list(live(overlay=lit, sleep=lambda seconds: None).pictures())[4] for lit in (False, True)]
    assert frames[1].pixels.max() == pytest.approx(frames[0].pixels.max() * 0.4, abs=1)


def test_bad_settings_and_a_missing_gradio_are_one_line_before_any_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = [
            (["--port", "0"], "--port must be between"),
            (["--port", "x"], "invalid whole number"),
            (["--port", port], f"--port {port}: cannot listen on 127.0.0.1 ("),
            (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        ]
        for arguments, message in refused:
            assert run_module("sparse_forcing.cli.playground", arguments) == 2
            captured = capsys.readouterr()
            assert captured.err.count("\n") == 1
            assert message in captured.err
    assert run_module("sparse_forcing.cli.playground", ["--port", port]) == 2
    assert 'pip install "sparse-forcing[ui]"' in capsys.readouterr().err


def test_the_page_streams_pictures_and_takes_prompts() -> None:
    playground = pytest.importorskip("sparse_forcing.cli.playground_page", exc_type=ImportError)
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    class Slow(StubPipeline):
        config = SimpleNamespace(height=8, width=8, num_frames=14, sampler=SimpleNamespace(steps=1, guidance_scale=1.0))
        default_memory = MemoryConfig()

        def prompt_remarks(self, prompts: list[str]) -> list[str]:
            return []

    page = playground.build_page(Slow())
    page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(page.local_url, verbose=False)
        job = client.submit("a ball", 0.1, 0, "sparse", False, api_name="/start")
        while not job.outputs():
            time.sleep(0.01)
        client.predict("a *cube*", api_name="/say")
        job.result(timeout=20)
        screens, lines = zip(*job.outputs())
        assert all(screen.startswith("<img") for screen in screens)
        assert lines[0].endswith("a ball")
        assert lines[-1].endswith(r"a \*cube\*")
        with pytest.raises(AppError, match="prompt is empty"):
            client.predict(" ", api_name="/say")
        client.predict(api_name="/stop")
        with pytest.raises(AppError, match="No video is running"):
            client.predict("a ball", api_name="/say")
    finally:
        page.close()


def test_the_line_below_the_picture_shows_a_prompt_as_it_was_typed() -> None:
    page = pytest.importorskip("sparse_forcing.cli.playground_page", exc_type=ImportError)
    picture: Any = SimpleNamespace(second=1.5, frames_per_second=20, cache_bytes=4.5e6, prompt="a *red* <b>")
    line = page.status(picture, 8.0, ["this model does not know: <b>"])
    assert line.startswith("1.5 s of video at 8 frames/s, made at 20.0 frames/s, cache 4.5 MB\n\n")
    assert line.endswith("a \\*red\\* \\<b\\>\n\nthis model does not know\\: \\<b\\>")
