"""`bench rollout`: the files it writes agree with each other, and its breakdown counts what captions say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_forcing.cli import main
from sparse_forcing.eval.bench.rollout import COLUMNS, breakdown
from sparse_forcing.scenes.held_out import held_out_prompts


def result(prompts: list[str], verdicts: list[dict[str, float | None]]) -> dict:
    columns = {name: [verdict.get(name) for verdict in verdicts] for name in COLUMNS}
    return {"prompts": prompts, "memories": {"window": {"verdicts": {"4": columns}}, "full": {}}}


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[4:]]
    return {first: rest for first, *rest in cells}


def test_the_breakdown_counts_a_caption_under_everything_it_says() -> None:
    prompts = [
        "a small red star moves up on a black background",
        "a blue star grows on a white background",
        "a large red square moves up on a black background and a small blue ring moves down",
    ]
    verdicts: list[dict[str, float | None]] = [
        {"background": 1, "colour": 1, "shape": 1, "size": 1, "motion": 1, "all": 1},
        {"background": 1, "colour": 1, "shape": 0, "size": None, "motion": 1, "all": 0},
        {"background": 1, "colour": 0, "shape": 0, "size": 0, "motion": 0, "all": 0},
    ]
    text = breakdown(result(prompts, verdicts))
    assert text.startswith("window, 4x, by what the caption says:")
    assert rows(text) == {
        "square": ["1", "100.0", "0.0", "0.0", "0.0", "0.0", "0.0"],
        "star": ["2", "100.0", "100.0", "50.0", "100.0", "100.0", "50.0"],
        "ring": ["1", "100.0", "0.0", "0.0", "0.0", "0.0", "0.0"],
        "small": ["2", "100.0", "50.0", "50.0", "50.0", "50.0", "50.0"],
        "large": ["1", "100.0", "0.0", "0.0", "0.0", "0.0", "0.0"],
        "moves up": ["2", "100.0", "50.0", "50.0", "50.0", "50.0", "50.0"],
        "moves down": ["1", "100.0", "0.0", "0.0", "0.0", "0.0", "0.0"],
        "grows": ["1", "100.0", "100.0", "0.0", "-", "100.0", "0.0"],
    }


def test_what_is_written_is_what_was_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--prompts", "2", "--horizons", "1", "--memories", "window", "--num-inference-steps", "1")
    assert main(["bench", "rollout", *settings, "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "rollout.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
    assert written["prompts"] == held_out_prompts(2)
    window = written["memories"]["window"]
    for name in COLUMNS:
        verdicts = [verdict for verdict in window["verdicts"]["1"][name] if verdict is not None]
        if verdicts:
            assert window["horizons"]["1"]["accuracy"][name]["mean"] == pytest.approx(sum(verdicts) / len(verdicts))
    table = (tmp_path / "rollout.md").read_text()
    assert "| window | 1x |" in table
    assert "window, 1x, by what the caption says:" in table
