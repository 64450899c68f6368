"""Prompts: read from the command line or a file, and refused before any model is loaded when they cannot be used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import PathLike, find_temporary, open_input
from sparse_forcing.strict_json import parse_json

MAX_PROMPT_CHARACTERS = 20_000  # far beyond any encoder's limit; longer text is a file given by mistake
MAX_FILE_BYTES = 64 << 20
MAX_FILE_LINES = 1_000_000
MAX_SEED = 2**62
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile(r"\r\n|\r|\n")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_NOT_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_prompt(prompt: str, where: str = "prompt") -> str:
    """Return the prompt without surrounding space. `where` opens the message.

    Raises:
        ConfigError: empty, huge, not valid Unicode, or holding control characters.
    """
    text = prompt.strip()
    if not text:
        raise ConfigError(f"{where} is empty; describe what the video shows")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ConfigError(f"{where} has {len(text)} characters; the limit is {MAX_PROMPT_CHARACTERS}")
    if _SURROGATE.search(text):
        raise ConfigError(f"{where} is not valid Unicode text (a lone surrogate); was it cut or wrongly decoded?")
    if control := _CONTROL.search(text):
        raise ConfigError(f"{where} contains the control character {control[0]!r}")
    return text


def check_new_name(name: str, where: str) -> None:
    """Refuse to make files whose names do not fit into a line of text, or which the next run would sweep away as the
    temporaries of a killed one. Raises ConfigError."""
    if control := _NOT_IN_NAMES.search(name):
        raise ConfigError(
            f"{where} {name!r:.60}: the name contains the control character {control[0]!r}; choose another"
        )
    if taken := find_temporary(name):
        raise ConfigError(f"{where} {name!r:.60}: {taken:.40} is a name of temporary files; choose another")


def check_utf8(name: str, where: str) -> None:
    """Refuse a name that JSON files beside the videos could not hold. Raises ConfigError."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} {name!r}: the name is not valid UTF-8; rename it") from error


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """Check prompts given one by one; messages count them from 1. Raises ConfigError."""
    checked = [check_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    if not checked:
        raise ConfigError('no prompt; give one, as in: sparse-forcing generate "a red ball moves to the right"')
    return checked


def is_jsonl(path: PathLike) -> bool:
    """Whether each line of a prompt file is an object."""
    return os.fsdecode(path).lower().endswith(".jsonl")


def read_prompts(path: PathLike) -> list[str]:
    """Prompts of a UTF-8 text file, one a line; blank lines and lines that begin with # are skipped. Each line of a
    .jsonl file is an object with a `prompt`.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, is huge, holds no prompt, or a line is not a prompt.
    """
    as_json = is_jsonl(path)
    return [check_prompt(_read_prompt(line, where) if as_json else line, where) for where, line in read_lines(path)]


def read_lines(path: PathLike) -> list[tuple[str, str]]:
    """(where it stands, text) of every line of a prompt file that says something. Raises ConfigError."""
    try:
        with open_input(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; is this a list of prompts?")
    if max(data.count(end) for end in (b"\n", b"\r")) >= MAX_FILE_LINES:
        raise ConfigError(f"{path}: more than {MAX_FILE_LINES} lines; is this a list of prompts?")
    try:
        lines = _LINE_END.split(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = len(_LINE_END.split(data[: error.start].decode("utf-8", "replace")))
        raise ConfigError(f"{path} line {line}: not UTF-8 text") from error
    found = [
        (f"{path} line {number}", text)
        for number, line in enumerate(lines, 1)
        if (text := line.strip()) and not text.startswith("#")
    ]
    if not found:
        raise ConfigError(f"{path}: contains no prompts; write one a line")
    if not is_jsonl(path) and found[0][1].startswith("{") and found[0][1].endswith("}"):
        raise ConfigError(f"{path}: its lines look like JSON; give the file a name that ends in .jsonl")
    return found


def _read_prompt(line: str, where: str) -> str:
    """The prompt of one line of a JSONL file."""
    row = parse_json(line, source=where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f'{where}: expected an object with a prompt, as in {{"prompt": "a red ball"}}')
    return row["prompt"]
