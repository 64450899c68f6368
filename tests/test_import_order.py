"""kernels < core < sampling < {training | eval} < reproduction < cli: nothing imports what comes after or beside it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {"kernels": 0, "core": 1, "sampling": 2, "training": 3, "eval": 3, "reproduction": 4, "cli": 5}
OUTSIDE = ("kernels", "sampling", "training", "eval")
TOP = {"sparse_forcing", "sparse_forcing.__main__"}  # public names and the entry point: they lead everywhere


def area_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "core"


def modules() -> Iterator[tuple[Path, str]]:
    for folder in ("sparse_forcing", *OUTSIDE):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if folder == "sparse_forcing" and relative.parts[1] in OUTSIDE:
                continue  # the same files through the links
            dotted = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            yield path, dotted if folder == "sparse_forcing" else f"sparse_forcing.{dotted}"


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Absolute names of everything imported anywhere in a file, inside functions and TYPE_CHECKING too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from (
                (node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])) for alias in node.names
            )


def allowed(importer: str, imported: str) -> bool:
    here, there = area_of(importer), area_of(imported)
    if importer in TOP or here == there:
        return True
    if here == "kernels" and imported.split(".")[1:2] == ["errors"]:
        return True  # a leaf: it imports nothing itself
    return RANK[there] < RANK[here]


def test_every_import_points_backwards() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {name}"
        for path, module in modules()
        for line, name in imports(path, module)
        if name.split(".")[0] == "sparse_forcing" and not allowed(module, name)
    ]
    assert wrong == []


def test_no_bare_area_is_imported() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, module in modules()
        for line, name in imports(path, module)
        if name.split(".")[0] in OUTSIDE
    ]
    assert wrong == []


def test_the_rule_can_fail() -> None:
    assert not allowed("sparse_forcing.files", "sparse_forcing.sampling.generation.jobs")
    assert not allowed("sparse_forcing.kernels.x", "sparse_forcing.media.video")
    assert not allowed("sparse_forcing.eval.x", "sparse_forcing.training.y")
    assert not allowed("sparse_forcing.training.x", "sparse_forcing.eval.y")
    assert not allowed("sparse_forcing.sampling.x", "sparse_forcing.reproduction.y")
    assert not allowed("sparse_forcing.eval.x", "sparse_forcing.cli")
    assert allowed("sparse_forcing.training.x", "sparse_forcing.sampling.rollout")
    assert allowed("sparse_forcing.kernels.x", "sparse_forcing.errors.ConfigError")


@pytest.mark.parametrize(
    "module", ["sparse_forcing", "sparse_forcing.cli", "sparse_forcing.sampling.generation.generate"]
)
def test_light_modules_leave_torch_alone(module: str) -> None:
    code = f"import sys, {module}; sys.exit(int('torch' in sys.modules or 'diffusers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
