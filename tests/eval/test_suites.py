"""VBench's prompts and the list of videos to generate for it."""

from __future__ import annotations

from collections import Counter

import pytest

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.measuring.manifest import prompt_from_name
from sparse_forcing.eval.vbench.aggregate import DIMENSIONS
from sparse_forcing.eval.vbench.suites import prompt_index, vbench_prompts, vbench_work_list


def test_every_dimension_has_its_prompts() -> None:
    rows = vbench_prompts()
    counts = Counter(name for row in rows for name in row.dimensions)
    assert len(rows) == 946
    assert set(counts) == set(DIMENSIONS)
    assert (counts["subject_consistency"], counts["overall_consistency"], counts["scene"]) == (72, 93, 86)
    assert counts["temporal_flickering"] == 75
    assert len(prompt_index()) == 944


def test_the_work_list_is_946_times_five_and_names_the_original_prompt() -> None:
    work = list(vbench_work_list())
    assert len(work) == 946 * 5
    for generated, file_name, original, index in work:
        assert prompt_from_name(file_name) == (original, index)
        assert "/" not in file_name
        assert len(file_name.encode()) <= 255
        assert generated
    assert sum(generated != original for generated, _, original, _ in work) > 0.9 * len(work)


def test_shards_cover_the_list_and_share_no_file() -> None:
    shards = [list(vbench_work_list(shard=(number, 7))) for number in range(7)]
    files = [{file_name for _, file_name, _, _ in shard} for shard in shards]
    assert Counter(item for shard in shards for item in shard) == Counter(vbench_work_list())
    assert sum(map(len, files)) == len(set().union(*files))


def test_options_of_the_list() -> None:
    assert sum(1 for _ in vbench_work_list(1, flicker_samples=25)) == 946 - 75 + 75 * 25
    assert all(generated == original for generated, _, original, _ in vbench_work_list(1, extended=False))
    for options in ({"shard": (2, 2)}, {"shard": (-1, 2)}, {"shard": (0, 0)}, {"samples": 0}):
        with pytest.raises(ConfigError):
            list(vbench_work_list(**options))
