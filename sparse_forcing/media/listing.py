"""Lists of videos, read the same way by training and evaluation: JSONL and CSV manifests, and folders.

    {"video": "clips/a.mp4", "prompt": "a cat", ...}      one JSON object a line, ended by a newline and nothing else
    video,prompt                                           CSV with a header (.csv, or .tsv with tabs)
    clips/a.mp4,"a cat, asleep"

`video` is relative to the manifest; fields that nobody here knows are kept. In a folder that holds `manifest.jsonl` or
`manifest.csv`, that counts. Any other folder is its video files: what is passed over is said on stderr. No torch here.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import TEMPORARY_PREFIX, is_file
from sparse_forcing.strict_json import parse_json

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".flv", ".ogv", ".ivf", ".obu", ".y4m", ".h264", ".hevc",
)  # fmt: skip
MANIFESTS = ("manifest.jsonl", "manifest.csv")
FIELDS = frozenset({"video", "prompt", "index", "seed", "original_prompt", "prompt_changes", "returns"})
MAX_FILE_BYTES = 64 << 20
MAX_LINE = 1 << 20  # characters
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NUMBERS, _TRUTHS = ("index", "seed"), {"true": True, "false": False}
_BESIDE = (".txt", ".json", ".jsonl", ".csv")  # captions, sidecars and lists: not worth a word
_SHOWN = 3  # files named of those that are passed over


@dataclass(frozen=True)
class Row:
    """A row of a manifest: the video's path, all of its fields as they are given, and where it stands."""

    video: Path
    fields: dict[str, Any]
    where: str


def is_video_name(path: Path) -> bool:
    """Whether a file is a video by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def folder_manifest(folder: Path) -> Path | None:
    """The manifest that lists a folder's videos, if there is one."""
    return next((folder / name for name in MANIFESTS if is_file(folder / name, ConfigError)), None)


def list_folder(folder: Path) -> list[Path]:
    """Video files directly inside a folder, by name. Says on stderr what else is there and was passed over.

    Raises:
        ConfigError: the folder cannot be read.
    """
    videos, passed = [], []
    try:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(TEMPORARY_PREFIX):
                continue  # ours, of a run that is writing or was killed
            if reason := _unfit(path) or _repeats(path):
                passed.append(f"{path.name!r} ({reason})")
            elif is_video_name(path):
                videos.append(path)
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror or error}") from error
    if passed:
        more = f" and {len(passed) - _SHOWN} more" if len(passed) > _SHOWN else ""
        print(f"{folder}: passed over {', '.join(passed[:_SHOWN])}{more}", file=sys.stderr, flush=True)
    return videos


def _unfit(path: Path) -> str:
    """Why a file of a folder is no video; empty for videos and for what is expected beside them."""
    if not is_video_name(path):
        plain = path.is_dir() or path.name.startswith(".") or path.suffix.lower() in _BESIDE
        return "" if plain else "not a known kind of video"
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "not a file"
    return "" if is_unicode(path.name) else "its name is not UTF-8; rename it"


def _repeats(path: Path) -> str:
    """What a link to another video of the same folder repeats; empty for all other files."""
    if not is_video_name(path) or not path.is_symlink():
        return ""
    real = Path(os.path.realpath(path))
    listed = is_video_name(real) and not _unfit(real) and real.parent == Path(os.path.realpath(path.parent))
    return f"a link to {real.name!r}" if listed else ""


def real_name(path: Path, folders: dict[Path, str]) -> str:
    """The one name of a file that is given by several: without links and detours. `folders` remembers those met."""
    if path.parent not in folders:
        folders[path.parent] = os.path.realpath(path.parent)
    name = os.path.join(folders[path.parent], path.name)
    return os.path.realpath(name) if path.name == ".." or os.path.islink(name) else name


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; names of files may hold bytes that cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: Path) -> list[Row]:
    """Rows of a manifest, in order; nothing is decoded.

    Raises:
        ConfigError: not readable, huge, not UTF-8, or a row is not an entry; the message names the line.
    """
    text, delimiter = _text(path, "a JSONL or CSV manifest"), _DELIMITERS.get(path.suffix.lower())
    records = _json_lines(text, path) if delimiter is None else _table(text, path, delimiter)
    rows = []
    for where, record in records:
        video = record.get("video")
        if not isinstance(video, str) or not video:
            raise ConfigError(f'{where}: expected {{"video": "file.mp4", "prompt": "..."}}, with a path as video')
        if "\0" in video or not is_unicode(video) or not Path(video).name:
            raise ConfigError(f"{where}: video path {video!r:.100} is not a file name")
        strange = () if "prompt" in record else record.keys() - FIELDS
        if strange and (close := get_close_matches("prompt", strange, 1, 0.8)):
            raise ConfigError(f"{where}: unknown field {close[0]!r}; do you mean prompt?")
        rows.append(Row(path.parent / video, record, where))
    return rows


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): strings may hold U+2028 and others that it splits at, too.
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path} line {number}"
        if len(line) > MAX_LINE:
            raise ConfigError(f"{where}: longer than {MAX_LINE} characters")
        if line.strip():
            record = parse_json(line, source=where)
            if not isinstance(record, dict):
                raise ConfigError(f'{where}: expected an object, {{"video": "file.mp4", "prompt": "..."}}')
            yield where, record


def _table(text: str, path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "video" not in header or len(set(header)) < len(header):
            raise ConfigError(f"{path} line 1: expected a header of different names with video and prompt among them")
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if any(cells):
                if len(cells) != len(header):
                    raise ConfigError(f"{where}: has {len(cells)} cells, the header has {len(header)}")
                yield where, {name: _cell(name, cell, where) for name, cell in zip(header, cells) if cell}
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: not valid CSV ({error})") from error


def _cell(name: str, cell: str, where: str) -> Any:
    try:
        return int(cell) if name in _NUMBERS else _TRUTHS[cell.lower()] if name == "prompt_changes" else cell
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{where}: {name} cannot be {cell!r:.60}") from error


def _text(path: Path, expected: str) -> str:
    if not is_file(path, ConfigError) and path.exists():  # a pipe would be waited for
        raise ConfigError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; expected {expected}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line}: not UTF-8 text; expected {expected}") from error


def read_caption(path: Path) -> str:
    """The text of a caption file. Raises ConfigError where it is missing, huge or not UTF-8."""
    return _text(path, "a caption")
