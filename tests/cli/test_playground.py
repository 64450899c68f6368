"""A video that is watched while it is made, and the page that shows it (with gradio, where that is installed)."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_forcing.cli import run_module
from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.sampling.live import LiveVideo

ROOT = Path(__file__).resolve().parents[2]
FPS, CHUNK = 8.0, 4
SETTINGS: Any = SimpleNamespace(
    height=8, width=16, num_frames=14, num_inference_steps=3, guidance_scale=2.0, memory=MemoryConfig()
)


class Clock:
    """Time that only sleeping moves."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class StubPipeline:
    """Four chunks of equal frames, numbered by their brightness; remembers what it was told."""

    fps = FPS
    config = SimpleNamespace(height=8, width=8, num_frames=14, sampler=SimpleNamespace(steps=1, guidance_scale=1.0))
    default_memory = MemoryConfig()

    def __init__(self, on_chunk: Callable[[int], Any] = lambda index: None) -> None:
        self.on_chunk = on_chunk
        self.told: dict[str, Any] = {}
        self.prompts: list[str] = []

    def stream(self, prompt: str, *, generator: Any, prompt_changes: Any, **settings: Any) -> Iterator[Any]:
        if prompt == "refused":
            raise ConfigError("prompt: refused")
        self.told = settings | {"seed": generator.initial_seed()}
        return self._chunks(prompt, prompt_changes)

    def _chunks(self, prompt: str, prompt_changes: Callable[[int], str | None]) -> Iterator[Any]:
        for index in range(4):
            prompt = (prompt_changes(index * CHUNK) if index else None) or prompt
            self.on_chunk(index)
            self.prompts.append(prompt)
            frames, mask = np.full((CHUNK, 8, 8, 3), index / 10, np.float32), np.zeros((CHUNK, 8, 8), np.float32)
            times = {"seconds": 0.1, "decode_seconds": 0.3}
            yield SimpleNamespace(frames=frames, persistent=mask, cache_bytes=1000 + index, **times)

    def prompt_remarks(self, prompts: list[str]) -> list[str]:
        return []


def live(pipe: Any = None, prompt: str = "a ball", **settings: Any) -> LiveVideo:
    return LiveVideo(pipe or StubPipeline(), prompt, SETTINGS, **{"sleep": lambda seconds: None, **settings})


def makers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "live video"]


