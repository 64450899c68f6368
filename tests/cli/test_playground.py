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

from sparse_forcing.cli import main
from sparse_forcing.cli.playground.pictures import curve_html, picture_html, plain
from sparse_forcing.cli.playground.visitors import Room, View, Visitors, read_form
from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.media.video import read_video
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.sampling import live as live_module
from sparse_forcing.sampling.live import LivePicture, LiveVideo, Stall

ROOT = Path(__file__).resolve().parents[2]
FPS, CHUNK = 8.0, 4
SETTINGS: Any = SimpleNamespace(
    height=8, width=16, num_frames=14, num_inference_steps=3, guidance_scale=2.0, memory=MemoryConfig()
)
SIZES = {"scale": 1, "prompt_changes": {}}


class Clock:
    """Time that only sleeping moves."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class StubPipeline:
    """Four chunks of equal frames, numbered by their brightness; remembers what it was told."""

    fps = FPS
    defaults = PipelineConfig(height=8, width=8, num_frames=14, sampler=SamplerConfig(steps=1))
    geometry = SimpleNamespace(whole_video=False)
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
    assert pipe.told == vars(SETTINGS) | {"seed": 7, "reserve_cache": False}


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
            (["--host", "a" * 70], "cannot listen on aaa"),
            (["--cache-gigabytes", "0"], "--cache-gigabytes must be above 0"),
        ]
        for arguments, message in refused:
            assert main(["playground", *arguments]) == 2
            captured = capsys.readouterr()
            assert captured.err.count("\n") == 1
            assert message in captured.err
    assert main(["playground", "--port", port]) == 2
    assert 'pip install "sparse-forcing[ui]"' in capsys.readouterr().err


def test_a_video_that_nobody_reads_ends_and_frees_its_room() -> None:
    left = threading.Event()
    video = live(patience=0.2, on_end=left.set)
    events = video.watch()
    next(events)
    assert left.wait(10)
    assert all_makers_end()
    assert video.ended == "unread"
    assert len(list(events)) < 13  # what was made is shown; then it is over


def test_a_watcher_who_waits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "STALL", 0.15)
    told = threading.Event()
    events = []
    for event in live(StubPipeline(lambda index: index == 2 and told.wait(10))).watch():
        events.append(event)
        if isinstance(event, Stall):
            told.set()
    assert any(isinstance(event, Stall) and event.seconds >= 0.15 for event in events)
    assert sum(isinstance(event, LivePicture) for event in events) == 14


def test_the_video_can_be_saved_also_when_it_was_stopped(tmp_path: Path) -> None:
    settings = SimpleNamespace(**vars(SETTINGS) | SIZES)
    whole = LiveVideo(StubPipeline(), "a", settings, sleep=lambda seconds: None, save_to=tmp_path / "whole.mp4")  # type: ignore[arg-type]
    assert len(list(whole.pictures())) == 14
    assert all_makers_end()
    assert whole.ended == "finished"
    assert read_video(tmp_path / "whole.mp4")[0].shape == (14, 8, 8, 3)
    part = LiveVideo(StubPipeline(), "a", settings, sleep=lambda seconds: None, save_to=tmp_path / "part.mp4")  # type: ignore[arg-type]
    next(pictures := part.pictures())
    pictures.close()  # type: ignore[attr-defined]
    assert all_makers_end()
    assert part.ended == "stopped"
    assert 4 <= len(read_video(tmp_path / "part.mp4")[0]) < 14


def test_room_is_given_in_order_and_never_exceeded() -> None:
    room = Room(10)
    places = [room.ask(size) for size in (6, 5, 4, 3)]
    assert [place.number for place in places] == [0, 1, 2, 3]  # 4 would fit, but came later
    places[1].leave()
    assert [place.number for place in places[2:]] == [0, 1]
    assert room.used == 10
    places[0].leave()
    places[0].leave()
    assert places[3].number == 0
    assert room.used == 7
    with pytest.raises(ConfigError, match="of cache, of"):
        room.ask(11)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ((float("nan"), "0", "full", False), "minutes: expected a number above 0, at most 10"),
        ((None, "0", "full", False), "minutes"),
        (("2", "0", "full", False), "minutes"),
        ((11, "0", "full", False), "minutes"),
        ((True, "0", "full", False), "minutes"),
        ((1, "x", "full", False), "seed: expected a whole number"),
        ((1, "-1", "full", False), "seed: expected a whole number"),
        ((1, "1e3", "full", False), "seed"),
        ((1, "9" * 30, "full", False), "--seed must be between 0"),
        ((1, {"a": 1}, "full", False), "seed"),
        ((1, "0", "fulll", False), "memory: expected one of full, window"),
        ((1, "0", ["full"], False), "memory"),
    ],
)
def test_a_form_that_cannot_be_used_is_one_line(form: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_form(*form)


def test_seeds_are_those_of_the_command_line() -> None:
    assert read_form(1, str(2**62), "sparse", True).seed == 2**62
    assert [read_form(1, text, "window", True).seed for text in ("", None, " 7 ", 7)] == [0, 0, 7, 7]
    assert not read_form(1, "0", "window", True).overlay


@pytest.fixture
def visitors() -> Iterator[Visitors]:
    with Visitors(StubPipeline(), Room(10), size_of=lambda settings: 6, sleep=lambda seconds: None) as visitors:  # type: ignore[arg-type]
        yield visitors
    assert all_makers_end()


def start(visitors: Visitors, session: str, prompt: str = "a ball", minutes: float = 0.02) -> Iterator[View]:
    return visitors.start(session, prompt, minutes, "0", "window", False)


def test_a_visitor_sees_a_curve_and_how_it_ended_and_can_save(visitors: Visitors) -> None:
    views = list(start(visitors, "one"))
    assert [view.picture is not None for view in views] == [True] * 10 + [False]
    assert views[9].points == ((0.0, 1000, 10.0), (0.5, 1001, 10.0), (1.0, 1002, 10.0))
    assert views[-1].line == "Finished after 1.2 s."
    assert views[-1].file is not None
    assert len(read_video(views[-1].file)[0]) == 10
    stopped = start(visitors, "one")
    next(stopped)
    assert not views[-1].file.exists()  # one file a visitor
    visitors.stop("one")
    *_, last = stopped
    assert last.line.startswith("Stopped after 0.")
    assert visitors.room.used == 0


def test_who_finds_no_room_is_shown_the_place_in_line(visitors: Visitors) -> None:
    first, second, third = (start(visitors, name) for name in ("one", "two", "three"))
    next(first)
    assert next(second).line == "Waiting for room: number 1 in line."
    assert next(third).line == "Waiting for room: number 2 in line."
    visitors.stop("two")
    assert [view.line for view in second] == ["Stopped."]
    assert next(third).line == "Waiting for room: number 1 in line."
    visitors.bye("one")
    list(first)
    assert all_makers_end()
    *_, last = third
    assert last.line == "Finished after 1.2 s."
    assert visitors.room.used == 0


def test_another_video_takes_the_screen_without_a_word_of_the_first(visitors: Visitors) -> None:
    first = start(visitors, "one")
    next(first)
    second = start(visitors, "one", "a cube")
    taken = threading.Thread(target=lambda: lines.extend(view.line for view in second))
    lines: list[str] = []
    taken.start()
    assert all(view.picture is not None for view in first)
    taken.join(20)
    assert lines[-1] == "Finished after 1.2 s."


def test_of_two_starts_at_once_one_video_is_made(visitors: Visitors, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second click before the first one's video is known must still find that video and stop it."""
    ask, delays, seen = visitors.room.ask, iter([0.1, 0.3]), []

    def ask_slowly(size: int) -> Any:
        time.sleep(next(delays))
        return ask(size)

    monkeypatch.setattr(visitors.room, "ask", ask_slowly)
    visitors.room.limit = 100
    visitors.pipe.on_chunk = lambda index: time.sleep(0.1)  # type: ignore[attr-defined]
    clicks = [threading.Thread(target=lambda: seen.append(list(start(visitors, "one")))) for _ in range(2)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join(20)
    assert sorted(sum(view.picture is not None for view in views) // 10 for views in seen) == [0, 1]


def test_a_page_that_was_closed_without_a_word_is_noticed(visitors: Visitors, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_forcing.cli.playground import visitors as module

    visitors.seen("one")
    monkeypatch.setattr(module, "GONE", -1.0)
    assert len(list(start(visitors, "one", minutes=10))) < 12
    assert visitors.room.used == 0


@pytest.mark.parametrize("prompt", ["", None, 5, "a\0b", "refused"])
def test_a_prompt_that_cannot_be_used_leaves_the_room(visitors: Visitors, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        list(start(visitors, "one", prompt))
    assert all_makers_end()
    assert visitors.room.used == 0
    with pytest.raises(ConfigError, match="No video is running"):
        visitors.say("one", "a cube")


def test_out_of_memory_is_one_line_for_the_visitor(visitors: Visitors) -> None:
    def fail(index: int) -> None:
        raise MemoryError

    visitors.pipe.on_chunk = fail  # type: ignore[attr-defined]
    with pytest.raises(SparseForcingError, match="out of memory at size 8x8"):
        list(start(visitors, "one"))
    assert all_makers_end()
    assert visitors.room.used == 0


def test_pictures_are_kept_exactly_while_they_are_small() -> None:
    assert "image/png" in picture_html(np.zeros((8, 256, 3), np.uint8))
    assert "image/jpeg" in picture_html(np.zeros((8, 257, 3), np.uint8))


def test_the_curve_shows_what_was_and_what_is() -> None:
    assert "cache" in curve_html([])
    html = curve_html([(0.0, 2_000_000, 5.0), (2.0, 1_000_000, 10.0)])
    assert "cache: 1.0 MB, at most 2.0" in html
    assert "made: 10.0 frames/s, at most 10.0" in html
    assert "0.0,0.0 400.0,45.0 400.0,45.0" in html


def test_prompts_are_shown_as_they_were_typed() -> None:
    assert plain("a *red*\n   <b>") == "a \\*red\\* \\<b\\>"


@pytest.fixture
def page() -> Any:
    return pytest.importorskip("sparse_forcing.cli.playground.page", exc_type=ImportError)


@pytest.fixture
def served(page: Any) -> Iterator[tuple[StubPipeline, Any]]:
    """A pipeline behind a page on a local port, and a client of it."""
    from gradio_client import Client

    pipe = StubPipeline()
    with Visitors(pipe, Room(10), size_of=lambda settings: 6) as visitors:  # type: ignore[arg-type]
        blocks = page.make_page(visitors)
        blocks.launch(prevent_thread_lock=True, quiet=True, show_error=True)
        try:
            yield pipe, Client(blocks.local_url, verbose=False)
        finally:
            blocks.close()


def test_the_page_streams_pictures_and_takes_prompts(
    served: tuple[StubPipeline, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    from gradio_client.exceptions import AppError

    pipe, client = served
    said = threading.Event()
    pipe.on_chunk = lambda index: index == 2 and said.wait(10)
    job = client.submit("a ball", 0.03, "5", "window", False, api_name="/start")
    while not job.outputs():
        time.sleep(0.01)
    client.predict("a *cube*\n    <b>", api_name="/say")
    said.set()
    job.result(timeout=20)
    screens, lines, curves, _ = zip(*job.outputs())
    assert "image/png" in screens[0]
    assert lines[0].endswith("a ball")
    assert lines[-2].endswith(r"a \*cube\* \<b\>")
    assert lines[-1] == "Finished after 1.8 s."
    assert "polyline" in curves[-1]
    assert pipe.told["num_frames"] == 14
    assert (pipe.told["seed"], pipe.told["memory"].kind) == (5, "window")
    refused = [
        (("/say", "a ball"), "No video is running"),
        (("/start", "a ball", 99, "0", "window", False), "minutes"),
        (("/start", "a ball", 1, "x", "window", False), "seed"),
        (("/start", "a ball", 1, "0", "nonsense", False), "memory"),
        (("/start", None, 1, "0", "window", False), "prompt"),
    ]
    for (name, *values), message in refused:
        with pytest.raises(AppError, match=message):
            client.predict(*values, api_name=name)
    job = client.submit("a ball", 0.03, "", "sparse", True, api_name="/start")
    while not job.outputs():
        time.sleep(0.01)
    with pytest.raises(AppError, match="prompt is empty"):
        client.predict(" ", api_name="/say")
    client.predict(api_name="/stop")
    job.result(timeout=20)
    assert job.outputs()[-1][1].startswith("Stopped after")
    assert all_makers_end()
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_start_replaces_the_first_and_errors_are_shown(served: tuple[StubPipeline, Any]) -> None:
    from gradio_client.exceptions import AppError

    pipe, client = served
    first = client.submit("a ball", 0.03, "0", "sparse", False, api_name="/start")
    while not first.outputs():
        time.sleep(0.01)
    second = client.submit("a cube", 0.03, "0", "sparse", False, api_name="/start")
    second.result(timeout=20)
    assert first.done()
    assert len(first.outputs()) < 14 <= len(second.outputs())

    def fail(index: int) -> None:
        raise RuntimeError("out of luck")

    pipe.on_chunk = fail
    with pytest.raises(AppError, match="out of luck"):
        client.predict("a ball", 0.03, "0", "sparse", False, api_name="/start")


def test_enter_changes_the_prompt_and_leaving_the_page_stops_the_video(page: Any) -> None:
    blocks = page.make_page(Visitors(StubPipeline(), Room(1)))  # type: ignore[arg-type]
    names = ("say", "stop", "bye", "seen")
    events = [(event, f.name) for f in blocks.fns.values() for _, event in f.targets if f.name in names]
    assert sorted(events) == [
        ("click", "say"),
        ("click", "stop"),
        ("submit", "say"),
        ("tick", "seen"),
        ("unload", "bye"),
    ]


@pytest.fixture(scope="module")
def worlds() -> Any:
    from sparse_forcing import SparseForcingPipeline
    from sparse_forcing.cli.playground.worlds import Worlds

    return Worlds(SparseForcingPipeline.from_pretrained("tiny-base"), Room(1 << 30))


def test_a_world_can_be_panned_to_both_ends_of_its_way_out(worlds: Any) -> None:
    place, _, first = worlds.pan("3", 0, -1)
    assert place == 0
    assert worlds.pan("3", 0, 1)[0] == 1
    place, line, last = worlds.pan("3", 1, 30)
    assert f"picture {place + 1} of {place + 1}" in line
    assert first.shape == last.shape
    assert (first != last).any()


@pytest.mark.slow
def test_the_way_back_shows_the_truth_and_both_memories_and_what_is_kept(worlds: Any) -> None:
    looks = list(worlds.go_on(3))
    drawn = [look for look in looks if look.way_back is not None]
    side = worlds.pipe.defaults.height
    assert all(look.way_back.shape[1] == 3 * side + 8 for look in drawn)
    lit = [look.way_out for look in looks if look.way_out is not None]
    assert len(lit) >= 1
    chunks = (lit[0].shape[1] + 4) // (side + 4)
    brightness = [lit[0][:, i * (side + 4) : i * (side + 4) + side].max() for i in range(chunks)]
    assert max(brightness) > 1.5 * min(brightness), "some chunks of the way out are kept, others are not"
    assert worlds.room.used == 0


@pytest.mark.parametrize("number", ["x", -1, "1" * 50])
def test_worlds_have_whole_numbers(worlds: Any, number: Any) -> None:
    with pytest.raises(ConfigError, match="seed"):
        list(worlds.go_on(number))
