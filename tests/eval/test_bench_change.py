"""`bench change`: what it asks for, and that following and ignoring a change are told apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.eval.bench import change as bench_change
from sparse_forcing.eval.bench.options import ChangeBenchConfig
from sparse_forcing.scenes.captions import parse_caption
from sparse_forcing.scenes.held_out import CHANGEABLE, PromptChange, changing_prompts
from sparse_forcing.scenes.render import render
from sparse_forcing.scenes.sample import batch_from_scenes
from sparse_forcing.scenes.vocabulary import CLIP_FRAMES, Scene, has_held_out, is_possible

TURN = PromptChange(
    "a large red square moves up on a white background",
    "a large red square moves right on a white background",
    "motion",
)
PAINT = PromptChange(
    "a large red square moves up on a white background", "a large blue square moves up on a white background", "colour"
)


SHRINK = PromptChange(
    "a large red star stays still on a white background", "a red star shrinks on a white background", "motion"
)
SHRUNK = PromptChange("a red star shrinks on a white background", "a blue star shrinks on a white background", "colour")


def attributes(scene: Scene) -> dict[str, str | None]:
    (item,) = scene.objects
    return {"background": scene.background} | {name: getattr(item, name) for name in list(CHANGEABLE)[1:]}


def test_one_attribute_changes_and_each_in_turn() -> None:
    changes = changing_prompts(200, seed=1)
    assert changing_prompts(7, seed=1) == changes[:7]
    assert Counter(change.attribute for change in changes) == dict.fromkeys(CHANGEABLE, 40)
    for before, after, attribute in changes:
        scenes = [parse_caption(text) for text in (before, after)]
        assert all(has_held_out(scene) for scene in scenes)
        old, new = (attributes(scene) for scene in scenes)
        different = {name for name in old if old[name] != new[name]}
        resizing = {"motion", "size"} if {old["motion"], new["motion"]} & {"grows", "shrinks"} else set()
        assert {attribute} <= different <= {attribute} | resizing
        assert is_possible(str(new["shape"]), str(new["motion"]))
        if attribute == "motion" and new["motion"] in ("grows", "shrinks"):
            assert old["size"] == {"grows": "small", "shrinks": "large"}[new["motion"]]


def film(prompts: list[str]) -> np.ndarray:
    """[1, F, H, W, 3]: a clip of each prompt in turn. A motion begins where it changes, all else goes on."""
    clips, start = [], 0
    for number, prompt in enumerate(prompts):
        scene = parse_caption(prompt)
        goes_on = number and scene.objects[0].motion == parse_caption(prompts[number - 1]).objects[0].motion
        start = start + CLIP_FRAMES if goes_on else 0
        clips.append(render(batch_from_scenes([scene], torch.Generator().manual_seed(0)), CLIP_FRAMES, 64, start=start))
    return ((torch.cat(clips, 1).permute(0, 1, 3, 4, 2) + 1) / 2).numpy()


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("change", [TURN, PAINT, SHRINK, SHRUNK], ids=["motion", "colour", "shrinks", "shrunk"])
def test_a_video_that_follows_is_right_and_one_that_goes_on_is_not(
    change: PromptChange, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first clip of the one whose prompt never changes is not judged: it may be of something else."""

    def stream(
        pipe: Any, memory: Any, prompts: list[str], first: int, settings: Any, *, prompt_changes: Any, recache: bool
    ) -> Any:
        assert (first, settings.horizons, recache) == (3, (3,), bool(prompt_changes))
        if prompt_changes is None:
            shown = ["a small cyan ring moves up on a black background", prompts[0], prompts[0]]
            if "shrinks" in change.after:
                shown[0] = prompts[0]  # it has done so by then
        else:
            assert prompt_changes == {CLIP_FRAMES: [change.after]}
            shown = [prompts[0], *[change.after if follows else change.before] * 2]
        return [SimpleNamespace(frames=part) for part in np.array_split(film(shown), 5, axis=1)]

    monkeypatch.setattr(bench_change, "stream", stream)
    pipe: Any = SimpleNamespace(defaults=SimpleNamespace(num_frames=CLIP_FRAMES))
    batch: Any = (pipe, None, [change], 3, ChangeBenchConfig())
    judged = bench_change.judge_changed(*batch, recache=True) | bench_change.judge_unchanged(*batch)
    right = {clip: records[0]["all"] for clip, records in judged.items()}
    after = {"1st after": follows, "2nd after": follows}
    assert right == {"before": 1, **after, "1st unchanged": 1, "2nd unchanged": 1}
    parts = bench_change.split_by_change(judged["2nd after"], [change])
    assert parts == {"changed": [float(follows)], "others": [1.0]}


@pytest.mark.slow
def test_what_is_written_is_what_was_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--prompts", "5", "--memories", "window", "--num-inference-steps", "1", "--batch-size", "3")
    assert main(["bench", "change", *settings, "--recache", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "change.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
    assert [PromptChange(**change) for change in written["changes"]] == changing_prompts(5)
    assert list(written["memories"]) == ["window", "window+recache"]
    for row in written["memories"].values():
        for clip in bench_change.CLIPS:
            for name, verdicts in row["verdicts"][clip].items():
                assert len(verdicts) == 5
                known = [verdict for verdict in verdicts if verdict is not None]
                mean = pytest.approx(sum(known) / len(known)) if known else None
                assert row["accuracy"][clip][name]["mean"] == mean
    plain, again = (row["verdicts"] for row in written["memories"].values())
    assert all(plain[clip] == again[clip] for clip in bench_change.CLIPS if "after" not in clip)
    table = (tmp_path / "change.md").read_text()
    assert "\n| window | " in table
    assert "| background (1) | colour (1) | shape (1) | size (1) | motion (1) |" in table


def test_options_of_other_benchmarks_and_unknown_memories_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--horizons", "4"], "--horizons has no effect on bench change"),
        (["--prompts", "0"], "--prompts: must be between 1 and"),
        (["--memories", "none"], "memories: unknown none"),
        (["--memories", "full", "--recache"], "the window of a full memory cannot be written again"),
    ):
        assert main(["bench", "change", *arguments]) == 2
        assert message in capsys.readouterr().err
