"""Judge videos by a metric of your own, from outside the package, with intervals and a report like any other.

python examples/own_metric.py FOLDER_OR_VIDEO [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View


@metric("redness", suites=("offline",), higher_is_better=None)
def redness(view: View, resources: Resources) -> Measurement:
    """How much redder than green and blue a picture is on average, as a share of full scale."""
    frames = view.frames.astype("float32") / 255  # [F, H, W, 3]
    return Measurement(value=float((frames[..., 0] - frames[..., 1:].mean(-1)).mean()), count=len(view))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--output", type=Path, default=Path("outputs/redness"))
    options = parser.parse_args(arguments)
    return evaluate(EvaluateConfig(target=options.target, metrics=("redness",), output=options.output))


if __name__ == "__main__":
    raise SystemExit(main())
