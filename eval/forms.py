"""Forms of the files that evaluations write and read again: records of videos, shards, results to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.measure import FLICKER
from sparse_forcing.eval.options import Mode, Suite
from sparse_forcing.strict_json import (
    ANY,
    COUNT,
    NOTHING,
    NUMBER,
    OBJECT,
    PATH,
    TEXT,
    TRUTH,
    WHOLE,
    Kind,
    check_form,
    find_misfit,
)

SHARD_KIND = "sparse-forcing evaluation shard"
SCHEMA = 1  # of results.json

_NUMBERS = [NUMBER]
_POSITIVE = Kind("a number above 0", lambda value: NUMBER.fits(value) and value > 0)
_SOME = Kind("a whole number of 1 or more", lambda value: COUNT.fits(value) and value > 0)
_PAIR = Kind("two numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(NUMBER.fits, value)))
_CLIP = Kind("[clip, value]", lambda value: _PAIR.fits(value) and COUNT.fits(value[0]))
_SUITE = Kind(f"one of {', '.join(get_args(Suite))}", lambda value: value in get_args(Suite))
_MODE = Kind(f"one of {', '.join(get_args(Mode))}", lambda value: value in get_args(Mode))
_NAMED_TEXTS = {ANY: TEXT}

# Of a video: what it is, then what was measured or why nothing was.
_VIDEO = {
    "video": PATH,
    "prompt": (NOTHING, TEXT),
    "original_prompt": (NOTHING, TEXT),
    "index": COUNT,
    "seed": (NOTHING, WHOLE),
}
_VALUE = (
    {"value": NOTHING, "count": NUMBER, "details": OBJECT, "error?": TEXT},
    {"value": NUMBER, "count": _POSITIVE, "details": OBJECT},
)
_FAILED = {**_VIDEO, "error": TEXT}
_MEASURED = {
    **_VIDEO,
    "sha256": TEXT,
    "frames": _SOME,
    "fps": _POSITIVE,
    "height": _SOME,
    "width": _SOME,
    "metrics": {ANY: _VALUE},
}

_CURVE_NUMBERS = {name: (NOTHING, NUMBER) for name in ("slope", "first", "last", "change", "absolute_change", "vde")}
_DRIFT = {
    "metrics": {ANY: {"times": _NUMBERS, "curve": _NUMBERS, "spread": NUMBER, **_CURVE_NUMBERS}},
    "opening": (NOTHING, {"curve": _NUMBERS}),
    "ratios": {ANY: (NOTHING, NUMBER)},
    "repetition": (NOTHING, {"repeats": (NOTHING, TRUTH)}),
    "failures?": _NAMED_TEXTS,
}

_SHARD = {
    "kind": SHARD_KIND,
    "shard": Kind("two whole numbers", lambda value: _PAIR.fits(value) and all(map(COUNT.fits, value))),
    "videos_in_all": _SOME,
    "same": {
        "target": PATH,
        "list of videos": TEXT,
        "suite": _SUITE,
        "mode": _MODE,
        "static_filter": TRUTH,
        "metrics": {ANY: WHOLE},
        "networks": _NAMED_TEXTS,
        "versions": {ANY: (NOTHING, TEXT)},
    },
    "skipped": _NAMED_TEXTS,
    "videos": [OBJECT],
}

_MEAN = (NOTHING, {"mean": NUMBER, "interval": (NOTHING, _PAIR)})
_BAND = {"mean": _NUMBERS, "low": _NUMBERS, "high": _NUMBERS}
_RESULTS = {
    "schema": SCHEMA,
    "suite": TEXT,
    "mode": TEXT,
    "target": TEXT,
    "metrics": {
        ANY: {
            "score": NUMBER,
            "interval": (NOTHING, _PAIR),
            "summary": TEXT,
            "higher_is_better": (NOTHING, TRUTH),
            "stand_in": TRUTH,
        }
    },
    "skipped": OBJECT,
    "versions": OBJECT,
    "networks": OBJECT,
    "settings": OBJECT,
    "totals?": {**{f"{name}?": (NOTHING, NUMBER) for name in ("quality", "semantic", "total")}, "refused?": TEXT},
    "drift?": {
        "metrics": {
            ANY: {
                "times": _NUMBERS,
                "curve": _BAND,
                **{name: _MEAN for name in ("slope", "change", "absolute_change", "spread", "vde")},
            }
        },
        "opening_similarity": _BAND,
        "late_early_ratios": {ANY: _MEAN},
        "no_repeat_share": (NOTHING, NUMBER),
        "no_repeat_videos": COUNT,
    },
    "videos": [{**_VIDEO, "metrics?": {ANY: {"value": (NOTHING, NUMBER)}}}],
}


def check_results(content: Any, file: Path) -> dict[str, Any]:
    """What a results.json holds, of which a report reads all. Raises ConfigError."""
    expected = f"a results.json of this tool (schema {SCHEMA})"
    check_form(content, _RESULTS, str(file), expected)
    drift = content.get("drift", {"metrics": {}, "opening_similarity": {}})
    curves = {name: {"times": found["times"], **found["curve"]} for name, found in drift["metrics"].items()}
    for name, curve in curves.items():
        if len({len(numbers) for numbers in curve.values()}) > 1 or not curve["times"] or len(curve) > 4:
            raise ConfigError(f"{file}: not {expected}: the curve of {name} has not as many numbers as times")
    opening = drift["opening_similarity"]
    if len({len(numbers) for numbers in opening.values()}) > 1 or len(opening) > 3:
        raise ConfigError(f"{file}: not {expected}: opening_similarity has bounds of another length")
    return content


def check_shard_file(content: Any, file: Path) -> dict[str, Any]:
    """What a shard of an evaluation holds, its records included. Raises ConfigError."""
    expected = "a shard of an evaluation, as --shard I/N writes it"
    check_form(content, _SHARD, str(file), expected)
    same = content["same"]
    if not same["metrics"]:
        raise ConfigError(f"{file}: not {expected}: same.metrics names none")
    for number, record in enumerate(content["videos"]):
        if misfit := _find_misfit_of_record(record, same):
            raise ConfigError(f"{file}: not {expected}: in videos[{number}], {misfit}")
    return content


def _find_misfit_of_record(record: dict[str, Any], same: dict[str, Any]) -> str | None:
    """What is wrong with a record of a run, None where nothing is; `same` says which run that was."""
    if "error" in record:
        return find_misfit(record, _FAILED)
    if misfit := find_misfit(record, _MEASURED | ({"drift": _DRIFT} if same["suite"] == "drift" else {})):
        return misfit
    for name, row in record["metrics"].items():
        if name not in same["metrics"]:
            return f"metrics.{name:.60} is no metric of the run"
        if row["value"] is not None and (misfit := find_misfit(row["details"], _details(name, same))):
            return f"metrics.{name}.details: {misfit}"
    return None


def _details(name: str, same: dict[str, Any]) -> dict[str, Any]:
    """The form of what a metric's score is made of besides its values and counts."""
    filtered = name == FLICKER and same["static_filter"]
    if same["suite"] == "vbench-long":
        return {"static": [_CLIP]} if filtered else {"clips": COUNT, "frames": NUMBER}
    return {"static": TRUTH} if filtered else {}
