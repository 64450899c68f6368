"""Inputs are never targets: whatever a run reads is still there, byte for byte, after it was refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from sparse_forcing.cli import main
from sparse_forcing.media.video import write_video
from sparse_forcing.model_folder.folder import EMBEDDED_MODELS
from sparse_forcing.sampling.generation.jobs import WRITTEN, GenerateConfig
from sparse_forcing.training.recipes.embedded.export import main as export

PROMPT = "a red ball"
NAME = "0000-a-red-ball-seed0"


def source(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.full((16, 32, 32, 3), 90, np.uint8), 16)
    return path


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder; folders count, too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a run that is refused and changes nothing below `folder`."""
    before = snapshot(folder)
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert snapshot(folder) == before
    return lines[0]


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("kind", ["itself", "default name", "symlink", "hard link", "overlay", "sidecar", "grid"])
def test_the_video_a_run_goes_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    given, output = source(tmp_path / "a.mp4"), tmp_path / "a.mp4"
    more: list[str | Path] = []
    if kind == "default name":
        output = tmp_path / "outputs"
        given = source(output / f"{NAME}.mp4")
    elif kind == "symlink":
        given = tmp_path / "link.mp4"
        given.symlink_to(output)
    elif kind == "hard link":
        given = tmp_path / "link.mp4"
        os.link(output, given)
    elif kind == "overlay":
        given = source(tmp_path / "overlay" / "b.mp4")
        output = tmp_path / "b.mp4"
    elif kind == "sidecar":
        given = source(tmp_path / "c.mov.mp4").rename(tmp_path / "c.mov")
        output = tmp_path / "c.mp4"
        (tmp_path / "c.json").write_text(json.dumps({"video": 1, "prompt": 2, "seed": 3, "settings": 4}))
    elif kind == "grid":
        given, output, more = tmp_path / "g.gif", tmp_path / "new", ["--grid", tmp_path / "link.gif"]
        Image.new("RGB", (32, 32)).save(given)
        os.link(given, tmp_path / "link.gif")
    line = refused(tmp_path, capsys, "generate", PROMPT, "--video", given, "--output", output, *more)
    assert "which this run reads" in line


