"""The page stands alone, survives hostile text, and shows differences as they are."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.report.charts import Series, line_chart
from sparse_forcing.media.video import write_video
from tests.eval.conftest import moving_disc


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "line", "circle", "polyline", "polygon"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def run(folder: Path, name: str, damage: float, **options) -> Path:
    videos = folder / name
    for index in range(3):
        frames = moving_disc(40, seed=index)
        grain = np.random.default_rng(index).normal(0, damage, frames.shape)
        write_video(videos / f"prompt {index}-0.mp4", np.clip(frames + grain, 0, 255).astype(np.uint8), 16)
    lines = [
        f'{{"video": "prompt {index}-0.mp4", "prompt": {prompt}}}'
        for index, prompt in enumerate(
            ('"plain"', '"<script>alert(1)</script> \\" onerror=\'x\' & 100% [bold]"', "null")
        )
    ]
    (videos / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    metrics = ("pixel_stability", "picture_quality", "brightness")
    evaluate(
        EvaluateConfig(
            **{"target": videos / "m.jsonl", "suite": "drift", "metrics": metrics, "resamples": 100, **options}
        )
    )
    return videos / "evaluation-drift"


def page(folder: Path) -> tuple[str, Tags]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    return text, tags


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    text, tags = page(run(tmp_path, "good", 0))
    names = [tag for tag, _ in tags.found]
    assert "script" not in names
    assert "link" not in names
    assert names.count("video") == names.count("img") == 3
    for _, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?://", text)
    assert "&lt;script&gt;alert(1)" in text


def test_videos_can_be_linked_instead(tmp_path: Path) -> None:
    folder = run(tmp_path, "good", 0, embed_videos=False)
    _, tags = page(folder)
    sources = [attributes["src"] for tag, attributes in tags.found if tag == "video"]
    assert sorted(sources) == ["../prompt%200-0.mp4", "../prompt%201-0.mp4", "../prompt%202-0.mp4"]
    assert all((folder / source.replace("%20", " ")).resolve().is_file() for source in sources)


def test_comparison_marks_what_is_clearly_worse(tmp_path: Path) -> None:
    good = run(tmp_path, "good", 0)
    text, tags = page(run(tmp_path, "bad", 25, compare=(good,)))
    cells = [attributes.get("class") for tag, attributes in tags.found if tag == "td"]
    assert cells.count("worse") == 2  # stability and quality; brightness has no better direction
    assert text.count("<polyline") == 2 * 4  # two runs in three metrics and the similarity to the opening
    assert "2 prompts" not in text  # the prompt, the hostile prompt, and the file name pair up: three


@pytest.mark.slow
def test_videos_can_be_compared_without_an_earlier_run(tmp_path: Path) -> None:
    run(tmp_path, "good", 0)
    text, _ = page(run(tmp_path, "bad", 25, compare=(tmp_path / "good" / "m.jsonl",)))
    assert "first run against" in text


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-9, 2e9], [-3.0, 4.0, 4.0]])
def test_charts_of_any_range_have_finite_coordinates(values: list[float]) -> None:
    x = [float(number) for number in range(len(values))]
    text = line_chart("a & b", [Series(label="r", x=x, mean=values, low=values, high=values)])
    assert "nan" not in text
    assert "inf" not in text
    assert "a &amp; b" in text
