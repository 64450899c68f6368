"""Manifests, VBench folder names, and hostile input: an entry or our own error, nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.measuring.manifest import Entry, load_entries, prompt_from_name, read_manifest, write_manifest
from sparse_forcing.eval.results import cluster


def test_a_folder_of_vbench_names_is_imported(tmp_path: Path) -> None:
    for name in ("a cat-0.mp4", "a cat-1.mp4", "a sci-fi ship-12.mp4", "loose.mp4", "notes.txt", ".sf-tmp-1-a.mp4"):
        (tmp_path / name).touch()
    found = [(entry.text, entry.index) for entry in load_entries(tmp_path)]
    assert found == [("a cat", 0), ("a cat", 1), ("a sci-fi ship", 12), ("loose", 0)]


def test_a_sidecar_beats_the_name(tmp_path: Path) -> None:
    (tmp_path / "0001-x.mp4").touch()
    record = {"video": "0001-x.mp4", "prompt": "long text", "original_prompt": "text", "seed": 7, "index": 2, "fps": 16}
    (tmp_path / "0001-x.json").write_text(json.dumps(record), encoding="utf-8")
    (entry,) = load_entries(tmp_path)
    assert (entry.prompt, entry.text, entry.seed, entry.index) == ("long text", "text", 7, 2)


def test_prompts_that_follow_each_other_group_videos_and_judge_none(tmp_path: Path) -> None:
    changes = [{"frame": 40, "seconds": 5.0, "prompt": "b"}, {"frame": 84, "seconds": 10.5, "prompt": "c"}]
    for seed in (1, 2):
        (tmp_path / f"{seed}.mp4").touch()
        record = {
            "video": f"{seed}.mp4",
            "prompt": "a",
            "original_prompt": "a",
            "seed": seed,
            "prompt_changes": changes,
        }
        (tmp_path / f"{seed}.json").write_text(json.dumps(record), encoding="utf-8")
    entries = load_entries(tmp_path)
    assert {entry.text for entry in entries} == {None}
    assert {entry.prompt for entry in entries} == {"a; 5 s: b; 10.5 s: c"}
    assert {cluster(asdict(entry)) for entry in entries} == {"a; 5 s: b; 10.5 s: c"}
    (tmp_path / "2.json").write_text(json.dumps({"prompt": "a", "prompt_changes": [{"frame": 1}]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="prompt_changes must be a list of objects"):
        load_entries(tmp_path)


def test_a_manifest_survives_writing_and_reading(tmp_path: Path) -> None:
    entries = [
        Entry(video=tmp_path / "clips" / "a.mp4", prompt="façade, \U0001f600", index=3, seed=2**40),
        Entry(video=Path("/elsewhere/b.mp4"), original_prompt="b"),
        Entry(video=tmp_path / "c.mp4", prompt="a; 5 s: b", prompt_changes=True),
    ]
    write_manifest(tmp_path / "m.jsonl", entries)
    assert json.loads((tmp_path / "m.jsonl").read_text("utf-8").splitlines()[0])["video"] == "clips/a.mp4"
    assert read_manifest(tmp_path / "m.jsonl") == entries


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"video": 3}',
        '{"video": ""}',
        '{"video": "a\\u0000.mp4"}',
        '{"video": "a.mp4", "prompt": "\\ud800"}',
        '{"video": "a.mp4", "prompt": 3}',
        '{"video": "a.mp4", "index": -1}',
        '{"video": "a.mp4", "index": 1.5}',
        '{"video": "a.mp4", "index": true}',
        '{"video": "a.mp4", "seed": NaN}',
        '{"video": "a.mp4", "video": "b.mp4"}',
        '{"video": "a.mp4", "promt": "typo"}',
        '{"video": "a.mp4", "prompt_changes": [5]}',
        '{"video": "ok.mp4"}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"video": "ok.mp4"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"m\.jsonl line 2") as caught:
        read_manifest(file)
    assert "\n" not in str(caught.value)


def test_a_prompt_of_a_megabyte_is_refused_and_many_lines_are_not(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text(json.dumps({"video": "a.mp4", "prompt": "x" * 10**6}), encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1"):
        read_manifest(file)
    file.write_text("".join(f'{{"video": "{number}.mp4"}}\n' for number in range(100_000)), encoding="utf-8")
    assert len(read_manifest(file)) == 100_000


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"<html></html>"])
def test_files_that_are_no_manifest(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        load_entries(file)


def test_missing_and_empty_targets(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError, match=str(target)):
            load_entries(target)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.sampled_from(["video", "prompt", "index", "seed", "original_prompt", "x"]), JSON)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(FIELDS | JSON)
def test_any_json_line_is_an_entry_or_our_own_error(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")
    try:
        assert all(isinstance(entry, Entry) for entry in read_manifest(file))
    except ConfigError as error:
        assert "line 1" in str(error)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_name_gives_a_prompt_or_our_own_error(name: str) -> None:
    try:
        prompt, index = prompt_from_name(name)
    except ConfigError:
        return
    assert index >= 0
    assert prompt in name
