"""Files that an evaluation reads again and that are damaged: what was kept is measured again, the rest is one line."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, MeasurementError
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.measuring.kept import FeatureStore
from sparse_forcing.eval.metrics.offline.motion import dense_flow
from sparse_forcing.eval.report.page import build_page
from sparse_forcing.eval.results import load_results, to_csv, to_json
from sparse_forcing.eval.shards import merge_shards
from sparse_forcing.media.video import write_video
from tests.eval.conftest import moving_disc

ODD = ([], "x", 5, None, True)
"""Values that most places of a file cannot have."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """A finished drift run over two videos, in the folder `out`, and the one shard of it."""
    folder = tmp_path_factory.mktemp("run")
    for number in range(2):
        write_video(folder / "v" / f"a disc-{number}.mp4", moving_disc(12, seed=number), 16)
    config = EvaluateConfig(
        target=folder / "v", suite="drift", metrics=("brightness",), output=folder / "out", resamples=5, report=False
    )
    assert evaluate(config) == 0
    (folder / "one.jsonl").write_text('{"video": "v/a disc-0.mp4"}')
    sharded = EvaluateConfig(**{**vars(config), "shard": (0, 1), "target": folder / "one.jsonl", "cache": folder / "c"})
    assert evaluate(sharded) == 0
    return config


def evaluate_line(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2, arguments
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "Traceback" not in line
    assert said.out == ""
    return line


def damaged(content: Any) -> Iterator[tuple[str, Any]]:
    """Copies of some JSON, in each of which one place is missing or has an odd value; and the place."""
    for place in list(list_places(content)):
        if place[:2] == ("videos", 1):
            continue  # like the first one
        inner: Any = content
        for key in place[:-1]:
            inner = inner[key]
        kept = inner[place[-1]]
        for odd in ODD:
            if type(odd) is not type(kept):
                inner[place[-1]] = odd
                yield f"{place}: {odd!r:.20}", copy.deepcopy(content)
        if isinstance(inner, dict):
            del inner[place[-1]]
            yield f"{place}: gone", copy.deepcopy(content)
        inner[place[-1]] = kept


def list_places(content: Any, place: tuple = ()) -> Iterator[tuple]:
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*place, key)
        yield from list_places(value, (*place, key))


def test_any_damage_of_a_shard_is_refused_or_makes_whole_results(run: EvaluateConfig, tmp_path: Path) -> None:
    file = tmp_path / "shard.json"
    merge = EvaluateConfig(merge=(file,), output=tmp_path / "new", resamples=2)
    refused = set()
    for place, content in damaged(json.loads((run.output_folder / "shard-0-of-1.json").read_text())):
        file.write_text(json.dumps(content))
        try:
            _, results = merge_shards(merge)
            to_json(results)
            to_csv(results)
        except ConfigError as error:
            assert str(file) in str(error), place
            refused.add(place)
    row = "('videos', 0, 'metrics', 'brightness'"
    for place in (f"{row}): 5", f"{row}, 'value'): 'x'", f"{row}, 'count'): gone", f"{row}, 'details'): None"):
        assert place in refused
    for place in ("('videos', 0, 'metrics'): []", "('videos', 0, 'video'): 5", "('same', 'static_filter'): 'x'"):
        assert place in refused
    assert "('videos', 0, 'prompt'): None" not in refused


def test_any_damage_of_compared_results_is_refused_or_makes_a_page(run: EvaluateConfig, tmp_path: Path) -> None:
    good = load_results(run.output_folder)
    file = tmp_path / "results.json"
    refused = set()
    for place, content in damaged(json.loads((run.output_folder / "results.json").read_text())):
        file.write_text(json.dumps(content))
        try:
            other = load_results(file)
        except ConfigError as error:
            assert str(file) in str(error), place
            refused.add(place)
            continue
        build_page(tmp_path / "report.html", [good | {"videos": []}, other], embed_videos=False)
    for name in ("suite", "mode", "target", "skipped", "versions", "networks", "settings", "videos", "metrics"):
        assert {f"('{name}',): gone", f"('{name}',): 5"} <= refused


def test_compared_results_are_checked_before_anything_is_measured(
    run: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sparse_forcing.eval.run.Runner", lambda config: pytest.fail("measuring began"))
    file, official = tmp_path / "results.json", tmp_path / "official.json"
    file.write_text('{"schema": 1, "metrics": {}}')
    official.write_text('{"scene": "x"}')
    assert run.target is not None
    line = evaluate_line(capsys, run.target, "--compare", file, "--output", tmp_path / "new")
    assert "not a results.json of this tool (schema 1): the content has no suite" in line
    line = evaluate_line(capsys, run.target, "--official-results", official, "--output", tmp_path / "new")
    assert f"{official}: scene is 'x'" in line


def test_a_video_where_json_is_expected_is_said_in_plain_words(
    run: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run.target is not None
    video, new = tmp_path / "video.json", ("--output", tmp_path / "new")
    video.write_bytes((run.target / "a disc-0.mp4").read_bytes())
    (tmp_path / "manifest.jsonl").write_bytes(video.read_bytes())
    for arguments, expected in (
        (["--merge", video, *new], "a shard of an evaluation, as --shard I/N writes it"),
        ([run.target, "--compare", video, *new], "a results.json of this tool"),
        ([run.target, "--official-results", video, *new], "a file of the official tool"),
        (["--aggregate", video], "an object of dimension names and fractions"),
    ):
        assert evaluate_line(capsys, *arguments).endswith(f"{video}: holds no text; expected {expected}")
    assert "expected a JSONL or CSV manifest" in evaluate_line(capsys, tmp_path / "manifest.jsonl", *new)


@pytest.mark.parametrize(
    "content", ["[]", "5", '{"schema": 1, "metrics": 5}', '{"schema": 1, "metrics": {"scene": 5}}']
)
def test_scores_that_are_none_are_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "scores.json").write_text(content)
    assert "scores.json: " in evaluate_line(capsys, "--aggregate", tmp_path / "scores.json")


def test_a_damaged_record_is_measured_again(run: EvaluateConfig) -> None:
    (record, *_) = sorted((run.cache_folder / "records").rglob("*.json"))
    whole = json.loads(record.read_text())
    right = [(run.output_folder / name).read_bytes() for name in ("results.json", "videos.csv")]
    lying, without = copy.deepcopy(whole), copy.deepcopy(whole)
    lying["metrics"]["brightness"]["value"] += 0.25  # one digit of the file
    del without["metrics"]["brightness"]["count"]
    texts = ["{}", '{"metrics": 5}', "null", "5", '"x"', record.read_text()[:-30], "", json.dumps(lying)]
    for text in (*texts, json.dumps(without), '{"a": NaN}', "\ufeff"):
        record.write_text(text)
        assert evaluate(run) == 0
        assert [(run.output_folder / name).read_bytes() for name in ("results.json", "videos.csv")] == right
        assert json.loads(record.read_text()) == whole


def test_damaged_features_are_computed_again(tmp_path: Path) -> None:
    store, array = FeatureStore(tmp_path), np.arange(12, dtype=np.float32).reshape(4, 3)
    store.save("ab" * 32, "key", array)
    path = store.path("ab" * 32, "key")
    data = path.read_bytes()
    loaded = store.load("ab" * 32, "key")
    assert loaded is not None
    assert np.array_equal(loaded, array)
    flipped = bytearray(data)
    flipped[-40] ^= 1  # a bit of a number
    for damage in (b"", data[:-1], bytes(flipped), b"PK\x03\x04" + data, data + b"x"):
        path.write_bytes(damage)
        assert store.load("ab" * 32, "key") is None


@pytest.mark.parametrize("given", ["a manifest", "one", "a folder"])
def test_what_is_no_regular_file_is_not_waited_for(given: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_video(tmp_path / "v" / "good.mp4", moving_disc(12), 16)
    os.mkfifo(tmp_path / "v" / "pipe.mp4")
    (tmp_path / "v" / "device.mp4").symlink_to("/dev/zero")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(f'{{"video": "v/{name}.mp4"}}\n' for name in ("good", "pipe", "device")))
    target = {"a manifest": manifest, "one": tmp_path / "v" / "pipe.mp4", "a folder": tmp_path / "v"}[given]
    flags = ["--metrics", "brightness", "--resamples", "2", "--no-report", "--output", str(tmp_path / "new")]
    assert main(["evaluate", str(target), *flags]) == (1 if given == "one" else 0)
    said = capsys.readouterr().err
    expected = {
        "a manifest": "cannot be read (not a regular file)",
        "one": "not a regular file",
        "a folder": "not a file",
    }
    assert said.count(expected[given]) == (1 if given == "one" else 2)


def test_one_video_under_two_names_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_video(tmp_path / "v" / "0.mp4", moving_disc(12), 16)
    (tmp_path / "v" / "1.mp4").symlink_to("0.mp4")
    (tmp_path / "w").symlink_to("v")
    for other in ("v/../v/0.mp4", "v/1.mp4", "w/0.mp4", "./v//0.mp4", str(tmp_path / "v" / "0.mp4")):
        manifest = tmp_path / "m.jsonl"
        manifest.write_text("".join(f"{json.dumps({'video': name})}\n" for name in ("v/0.mp4", other)))
        assert "line 2: repeats the video of" in evaluate_line(capsys, manifest)
    flags = ["--metrics", "brightness", "--resamples", "2", "--no-report", "--output", str(tmp_path / "new")]
    assert main(["evaluate", str(tmp_path / "v"), *flags]) == 0
    said = capsys.readouterr()
    assert "passed over '1.mp4' (a link to '0.mp4')" in said.err
    assert "1 videos measured" in said.out


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")
    for arguments in (["--merge", tmp_path / "pipe", "--output", tmp_path / "new"], ["--aggregate", tmp_path / "pipe"]):
        assert evaluate_line(capsys, *arguments).endswith("pipe: a pipe that nobody writes to")
    read, write = os.pipe()  # as `<(command)` of a shell
    os.write(write, b'{"scene": 0.5}')
    os.close(write)
    assert main(["evaluate", "--aggregate", f"/dev/fd/{read}"]) == 2
    os.close(read)
    assert "no total: subject_consistency (missing)" in capsys.readouterr().err


def test_options_that_mean_nothing_are_one_line(run: EvaluateConfig, capsys: pytest.CaptureFixture) -> None:
    flags = (run.target, "--output", run.output_folder.parent / "new")
    for name in ("os:getcwd", "math:pi", ":x", "..:x", "os:nothing"):
        plugin = ("--suite", "vbench", "--metrics", "motion_smoothness", "--plugins", f"interpolator={name}")
        assert f"plugin '{name}': " in evaluate_line(capsys, *flags, *plugin)
    assert "resamples may be up to" in evaluate_line(capsys, *flags, "--resamples", 10**12)
    assert "device" in evaluate_line(capsys, *flags, "--metrics", "brightness", "--device", "strange")


def test_strips_have_no_motion_and_take_no_memory_for_it() -> None:
    strip = np.zeros((2, 16_384, 3), np.uint8)
    with pytest.raises(MeasurementError, match="as narrow as 16384x2"):
        dense_flow(strip, strip)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("target", "videos", "target must be a pathlib.Path"),
        ("metrics", "contrast", "metrics must be a tuple"),
        ("metrics", None, "metrics must be a tuple"),
        ("compare", ("results.json",), "compare must hold Path alone"),
        ("shard", "0/0", "shard must be a tuple"),
        ("shard", (1, 2, 3), "shard must be two whole numbers"),
        ("workers", 2.5, "workers must be a whole number"),
        ("max_frames", float("nan"), "max_frames must be a whole number"),
        ("max_pixels", "9", "max_pixels must be a whole number"),
        ("worker_timeout", "5", "worker_timeout must be a number"),
        ("weights", 4, "weights must be a pathlib.Path"),
    ],
)
def test_options_of_other_types_are_one_line(option: str, value: Any, message: str) -> None:
    """From Python; a bound that is NaN bounded nothing."""
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**{"target": Path("videos"), option: value})
