"""Recall: how much what returns is like what was seen first, by ranges of frames that a manifest gives.

CMBench scores the similarity of a returning object in DINO's features. A picture without DINO's weights is described
by its colours and edges (`offline/appearance.py`); that number is no CMBench score.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from sparse_forcing.errors import MeasurementError
from sparse_forcing.eval.measuring.features import unit
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.returns import Box, Sight
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.metrics.offline.appearance import describe
from sparse_forcing.eval.vbench.transforms import dino_input

Describe = Callable[[np.ndarray], np.ndarray]


@metric("return_similarity", suites=("recall",))
def return_similarity(view: View, resources: Resources) -> Measurement:
    """Colour-and-edge cosine of what returns with its first sight."""
    return _measure_returns(view, describe)


@metric("return_gain", suites=("recall",))
def return_gain(view: View, resources: Resources) -> Measurement:
    """By how much colours and edges at the return are more like the first sight than those in between are."""
    return _measure_gains(view, describe)


@metric("dino_return_similarity", suites=("recall",), needs=("dino",))
def dino_return_similarity(view: View, resources: Resources) -> Measurement:
    """DINO cosine of what returns with its first sight, as CMBench compares them."""
    return _measure_returns(view, _dino(resources))


@metric("dino_return_gain", suites=("recall",), needs=("dino",))
def dino_return_gain(view: View, resources: Resources) -> Measurement:
    """By how much DINO finds the return more like the first sight than what was in between."""
    return _measure_gains(view, _dino(resources))


def _measure_returns(view: View, describe: Describe) -> Measurement:
    pairs = [(pair.first, pair.again) for pair in view.clip.entry.returns]
    values = [similarity_at_return(*(describe_sight(view, sight, describe) for sight in pair)) for pair in pairs]
    return _average(values)


def _measure_gains(view: View, describe: Describe) -> Measurement:
    gains = []
    for pair in view.clip.entry.returns:
        between = pair.between()
        if between is None:
            continue  # it was never out of sight: there is nothing to compare with
        first, again, other = (describe_sight(view, sight, describe) for sight in (pair.first, pair.again, between))
        gains.append(similarity_at_return(first, again) - similarity_at_return(first, other))
    return _average(gains)


def _average(values: list[float]) -> Measurement:
    if not values:
        return Measurement(value=None, details={"reason": "nothing is said to return"})
    return Measurement(value=float(np.mean(values)), count=len(values), details={"returns": values})


def _dino(resources: Resources) -> Describe:
    def encode(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return network(images)

    return lambda crops: resources.features("dino", dino_input(crops), encode)


def similarity_at_return(first: np.ndarray, again: np.ndarray) -> float:
    """Mean over the frames of the return [m, D] of the largest cosine with a frame of the first sight [n, D]."""
    return float((unit(again) @ unit(first).T).max(1).mean())


def describe_sight(view: View, sight: Sight, describe: Describe) -> np.ndarray:
    """describe(crop [1, h, w, 3]) -> [1, D] of every frame of a sight that is looked at: [n, D].

    Raises MeasurementError where the video has fewer frames than the sight.
    """
    if sight.end > len(view):
        raise MeasurementError(f"its manifest says what returns until frame {sight.end - 1}; it has {len(view)} frames")
    numbers, boxes = zip(*sight.pick())
    return np.concatenate([describe(crop(frame, box)[None]) for frame, box in zip(view.pick(numbers), boxes)])


def crop(frame: np.ndarray, box: Box) -> np.ndarray:
    """The part [h, w, 3] of a frame [H, W, 3] inside a box: every pixel that it touches."""
    height, width = frame.shape[:2]
    left, top, right, bottom = box
    rows = slice(max(0, math.floor(top * height)), math.ceil(bottom * height))
    columns = slice(max(0, math.floor(left * width)), math.ceil(right * width))
    return np.ascontiguousarray(frame[rows, columns])
