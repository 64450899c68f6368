"""`pytest tests/golden --golden DIR` runs every recorded case of DIR; a test module says which kind it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.golden_cases import DEFAULT_FOLDER, DTYPES, Case


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=DEFAULT_FOLDER, help="folder with recorded cases")


def golden_folder(config: pytest.Config) -> Path:
    # A run of the whole suite reads this file too late for the option to exist.
    folder = Path(config.getoption("--golden", DEFAULT_FOLDER))
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden {folder}: no such folder")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kind(name): recorded cases this test is for, where its module reads several")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, pattern in (
        ("case", f"{kind_of(metafunc)}*.json"),
        ("golden_file", "*"),
        ("wan_weights", "weights_*_wan.safetensors"),
    ):
        if fixture in metafunc.fixturenames:
            files = sorted(path for path in golden_folder(metafunc.config).glob(pattern) if path.is_file())
            values = [Case(path) if fixture == "case" else path for path in files]
            metafunc.parametrize(fixture, values, ids=[path.stem if fixture == "case" else path.name for path in files])
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def kind_of(metafunc: pytest.Metafunc) -> str:
    marker = metafunc.definition.get_closest_marker("kind")
    return marker.args[0] if marker else getattr(metafunc.module, "KIND", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A kind without a case in the folder is not a skipped test: there is nothing to run."""
    items[:] = [item for item in items if "NOTSET" not in item.name]
