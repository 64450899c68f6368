"""JSON read strictly, and the forms that files of this project have: one line says what is not as expected.

A form is one of: a dictionary of keys and the forms of their values ("name?" may be absent; the one key ANY stands for
every name), a list with the one form of its items, a tuple of forms of which one must fit, a value that must be equal,
or a Kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparse_forcing.errors import ConfigError

ANY = "*"
MOST = 1e150  # numbers whose squares, and sums of those, are finite


def parse_json(text: str | bytes, *, source: str, expected: str = "JSON") -> Any:
    """Parse JSON strictly: duplicate keys, NaN and infinity are errors.

    Args:
        source: names the text in the message; expected: says there what should have been in its place.

    Raises:
        ConfigError: the text is not valid JSON in this strict sense.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in pairs:
            if key in result:
                raise ConfigError(f"{source}: key {key!r} appears twice")
            result[key] = item
        return result

    def refuse(name: str) -> Any:
        raise ConfigError(f"{source}: {name} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except ConfigError:
        raise
    except UnicodeDecodeError as error:  # its own words would be about UTF-32, which it guesses from the first bytes
        raise ConfigError(f"{source}: holds no text; expected {expected}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from error


@dataclass(frozen=True)
class Kind:
    """Values of one kind: what they are called, and which they are."""

    words: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be computed with; true and false are none."""
    return type(value) in (int, float) and abs(value) <= MOST


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


NUMBER = Kind("a finite number", is_number)
COUNT = Kind("a whole number of 0 or more", lambda value: type(value) is int and 0 <= value <= MOST)
WHOLE = Kind("a whole number", lambda value: type(value) is int)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", _is_text)
PATH = Kind("a path", lambda value: _is_text(value) and value != "" and "\0" not in value)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NOTHING = Kind("null", lambda value: value is None)


def check_form(value: Any, form: Any, source: str, expected: str) -> None:
    """Raise ConfigError unless `value`, read from `source`, has a form; the message says `expected` in words."""
    if misfit := find_misfit(value, form):
        raise ConfigError(f"{source}: not {expected}: {misfit}")


def find_misfit(value: Any, form: Any, at: str = "") -> str | None:
    """Where and why a value does not have a form, None where it does."""
    where = at or "the content"
    if isinstance(form, Kind):
        return None if form.fits(value) else f"{where} is {value!r:.60}, expected {form.words}"
    if isinstance(form, tuple):
        misfits = [find_misfit(value, option, at) for option in form]
        return None if None in misfits else misfits[-1]
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is {value!r:.60}, expected a list"
        return _first(find_misfit(item, form[0], f"{at}[{number}]") for number, item in enumerate(value))
    if isinstance(form, dict):
        return _misfit_of_object(value, form, at, where)
    return None if type(value) is type(form) and value == form else f"{where} is {value!r:.60}, expected {form!r}"


def _misfit_of_object(value: Any, form: dict[str, Any], at: str, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where} is {value!r:.60}, expected an object"
    if ANY in form:
        return _first(find_misfit(item, form[ANY], f"{at}.{name:.60}".lstrip(".")) for name, item in value.items())
    for key, inner in form.items():
        name = key.rstrip("?")
        if name not in value:
            if key == name:
                return f"{where} has no {name}"
        elif misfit := find_misfit(value[name], inner, f"{at}.{name}".lstrip(".")):
            return misfit
    return None


def _first(misfits: Any) -> str | None:
    return next((misfit for misfit in misfits if misfit is not None), None)
