"""Configuration: a YAML file and dotted overrides become one frozen dataclass, or one line that says what is wrong.

    config = load_config(TrainConfig, "tiny.yaml", ["optimizer.lr=1e-4", "memory.kind=sparse"])

Strict on purpose: unknown keys, wrong types, duplicate keys, NaN and missing values are errors that name the dotted
path. The YAML read here is the core schema of YAML 1.2 (`1e-4` is a number, `off` is text), without aliases. Whatever
a dataclass raises in `__post_init__` is reported under the path of that dataclass. A dataclass may list former names
of its settings, `RENAMED: ClassVar = {old: new}`; whoever still uses one is told the new name.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import PathLike, open_input

T = TypeVar("T")
MAX_CONFIG_BYTES = 1 << 20


_CORE = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the core schema of YAML 1.2, unique keys and no aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # Nested aliases expand without bound, and shared values would hide which key is wrong.
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a group of settings", node.start_mark)
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in _CORE:
            raise yaml.constructor.ConstructorError(
                None, None, f"values of type {kind!r:.60} are not supported", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (KeyError, ValueError) as error:  # a tag that does not fit, as in `!!bool abc`
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.40} is not a value of type {kind}", node.start_mark
            ) from error


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
# YAML 1.1 reads 010 as eight and 1_000 as a thousand; the core schema knows neither.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 16 if "x" in node.value else 10))


@dataclasses.dataclass(frozen=True)
class _Text:
    """The raw right side of an override; what it means depends on the type it meets."""

    raw: str


def load_config(cls: type[T], path: PathLike | None, overrides: Iterable[str] = ()) -> T:
    """Read `path` (None: nothing but defaults), apply overrides `a.b=value`, and build `cls`.

    Raises:
        ConfigError: one line with the file and the dotted path.
    """
    source = str(path) if path is not None else "settings"
    return build_config(cls, read_settings(path) if path is not None else {}, overrides, source=source)


def build_config(
    cls: type[T], tree: Mapping[str, Any], overrides: Iterable[str] = (), *, source: str = "settings"
) -> T:
    """Build dataclass `cls` from nested mappings and overrides, strictly; `source` opens the message of an error."""
    try:
        changed = _change(tree, list(overrides))
        return _build(cls, changed, "", _leaves(cls))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error


def to_plain(value: Any) -> Any:
    """A config (or a part of one) as dicts, lists, numbers and text: what JSON and YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _parse_yaml(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or "not valid YAML; expected a text of `name: value` lines"
        raise ConfigError(f"{source}{where}: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: not valid YAML ({error})") from error
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # What PyYAML's constructors raise for a value that is not of the type its tag names (`!!bool abc`).
        raise ConfigError(f"{source}: not valid YAML (a value is not what its tag says: {error})") from error


def read_settings(path: PathLike) -> dict[str, Any]:
    """The settings of a YAML file as nested mappings, before any of them is checked. Raises ConfigError."""
    try:
        with open_input(path) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read config {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: a config is at most {MAX_CONFIG_BYTES} bytes")
    tree = _parse_yaml(data, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a list of `name: value` lines, not {_kind(tree)}")
    return tree


def _change(tree: Any, overrides: Sequence[str]) -> Any:
    """The tree with overrides, which need a mapping; without them it is left to be judged as it is."""
    if not overrides or not isinstance(tree, Mapping):
        return tree
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        _apply_override(changed, override)
    return changed


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, raw = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write it as name=value, with dots for groups (optimizer.lr=1e-4)")
    group = tree
    for depth, key in enumerate(keys[:-1]):
        if group.get(key) is None:
            group[key] = {}
        group = group[key]
        if not isinstance(group, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is not a group of settings")
    group[keys[-1]] = _Text(raw.strip())


def _build(cls: type[Any], tree: Any, path: str, leaves: list[str]) -> Any:
    if isinstance(tree, _Text):
        tree = _parse_yaml(tree.raw, path)
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path or 'config'}: expected a group of settings, got {_kind(tree)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = {}
    for key, value in tree.items():
        here = _join(path, key)
        if key in getattr(cls, "RENAMED", {}):
            raise ConfigError(f"{here}: this setting is called {_join(path, cls.RENAMED[key])} now")
        if key not in fields:
            raise ConfigError(f"{here}: unknown setting{_suggestion(here, path, fields, leaves)}")
        values[key] = _convert(hints[key], value, here, leaves)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{_join(path, name)}: missing; it has no default")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def _convert(kind: Any, value: Any, path: str, leaves: list[str]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _parse_yaml(value.raw, path) if isinstance(value, _Text) else value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path, leaves)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast("type[Any]", kind), value, path, leaves)
    if isinstance(value, _Text):
        # Text fields take the words as typed; everything else is read as YAML first.
        textual = (
            kind in (str, Path) or origin is typing.Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum))
        )
        value = value.raw if textual and value.raw not in ("", "null") else _parse_yaml(value.raw, path)
    if origin is typing.Literal:
        return _choice(arguments, value, path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(_choice([member.value for member in kind], value, path))
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, path, leaves)
    if origin is dict:
        return _convert_mapping(arguments, value, path, leaves)
    return _convert_scalar(kind, value, path)


def _convert_union(kinds: tuple[Any, ...], value: Any, path: str, leaves: list[str]) -> Any:
    is_null = value is None or (isinstance(value, _Text) and value.raw in ("", "null"))
    if is_null and types.NoneType in kinds:
        return None
    error: ConfigError | None = None
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return _convert(kind, value, path, leaves)
        except ConfigError as failure:
            error = failure
    raise error or ConfigError(f"{path}: expected null, got {_kind(value)}")


def _convert_sequence(origin: type, kinds: tuple[Any, ...], value: Any, path: str, leaves: list[str]) -> Any:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list, got {_kind(value)}")
    if origin is tuple and not (len(kinds) == 2 and kinds[1] is Ellipsis):
        if len(value) != len(kinds):
            raise ConfigError(f"{path}: expected {len(kinds)} values, got {len(value)}")
        members = list(kinds)
    else:
        members = [kinds[0]] * len(value)
    return origin(_convert(kind, item, f"{path}[{i}]", leaves) for i, (kind, item) in enumerate(zip(members, value)))


def _convert_mapping(kinds: tuple[Any, ...], value: Any, path: str, leaves: list[str]) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a group of settings, got {_kind(value)}")
    key_kind, item_kind = kinds
    return {
        _convert(key_kind, key, _join(path, key), leaves): _convert(item_kind, item, _join(path, key), leaves)
        for key, item in value.items()
    }


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{path}: {value} is not a finite number")
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 steps
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}
    if kind not in names:
        raise TypeError(f"{path}: config fields of type {kind!r} are not supported")
    hint = "; put it in quotes" if kind is str and value is not None else ""
    raise ConfigError(f"{path}: expected {names[kind]}, got {_kind(value)}{hint}")


def _choice(allowed: Iterable[Any], value: Any, path: str) -> Any:
    allowed = list(allowed)
    for option in allowed:
        if value == option and isinstance(value, bool) == isinstance(option, bool):
            return option
        if isinstance(value, str) and not isinstance(option, str) and value == str(option):
            return option
    close = difflib.get_close_matches(str(value), [str(option) for option in allowed], 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(str, allowed))}{hint}")


