"""Whole runs: records are kept and reused, damaged videos are one line each, results say what was measured."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparse_forcing.errors import ConfigError, OutputError, WeightsError
from sparse_forcing.eval import run as run_module
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.measuring.view import open_clip
from sparse_forcing.eval.results import load_results
from sparse_forcing.files import output_lock
from sparse_forcing.media.video import write_video
from tests.eval.conftest import moving_disc

FEW = ("pixel_stability", "brightness")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Four small videos of two prompts."""
    folder = tmp_path / "videos"
    for prompt in ("a disc", "another disc"):
        for index in range(2):
            write_video(folder / f"{prompt}-{index}.mp4", moving_disc(12, seed=index, speed=1 + index), 16)
    return folder


def config(target: Path, **options) -> EvaluateConfig:
    return EvaluateConfig(**{"target": target, "metrics": FEW, "report": False, "resamples": 50, **options})


def results_of(given: EvaluateConfig) -> dict:
    return load_results(given.output_folder)


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    decoded: list[Path] = []

    def counting(entry, **options):
        decoded.append(entry.video)
        return open_clip(entry, **options)

    monkeypatch.setattr(run_module, "open_clip", counting)
    return decoded


def test_results_csv_and_exit_code(videos: Path, capsys: pytest.CaptureFixture) -> None:
    given = config(videos, json=True)
    assert evaluate(given) == 0
    results = results_of(given)
    entry = results["metrics"]["pixel_stability"]
    assert (entry["videos"], entry["prompts"], entry["aggregation"]) == (4, 2, "video mean")
    assert entry["interval"][0] <= entry["score"] <= entry["interval"][1]
    assert results["versions"]["torch"]
    assert json.loads(capsys.readouterr().out)["metrics"] == results["metrics"]
    rows = list(csv.DictReader((given.output_folder / "videos.csv").open(encoding="utf-8")))
    assert [row["prompt"] for row in rows] == ["a disc", "a disc", "another disc", "another disc"]
    mean = np.mean([float(row["pixel_stability"]) for row in rows])
    assert mean == pytest.approx(entry["score"])


def test_a_second_run_decodes_nothing_and_a_changed_video_is_measured_again(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decodes(monkeypatch)
    evaluate(config(videos))
    first = results_of(config(videos))
    assert len(decoded) == 4
    evaluate(config(videos))
    assert len(decoded) == 4
    assert results_of(config(videos)) == first
    write_video(videos / "a disc-1.mp4", moving_disc(12, seed=9), 16)
    evaluate(config(videos))
    assert decoded[4:] == [videos / "a disc-1.mp4"]
    evaluate(config(videos, metrics=("brightness",)))
    assert len(decoded) == 9


@pytest.mark.slow
def test_two_workers_give_the_same_results(videos: Path, tmp_path: Path) -> None:
    evaluate(config(videos, output=tmp_path / "one"))
    evaluate(config(videos, output=tmp_path / "two", workers=2))
    assert load_results(tmp_path / "one") == load_results(tmp_path / "two")


CHILD = """
import sys, time
from pathlib import Path
from sparse_forcing.eval import run
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
original = run.open_clip
def slowly(entry, **options):
    print("decoding", flush=True)
    time.sleep(0.5 if len(list(Path(sys.argv[2]).rglob("*.json"))) < 2 else 60)
    return original(entry, **options)
run.open_clip = slowly
evaluate(EvaluateConfig(target=Path(sys.argv[1]), output=Path(sys.argv[2]), metrics=("brightness",), report=False))
"""


def test_killed_and_resumed_loses_one_video(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(videos), str(output)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        try:
            for _ in range(3):
                child.stdout.readline()
            time.sleep(0.2)
        finally:
            child.send_signal(signal.SIGKILL)
    assert len(list((output / "cache" / "records").rglob("*.json"))) == 2
    decoded = count_decodes(monkeypatch)
    assert evaluate(config(videos, output=output, metrics=("brightness",))) == 0
    assert len(decoded) == 2
    assert load_results(output)["videos_measured"] == 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data), 97):
        data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>\nnot found\n</html>"),
        lambda path: path.write_bytes(os.urandom(4096)),
        lambda path: path.write_text("#EXTM3U\nfile:///etc/passwd\n"),
        lambda path: (path.unlink(), path.symlink_to("gone.mp4")),
    ],
    ids=["cut", "flipped", "empty", "html", "random", "playlist", "dangling"],
)
def test_a_damaged_video_is_one_line_and_the_rest_is_measured(
    videos: Path, capsys: pytest.CaptureFixture, damage: Callable
) -> None:
    manifest = videos / "m.jsonl"
    names = sorted(path.name for path in videos.glob("*.mp4"))
    manifest.write_text("".join(json.dumps({"video": name, "prompt": "x"}) + "\n" for name in names), encoding="utf-8")
    damage(videos / "a disc-1.mp4")
    assert evaluate(config(manifest)) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "a disc-1.mp4" in lines[0]
    results = results_of(config(manifest))
    assert results["videos_measured"] == 3
    assert len(results["failures"]) == 1
    assert evaluate(config(manifest, strict_exit=True)) == 1


