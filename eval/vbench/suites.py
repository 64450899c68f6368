"""What VBench generates and judges: its 946 prompts, which dimensions each serves, and the file layout it expects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.shards import check_shard

# Prompts outside VBench: the dimensions that need nothing but the video and its text.
CUSTOM_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
)

DATA = Path(__file__).parent / "data"
SAMPLES = 5  # videos per prompt in VBench's protocol
FLICKER_SAMPLES = 25  # its protocol for temporal flickering, before the static filter keeps five


@dataclass(frozen=True, kw_only=True)
class PromptInfo:
    """A VBench prompt, the dimensions judged on it, and per dimension what to look for (`auxiliary`)."""

    prompt: str
    extended: str
    dimensions: tuple[str, ...]
    auxiliary: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1)
def vbench_prompts() -> tuple[PromptInfo, ...]:
    """The 946 rows of VBench in their official order (two prompts appear in two rows)."""
    rows = json.loads((DATA / "vbench_full_info.json").read_text(encoding="utf-8"))
    extended = (DATA / "vbench_prompts_extended.txt").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(extended), "the prompt tables must be aligned line by line"
    return tuple(
        PromptInfo(
            prompt=row["prompt_en"],
            extended=longer,
            dimensions=tuple(row["dimension"]),
            auxiliary=row.get("auxiliary_info", {}),
        )
        for row, longer in zip(rows, extended)
    )


def list_dimensions(text: str | None) -> tuple[str, ...]:
    """VBench dimensions judged on a prompt."""
    info = prompt_index().get(text or "")
    return CUSTOM_DIMENSIONS if info is None else info.dimensions


@lru_cache(maxsize=1)
def prompt_index() -> dict[str, PromptInfo]:
    """Prompt -> what it serves, rows with the same prompt merged."""
    merged: dict[str, PromptInfo] = {}
    for row in vbench_prompts():
        known = merged.get(row.prompt)
        if known is not None:
            row = PromptInfo(
                prompt=row.prompt,
                extended=known.extended,
                dimensions=tuple(dict.fromkeys(known.dimensions + row.dimensions)),
                auxiliary={**known.auxiliary, **row.auxiliary},
            )
        merged[row.prompt] = row
    return merged


def vbench_work_list(
    samples: int = SAMPLES,
    shard: tuple[int, int] = (0, 1),
    *,
    extended: bool = True,
    flicker_samples: int | None = None,
) -> Iterator[tuple[str, str, str, int]]:
    """Yield (prompt to generate from, file name, original prompt, sample index) for the whole VBench layout.

    samples: videos per prompt (946 x 5 by default). shard: (i, n) yields every n-th prompt from the i-th, so that n
    machines share the work and the samples of one prompt stay together. extended: generate from the rewritten prompts.
    flicker_samples: more samples for the temporal-flickering prompts (25 in the official protocol).
    To resume, skip file names that exist: two prompts occur in two rows and name the same files.
    """
    number, of = check_shard(shard)
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, not {samples}")
    first_row = {row.prompt: position for position, row in reversed(list(enumerate(vbench_prompts())))}
    for row in vbench_prompts():
        # By first occurrence, so that two shards never write the same file.
        if first_row[row.prompt] % of != number:
            continue
        flickering = flicker_samples is not None and "temporal_flickering" in row.dimensions
        for index in range(flicker_samples if flickering and flicker_samples else samples):
            yield row.extended if extended else row.prompt, f"{row.prompt}-{index}.mp4", row.prompt, index
