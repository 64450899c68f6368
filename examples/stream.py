"""Watch a video grow: frames of each chunk as soon as it exists, and another prompt on the way.

python examples/stream.py [--seconds N] [--output FILE.mp4]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sparse_forcing import SparseForcingPipeline
from sparse_forcing.media.video import VideoWriter, to_uint8

FIRST = "a large red star spins clockwise on a white background"
LATER = "a large blue star spins clockwise on a white background"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("outputs/stream.mp4"))
    options = parser.parse_args(arguments)

    pipe = SparseForcingPipeline.from_pretrained("tiny")
    num_frames = round(options.seconds * pipe.fps)
    chunks = pipe.stream(
        FIRST,
        num_frames=num_frames,
        prompt_changes={num_frames // 2: LATER},  # the first chunk that begins here or later takes it
        generator=torch.Generator().manual_seed(0),
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    height, width = pipe.defaults.height, pipe.defaults.width
    with VideoWriter(options.output, width=width, height=height, fps=pipe.fps, scale=4) as writer:
        for chunk in chunks:
            writer.write(to_uint8(chunk.frames))
            frames, seconds = len(chunk.frames), chunk.seconds
            print(f"chunk {chunk.index}: {frames} frames in {seconds:.2f} s, cache {chunk.cache_bytes} bytes")
    print(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