def test_all_damaged_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    assert evaluate(config(tmp_path, output=tmp_path / "out")) == 1
    assert results_of(config(tmp_path, output=tmp_path / "out"))["metrics"] == {}


def test_bounds_are_kept(videos: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(config(videos, max_frames=11)) == 1
    assert evaluate(config(videos, max_pixels=12 * 64 * 64 - 1)) == 1
    assert all("exceed" in line for line in capsys.readouterr().err.strip().splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "vbnch"}, "choose one of"),
        ({"mode": "loose"}, "choose one of"),
        ({"workers": 0}, "at least 1"),
        ({"aggregate": Path("a.json")}, "either"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(target=tmp_path, **options)


def test_mistakes_are_found_before_any_video(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodes(monkeypatch)
    weights = tmp_path / "weights" / "dino_model"
    weights.mkdir(parents=True)
    (weights / "dino_vitbase16_pretrain.pth").write_bytes(b"damaged")
    (tmp_path / "file").touch()
    cases: list[tuple[dict, type[Exception], str]] = [
        ({"metrics": ("brightnes",)}, ConfigError, "has no metric"),
        ({"suite": "vbench", "weights": weights.parent, "metrics": ("subject_consistency",)}, WeightsError, "dino_vit"),
        ({"suite": "vbench", "metrics": ("dynamic_degree",)}, ConfigError, "raft-things.pth"),
        ({"suite": "vbench", "metrics": ("temporal_flickering",), "static_filter": True}, ConfigError, "raft"),
        ({"weights": tmp_path / "gone"}, ConfigError, "no such folder"),
        ({"plugins": ("interpolator",)}, ConfigError, "NAME=VALUE"),
        ({"plugins": ("x=a:b",)}, ConfigError, "unknown"),
        ({"compare": (tmp_path / "gone",)}, ConfigError, "gone"),
        ({"output": tmp_path / "file"}, OutputError, "file"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            evaluate(config(videos, **options))
    with output_lock(tmp_path), pytest.raises(OutputError, match="another run"):
        evaluate(config(videos, output=tmp_path))
    assert decoded == []


def test_vbench_suite_measures_what_it_can_and_refuses_a_total(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "videos"
    for prompt in ("In a still frame, a stop sign", "a red bicycle"):
        write_video(folder / f"{prompt}-0.mp4", moving_disc(12), 16)
    official = tmp_path / "scene_eval_results.json"
    official.write_text(json.dumps({"scene": [0.4, [{"video_path": "x", "video_results": 0.4}]]}), encoding="utf-8")
    given = config(folder, suite="vbench", metrics=(), official_results=(official,))
    assert evaluate(given) == 0
    results = results_of(given)
    assert results["metrics"]["temporal_flickering"]["videos"] == 1  # only the prompt of that dimension
    assert results["metrics"]["temporal_flickering"]["prompts_expected"] == 75
    assert results["metrics"]["scene"]["imported_from"] == str(official)
    assert results["totals"]["total"] is None
    assert "subject_consistency (missing)" in results["totals"]["refused"]
    assert "raft-things.pth" in results["skipped"]["dynamic_degree"]
    assert "dynamic_degree: not measured" in capsys.readouterr().err


def test_official_results_must_be_fractions_of_unmeasured_dimensions(videos: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    for content in ({"temporal_flickering": [0.9]}, {"scene": [40.0]}, {"sceen": [0.4]}, [1]):
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"r\.json"):
            evaluate(config(videos, suite="vbench", metrics=("temporal_flickering",), official_results=(file,)))


def still(device: str):
    """A plugin: an interpolator that repeats the first frame."""
    return lambda first, second: first


def test_a_plugin_supplies_the_interpolator(videos: Path) -> None:
    given = config(videos, suite="vbench", metrics=("motion_smoothness",), plugins=(f"interpolator={__name__}:still",))
    assert evaluate(given) == 0
    results = results_of(given)
    assert 0.9 < results["metrics"]["motion_smoothness"]["score"] < 1
    assert results["networks"] == {"interpolator": f"plugin {__name__}:still"}


def test_long_and_drift_suites_run(tmp_path: Path) -> None:
    write_video(tmp_path / "v" / "a disc-0.mp4", moving_disc(80), 16)
    write_video(tmp_path / "v" / "a disc-1.mp4", moving_disc(40), 16)
    strict = config(tmp_path / "v", suite="vbench-long", metrics=(), output=tmp_path / "s")
    loose = config(tmp_path / "v", suite="vbench-long", metrics=(), output=tmp_path / "l", mode="vbench-compatible")
    evaluate(strict)
    evaluate(loose)
    by_video = results_of(strict)["metrics"]["temporal_flickering"]
    by_clip = results_of(loose)["metrics"]["temporal_flickering"]
    assert (by_video["aggregation"], by_clip["aggregation"]) == ("video mean", "pooled")
    rows = [video["metrics"]["temporal_flickering"] for video in results_of(loose)["videos"]]
    assert [row["count"] for row in rows] == [3, 2]
    assert by_clip["score"] == pytest.approx((3 * rows[0]["value"] + 2 * rows[1]["value"]) / 5)
    assert by_video["score"] == pytest.approx((rows[0]["value"] + rows[1]["value"]) / 2)
    assert "1 videos are shorter than 5 s" in results_of(strict)["notes"][0]
    drift = config(tmp_path / "v", suite="drift", output=tmp_path / "d")
    evaluate(drift)
    brightness = results_of(drift)["drift"]["metrics"]["brightness"]
    assert len(brightness["curve"]["mean"]) == len(brightness["times"]) == 3
    assert brightness["change"]["videos"] == 2


def broken(device: str):
    """A plugin: an interpolator that answers with NaN."""
    return lambda first, second: first * float("nan")


def raising(device: str):
    """A plugin: an interpolator that fails in a way of its own."""

    def call(first, second):
        raise RuntimeError("out of\nmemory")

    return call


@pytest.mark.parametrize(
    ("plugin", "reason", "cached"), [("broken", "not finite", True), ("raising", "out of memory", False)]
)
def test_a_metric_that_fails_costs_its_own_value(
    videos: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, plugin: str, reason: str, cached: bool
) -> None:
    metrics = ("motion_smoothness", "temporal_flickering")
    options = {"suite": "vbench", "metrics": metrics, "plugins": (f"interpolator={__name__}:{plugin}",)}
    given = config(videos, report=True, **options)
    decoded = count_decodes(monkeypatch)
    assert evaluate(given) == 0
    results = results_of(given)
    assert results["metrics"]["temporal_flickering"]["videos"] == 4
    assert "motion_smoothness" not in results["metrics"]
    assert results["failures"] == []
    assert [entry["metric"] for entry in results["missing_values"]] == ["motion_smoothness"] * 4
    entry = results["videos"][0]["metrics"]["motion_smoothness"]
    assert entry["value"] is None
    assert reason in entry["error"]
    assert any("motion_smoothness: no value for 4 of 4 videos" in note and reason in note for note in results["notes"])
    assert reason in capsys.readouterr().err
    assert reason in (given.output_folder / "report.html").read_text(encoding="utf-8")
    rows = list(csv.DictReader((given.output_folder / "videos.csv").open(encoding="utf-8")))
    assert all(row["motion_smoothness"] == "" and reason in row["error"] for row in rows)
    # What fails every time is kept; what may succeed another time is tried again.
    assert evaluate(config(videos, strict_exit=True, **options)) == 1
    assert len(decoded) == (4 if cached else 8)
    alone = config(videos, **{**options, "metrics": ("motion_smoothness",)})
    assert evaluate(alone) == 1


def test_a_failing_metric_leaves_the_other_drift_curves(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from sparse_forcing.eval.measuring import registry

    def fails_on_windows(view, resources):
        return registry.Measurement(value=1.0 if view.start == 0 and len(view) == 12 else float("inf"))

    known = registry.all_metrics()["detail"]
    monkeypatch.setitem(registry._METRICS, "detail", replace(known, compute=fails_on_windows))
    given = config(videos, suite="drift", metrics=("brightness", "detail"))
    assert evaluate(given) == 0
    drift = results_of(given)["videos"][0]["drift"]
    assert "brightness" in drift["metrics"]
    assert "detail" not in drift["metrics"]
    assert "not a finite number" in drift["failures"]["detail"]
    assert any("drift of detail" in note for note in results_of(given)["notes"])


def test_differences_that_stay_are_said_with_their_size(videos: Path) -> None:
    short = config(videos, suite="vbench", metrics=("temporal_flickering",), output=videos / "s")
    long = config(videos, suite="vbench-long", metrics=("temporal_flickering",), output=videos / "l", report=True)
    plain = config(videos, output=videos / "o")
    for given in (short, long, plain):
        evaluate(given)
    sizes = {
        name: {entry["size"] for entry in results_of(given)["differences"]}
        for name, given in (("short", short), ("long", long), ("plain", plain))
    }
    assert sizes == {"short": {1e-3, 8e-5}, "long": {1e-3, 8e-5, 5e-3, 8e-3}, "plain": set()}
    page = (long.output_folder / "report.html").read_text(encoding="utf-8")
    assert "Differences from VBench" in page
    assert "0.008" in page


def test_negative_cosines_of_official_results_are_taken_over(videos: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"overall_consistency": [-0.01, []]}), encoding="utf-8")
    given = config(videos, suite="vbench", metrics=("temporal_flickering",), official_results=(file,))
    assert evaluate(given) == 0
    assert results_of(given)["metrics"]["overall_consistency"]["score"] == -0.01


@pytest.mark.parametrize("suite", ["vbench", "vbench-long"])
def test_a_video_that_raft_cannot_see_is_not_static_and_keeps_its_other_values(tmp_path: Path, suite: str) -> None:
    import torch

    from sparse_forcing.eval.vbench.networks.raft import Raft

    (tmp_path / "weights").mkdir()
    torch.save(Raft().state_dict(), tmp_path / "weights" / "raft-things.pth")
    frames = moving_disc(6).repeat(2, axis=1).repeat(3, axis=2)[:, :120, :160]
    write_video(tmp_path / "v" / "a disc-0.mp4", frames, 16)
    metrics = ("temporal_flickering", "dynamic_degree", "motion_smoothness")
    plugins = (f"interpolator={__name__}:still",)
    options = {"suite": suite, "weights": tmp_path / "weights", "plugins": plugins, "static_filter": True}
    given = config(tmp_path / "v", metrics=metrics, **options)
    assert evaluate(given) == 0
    results = results_of(given)
    assert set(results["metrics"]) == {"motion_smoothness"}
    (video,) = results["videos"]
    for name in ("temporal_flickering", "dynamic_degree"):
        assert video["metrics"][name]["value"] is None
        assert "at least 121 pixels a side, not 160x120" in video["metrics"][name]["error"]
