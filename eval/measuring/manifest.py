"""Manifests: which videos to judge, and what each was meant to show.

A manifest is a JSONL or CSV file as training reads it, too (sparse_forcing/media/listing.py):

    {"video": "clips/a.mp4", "prompt": "a cat", "index": 0, "seed": 1, "original_prompt": null}

`original_prompt` is what metrics compare against when generation used a rewritten `prompt`. A folder works too: its
manifest, or else its videos, each with the `name.json` that `generate` wrote beside `name.mp4`, its caption in
`name.txt`, or a name as VBench's `{prompt}-{index}.mp4`. With `prompt_changes` (in a manifest: true) the prompt changes
on the way, and metrics that compare with one leave the video out. `returns` says what comes back (returns.py). Other
fields are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.measuring.returns import SightPair, parse_returns, write_returns
from sparse_forcing.files import atomic_write_text, is_file, is_folder, read_json
from sparse_forcing.media.listing import (
    FIELDS,
    VIDEO_SUFFIXES,
    Row,
    folder_manifest,
    is_video_name,
    list_folder,
    read_caption,
    read_rows,
    real_name,
)
from sparse_forcing.sampling.generation.prompts import MAX_PROMPT_CHARACTERS

_VBENCH_NAME = re.compile(r"^(?P<prompt>.*)-(?P<index>\d{1,9})$", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One video: its path, the prompt it was generated from, sample index and seed, the prompt to judge it by.

    prompt_changes: `prompt` tells of several that followed each other, none of which says what the whole video shows.
    returns: what comes back in it, for suite recall.
    extra: further fields of its row, kept as they are.
    """

    video: Path
    prompt: str | None = None
    index: int = 0
    seed: int | None = None
    original_prompt: str | None = None
    prompt_changes: bool = False
    returns: tuple[SightPair, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.video.name or "\0" in str(self.video):
            raise ConfigError(f"video path {str(self.video)!r} is not a file name")
        one_prompt = None if self.prompt_changes else self.prompt  # several in one line may be longer
        for text in (one_prompt, self.original_prompt, str(self.video)):
            if text is not None:
                _check_text(text)
        if self.index < 0:
            raise ConfigError(f"index must be 0 or more, not {self.index}")

    @property
    def text(self) -> str | None:
        """The prompt that the video is judged against."""
        if self.prompt_changes:
            return None
        return self.prompt if self.original_prompt is None else self.original_prompt


def load_entries(target: Path) -> list[Entry]:
    """Entries of a folder, a manifest (.jsonl) or a single video file. Raises ConfigError when there are none."""
    target = Path(target)
    if is_folder(target, ConfigError):
        manifest = folder_manifest(target)
        entries = import_folder(target) if manifest is None else read_manifest(manifest)
    elif is_video_name(target):
        entries = [_make_entry(target)]
    elif is_file(target, ConfigError):
        entries = read_manifest(target)
    else:
        raise ConfigError(f"{target}: no such folder, manifest or video")
    if not entries:
        raise ConfigError(f"{target}: contains no videos ({', '.join(VIDEO_SUFFIXES)})")
    return entries


def read_manifest(path: Path) -> list[Entry]:
    """Entries of a manifest, in order. Raises ConfigError naming the line."""
    entries: list[Entry] = []
    seen: dict[str, str] = {}
    folders: dict[Path, str] = {}
    for row in read_rows(Path(path)):
        name = real_name(row.video, folders)
        if name in seen:
            raise ConfigError(f"{row.where}: repeats the video of {seen[name]}")
        seen[name] = row.where
        entries.append(_from_row(row))
    return entries


def _from_row(row: Row) -> Entry:
    try:
        known = _check_types({name: row.fields[name] for name in FIELDS if name in row.fields})
        extra = {name: value for name, value in row.fields.items() if name not in FIELDS}
        return Entry(**{**known, "video": row.video, "extra": extra})
    except ConfigError as error:
        raise ConfigError(f"{row.where}: {error}") from error


def _check_types(record: dict[str, Any]) -> dict[str, Any]:
    for name, kind in (("prompt", str), ("original_prompt", str), ("index", int), ("seed", int)):
        value = record.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"{name} must be {'text' if kind is str else 'a whole number'}, not {value!r:.60}")
    changes = record.get("prompt_changes") or False
    if not isinstance(changes, bool):
        raise ConfigError(f"prompt_changes must be true or false, not {changes!r:.60}")
    returns = parse_returns(record.get("returns"))
    return {**record, "index": record.get("index") or 0, "prompt_changes": changes, "returns": returns}


def _check_text(text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ConfigError(f"text of {len(text)} characters; the limit is {MAX_PROMPT_CHARACTERS}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text[:40]!r} is not valid Unicode ({error.reason})") from error


def import_folder(folder: Path) -> list[Entry]:
    """Entries of all videos directly inside a folder, by name; see the module for where prompts come from."""
    return [_make_entry(video) for video in list_folder(folder)]


def _make_entry(video: Path) -> Entry:
    sidecar = video.with_suffix(".json")
    if sidecar.is_file():
        record = read_json(sidecar)
        known = {name: record.get(name) for name in FIELDS} if isinstance(record, dict) else {}
        try:
            changes = _later_prompts(record) if known else []
            known = _check_types(known | {"prompt_changes": bool(changes)})
            if changes:
                known |= {"prompt": "; ".join([known["prompt"] or "", *changes]), "original_prompt": None}
            return Entry(**{**known, "video": video})
        except ConfigError as error:
            raise ConfigError(f"{sidecar}: {error}") from error
    if is_file(video.with_suffix(".txt"), ConfigError):
        return Entry(video=video, prompt=read_caption(video.with_suffix(".txt")).strip())
    try:
        prompt, index = prompt_from_name(video.name)
    except ConfigError as error:
        raise ConfigError(f"{str(video)!r}: {error}") from error
    return Entry(video=video, prompt=prompt, index=index)


def _later_prompts(record: dict[str, Any]) -> list[str]:
    """The `prompt_changes` of a sidecar, a text each."""
    changes = record.get("prompt_changes") or []
    try:
        return [f"{float(change['seconds']):g} s: {change['prompt']}" for change in changes]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ConfigError("prompt_changes must be a list of objects with seconds and prompt") from error


def prompt_from_name(name: str) -> tuple[str, int]:
    """VBench's file name -> prompt and sample index; a name without `-{index}` is all prompt."""
    stem = Path(name).stem
    match = _VBENCH_NAME.match(stem)
    prompt, index = (stem, 0) if match is None else (match["prompt"], int(match["index"]))
    _check_text(prompt)
    return prompt, index


def write_manifest(path: Path, entries: Iterable[Entry]) -> None:
    """Write entries as JSONL, videos relative to the manifest where they lie below it."""
    lines = []
    for entry in entries:
        record = {name: value for name, value in asdict(entry).items() if value is not None and value is not False}
        record |= record.pop("extra") | {"returns": write_returns(entry.returns)}
        if not record["returns"]:
            del record["returns"]
        base = Path(path).parent.resolve()
        video = entry.video.resolve()
        record["video"] = str(video.relative_to(base) if video.is_relative_to(base) else video)
        lines.append(json.dumps(record, ensure_ascii=False))
    atomic_write_text(path, "".join(line + "\n" for line in lines))
