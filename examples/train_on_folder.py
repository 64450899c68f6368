"""Fine-tune the embedded model on a folder of videos: files `x.mp4`, each with its caption in `x.txt`.

python examples/train_on_folder.py FOLDER [--steps N] [--output FOLDER]

The same command goes on where it was stopped. Afterwards:
sparse-forcing generate "a prompt" --model FOLDER/pipeline
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_forcing.training.entry import train


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/mine"))
    options = parser.parse_args(arguments)
    settings = [
        "model=tiny",
        "mode=teacher",  # teacher forcing, through the model's own memory
        "data.kind=videos",
        f"data.path={options.folder}",
        "data.latent_frames=10",  # as long as the clips that `tiny` was trained on: 40 frames
        f"loop.steps={options.steps}",
        f"loop.global_batch={options.batch}",
        f"loop.micro_batch={options.batch}",
        "loop.trackers=[]",
        "optimizer.learning_rate=1e-5",
    ]
    return train("forcing", None, settings, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
