"""Human action: whether an action recogniser names the prompt's action among its five best, with a score of .85."""

from __future__ import annotations

import math

from sparse_forcing.errors import MeasurementError
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.semantic import FRAMES
from sparse_forcing.eval.vbench.suites import prompt_index
from sparse_forcing.eval.vbench.transforms import middle_frames

PREFIX = "A person is "
TOP, MIN_SCORE, DECIMALS = 5, 0.85, 4


@metric("human_action", suites=("vbench", "vbench-long"), needs=("actions",), needs_text=True)
def human_action(view: View, resources: Resources) -> Measurement:
    """1 if the action of the prompt is recognised, else 0."""
    info = prompt_index().get(view.text or "")
    if info is None or "human_action" not in info.dimensions:
        return Measurement(value=None, details={"reason": "not a VBench prompt of this dimension"})
    action = info.prompt.removeprefix(PREFIX).lower()
    scores = resources.network("actions")(view.pick(middle_frames(len(view), FRAMES)))
    if not all(math.isfinite(score) for score in scores.values()):
        raise MeasurementError("the action recogniser answered with scores that are not finite")
    best = sorted(scores, key=lambda name: -scores[name])[:TOP]
    named = {name.lower() for name in best if round(scores[name], DECIMALS) >= MIN_SCORE}
    return Measurement(value=float(action in named))