@pytest.mark.usefixtures("never_loads")
def test_picture_prompts_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    (tmp_path / "p.mp4").symlink_to("p.png")
    refused(tmp_path, capsys, "generate", PROMPT, "--image", tmp_path / "p.png", "--output", tmp_path / "p.mp4")
    (tmp_path / "prompts.json").write_text(f"{PROMPT}\n")
    refused(
        tmp_path, capsys, "generate", "--prompt-file", tmp_path / "prompts.json", "--output", tmp_path / "prompts.mp4"
    )
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    (model / "transformer" / "config.json").write_text("{}")
    for name in ("transformer/config.mp4", "new", "transformer/new/deep.mp4"):
        line = refused(tmp_path, capsys, "generate", PROMPT, "--model", model, "--output", model / name)
        assert "which this run reads" in line


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("link", ["symlink", "hard link"])
def test_whatever_a_flag_names(tmp_path: Path, link: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every path of the config but those that are written: a flag of tomorrow is an input, too."""
    read = [name for name, kind in get_type_hints(GenerateConfig).items() if Path in (kind, *get_args(kind))]
    read = [name for name in read if name not in WRITTEN]
    assert {"image", "video", "prompt_file", "tiny_vae"} <= set(read)
    given, output = tmp_path / "given", tmp_path / "a.mp4"
    given.write_text(PROMPT)
    output.symlink_to(given) if link == "symlink" else os.link(given, output)
    for name in read:
        prompts = [] if name == "prompt_file" else [PROMPT]
        flags = (f"--{name.replace('_', '-')}", given)
        assert "reads" in refused(tmp_path, capsys, "generate", *prompts, *flags, "--output", output)


@pytest.mark.usefixtures("never_loads")
def test_what_a_run_leaves_beside_its_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint goes when its video is complete, with or without --resume."""
    state = tmp_path / "resume" / "a" / "state-00000001.pt"
    state.parent.mkdir(parents=True)
    state.write_text("x")
    line = refused(tmp_path, capsys, "generate", PROMPT, "--tiny-vae", state, "--output", tmp_path / "a.mp4")
    assert "resume/a: it is or holds" in line


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("where", ["cache", "", "text_encoder/cache", "../base/text_encoder/cache"])
def test_nothing_is_added_to_a_model(tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, base = tmp_path / "model", tmp_path / "base" / "text_encoder"
    model.mkdir()
    base.mkdir(parents=True)
    (model / "text_encoder").symlink_to(base)  # as `convert --base` does
    (model / "model_index.json").write_text("{}")
    words = ("generate", PROMPT, "--model", model, "--output", tmp_path / "new")
    assert "reads" in refused(tmp_path, capsys, *words, "--prompt-cache", model / where)
    assert "reads" in refused(tmp_path, capsys, *words[:-1], model / where / "a.mp4")


@pytest.mark.usefixtures("never_loads")
def test_embedded_models_are_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = EMBEDDED_MODELS / "tiny" / "new"
    for words in (
        ("generate", PROMPT, "--output", inside),
        ("bench", "rollout", "--output", inside),
        ("train", "forcing", "--set", "loop.steps=1", "--set", "model=tiny", "--output", inside),
    ):
        assert "which this run reads" in refused(tmp_path, capsys, *words)
        assert not inside.exists()


def test_skipped_videos_are_no_targets(tmp_path: Path, stub: object) -> None:
    given = source(tmp_path / f"{NAME}.mp4")
    given.with_suffix(".json").write_text(json.dumps({"video": 1, "prompt": 2, "seed": 3, "settings": 4}))
    before = snapshot(tmp_path)
    assert main(["generate", PROMPT, "--video", str(given), "--output", str(tmp_path), "--skip-existing"]) == 0
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "kind", ["manifest", "compare", "linked compare", "compared video", "video", "caption", "sidecar"]
)
def test_what_evaluation_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    video, out = source(tmp_path / "videos" / "a.mp4"), tmp_path / "out"
    out.mkdir()
    target, more = video, []
    if kind == "manifest":
        target = out / "videos.csv"
        target.write_text(f"video,prompt\n{video},a\n")
    elif kind == "video":
        os.link(video, out / "report.html")
    elif kind == "caption":
        video.with_suffix(".txt").write_text("a")
        (out / "videos.csv").symlink_to(video.with_suffix(".txt"))
    elif kind == "compared video":
        other = source(tmp_path / "others" / "b.mp4")
        (out / "report.html").symlink_to(other)
        more = ["--compare", other.parent]
    elif kind == "sidecar":
        target = out = tmp_path / "videos"
        video.rename(out / "results.mp4")
        (out / "results.json").write_text(json.dumps({"prompt": "a"}))
    else:
        old = out / "results.json" if kind == "compare" else tmp_path / "old.json"
        assert main(["evaluate", str(video), "--output", str(out), "--metrics", "brightness"]) == 0
        if kind == "linked compare":
            os.link(out / "results.json", old)
        more = ["--compare", old]
    line = refused(tmp_path, capsys, "evaluate", target, "--output", out, "--metrics", "brightness", *more)
    assert "which this run reads" in line


def test_what_data_encode_and_train_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    model.mkdir()
    (model / "pipeline.json").symlink_to(EMBEDDED_MODELS / "tiny" / "pipeline.json")
    prompts = out / "shard-00000.json"
    prompts.write_text(f"{PROMPT}\n")
    encode = ("data", "encode", "--set", "data.kind=prompts")
    assert "reads" in refused(tmp_path, capsys, *encode, out, "--set", f"data.path={prompts}")
    os.link(prompts, tmp_path / "link.txt")
    assert "reads" in refused(tmp_path, capsys, *encode, out, "--set", f"data.path={tmp_path / 'link.txt'}")
    (tmp_path / "p.txt").write_text(f"{PROMPT}\n")
    inside = ("--set", f"data.path={tmp_path / 'p.txt'}", "--set", f"model={model}")
    assert "reads" in refused(tmp_path, capsys, *encode, model / "encoded", *inside)
    assert "reads" in refused(tmp_path, capsys, *encode, model, *inside)
    config = tmp_path / "run" / "metrics.jsonl"
    config.parent.mkdir()
    config.write_text("loop:\n  steps: 1\n")
    assert "reads" in refused(tmp_path, capsys, "train", "forcing", "--config", config, "--output", config.parent)
    run = ("train", "forcing", "--set", "loop.steps=1", "--set", f"model={model}")
    assert "reads" in refused(tmp_path, capsys, *run, "--output", model / "run")
    (tmp_path / "run" / "pipeline").symlink_to(model)
    assert "reads" in refused(tmp_path, capsys, *run, "--output", tmp_path / "run")


def test_weights_that_the_environment_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    video, weights = source(tmp_path / "a.mp4"), tmp_path / "weights" / "raft-things.pth"
    weights.parent.mkdir()
    weights.write_text("x")
    (tmp_path / "results.json").symlink_to(weights)
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(weights.parent))
    words = ("evaluate", video, "--output", tmp_path, "--metrics", "brightness")
    assert "raft-things.pth, which this run reads" in refused(tmp_path, capsys, *words)


def test_what_an_export_and_a_reproduction_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "pipeline.json").write_text("{}")
    before = snapshot(tmp_path)
    assert export([str(model), "--out", str(model)]) == 2
    assert export(["tiny", "--mean-with", str(model), "--out", str(model / "new")]) == 2
    assert capsys.readouterr().err.count("which this run reads") == 2
    assert snapshot(tmp_path) == before


def test_what_bench_and_convert_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "pipeline.json").write_text("{}")
    assert "reads" in refused(tmp_path, capsys, "bench", "rollout", "--model", model, "--output", model / "bench")
    assert "reads" in refused(tmp_path, capsys, "convert", model, model / "converted")
