"""Claims are computed from numbers: each is met by numbers that show it, not met by numbers that do not."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest

from sparse_forcing.reproduction.claims import OTHERS, check_claims

PROMPTS = 40
VARIANTS = ("dense", "dense-absolute", "dense-window", "sparse", *OTHERS)


def variant(right: float, drift: float, cache: tuple[int, int]) -> dict[str, Any]:
    """A variant that is right on a share of the prompts at 12x, on all of them at 1x."""
    row = [float(number < right * PROMPTS) for number in range(PROMPTS)]
    cells = {
        horizon: {
            "accuracy": {m: {"mean": share, "interval": [share - 0.05, share + 0.05]} for m in ("all", "attributes")},
            "drift": {"mean": {"mean": drift, "interval": [0.8 * drift, 1.2 * drift]}},
            "cache_bytes_peak": peak,
        }
        for horizon, share, peak in (("1", 1.0, cache[0]), ("12", right, cache[1]))
    }
    records = {"1": {m: [1.0] * PROMPTS for m in ("all", "attributes")}, "12": {"all": row, "attributes": row}}
    return {"horizons": cells, "records": records, "prompts": PROMPTS}


def result() -> dict[str, Any]:
    """Numbers that show everything."""
    row = {"mean": 0.4, "learned": 0.5, "oracle": 0.6}
    return {
        "variants": {
            name: variant(*((0.9, 0.01, (500, 500)) if name == "sparse" else (0.5, 0.03, (1000, 12000))))
            for name in VARIANTS
        },
        "timing": {
            "threads": 1,
            "students": {
                "dense": {"rollouts": [2.0, 9.0, 2.6]},
                "dense-absolute": {"rollouts": [1.9, 2.5, 2.5]},
                "sparse": {"rollouts": [1.0, 2.0, 1.3]},
            },
        },
        "recall": [
            {"share": 0.25, "gap_closed": 0.5}
            | {name: {"mean": mean, "prompts": [mean, mean - 0.02]} for name, mean in row.items()}
        ],
    }


def verdicts(numbers: dict[str, Any]) -> dict[str, bool | None]:
    return {claim.text: claim.met for claim in check_claims(numbers)}


def one(numbers: dict[str, Any], words: str) -> bool | None:
    """The verdict on the one claim that contains `words` (* for anything)."""
    (found,) = (met for text, met in verdicts(numbers).items() if fnmatch(text, f"*{words}*"))
    return found


def test_everything_is_met_by_numbers_that_show_it() -> None:
    found = verdicts(result())
    assert len(found) == 23
    assert set(found.values()) == {True}


def change(numbers: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        numbers = numbers[int(name)] if isinstance(numbers, list) else numbers[name]
    numbers[last] = value


def cell(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"mean": mean, "interval": [low, high]}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        # Overlapping intervals.
        ("variants/dense/horizons/12/accuracy/all", cell(0.8, 0.7, 0.86), "captions* relative"),
        ("variants/dense-absolute/horizons/12/accuracy/all", cell(0.8, 0.7, 0.86), "captions* absolute"),
        ("variants/dense-absolute/horizons/12/accuracy/attributes", cell(0.95, 0.94, 0.96), "more stated* absolute"),
        ("variants/dense-window/horizons/12/accuracy/all", cell(0.85, 0.8, 0.9), "captions* with the same window"),
        ("variants/dense-absolute/horizons/12/drift/mean", cell(0.014, 0.011, 0.02), "less drift* absolute"),
        ("variants/dense-window/horizons/12/drift/mean", cell(0.001, 0, 0.002), "less drift* with the same window"),
        ("variants/sparse/records/1/all", [0.0] * 10 + [1.0] * 30, "1x: no fewer captions"),
        ("timing/students/dense-absolute/rollouts", [1.2, 2.5, 1.5], "decodes"),
        ("variants/sparse/horizons/1/cache_bytes_peak", 581, "less peak cache"),
        ("variants/sparse/horizons/12/cache_bytes_peak", 501, "does not grow"),
        ("variants/training-free/records/12/all", [0.0] + [1.0] * 39, "captions* than training-free"),
        ("variants/mean-pooled/records/12/attributes", [1.0] * 36 + [0.0] * 4, "stated* than mean-pooled"),
        ("recall/0/gap_closed", 0.33, "closes at least a third"),
    ],
)
def test_one_number_that_does_not_show_it_is_enough(path: str, value: Any, words: str) -> None:
    numbers = result()
    change(numbers, path, value)
    assert one(numbers, words) is False
    assert [text for text, met in verdicts(numbers).items() if not met and not fnmatch(text, f"*{words}*")] == []


def test_what_was_not_measured_is_neither() -> None:
    numbers = result() | {"timing": None, "recall": None}
    del numbers["variants"]["dense-absolute"], numbers["variants"]["mean-pooled"]
    missing = [claim for claim in check_claims(numbers) if claim.met is None]
    assert len(missing) == 3 + 1 + 2 + 1
    assert all(claim.verdict == "not measured" and claim.evidence.startswith("needs ") for claim in missing)


def test_pairs_are_the_prompts_that_both_have() -> None:
    numbers = result()
    short = numbers["variants"]["training-free"]["records"]["12"]
    short["all"] = short["all"][:10]  # where both are right
    assert one(numbers, "captions* than training-free") is False
