"""Lists of videos: training and evaluation read the same manifests and folders, whatever is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.measuring.manifest import load_entries, write_manifest
from sparse_forcing.media.listing import VIDEO_SUFFIXES, read_rows
from sparse_forcing.training.data.videos import list_videos


def both(path: Path) -> list[tuple[Path, str | None]]:
    """What training and evaluation find; they must agree."""
    trained = [(video.path, video.prompt) for video in list_videos(path)]
    judged = [(entry.video, entry.prompt) for entry in load_entries(path)]
    assert trained == judged
    return list(judged)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_newlines_end_a_line(tmp_path: Path, separator: str) -> None:
    prompt = f"a square.{separator}It moves."
    rows = [{"video": "a.mp4", "prompt": "first"}, {"video": "b.mp4", "prompt": prompt}]
    ascii_only = ord(separator) < 32  # control characters are escaped in JSON
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    if ascii_only and separator in "\x0b\x0c\x1c\x1d\x1e":
        assert [entry.prompt for entry in load_entries(tmp_path / "m.jsonl")] == ["first", prompt]
        with pytest.raises(ConfigError, match="line 2 contains the control character"):
            list_videos(tmp_path / "m.jsonl")
    else:
        assert both(tmp_path / "m.jsonl")[1] == (tmp_path / "b.mp4", prompt)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_mark_and_line_ends(tmp_path: Path, mark: bytes, end: bytes) -> None:
    lines = [b'{"video": "a.mp4", "prompt": "a"}', b"", b'{"video": "sub/b.mp4", "prompt": "b"}']
    (tmp_path / "m.jsonl").write_bytes(mark + end.join(lines))
    assert both(tmp_path / "m.jsonl") == [(tmp_path / "a.mp4", "a"), (tmp_path / "sub/b.mp4", "b")]
    (tmp_path / "m.csv").write_bytes(mark + end.join([b"prompt,video,note", b'"a, b",a.mp4,x', b"c,b.mp4,"]) + end)
    assert both(tmp_path / "m.csv") == [(tmp_path / "a.mp4", "a, b"), (tmp_path / "b.mp4", "c")]


def test_fields_that_nobody_knows_are_kept(tmp_path: Path) -> None:
    row = {"video": "a.mp4", "prompt": "a", "seed": 3, "licence": "CC0", "boxes": [[1, 2]]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    assert both(tmp_path / "m.jsonl") == [(tmp_path / "a.mp4", "a")]
    (entry,) = load_entries(tmp_path / "m.jsonl")
    assert entry.extra == {"licence": "CC0", "boxes": [[1, 2]]}
    write_manifest(tmp_path / "again.jsonl", [entry])
    assert read_rows(tmp_path / "again.jsonl")[0].fields == {**row, "index": 0}


def test_a_table_has_numbers_and_lines_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('video,prompt,index,seed,prompt_changes\na.mp4,"one\ntwo",2,7,true\n')
    (entry,) = load_entries(tmp_path / "m.csv")
    assert (entry.prompt, entry.index, entry.seed, entry.prompt_changes) == ("one\ntwo", 2, 7, True)
    (tmp_path / "m.tsv").write_text("video\tprompt\na.mp4\tone, two\n")
    assert both(tmp_path / "m.tsv") == [(tmp_path / "a.mp4", "one, two")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,a cat\n", "line 1: expected a header"),
        ("video,video\na,b\n", "line 1: expected a header"),
        ("video,prompt\na.mp4\n", "line 2: has 1 cells"),
        ("video,prompt\na.mp4,a,b\n", "line 2: has 3 cells"),
        ('video,prompt\na.mp4,"a\n', "not valid CSV"),
        ("video,prompt\n,a\n", "line 2: expected"),
        ("video,index\na.mp4,two\n", "line 2: index cannot be 'two'"),
        ("video,prompt\na\0.mp4,a\n", "line 2"),
    ],
)
def test_a_bad_table_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_bytes(text.encode())
    for read in (list_videos, load_entries):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / "m.csv")


NAMES = ("a.mp4", "b.MP4", "c.mov", "d.webm", "e.mkv", "f.m4v", "g.ts", "h.gif", "i.Mpeg", "j.AVI")


def test_every_kind_of_video_is_found_and_what_is_passed_over_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"-")
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    for name in ("._a.mp4", "film.wmv", ".sf-tmp-12-ab.mp4", ".DS_Store"):
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "broken.mp4").symlink_to("nowhere")
    assert both(tmp_path) == [(tmp_path / name, f"caption of {name}") for name in NAMES]
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"{tmp_path}: passed over '._a.mp4' (hidden), 'broken.mp4' (not a file), 'film.wmv' (not")
    assert said.endswith("and 1 more")


def test_a_name_that_is_not_utf8_costs_one_file_not_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    try:
        Path(os.fsdecode(bad)).write_bytes(b"-")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"-")
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    assert [path.name for path, _ in both(tmp_path)] == ["a.mp4", "b.mp4"]
    assert "'caf\\udce9.mp4' (its name is not UTF-8; rename it)" in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_text('{"video": "caf\\udce9.mp4", "prompt": "a"}\n')
    for read in (list_videos, load_entries):
        with pytest.raises(ConfigError, match="line 1: video path"):
            read(tmp_path / "m.jsonl")


def test_a_folder_with_a_manifest_is_what_the_manifest_says(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "manifest.csv").write_text("video,prompt\nb.mp4,from the table\n")
    assert both(tmp_path) == [(tmp_path / "b.mp4", "from the table")]
    (tmp_path / "manifest.jsonl").write_text('{"video": "a.mp4", "prompt": "from the lines"}\n')
    assert both(tmp_path) == [(tmp_path / "a.mp4", "from the lines")]


def test_a_sidecar_of_generate_is_a_caption(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"-")
    (tmp_path / "a.json").write_text(json.dumps({"video": "a.mp4", "prompt": "a cat", "seed": 1, "settings": {}}))
    assert both(tmp_path) == [(tmp_path / "a.mp4", "a cat")]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.sampled_from(["m.jsonl", "m.csv", "m.tsv"]))
def test_any_bytes_are_rows_or_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(content if name == "m.jsonl" else b"video,prompt\n" + content)
    try:
        read_rows(file)
    except ConfigError as error:
        assert name in str(error)


def test_suffixes_are_lower_case() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in VIDEO_SUFFIXES)
