"""docs/memory.md says what is: its table names every rule, and its example is a rule that works as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.memory.retention import RULES

from . import test_retention as table

PAGE = (Path(__file__).resolve().parents[2] / "docs/memory.md").read_text("utf-8")


@pytest.fixture
def example() -> Iterator[str]:
    """The example's rule under its name, gone again afterwards."""
    before = set(RULES)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/memory.md", "exec"), {"__name__": "example"})
    (name,) = set(RULES) - before
    yield name
    del RULES[name]


def test_the_table_names_every_rule() -> None:
    assert set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)) == set(RULES)


def test_the_settings_it_names_exist() -> None:
    fields = MemoryConfig.__dataclass_fields__
    assert all(name in fields for name in re.findall(r"`(retention_\w+|persistent_blocks)`", PAGE))


def test_the_example_goes_through_the_table(example: str, run) -> None:
    table.test_the_set_is_bounded_and_holds_what_left_the_window(example, 5)
    table.test_what_is_gone_never_comes_back(example)
    table.test_choices_repeat_and_do_not_depend_on_the_batch(example, table.RAGGED, torch.float32)
    table.test_training_keeps_the_blocks_of_inference(run, example, table.RAGGED, ["detached"])
    table.test_state_of_a_slot_begins_anew_with_its_block(example)


def test_the_example_drops_what_was_unused_for_longest(example: str) -> None:
    blocks = table.view(torch.zeros(1, 1, 4, 2), attention=torch.tensor([[[0.1, 0.4, 0.1, 0.4]]]))
    rule = RULES[example](MemoryConfig())
    state = rule.observe(blocks)
    assert state.flatten().tolist() == [1, 0, 1, 0]
    assert rule.scores(table.view(torch.zeros(1, 1, 4, 2), attention=blocks.attention), 2).shape == (1, 1, 4)
