"""What tests of the core share."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.core.small_pipelines import make_pipe
from tests.wan_folder import write_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Wan as diffusers publishes it."""
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def shared() -> SparseForcingPipeline:
    """A small pipeline of embedded parts, not to be changed."""
    return make_pipe()


@pytest.fixture
def pipe(shared: SparseForcingPipeline) -> SparseForcingPipeline:
    """A copy of it, to be changed."""
    return copy.deepcopy(shared)
