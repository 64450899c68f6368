"""The package as users get it: four folders inside `sparse_forcing`, installed, editable, and from an sdist."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AREAS = ("kernels", "training", "sampling", "eval")
PARTS = ("sparse_forcing", *AREAS)
RUNTIME_DATA = {".json", ".yaml", ".txt", ".safetensors", ".typed", ".md"}


@pytest.mark.parametrize("area", AREAS)
def test_area_is_a_plain_folder_linked_into_the_package(area: str) -> None:
    link = ROOT / "sparse_forcing" / area
    assert link.is_symlink()
    assert link.readlink() == Path("..") / area
    assert not (ROOT / area / "__init__.py").exists()


def test_no_module_shadows_a_dependency() -> None:
    # `import triton` inside a folder that holds triton.py would find the wrong one when run from that folder.
    names = {Path(path).stem for path in tracked() if path.endswith(".py")}
    distributions = importlib.metadata.packages_distributions()
    ours = {"sparse_forcing", "conftest", "__init__", "__main__"}
    shadowed = {name for name in names - ours if name in distributions and not is_ours(distributions[name])}
    assert not shadowed & {
        "torch",
        "triton",
        "diffusers",
        "transformers",
        "accelerate",
        "einops",
        "av",
        "numpy",
        "yaml",
    }


def test_make_installs_the_torch_that_the_package_asks_for_and_ci_runs_make_test() -> None:
    torch_range = re.search(r'"(torch>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert torch_range is not None
    assert f"TORCH := {torch_range[1]}\n" in (ROOT / "Makefile").read_text()
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def is_ours(names: list[str]) -> bool:
    return set(names) == {"sparse-forcing"}


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def shipped() -> set[str]:
    """Every tracked file that belongs into an installed package, by its import path."""
    wanted = set()
    for name in tracked():
        area = name.split("/")[0]
        path = f"sparse_forcing/{name}" if area in AREAS else name
        if path.startswith("sparse_forcing/") and Path(name).suffix in RUNTIME_DATA | {".py"}:
            wanted.add(path)
    return wanted


def build(kind: str, source: Path, target: Path) -> Path:
    """Call setuptools' build backend in a child, without network or isolation."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    child = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    return target / child.stdout.splitlines()[-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the tracked files: building leaves egg-info behind."""
    source = tmp_path / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def works(folder: Path, cwd: Path) -> None:
    code = (
        "import sparse_forcing, sparse_forcing.sampling.generation.jobs, sparse_forcing.eval.vbench.suites as s;"
        "assert len(s.vbench_prompts()) == 946; print(sparse_forcing.__file__)"
    )
    environment = {"PYTHONPATH": str(folder), "PATH": ""}
    child = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.startswith(str(folder))


@pytest.mark.slow
def test_wheel_holds_every_module_once_and_no_bare_area(checkout: Path, tmp_path: Path) -> None:
    wheel = build("wheel", checkout, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(tmp_path / "installed")
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"sparse_forcing"}
    assert shipped() - set(names) == set()
    works(tmp_path / "installed", tmp_path)


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    sdist = build("sdist", checkout, tmp_path)
    with tarfile.open(sdist) as archive:
        # Early releases of Python 3.10 and 3.11 have no extraction filters.
        archive.extractall(tmp_path / "unpacked", **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))
    (source,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", source, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert shipped() - set(archive.namelist()) == set()


@pytest.mark.slow
def test_editable_install_works_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    child = subprocess.run(
        [*command, "--target", str(tmp_path / "site"), "--editable", str(checkout)], capture_output=True, text=True
    )
    if "No module named pip" in child.stderr:
        pytest.skip("this environment has no pip")
    assert child.returncode == 0, child.stderr[-2000:]
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path / 'site')!r});"
        f"sys.path.append({sysconfig.get_path('purelib')!r});"
        "import sparse_forcing.sampling.generation.jobs as j, sparse_forcing;"
        "print(sparse_forcing.__file__, j.__file__)"
    )
    child = subprocess.run(
        # -S: an editable install of this environment itself must not answer instead.
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.count(str(checkout)) == 2


def test_runs_from_the_root_of_a_clone() -> None:
    works(ROOT, ROOT)


def test_modules_functions_and_folders_are_small() -> None:
    modules = [Path(name) for name in tracked() if name.endswith(".py") and name.split("/")[0] in PARTS]
    sizes = {}
    for module in modules:
        text = (ROOT / module).read_text()
        lenient = module.parts[0] == "kernels"
        limit = 450 if lenient or module.is_relative_to("training/recipes") else 400
        if (lines := len(text.splitlines())) > limit:
            sizes[str(module)] = lines
        sizes |= {} if lenient else dict(long_functions(module, text))
    assert sizes == {}
    folders = Counter(module.parent for module in modules if module.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 14} == {}


def long_functions(module: Path, text: str, limit: int = 60) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > limit:
                yield f"{module}: {node.name}", lines


def test_a_long_function_is_found() -> None:
    text = "class A:\n    def short(self):\n        pass\n\n    def long(self):\n" + "        pass\n" * 60
    assert dict(long_functions(Path("a.py"), text)) == {"a.py: long": 61}
