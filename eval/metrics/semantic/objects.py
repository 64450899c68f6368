"""Object class, multiple objects, spatial relationship and colour, from whatever detector the run has.

The rules are VBench's: 16 middle frames, an object counts in a frame when the detector accepts it under the name that
is looked for; whatever else it returns counts for nothing. The detector is not VBench's GRiT, so results are marked as
coming from a stand-in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_forcing.errors import MeasurementError
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.semantic import FRAMES, Detection
from sparse_forcing.eval.vbench.suites import prompt_index
from sparse_forcing.eval.vbench.transforms import middle_frames

SUITES = ("vbench", "vbench-long")
NEEDS = ("detector",)
COLORS = ("white", "red", "pink", "blue", "silver", "purple", "orange", "green", "gray", "yellow", "black", "grey")
FREE_OVERLAP = 0.1  # boxes overlapping more than this are not clearly beside each other
Box = tuple[float, float, float, float]


def _look_up(view: View, dimension: str) -> Any:
    info = prompt_index().get(view.text or "")
    return info.auxiliary.get(dimension) if info else None


def _detect(view: View, resources: Resources, labels: list[str]) -> list[list[Detection]]:
    """What the detector finds under one of these labels, frame by frame. Raises MeasurementError if frames lack."""
    frames = view.pick(middle_frames(len(view), FRAMES))
    found = resources.network("detector").detect(frames, labels)
    if len(found) != len(frames):
        raise MeasurementError(f"the detector answered for {len(found)} of {len(frames)} frames")
    return [[detection for detection in frame if detection.label in labels] for frame in found]


def _skip() -> Measurement:
    return Measurement(value=None, details={"reason": "not a VBench prompt of this dimension"})


@metric("object_class", suites=SUITES, needs=NEEDS, needs_text=True, pooled=True, version=2)
def object_class(view: View, resources: Resources) -> Measurement:
    """Share of frames in which the prompt's object is detected."""
    wanted = _look_up(view, "object_class")
    if wanted is None:
        return _skip()
    found = _detect(view, resources, [wanted["object"]])
    return Measurement(value=float(np.mean([bool(frame) for frame in found])), count=len(found))


@metric("multiple_objects", suites=SUITES, needs=NEEDS, needs_text=True, pooled=True, version=2)
def multiple_objects(view: View, resources: Resources) -> Measurement:
    """Share of frames in which both objects of the prompt are detected."""
    wanted = _look_up(view, "multiple_objects")
    if wanted is None:
        return _skip()
    names = wanted["object"].split(" and ")
    found = _detect(view, resources, names)
    both = [set(names) <= {detection.label for detection in frame} for frame in found]
    return Measurement(value=float(np.mean(both)), count=len(both))


def intersection_over_union(first: Box, second: Box) -> float:
    """IoU of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared) if shared else 0.0


def relation_score(first: Box, second: Box, relationship: str, *, directed: bool) -> float:
    """1 when `first` stands to `second` as said and they hardly overlap, 0.1 / IoU when they overlap, 0 otherwise.

    directed: whether the right side is required, too; VBench only compares the axis, so left passes for right.
    """
    dx = (first[0] + first[2] - second[0] - second[2]) / 2
    dy = (first[1] + first[3] - second[1] - second[3]) / 2
    horizontal = "left" in relationship or "right" in relationship
    along, across = (dx, dy) if horizontal else (dy, dx)
    if abs(along) <= abs(across):
        return 0.0
    wants_negative = "left" in relationship or "top" in relationship or "above" in relationship
    if directed and (along < 0) != wants_negative:
        return 0.0
    overlap = intersection_over_union(first, second)
    return 1.0 if overlap < FREE_OVERLAP else FREE_OVERLAP / overlap


@metric("spatial_relationship", suites=SUITES, needs=NEEDS, needs_text=True, pooled=True, version=2)
def spatial_relationship(view: View, resources: Resources) -> Measurement:
    """Best agreement of detected pairs with the relationship in the prompt, mean over frames."""
    wanted = _look_up(view, "spatial_relationship")
    if wanted is None:
        return _skip()
    wanted = wanted.get("spatial_relationship", wanted)
    a, b, said = wanted["object_a"], wanted["object_b"], wanted["relationship"]
    scores = []
    for frame in _detect(view, resources, [a, b]):
        if resources.compatible:
            pairs = [(p, q) for i, p in enumerate(frame) for q in frame[i + 1 :]]
        else:
            pairs = [(p, q) for p in frame if p.label == a for q in frame if q.label == b]
        agreed = [relation_score(p.box, q.box, said, directed=not resources.compatible) for p, q in pairs]
        scores.append(max(agreed, default=0.0))
    return Measurement(value=float(np.mean(scores)), count=len(scores))


@metric("color", suites=SUITES, needs=NEEDS, needs_text=True, version=2)
def color(view: View, resources: Resources) -> Measurement:
    """Share of frames where the object has the prompt's colour, among those where it is seen in any colour."""
    wanted = _look_up(view, "color")
    if wanted is None:
        return _skip()
    said = wanted["color"]
    thing = (view.text or "").removeprefix("a ").removeprefix("an ").replace(said, "", 1).strip()
    found = _detect(view, resources, [f"{name} {thing}" for name in COLORS])
    seen = [{detection.label for detection in frame} for frame in found if frame]
    if not seen:
        return Measurement(value=None, details={"reason": "the object was not seen"})
    # Any of the objects, not only the one that the detector is surest of.
    return Measurement(value=float(np.mean([f"{said} {thing}" in labels for labels in seen])), count=len(seen))
