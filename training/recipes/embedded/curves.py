"""Draw a run's learning curve from its metrics.jsonl.

python -m sparse_forcing.training.recipes.embedded.curves runs/tiny/metrics.jsonl --config training/configs/tiny.yaml \
    --output loss.png
"""

from __future__ import annotations

import argparse
import json
from itertools import accumulate
from pathlib import Path

from sparse_forcing.config import load_config
from sparse_forcing.files import atomic_path
from sparse_forcing.training.recipes.embedded.curriculum import PretrainConfig


def draw(metrics: Path, config: PretrainConfig, output: Path) -> None:
    """Loss over optimizer steps, stages marked by the latent frames they train on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # A resumed run logs the steps since its checkpoint again; the later row counts.
    rows = {row["step"]: row for row in map(json.loads, metrics.read_text().splitlines())}
    figure, axes = plt.subplots(figsize=(8, 4))
    for name, label in (("loss", "loss"), ("continuation_loss", "loss of continuations")):
        steps = [step for step in sorted(rows) if name in rows[step]]
        axes.plot(steps, [rows[step][name] for step in steps], marker=".", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.legend()
    starts = [0, *accumulate(stage.steps for stage in config.stages)]
    for start, stage in zip(starts, config.stages):
        axes.axvline(start, color="gray", linewidth=0.5)
        axes.annotate(f" {stage.latent_frames} x {stage.batch_size}", (start, axes.get_ylim()[1]), va="top", fontsize=8)
    axes.set(xlabel="optimizer steps (stages: latent frames x clips)", ylabel="flow-matching loss, unit variance")
    figure.tight_layout()
    with atomic_path(output) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draw(args.metrics, load_config(PretrainConfig, args.config, []), args.output)


if __name__ == "__main__":
    main()
