"""Rows of a prompt file: a prompt alone, or a line of JSON that says more about its video."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import PathLike
from sparse_forcing.sampling.generation.paths import RESERVED
from sparse_forcing.sampling.generation.prompts import (
    MAX_SEED,
    check_new_name,
    check_prompt,
    check_utf8,
    is_jsonl,
    read_lines,
)
from sparse_forcing.strict_json import parse_json

FIELDS = ("prompt", "original_prompt", "negative_prompt", "seed", "image", "video", "then", "output")


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One prompt, and what is said of its video alone; None: as the whole run says.

    where: place in the file, for messages.
    original_prompt: what evaluation compares with; negative_prompt, seed, image, video, then: see `GenerateConfig`.
    output: path of the video below the output folder.
    """

    where: str = "prompt"
    prompt: str
    original_prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    image: Path | None = None
    video: Path | None = None
    then: tuple[tuple[float, str], ...] = ()
    output: str | None = None


def read_rows(path: PathLike) -> list[PromptRow]:
    """Rows of a text file, a prompt each, or of a .jsonl file, an object each with the fields `FIELDS`.

    Files that a row names are looked for beside the prompt file.

    Raises:
        ConfigError: see `read_prompts`; or a field is unknown, of the wrong kind, or cannot be used.
    """
    lines = read_lines(path)
    if not is_jsonl(path):
        return [PromptRow(where=where, prompt=check_prompt(line, where)) for where, line in lines]
    return [_row(line, where, Path(path).parent) for where, line in lines]


def _row(line: str, where: str, folder: Path) -> PromptRow:
    row = parse_json(line, source=where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f'{where}: expected an object with a prompt, as in {{"prompt": "a red ball"}}')
    row = {name: value for name, value in row.items() if value is not None}
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise ConfigError(f"{where}: unknown field {unknown[0]!r:.60}; the fields are {', '.join(FIELDS)}")
    if {"image", "video"} <= row.keys():
        raise ConfigError(f"{where}: image and video: give one of them")
    found: dict[str, Any] = {}
    for name in row.keys() - {"seed", "then"}:
        found[name] = _text(row[name], name, where)
        if name in ("image", "video"):
            found[name] = folder / found[name]
        elif name == "output":
            found[name] = _inside(found[name], where)
        else:
            found[name] = check_prompt(found[name], where if name == "prompt" else f"{where}: {name}")
    if "seed" in row:
        found["seed"] = _seed(row["seed"], where)
    then = tuple(_change(change, where) for change in _list(row.get("then", []), where))
    return PromptRow(where=where, then=then, **found)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {name}: expected text, got {value!r:.60}")
    return value


def _seed(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SEED:
        raise ConfigError(f"{where}: seed: expected a whole number from 0 to {MAX_SEED}, got {value!r:.60}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f'{where}: then: expected a list, as in [[5, "a blue ball"]], got {value!r:.60}')
    return value


def _change(value: Any, where: str) -> tuple[float, str]:
    pair = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if not (type(pair[0]) in (int, float) and isinstance(pair[1], str)):
        raise ConfigError(f'{where}: then: expected seconds and a prompt, as in [5, "a blue ball"], got {value!r:.60}')
    try:
        return float(pair[0]), pair[1]
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf, pair[1]


def _inside(name: str, where: str) -> str:
    """`name` as a path of an .mp4 file below some folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or path.suffix.lower() != ".mp4":
        raise ConfigError(f"{where}: output: expected the path of an .mp4 file inside --output, got {name!r:.60}")
    check_new_name(name, f"{where}: output:")
    check_utf8(name, f"{where}: output:")
    if taken := [part for part in path.parts[:-1] if part in RESERVED]:
        raise ConfigError(f"{where}: output: {taken[0]} is a folder for files beside the videos; choose another name")
    return str(path)
