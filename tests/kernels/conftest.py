"""Kernel tests check the values of lists and sizes on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparse_forcing.kernels.values import checked_values


@pytest.fixture(autouse=True)
def values_are_checked() -> Iterator[None]:
    with checked_values():
        yield
