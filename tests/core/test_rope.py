"""Rotary positions: relative, norm-preserving, and movable in time."""

from __future__ import annotations

import pytest
import torch

from sparse_forcing.model.rope import apply_rotary, axis_dims, rotary_table, shift_time

ROWS, COLS, DIM = 2, 3, 32


def table(first: int, frames: int = 2):
    return rotary_table(torch.arange(first, first + frames), ROWS, COLS, DIM, torch.float64)


def test_head_dimensions_of_wan() -> None:
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(32) == (12, 10, 10)
    assert sum(axis_dims(22)) == 22


def test_scores_depend_on_distance_only() -> None:
    query, key = (torch.randn(1, 2 * ROWS * COLS, 2, DIM, dtype=torch.float64) for _ in range(2))
    scores = [
        torch.einsum("blhd,bmhd->bhlm", apply_rotary(query, table(first)), apply_rotary(key, table(first)))
        for first in (0, 5, 2000)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_rotation_keeps_the_norm_and_every_axis_matters() -> None:
    x = torch.randn(1, 2 * ROWS * COLS, 1, DIM, dtype=torch.float64)
    rotated = apply_rotary(x, table(1))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    ones = apply_rotary(torch.ones_like(x), table(1))
    assert len(torch.unique(ones[0, :, 0].round(decimals=9), dim=0)) == 2 * ROWS * COLS


@pytest.mark.parametrize("move", [3, -4, 0.5])
def test_moving_keys_in_time_equals_rotating_them_there(move: float) -> None:
    key = torch.randn(1, 2 * ROWS * COLS, 2, DIM, dtype=torch.float64)
    there = rotary_table(torch.arange(7, 9) + move, ROWS, COLS, DIM, torch.float64)
    moved = shift_time(apply_rotary(key, table(7)), torch.tensor(move).expand(key.shape[:-1]))
    torch.testing.assert_close(moved, apply_rotary(key, there))


def test_moves_differ_per_key() -> None:
    key = torch.randn(1, 4, 1, DIM, dtype=torch.float64)
    frames = torch.tensor([0, -1, 2, 0])[None, :, None]
    moved = shift_time(key, frames)
    assert torch.equal(moved[:, [0, 3]], key[:, [0, 3]])
    torch.testing.assert_close(shift_time(moved, -frames), key)


def test_half_precision_keys_are_rotated_in_float32() -> None:
    key = torch.randn(1, 2 * ROWS * COLS, 1, DIM, dtype=torch.bfloat16)
    rotary = rotary_table(torch.arange(900, 902), ROWS, COLS, DIM)
    expected = apply_rotary(key.double(), rotary_table(torch.arange(900, 902), ROWS, COLS, DIM, torch.float64))
    found = apply_rotary(key, rotary)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
