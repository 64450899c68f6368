"""README.md begins with the two commands; the code tour has a line for every module, none for one that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TOUR = (ROOT / "docs" / "code-tour.md").read_text("utf-8")
FOLDERS = ("sparse_forcing", "kernels", "sampling", "training", "eval")


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


def test_first_thing_is_the_two_commands() -> None:
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", README, re.DOTALL)
    assert [line.split("#")[0].strip() for line in blocks[0].strip().splitlines()] == ["make demo", "make test"]
    assert README.index("make demo") < 700


def test_map_has_a_line_for_every_module() -> None:
    assert sorted(modules() - set(mapped())) == []


def test_map_names_nothing_that_is_gone() -> None:
    gone = [name for name in mapped() if not (ROOT / name).exists()]
    assert gone == []


def test_every_relative_link_resolves() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
