"""Command-line flags from a config dataclass: names, types and choices are the dataclass's, only the help is added."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sparse_forcing.errors import ConfigError

T = TypeVar("T")
_HABITS = {
    "--steps": ("--num-inference-steps",), "--inference-steps": ("--num-inference-steps",),
    "--size": ("--height", "--width"), "--resolution": ("--height", "--width"), "--frames": ("--num-frames",),
    "--length": ("--seconds",), "--duration": ("--seconds",), "--cfg": ("--guidance-scale",),
    "--cfg-scale": ("--guidance-scale",), "--guidance": ("--guidance-scale",), "--out": ("--output",),
    "--prompts": ("--prompt-file",), "-o": ("--output",), "-m": ("--model",), "-s": ("--seed",),
    "--samples": ("--num-samples",), "--checkpoint": ("--model",),
}  # fmt: skip
"""Flags of other programs, and what they are called where these are flags."""
_LIKE_A_FLAG = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line (exit code 2) and suggest the flag that was meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.renamed: dict[str, str] = {}  # former flags and what they are called now

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, flags and positional arguments in any order; an unknown flag names the closest known one.
        After `--` everything is positional, so that a flag there is a mistake; among prompts also what looks like one.
        """
        args = sys.argv[1:] if args is None else list(args)
        end = args.index("--") if "--" in args else len(args)
        # The intermixed form loses the `--`, so what follows is added to the list that takes any number of words.
        rest = next((action for action in self._positionals._group_actions if action.nargs == "*"), None)
        for word in args[end + 1 :]:
            flag = word.partition("=")[0]
            if flag in self._option_string_actions or (rest is not None and _LIKE_A_FLAG.fullmatch(word)):
                self.error(f"{flag} stands after --, where nothing is a flag; move it before{self._hint(flag)}")
        if end == len(args) or rest is not None:
            parsed, unknown = self.parse_known_intermixed_args(args[:end], namespace)
            if more := args[end + 1 :]:
                setattr(parsed, rest.dest, [*getattr(parsed, rest.dest, []), *more])  # type: ignore[union-attr]
        else:
            parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag in self.renamed:
                self.error(f"{flag} is called {self.renamed[flag]} now")
            self.error(f"unrecognized argument {unknown[0]!r}{self._hint(flag)}")
        return parsed

    def _hint(self, flag: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        if flag in known:
            return ""
        for action in self._actions:
            if not action.option_strings and flag == f"--{str(action.metavar).lower()}":
                return f"; {action.metavar} is given without a flag, in quotes where it has spaces"
        meant = _HABITS.get(flag, ())
        if not meant or not set(meant) <= set(known):
            meant = tuple(difflib.get_close_matches(flag, known, 1))
        return f"; did you mean {' and '.join(meant)}?" if meant else ""


def whole_number(text: str) -> int:
    return int(text)


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError
    return Path(text)


def shard(text: str) -> tuple[int, int]:
    """ "0/4" -> (0, 4)."""
    number, _, count = text.partition("/")
    return int(number), int(count)


_PARSERS: dict[Any, Any] = {int: whole_number, float: number, str: str, Path: path}
for _function, _name in ((whole_number, "whole number"), (number, "number"), (path, "path"), (shard, "I/N")):
    _function.__name__ = _name  # argparse puts it into "invalid ... value"


def add_config_flags(parser: Parser, cls: type[Any], texts: Mapping[str, str]) -> None:
    """Add a flag for every field of dataclass `cls` named in `texts` (field -> help), in that order.

    A field that is not given on the command line is left to the dataclass: its default stays in one place.
    """
    parser.renamed |= {_flag(old): _flag(new) for old, new in getattr(cls, "RENAMED", {}).items()}
    hints = typing.get_type_hints(cls)
    for field, text in texts.items():
        shape = _shape(hints[field], cls.__dataclass_fields__[field].default)
        parser.add_argument(_flag(field), help=text, default=argparse.SUPPRESS, **shape)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def read_config(cls: type[T], arguments: argparse.Namespace) -> T:
    """Build dataclass `cls` from the parsed flags that are its fields. Raises ConfigError through its validation."""
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _shape(hint: Any, default: Any) -> dict[str, Any]:
    """Keyword arguments of add_argument for a type hint."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"choices": kinds}
    if origin is tuple and kinds[-1] is Ellipsis:
        return {"nargs": "+", "action": "extend", "type": _PARSERS[kinds[0]], "metavar": _metavar(kinds[0])}
    if origin is tuple:
        return {"nargs": len(kinds), "type": _PARSERS[kinds[0]], "metavar": _metavar(kinds[0])}
    return {"type": _PARSERS[hint], "metavar": _metavar(hint)}


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]
