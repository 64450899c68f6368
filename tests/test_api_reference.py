"""The API reference names what exists, what it shows has a docstring, and no public name is left out."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pages import ROOT

PUBLIC = (
    "sparse_forcing",
    "sparse_forcing.memory",
    "sparse_forcing.memory.retention",
    "sparse_forcing.kernels.block_selection",
    "sparse_forcing.kernels.block_sparse_attention",
)
SHOWN = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)
]


def resolve(name: str) -> Any:
    """The module, class or function of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def members(thing: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of what is shown with a module or class: its own public functions, classes and properties."""
    for name, value in vars(thing).items():
        if name.startswith("_"):
            continue
        if inspect.ismodule(thing):
            if getattr(value, "__module__", None) == thing.__name__ and (
                inspect.isclass(value) or inspect.isfunction(value)
            ):
                yield name, value
                yield from ((f"{name}.{inner}", x) for inner, x in members(value) if inspect.isclass(value))
        elif isinstance(value, (types.FunctionType, property, classmethod, staticmethod)):
            yield name, getattr(thing, name)


def documented(thing: Any) -> bool:
    """Whether somebody wrote a docstring: a method may inherit one, a dataclass's own signature is none."""
    if inspect.isclass(thing):
        written = vars(thing).get("__doc__") or ""
        return bool(written) and not written.startswith(f"{thing.__name__}(")
    return bool(inspect.getdoc(thing))


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_has_a_docstring(name: str) -> None:
    thing = resolve(name)
    nested = members(thing) if inspect.ismodule(thing) or inspect.isclass(thing) else ()
    assert [inner for inner, value in [(name, thing), *nested] if not documented(value)] == []


@pytest.mark.parametrize("package", PUBLIC)
def test_no_public_name_is_left_out(package: str) -> None:
    module = importlib.import_module(package)
    shown = [resolve(name) for name in SHOWN]
    inside = [vars(thing).values() for thing in shown if inspect.ismodule(thing)]
    everything = [*shown, *(value for values in inside for value in values)]
    public = {name: getattr(module, name) for name in module.__all__ if name != "__version__"}
    names = [name for name, thing in public.items() if not inspect.ismodule(thing)]
    assert [name for name in names if not any(public[name] is other for other in everything)] == []
