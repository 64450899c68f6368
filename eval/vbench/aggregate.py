"""VBench's score arithmetic: sixteen raw dimension scores in, quality, semantic and total out.

Source: Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative Models" (arXiv 2311.17982) and the
constants of the official repository at commit 45e79ec. Raw scores are fractions in [0, 1]; results are in percent.

    n_d      = (x_d - min_d) / (max_d - min_d)              not clipped: n_d may exceed 1
    quality  = sum_{7 quality dimensions} w_d n_d / 6.5     (dynamic degree weighs 0.5, the others 1)
    semantic = mean_{9 semantic dimensions} n_d
    total    = (4 quality + semantic) / 5
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import read_json
from sparse_forcing.strict_json import is_number

ROUNDING = 1e-5  # cosines of equal features in single precision are this near to 1, on either side


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One VBench dimension: its range for normalisation, its weight, and the group it counts in."""

    low: float
    high: float
    group: str
    weight: float = 1.0
    cosine: bool = False  # raw scores reach down to -1

    def accepts(self, score: object) -> bool:
        """Whether a raw score is one that this dimension can have."""
        low = -1.0 if self.cosine else 0.0
        return is_number(score) and low - ROUNDING <= score <= 1.0 + ROUNDING  # type: ignore[operator]

    @property
    def span(self) -> str:
        """The range of raw scores in words."""
        return "cosines between -1 and 1" if self.cosine else "fractions between 0 and 1"


DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(low=0.1462, high=1.0, group="quality"),
    "background_consistency": Dimension(low=0.2615, high=1.0, group="quality"),
    "temporal_flickering": Dimension(low=0.6293, high=1.0, group="quality"),
    "motion_smoothness": Dimension(low=0.706, high=0.9975, group="quality"),
    "dynamic_degree": Dimension(low=0.0, high=1.0, group="quality", weight=0.5),
    "aesthetic_quality": Dimension(low=0.0, high=1.0, group="quality"),
    "imaging_quality": Dimension(low=0.0, high=1.0, group="quality"),
    "object_class": Dimension(low=0.0, high=1.0, group="semantic"),
    "multiple_objects": Dimension(low=0.0, high=1.0, group="semantic"),
    "human_action": Dimension(low=0.0, high=1.0, group="semantic"),
    "color": Dimension(low=0.0, high=1.0, group="semantic"),
    "spatial_relationship": Dimension(low=0.0, high=1.0, group="semantic"),
    "scene": Dimension(low=0.0, high=0.8222, group="semantic"),
    "appearance_style": Dimension(low=0.0009, high=0.2855, group="semantic", cosine=True),
    "temporal_style": Dimension(low=0.0, high=0.364, group="semantic", cosine=True),
    "overall_consistency": Dimension(low=0.0, high=0.364, group="semantic", cosine=True),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Quality, semantic and total in percent; None where a dimension is missing or comes from a stand-in."""

    quality: float | None
    semantic: float | None
    total: float | None
    refused: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A dictionary for JSON output; `refused` says why a number is null."""
        numbers = {"quality": self.quality, "semantic": self.semantic, "total": self.total, "unit": "percent"}
        return numbers if self.refused is None else {**numbers, "refused": self.refused}


def normalize(name: str, score: float) -> float:
    """Raw fraction -> normalised score of one dimension (unclipped, unweighted)."""
    dimension = DIMENSIONS[name]
    return (score - dimension.low) / (dimension.high - dimension.low)


def aggregate(scores: Mapping[str, float], stand_ins: Iterable[str] = ()) -> Totals:
    """Quality, semantic and total (percent) of raw dimension scores (fractions).

    A group whose dimensions are not all present, or of which one was measured by a stand-in, gets None, and so does
    the total: filling a gap with zero, as the official script does, would quietly give a normalised score far below it.
    """
    unusable = {name: "missing" for name in DIMENSIONS if name not in scores}
    unusable.update({name: "measured by a stand-in" for name in stand_ins if name in DIMENSIONS})
    quality = _group_score(scores, "quality", unusable)
    semantic = _group_score(scores, "semantic", unusable)
    if quality is None or semantic is None:
        listed = ", ".join(f"{name} ({why})" for name, why in unusable.items())
        return Totals(quality=quality, semantic=semantic, total=None, refused=f"no total: {listed}")
    total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return Totals(quality=quality, semantic=semantic, total=total)


def _group_score(scores: Mapping[str, float], group: str, unusable: Mapping[str, str]) -> float | None:
    members = {name: dimension for name, dimension in DIMENSIONS.items() if dimension.group == group}
    if any(name in unusable for name in members):
        return None
    weighted = math.fsum(normalize(name, scores[name]) * dimension.weight for name, dimension in members.items())
    return 100.0 * weighted / math.fsum(dimension.weight for dimension in members.values())


def read_scores(path: Path) -> tuple[dict[str, float], set[str]]:
    """Dimension scores (fractions) of a JSON file, and the dimensions in it that a stand-in measured.

    Takes `{name: fraction}`, the official tool's `{name: [fraction, details]}`, and this tool's own `results.json`.
    Names may be spelled with spaces. Raises ConfigError for anything else, percentages included.
    """
    expected = "an object of dimension names and fractions"
    content = read_json(path, expected=expected)
    if isinstance(content, dict) and "metrics" in content and "schema" in content:
        content = content["metrics"]
        if isinstance(content, dict):
            content = {name: entry for name, entry in content.items() if name in DIMENSIONS}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected {expected}")
    scores: dict[str, float] = {}
    stand_ins: set[str] = set()
    for key, value in content.items():
        name = key.strip().lower().replace(" ", "_")
        if name not in DIMENSIONS:
            raise ConfigError(f"{path}: unknown dimension {key!r:.100}; known are {', '.join(DIMENSIONS)}")
        if name in scores:
            raise ConfigError(f"{path}: dimension {name} is given twice")
        if isinstance(value, dict):
            if value.get("stand_in"):
                stand_ins.add(name)
            value = value.get("score")
        elif isinstance(value, list) and value:
            value = value[0]
        scores[name] = check_score(path, name, value)
    return scores, stand_ins


def check_score(path: Path, name: str, value: object) -> float:
    """A raw score of a dimension that a file gives. Raises ConfigError for one that the dimension cannot have."""
    if not DIMENSIONS[name].accepts(value):
        raise ConfigError(f"{path}: {name} is {value!r:.40}; its scores are {DIMENSIONS[name].span}, not percentages")
    return float(value)  # type: ignore[arg-type]
