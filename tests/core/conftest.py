"""What tests of the core share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wan_folder import write_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Wan as diffusers publishes it."""
    return write_wan(tmp_path_factory.mktemp("wan"))
