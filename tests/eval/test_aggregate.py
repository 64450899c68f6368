"""VBench's totals: published rows, refusals, and files that are not scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.vbench.aggregate import DIMENSIONS, aggregate, normalize, read_scores

ROWS = json.loads((Path(__file__).parent / "data" / "leaderboard_rows.json").read_text(encoding="utf-8"))
HALF = dict.fromkeys(DIMENSIONS, 0.5)


@pytest.mark.parametrize("row", ROWS, ids=[row["model"] for row in ROWS])
def test_published_rows_are_reproduced_within_a_hundredth(row: dict) -> None:
    totals = aggregate({name: value / 100 for name, value in row["dimensions"].items()})
    for key, published in row["published"].items():
        assert getattr(totals, key) == pytest.approx(published, abs=0.01)


def test_scores_above_the_range_are_not_clipped() -> None:
    assert normalize("motion_smoothness", 0.9993) == pytest.approx((0.9993 - 0.706) / 0.2915)
    assert normalize("motion_smoothness", 0.9993) > 1


def test_dynamic_degree_weighs_half() -> None:
    less = aggregate({**HALF, "dynamic_degree": 0.0}).quality
    assert aggregate(HALF).quality - less == pytest.approx(100 * 0.5 * 0.5 / 6.5)


def test_a_missing_dimension_refuses_its_group_and_the_total() -> None:
    totals = aggregate({name: 0.5 for name in DIMENSIONS if name != "scene"})
    assert totals.quality is not None
    assert totals.semantic is None
    assert totals.total is None
    assert "scene (missing)" in (totals.refused or "")


def test_a_stand_in_refuses_the_total() -> None:
    totals = aggregate(HALF, stand_ins=["color"])
    assert totals.total is None
    assert "color (measured by a stand-in)" in (totals.refused or "")


def write(folder: Path, content: object) -> Path:
    file = folder / "scores.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_names_with_spaces_and_official_lists_are_read(tmp_path: Path) -> None:
    content = {name.replace("_", " "): [0.5, [{"video_path": "a.mp4"}]] for name in DIMENSIONS}
    assert read_scores(write(tmp_path, content)) == (HALF, set())


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "[" * 100_000,
        '{"scene": 0.1, "scene": 0.2}',
        {**HALF, "sceen": 0.5},
        {**HALF, "scene": 39.26},
        {**HALF, "scene": -0.1},
        {**HALF, "scene": "0.5"},
        {**HALF, "scene": True},
        {**HALF, "scene": None},
        {**HALF, "scene": []},
        '{"scene": NaN}',
        {"subject consistency": 0.5, "subject_consistency": 0.5},
    ],
)
def test_files_that_are_not_fractions_are_one_clear_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError, match=r"scores\.json") as caught:
        read_scores(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_negative_cosines_are_scores(tmp_path: Path) -> None:
    cosines = ("appearance_style", "temporal_style", "overall_consistency")
    content = {**HALF, **dict.fromkeys(cosines, -0.02)}
    scores, _ = read_scores(write(tmp_path, content))
    assert scores == content
    assert aggregate(scores).semantic < aggregate({**HALF, **dict.fromkeys(cosines, 0.0)}).semantic
    for name, value in (("overall_consistency", -1.1), ("scene", -0.01), ("appearance_style", 28.5)):
        with pytest.raises(ConfigError, match=name):
            read_scores(write(tmp_path, {**HALF, name: value}))


@pytest.mark.parametrize("one", [1.0000000000000004, 1.0000001])
def test_the_consistency_of_a_still_video_is_a_score(tmp_path: Path, one: float) -> None:
    """What cosines of equal features are in double and in single precision."""
    assert read_scores(write(tmp_path, {**HALF, "subject_consistency": one}))[0]["subject_consistency"] == one


def test_the_command_prints_json_and_exits_by_whether_there_is_a_total(tmp_path: Path, capsys) -> None:
    assert evaluate(EvaluateConfig(aggregate=write(tmp_path, HALF), json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == pytest.approx(aggregate(HALF).as_json())
    without = {name: value for name, value in HALF.items() if name != "scene"}
    assert evaluate(EvaluateConfig(aggregate=write(tmp_path, without), json=True)) == 2
    refused = capsys.readouterr()
    assert json.loads(refused.out)["total"] is None
    assert "scene (missing)" in refused.err
