"""What the pages of the documentation say, taken apart: links, shell commands, Python blocks."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "sparse_forcing", "sampling", "training", "eval", "examples")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    + [page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def links(page: Path) -> list[str]:
    """Targets of the relative links of a page, without their anchors."""
    return re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text("utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Words of every command in the fenced `sh` blocks; loops are unrolled, variables of the block replaced."""
    return [words for block in blocks(page, "sh") for words in _words(block)]


def _words(block: str) -> list[list[str]]:
    def unrolled(loop: re.Match[str]) -> str:
        return "\n".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())

    text = re.sub(r"for (\w+) in ([^;]+); do\n(.*?)\ndone", unrolled, block.replace("\\\n", " "), flags=re.DOTALL)
    found, variables = [], {}
    for line in text.splitlines():
        words = [re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), w) for w in shlex.split(line, comments=True)]
        if len(words) == 1 and (assignment := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
            variables[assignment[1]] = assignment[2]
        elif words:
            found.append(words)
    return found


def arguments_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of a command that runs this package, through a launcher or not; None for any other."""
    if "sparse-forcing" in words:
        return "sparse_forcing", words[words.index("sparse-forcing") + 1 :]
    for place, (flag, module) in enumerate(pairwise(words)):
        if flag == "-m" and module.split(".")[0] == "sparse_forcing":
            return module, words[place + 2 :]
    return None
