"""Judge videos by a metric of your own, from outside the package, with intervals and a report like any other.

python examples/own_metric.py FOLDER_OR_VIDEO [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View


@metric("redness", suites=("offline",), higher_is_better=None)
def redness(view: View, resources: Resources) -> Measurement:
    """How much redder than green and blue a picture is on average, as a share of full scale."""
    return Measurement(value=float(view.per_frame("redness", _redness).mean()), count=len(view))


def _redness(frames: np.ndarray) -> np.ndarray:
    """[n] of uint8 frames [n, H, W, 3]; computed once for the video, a few frames at a time."""
    colors = frames.mean((1, 2)) / 255
    return colors[:, 0] - colors[:, 1:].mean(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--output", type=Path, default=Path("outputs/redness"))
    options = parser.parse_args(arguments)
    return evaluate(EvaluateConfig(target=options.target, metrics=("redness",), output=options.output))


if __name__ == "__main__":
    raise SystemExit(main())
