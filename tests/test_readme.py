"""The pages say what is there: README begins with the two commands, the code tour maps every module, links resolve,
commands parse and name files that exist, Python blocks import."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from sparse_forcing.cli import COMMANDS
from sparse_forcing.cli import data as data_command
from sparse_forcing.cli import generate as generate_command
from sparse_forcing.cli.flags import Parser, read_config
from sparse_forcing.config import load_config
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.training.entry import load_stage
from tests.pages import NAMES, PAGES, ROOT, arguments_of, blocks, commands, links

README = ROOT / "README.md"
TOUR = (ROOT / "docs" / "code-tour.md").read_text("utf-8")
FOLDERS = ("sparse_forcing", "kernels", "sampling", "training", "eval")
WRITTEN = {"--output", "--out", "--grid"}
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def modules() -> set[str]:
    """Paths of all modules; a package's `__init__.py` counts as its folder, with a slash."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT)
            if folder == "sparse_forcing" and relative.parts[1] in FOLDERS:
                continue
            found.add(f"{relative.parent}/" if path.name == "__init__.py" else str(relative))
    return found


def mapped() -> dict[str, str]:
    """The lines "- `path`: what it is" of the map."""
    return dict(re.findall(r"^- `([\w/.]+(?:\.py|/))`: (\S.*)$", TOUR, re.MULTILINE))


def parsed(words: list[str]) -> tuple[str, argparse.Namespace] | None:
    """(command, arguments) of a `sparse-forcing` command, by its own parser; None for any other. Raises ConfigError."""
    found = arguments_of(words)
    if found is None or found[0] != "sparse_forcing" or found[1][0] not in COMMANDS:
        return None
    parser = Parser(prog=found[1][0])
    importlib.import_module(f"sparse_forcing.cli.{found[1][0]}").add_arguments(parser)
    return found[1][0], parser.parse_args(found[1][1:])


def test_first_thing_is_the_two_commands() -> None:
    lines = blocks(README, "sh")[0].strip().splitlines()
    assert [line.split("#")[0].strip() for line in lines] == ["make demo", "make test"]
    assert README.read_text("utf-8").index("make demo") < 700


def test_readme_stays_readable() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 180


def test_changelog_says_a_version_once_and_stays_short() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines()
    versions = [line.split()[1] for line in lines if line.startswith("## ")]
    assert len(versions) == len(set(versions))
    assert len(lines) <= 60 * len(versions)


def test_map_has_a_line_for_every_module() -> None:
    assert sorted(modules() - set(mapped())) == []


def test_map_names_nothing_that_is_gone() -> None:
    assert [name for name in mapped() if not (ROOT / name).exists()] == []


def test_tour_names_nothing_that_is_gone() -> None:
    named = re.findall(r"`((?:sparse_forcing|kernels|sampling|training|eval)/[\w/.]*)`", TOUR)
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_every_relative_link_resolves(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


@each_page
def test_every_command_parses_and_its_settings_are_valid(page: Path) -> None:
    for words in commands(page):
        found = parsed(words)
        if found is None:
            continue
        command, arguments = found
        if command == "generate" and not arguments.suite:
            if "then" in arguments:
                arguments.then = [(float(seconds), prompt) for seconds, prompt in arguments.then]
            read_config(GenerateConfig, arguments)
        elif command == "train":
            load_stage(arguments.stage, arguments.config, arguments.set)
        elif command == "data" and arguments.kind != "clips":
            module, config_class, _ = data_command._FROM_CONFIG[arguments.kind]
            load_config(getattr(importlib.import_module(module), config_class), arguments.config, arguments.set or [])


@each_page
def test_every_file_module_and_target_of_a_command_exists(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for words in commands(page):
        read = [word for flag, word in zip(["", *words], words) if flag not in WRITTEN]
        named = [word for word in read if re.match(r"(docs|examples|tests|kernels|eval|training|sampling)/", word)]
        assert [word for word in named if not (ROOT / word).exists()] == []
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        found = arguments_of(words)
        assert found is None or importlib.util.find_spec(found[0]) is not None, words


@each_page
def test_every_python_block_compiles_and_its_imports_resolve(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom):
                module: Any = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_what_is_checked_can_be_found() -> None:
    found = [parsed(words) for page in PAGES for words in commands(page)]
    assert {command for command, _ in filter(None, found)} == set(COMMANDS)
    assert generate_command.FLAGS.keys() <= vars(GenerateConfig(prompts=("a",))).keys()
