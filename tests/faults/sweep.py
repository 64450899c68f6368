"""Kills and flipped bits at random: nothing is lost, and nobody sees a traceback.

    python -m tests.faults.sweep --rounds 200 [--seed 0] [--kinds generate train encode ...]

A round either kills a command (SIGKILL to all its processes) at a random moment and runs it again to its end, or flips
a bit of a file that a command reads. A small model with random weights is made first; a round takes a few seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_forcing.cli import main
from tests.forked import Forked

PROMPTS = ("a red circle moves right", "a blue ring grows on black", "a pink star stays still")
STEPS = 6


class Lost(AssertionError):
    """Something was lost, or a traceback was printed."""


class Sweep:
    """A folder with a model, videos and shards, and the rounds that ill-treat them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.started = 0
        self.usual: dict[str, float] = {}  # seconds that a command takes when it is left alone
        self.kills: dict[str, Callable[[], None]] = {
            "generate": self.kill_generate,
            "resume": self.kill_resume,
            "evaluate": self.kill_evaluate,
            "encode": self.kill_encode,
            "train": lambda: self.kill_train(1),
            "train-2": lambda: self.kill_train(2),
        }
        self.flips: dict[str, Callable[[], None]] = {
            "flip-model": self.flip_model,
            "flip-video": self.flip_video,
            "flip-shard": self.flip_shard,
        }

    def prepare(self) -> None:
        """Make the model, some videos of it, and the configs."""
        from tests.training.conftest import make_pipeline
        from tests.training.helpers import small_config

        make_pipeline().save_pretrained(self.folder / "model")
        data = {"size": 32, "latent_frames": 4}
        encode = {"model": str(self.folder / "model"), "data": data, "count": 8, "per_shard": 2}
        train = small_config(self.folder / "model", steps=STEPS, checkpoint_every=2)
        for name, config in (("encode", encode), ("train", train)):
            (self.folder / f"{name}.yaml").write_text(json.dumps(config))
        code, _ = self.run(self.generate("videos"))
        expect(code == 0, "no videos could be made")
        code, _ = self.run(self.encode("shards"))
        expect(code == 0, "no shards could be made")

    def round(self, kind: str) -> None:
        """One kill or flip. Raises Lost."""
        (self.kills | self.flips)[kind]()

    def generate(self, out: str) -> list[str]:
        return ["generate", *PROMPTS, "--model", self.at("model"), "--output", self.at(out), "--skip-existing"]

    def encode(self, out: str) -> list[str]:
        return ["data", "encode", self.at(out), "--config", self.at("encode.yaml")]

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def start(self, arguments: Sequence[str], processes: int = 1) -> Forked:
        self.started += 1
        return Forked(self.folder / f"{self.started}.log", main, arguments, processes=processes, folder=self.folder)

    def run(self, arguments: Sequence[str], processes: int = 1) -> tuple[int, str]:
        """(exit code, what was said) of a command that is left alone. Raises Lost for a traceback."""
        began = time.monotonic()
        code, output = self.start(arguments, processes).finish(600)
        self.usual[f"{arguments[0]}{processes}"] = time.monotonic() - began
        expect("Traceback" not in output, f"{' '.join(arguments)}: {output[-3000:]}")
        if code is None:
            raise Lost(f"{' '.join(arguments)} has not ended after 600 seconds: {output[-3000:]}")
        return code, output

    def kill(self, arguments: Sequence[str], out: Path, processes: int = 1) -> None:
        """Start a command and end all its processes at a random moment of the time it usually takes."""
        if (name := f"{arguments[0]}{processes}") not in self.usual:
            self.run(arguments, processes)
            self.fresh(out.name)
        self.end(self.start(arguments, processes), self.random.uniform(0, self.usual[name]))

    def end(self, process: Forked, seconds: float) -> None:
        """End a command and all its processes after so many seconds."""
        if process.finish(seconds)[0] is None:
            for each in _descendants(process.pid):
                _kill(each)
            process.finish()

    def finish(self, arguments: Sequence[str], out: Path, processes: int = 1) -> None:
        """Run a killed command again: it must end well, keep what was complete, and leave no temporary file or lock."""
        code, output = self.run(arguments, processes)
        expect(code == 0, f"{' '.join(arguments)} ends with {code}: {output[-3000:]}")
        left = [path for path in out.rglob("*") if path.name.startswith((".sf-tmp-", ".tmp-", ".sparse-forcing.lock"))]
        expect(not left, f"left behind: {left}")

    def kill_generate(self) -> None:
        out = self.fresh("generated")
        self.kill(self.generate(out.name), out)
        complete = {path: digest(path) for path in out.glob("*.mp4") if path.with_suffix(".json").exists()}
        self.finish(self.generate(out.name), out)
        expect(all(digest(path) == known for path, known in complete.items()), "a finished video was made again")
        expect(len(list(out.glob("*.mp4"))) == len(list(out.glob("*.json"))) == len(PROMPTS), "videos are missing")

    def kill_resume(self) -> None:
        """Kill a long video somewhere after its first checkpoint; resumed, its bytes are those of one left alone."""
        memory = self.random.choice(("sparse", "window", "full"))
        words = ["generate", PROMPTS[0], "--then", "9", PROMPTS[1], "--model", self.at("model"), "--memory", memory]
        words += ["--num-frames", "400", "--overlay"] if memory == "sparse" else ["--num-frames", "400"]
        plain, out = self.folder / f"plain-{memory}.mp4", self.fresh("resumed") / "c.mp4"
        if not plain.exists():
            code, _ = self.run([*words, "--output", str(plain)])
            expect(code == 0, "no video could be made")
        words += ["--output", str(out), "--resume", "--checkpoint-every", str(self.random.choice((1, 2, 5)))]
        seconds = json.loads(plain.with_suffix(".json").read_text())["wall_seconds"]
        process = self.start(words)
        while process.running and not (out.parent / "resume" / "c" / "manifest.json").exists():
            time.sleep(0.01)
        self.end(process, self.random.uniform(0, 1.2 * seconds))
        self.finish(words, out.parent)
        expect(digest(out) == digest(plain), f"the resumed video differs ({memory})")
        expect(not (out.parent / "resume").exists(), "a checkpoint of a complete video is left")

    def kill_evaluate(self) -> None:
        out = self.fresh("evaluated")
        command = ["evaluate", self.at("videos"), "--output", str(out)]
        self.kill(command, out)
        self.finish(command, out)
        expect(len(json.loads((out / "results.json").read_text())["videos"]) == len(PROMPTS), "results are missing")

    def kill_encode(self) -> None:
        out = self.fresh("encoded")
        self.kill(self.encode(out.name), out)
        complete = {path: digest(path) for path in out.glob("*.safetensors") if path.with_suffix(".json").exists()}
        self.finish(self.encode(out.name), out)
        expect(all(digest(path) == known for path, known in complete.items()), "a finished shard was made again")
        for shard in self.folder.glob("shards/*.safetensors"):
            expect(digest(shard) == digest(out / shard.name), f"{shard.name} differs from that of an undisturbed run")

    def kill_train(self, processes: int) -> None:
        out = self.fresh(f"trained-{processes}")
        command = ["train", "forcing", "--config", self.at("train.yaml"), "--output", str(out)]
        self.kill(command, out, processes)
        before = max((path.name for path in out.glob("step-*")), default="")
        self.finish(command, out, processes)
        newest = max(path.name for path in out.glob("step-*"))
        expect(newest == f"step-{STEPS:08d}" >= before, f"ends with {newest}")
        rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        expect(rows == list(range(1, STEPS + 1)), f"metrics of steps {rows}")

    def flip_model(self) -> None:
        model, out = self.fresh("flipped"), self.fresh("none")
        shutil.copytree(self.folder / "model", model)
        where = self.flip([path for path in model.rglob("*") if path.is_file()])
        code, output = self.run(["generate", PROMPTS[0], "--model", str(model), "--output", str(out)])
        expect(code == 2 and not out.exists(), f"{where} went unnoticed: {output[-1000:]}")

    def flip_video(self) -> None:
        videos = self.fresh("flipped-videos")
        shutil.copytree(self.folder / "videos", videos)
        where = self.flip(sorted(videos.glob("*.mp4")))
        code, output = self.run(["evaluate", str(videos), "--output", str(self.fresh("judged"))])
        expect(code in (0, 1), f"{where}: {output[-1000:]}")

    def flip_shard(self) -> None:
        shards = self.fresh("flipped-shards")
        shutil.copytree(self.folder / "shards", shards)
        where = self.flip(sorted(path for path in shards.iterdir() if path.is_file()))
        changes = ["data.kind=shards", f"data.path={shards}", "data.caption_dropout=0"]
        command = ["train", "forcing", "--config", self.at("train.yaml"), "--output", str(self.fresh("unused"))]
        code, output = self.run([*command, *(word for change in changes for word in ("--set", change))])
        expect(code == 2, f"{where} went unnoticed: {output[-1000:]}")

    def flip(self, files: list[Path]) -> Path:
        path = self.random.choice(files)
        data = bytearray(path.read_bytes())
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        path.write_bytes(data)
        return path

    def fresh(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


def expect(right: bool, otherwise: str) -> None:
    if not right:
        raise Lost(otherwise)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _descendants(pid: int) -> list[int]:
    """The process and all below it, children first, as far as they still run (Linux)."""
    children = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(file).split()]
    return [*(below for child in children for below in _descendants(child)), pid]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def sweep(rounds: int, seed: int = 0, kinds: Sequence[str] = ()) -> int:
    """Returns how many rounds lost something; prints what."""
    with tempfile.TemporaryDirectory() as folder:
        work, lost = Sweep(Path(folder), seed), 0
        kinds = kinds or [*work.kills, *work.flips]
        work.prepare()
        for number in range(rounds):
            kind = kinds[number % len(kinds)]
            try:
                work.round(kind)
                print(f"{number + 1}/{rounds} {kind}: well", flush=True)
            except Lost as error:
                lost += 1
                print(f"{number + 1}/{rounds} {kind}: LOST: {error}", flush=True)
    return lost


def sweep_from_command_line() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--kinds", nargs="+", default=(), metavar="KIND", help="default: all, in turn")
    arguments = parser.parse_args()
    return int(sweep(arguments.rounds, arguments.seed, arguments.kinds) > 0)


if __name__ == "__main__":
    sys.exit(sweep_from_command_line())