def _leaves(cls: Any, prefix: str = "", depth: int = 0) -> list[str]:
    """Dotted names of every setting below `cls`, to suggest the right group for a setting put in the wrong one."""
    if not dataclasses.is_dataclass(cls) or depth > 6:
        return [prefix] if prefix else []
    hints = typing.get_type_hints(cls)
    names = [prefix] if prefix else []
    for field in dataclasses.fields(cls):
        for kind in typing.get_args(hints[field.name]) or (hints[field.name],):
            names += _leaves(kind if dataclasses.is_dataclass(kind) else None, _join(prefix, field.name), depth + 1)
    return list(dict.fromkeys(names))


def _suggestion(here: str, path: str, fields: Mapping[str, Any], leaves: list[str]) -> str:
    last = here.rpartition(".")[2]
    close = [_join(path, name) for name in difflib.get_close_matches(last, list(fields), 1)]
    close += [name for name in leaves if name.rpartition(".")[2] == last and name != here]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(sorted(fields))}"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a group of settings"
    if isinstance(value, list):
        return "a list"
    return f"{'text ' if isinstance(value, str) else ''}{value!r}"[:80]


def constructor_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a diffusers config passes to its class's constructor, without diffusers' own notes ("_class_name", ...).

    For changed settings instead of `from_config`, which ignores one that the model's file does not mention.
    """
    return {name: value for name, value in config.items() if not name.startswith("_")}