def all_makers_end(seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while makers() and time.monotonic() < until:
        time.sleep(0.01)
    return not makers()


def test_pictures_come_at_their_pace_and_end_at_the_wanted_length() -> None:
    clock = Clock()
    shown = [(clock.now, picture) for picture in live(clock=lambda: clock.now, sleep=clock.sleep).pictures()]
    assert [time for time, _ in shown] == pytest.approx([number / FPS for number in range(14)])
    assert [picture.second for _, picture in shown] == pytest.approx([number / FPS for number in range(14)])
    assert [int(picture.pixels[0, 0, 0]) for _, picture in shown] == [0] * 4 + [26] * 4 + [51] * 4 + [76] * 2
    assert {picture.frames_per_second for _, picture in shown} == {CHUNK / 0.4}
    assert shown[-1][1].cache_bytes == 1003


def test_a_late_picture_delays_those_after_it_instead_of_hurrying_them() -> None:
    clock = Clock()
    times = []
    for picture in live(clock=lambda: clock.now, sleep=clock.sleep).pictures():
        times.append(clock.now)
        if picture.second == 0.5:
            clock.now += 2.0
    assert np.diff(times) == pytest.approx([1 / FPS] * 4 + [2.0] + [1 / FPS] * 8)


def test_the_pipeline_gets_every_setting() -> None:
    pipe = StubPipeline()
    assert len(list(live(pipe, seed=7).pictures())) == 14
    assert pipe.told == vars(SETTINGS) | {"seed": 7}


def test_a_prompt_is_followed_from_the_next_chunk_that_is_begun() -> None:
    may_go_on = threading.Event()
    pipe = StubPipeline(lambda index: index == 1 and may_go_on.wait(10))
    video = live(pipe)
    shown = []
    for picture in video.pictures():
        shown.append(picture.prompt)
        if len(shown) == CHUNK:  # the second chunk is being made with the first prompt
            video.say(" a cube ")
            may_go_on.set()
    assert shown == ["a ball"] * 8 + ["a cube"] * 6
    assert pipe.prompts == ["a ball"] * 2 + ["a cube"] * 2
    with pytest.raises(ConfigError, match="prompt is empty"):
        video.say(" ")


def test_a_prompt_that_stays_is_not_encoded_again() -> None:
    said = []

    class Asked(StubPipeline):
        def _chunks(self, prompt: str, prompt_changes: Callable[[int], str | None]) -> Iterator[Any]:
            return super()._chunks(prompt, lambda frame: said.append(prompt_changes(frame)))

    video = live(Asked())
    video.say("a cube")
    assert {picture.prompt for picture in video.pictures()} == {"a cube"}
    assert said == [None] * 3


def test_who_stops_watching_stops_the_making_and_frees_it() -> None:
    video = live()
    pictures = video.pictures()
    next(pictures)
    pictures.close()  # type: ignore[attr-defined]
    assert all_makers_end()
    gc.collect()
    gc.disable()
    try:
        video = live()
        next(pictures := video.pictures())
        video.stop()
        assert list(pictures) == []
        assert all_makers_end()
        gone = weakref.ref(video)
        del video, pictures
        assert gone() is None  # at once: a cache may take all memory until the collector looks
    finally:
        gc.enable()


def test_the_maker_is_waited_for_at_exit_and_then_ends() -> None:
    """Also where the watching thread would not be: torch aborts when the interpreter ends under it."""
    code = (
        "import sys, threading, time; sys.path.insert(0, sys.argv[1])\n"
        "from tests.cli.test_playground import StubPipeline, live\n"
        "video = live(StubPipeline(lambda index: time.sleep(0.2)), sleep=time.sleep)\n"
        "threading.Thread(target=lambda: next(video.pictures()), daemon=True).start()\n"
        "time.sleep(0.1)\n"
        "(maker,) = (thread for thread in threading.enumerate() if thread.name == 'live video')\n"
        "sys.exit(7 if maker.daemon else 143)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr


def test_errors_reach_whoever_watches() -> None:
    def fail(index: int) -> None:
        if index == 2:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        list(live(StubPipeline(fail)).pictures())
    with pytest.raises(ConfigError, match="prompt: refused"):
        list(live(prompt="refused").pictures())
    with pytest.raises(ConfigError, match="prompt is empty"):
        live(prompt="")
    assert all_makers_end()


def test_persistent_blocks_light_up() -> None:
    frames = [list(live(overlay=lit).pictures())[4] for lit in (False, True)]
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


@pytest.fixture
def page() -> Any:
    return pytest.importorskip("sparse_forcing.cli.playground_page", exc_type=ImportError)


@pytest.fixture
def served(page: Any) -> Iterator[tuple[StubPipeline, Any]]:
    """A pipeline behind a page on a local port, and a client of it."""
    from gradio_client import Client

    pipe = StubPipeline()
    blocks = page.Playground(pipe).page()
    blocks.launch(prevent_thread_lock=True, quiet=True, show_error=True)
    try:
        yield pipe, Client(blocks.local_url, verbose=False)
    finally:
        blocks.close()


def test_the_page_streams_pictures_and_takes_prompts(served: tuple[StubPipeline, Any]) -> None:
    from gradio_client.exceptions import AppError

    pipe, client = served
    job = client.submit("a ball", 0.2, 5, "window", False, api_name="/start")
    while not job.outputs():
        time.sleep(0.01)
    client.predict("a *cube*\n    <b>", api_name="/say")
    job.result(timeout=20)
    screens, lines = zip(*job.outputs())
    assert all(screen.startswith("<img") and "image/png" in screen for screen in screens)
    assert lines[0].endswith("a ball")
    assert lines[-1].endswith(r"a \*cube\* \<b\>")
    assert pipe.told["num_frames"] == 0.2 * 60 * FPS
    assert (pipe.told["seed"], pipe.told["memory"].kind) == (5, "window")
    with pytest.raises(AppError, match="No video is running"):  # it ended
        client.predict("a ball", api_name="/say")
    job = client.submit("a ball", 0.2, None, "sparse", True, api_name="/start")
    while not job.outputs():
        time.sleep(0.01)
    with pytest.raises(AppError, match="prompt is empty"):
        client.predict(" ", api_name="/say")
    client.predict(api_name="/stop")
    job.result(timeout=20)
    assert len(job.outputs()) < 14
    assert all_makers_end()


def test_a_second_start_replaces_the_first_and_errors_are_shown(served: tuple[StubPipeline, Any]) -> None:
    from gradio_client.exceptions import AppError

    pipe, client = served
    first = client.submit("a ball", 0.2, 0, "sparse", False, api_name="/start")
    while not first.outputs():
        time.sleep(0.01)
    second = client.submit("a cube", 0.2, 0, "sparse", False, api_name="/start")
    second.result(timeout=20)
    assert first.done()
    assert len(first.outputs()) < 14 <= len(second.outputs())

    def fail(index: int) -> None:
        raise RuntimeError("out of memory")

    pipe.on_chunk = fail
    with pytest.raises(AppError, match="out of memory"):
        client.predict("a ball", 0.2, 0, "sparse", False, api_name="/start")


def test_enter_changes_the_prompt_and_leaving_the_page_stops_the_video(page: Any) -> None:
    blocks = page.Playground(StubPipeline()).page()
    events = [(event, block) for f in blocks.fns.values() for block, event in f.targets if f.name in ("say", "stop")]
    assert sorted(event for event, _ in events) == ["click", "click", "submit", "unload"]


def test_pictures_are_kept_exactly_while_they_are_small(page: Any) -> None:
    assert "image/png" in page.picture_html(np.zeros((8, 256, 3), np.uint8))
    assert "image/jpeg" in page.picture_html(np.zeros((8, 257, 3), np.uint8))


def test_the_line_below_the_picture_shows_a_prompt_as_it_was_typed(page: Any) -> None:
    picture: Any = SimpleNamespace(second=1.5, frames_per_second=20, cache_bytes=4.5e6, prompt="a *red* <b>")
    line = page.status(picture, 8.0, ["this model does not know: <b>"])
    assert line.startswith("1.5 s of video at 8 frames/s, made at 20.0 frames/s, cache 4.5 MB\n\n")
    assert line.endswith("a \\*red\\* \\<b\\>\n\nthis model does not know\\: \\<b\\>")
