"""Folders and manifests of videos, bad files, encoded shards and stored text; `data encode` and `data ode-pairs`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sparse_forcing.cli import main
from sparse_forcing.config import load_config
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import output_lock
from sparse_forcing.media.video import write_video
from sparse_forcing.model.text import WordTextEncoder
from sparse_forcing.model.vae import PatchAutoencoder
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.captions import parse_caption
from sparse_forcing.scenes.vocabulary import COLOURS
from sparse_forcing.training.data import encode as encode_module
from sparse_forcing.training.data.encode import EncodeConfig, encode
from sparse_forcing.training.data.pairs import PairsConfig, choose_kept_steps
from sparse_forcing.training.data.shards import Shards, StoredText
from sparse_forcing.training.data.sources import DataConfig, ProceduralSource, VideoFormat, VideoSource, make_source
from sparse_forcing.training.data.videos import list_videos, read_clip
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.recipes.forcing import ForcingConfig, ForcingRecipe
from tests.forked import Forked, json_of
from tests.training.conftest import CHANNELS, HORIZON, SIZE
from tests.training.test_recipes import distill

OWN = VideoFormat(height=SIZE, width=SIZE, fps=8.0)
FRAMES = 4 * HORIZON


def colour(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(30, 220, 3).astype(np.uint8)


def add_video(folder: Path, number: int, *, frames: int = FRAMES, caption: str | None = "", fps: float = 8.0) -> Path:
    """A plain clip whose colour tells its number, with its caption beside it."""
    path = folder / f"{number:03d}.mp4"
    write_video(path, np.broadcast_to(colour(number), (frames, SIZE, SIZE, 3)), fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption or f"clip number {number}\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five good clips."""
    (tmp_path / "clips").mkdir()
    for number in range(5):
        add_video(tmp_path / "clips", number)
    return tmp_path / "clips"


def cut(path: Path, share: float = 0.9) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def source(path: Path, **changes: Any) -> VideoSource:
    config = DataConfig(kind="videos", path=path, latent_frames=HORIZON, **changes)
    made = make_source(config, 3, PatchAutoencoder(CHANNELS), OWN)
    assert isinstance(made, VideoSource)
    return made


def test_every_video_comes_once_an_epoch_with_its_caption(folder: Path) -> None:
    videos = source(folder)
    seen = [videos.clips(draw, 1) for draw in range(5)]
    assert sorted(prompts[0] for _, prompts in seen) == [f"clip number {n}" for n in range(5)]
    for latents, (prompt,) in seen:
        assert latents.shape == (1, HORIZON, CHANNELS, SIZE // 8, SIZE // 8)
        expected = colour(int(prompt.split()[-1])).astype(float) / 127.5 - 1
        assert latents[0, 0, 0, 0, 0].item() == pytest.approx(expected[0], abs=0.05)  # first component: red, untrained
    again, prompts = source(folder).clips(3, 1)
    assert torch.equal(again, seen[3][0])
    assert prompts == seen[3][1]
    assert videos.prompts(3, 1) == prompts


def test_folder_and_manifest_hold_the_same(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"video": f"clips/{v.path.name}", "prompt": v.prompt}) for v in list_videos(folder)]
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("\n".join(lines) + "\n\n")
    assert [(v.path.resolve(), v.prompt) for v in list_videos(manifest)] == [
        (v.path.resolve(), v.prompt) for v in list_videos(folder)
    ]


def test_what_data_clips_writes_is_a_source(tmp_path: Path) -> None:
    assert main(["data", "clips", str(tmp_path), "--num-clips", "2", "--num-frames", "32", "--size", "32"]) == 0
    latents, prompts = source(tmp_path).clips(0, 2)
    assert latents.shape[:2] == (2, HORIZON)
    assert all(prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no videos"),
        ("{}", r"line 1: expected \{\"video\""),
        ('{"video": "a.mp4", "prompt": ""}', "line 1 is empty"),
        ('{"video": "a.mp4", "video": "b.mp4", "prompt": "x"}', "line 1: key 'video' appears twice"),
        ("not json", "line 1: not valid JSON"),
    ],
)
def test_a_bad_manifest_is_named_before_anything_is_decoded(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        list_videos(tmp_path / "list.jsonl")


def test_a_video_without_caption_and_an_empty_folder_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "002.txt").unlink()
    with pytest.raises(ConfigError, match=r"002\.txt"):
        list_videos(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no videos"):
        list_videos(tmp_path / "empty")


def test_frame_rates_are_thinned_and_sizes_covered(tmp_path: Path) -> None:
    frames = np.zeros((40, 48, 96, 3), np.uint8)
    frames[:] = (np.arange(40) * 6)[:, None, None, None]
    frames[:, :, :20] = 255  # outside the middle square
    write_video(tmp_path / "a.mp4", frames, 16.0)
    clip = read_clip(tmp_path / "a.mp4", frames=16, size=(24, 24), fps=8.0)
    assert clip.shape == (3, 16, 24, 24)
    brightness = (clip[0, :, 12, 12] + 1) * 127.5
    torch.testing.assert_close(brightness, 12.0 * torch.arange(16), atol=6.0, rtol=0)
    assert (clip[:, :, :, 2] < 0.9).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path), "could be decoded|damaged|not a readable"),
        (lambda path: path.write_bytes(b""), "not a readable video"),
        (lambda path: path.write_text("<html>404</html>"), "not a readable video"),
        (lambda path: path.unlink(), "no such video file"),
        (lambda path: add_video(path.parent, 2, frames=8), "too short"),
        (lambda path: add_video(path.parent, 2, fps=4.0), "frames per second, fewer"),
    ],
    ids=["cut", "empty", "html", "missing", "short", "slow"],
)
def test_bad_files_are_named_skipped_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    manifest = [json.dumps({"video": v.path.name, "prompt": v.prompt}) for v in list_videos(folder)]
    (folder / "manifest.jsonl").write_text("\n".join(manifest))
    damage(folder / "002.mp4")
    videos = source(folder, max_bad_samples=1)
    prompts = [videos.clips(draw, 1)[1][0] for draw in range(10)]
    assert "clip number 2" not in prompts
    assert {f"clip number {n}" for n in (0, 1, 3, 4)} == set(prompts)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bad sample" in line]
    assert "002.mp4" in line
    assert any(part in line for part in message.split("|"))
    with pytest.raises(ConfigError, match=r"1 bad samples exceed max_bad_samples 0; .*002\.mp4"):
        for draw in range(5):
            source(folder, max_bad_samples=0).clips(draw, 1)


def test_procedural_prompts_have_the_weighted_motions_and_shapes_more_often() -> None:
    def source(**weights: Any) -> ProceduralSource:
        return ProceduralSource(DataConfig(size=SIZE, two_object_fraction=0.0, **weights), 0, PatchAutoencoder(4))

    even, stars = source(), source(shape_weights={"star": 1e9})
    spins = source(motion_weights={"spins clockwise": 1e9})
    assert sum("star" in prompt for prompt in even.prompts(0, 40)) < 20
    assert all("star" in prompt for prompt in stars.prompts(0, 40))
    motions = {parse_caption(prompt).objects[0].motion for prompt in spins.prompts(0, 40)}
    assert motions == {"spins clockwise"}


def world_source(fraction: float, **settings: Any) -> ProceduralSource:
    worlds = {"revisit": 2.0, "reappear": 1.0}
    data = DataConfig(size=16, latent_frames=20, worlds=worlds, world_fraction=fraction, **settings)
    return ProceduralSource(data, 3, PatchAutoencoder(4))


def test_a_share_of_procedural_samples_are_worlds_and_the_rest_what_they_were() -> None:
    mixed, plain = world_source(0.5), ProceduralSource(DataConfig(size=16, latent_frames=20), 3, PatchAutoencoder(4))
    pixels, captions = mixed._batch(7, 12, mixed.frames)
    old, texts = plain._batch(7, 12, plain.frames)
    assert pixels.shape == old.shape == (12, 3, 80, 16, 16)
    same = [text == other for text, other in zip(captions, texts)]
    assert 2 < sum(same) < 10
    assert [torch.equal(clip, other) for clip, other in zip(pixels, old)] == same
    assert not any(colour in text.split() for text, kept in zip(captions, same) if not kept for colour in COLOURS)
    assert mixed.prompts(7, 12) == captions
    again, _ = world_source(0.5)._batch(7, 12, mixed.frames)
    assert torch.equal(again, pixels)
    assert mixed.prompts(8, 12) != captions


def test_captions_of_worlds_are_dropped_as_often_as_others() -> None:
    source = world_source(1.0, caption_dropout=0.5)
    texts = [text for draw in range(8) for text in source.prompts(draw, 8)]
    assert 16 < sum(not text for text in texts) < 48


def test_a_clip_too_short_for_a_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="80 frames are too few for"):
        world_source(1.0, world_gap=(70, 90)).prompts(0, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"worlds": {"revisit": 1.0}}, "worlds and world_fraction: each has an effect only with the other"),
        ({"world_fraction": 0.5}, "worlds and world_fraction"),
        ({"worlds": {"maze": 1.0}, "world_fraction": 0.5}, "unknown kind 'maze'"),
        ({"worlds": {"revisit": 1.0}, "world_fraction": 1.5}, "world_fraction must lie in"),
        ({"worlds": {"revisit": 1.0}, "world_fraction": 0.5, "world_gap": (9, 3)}, "gap must be two numbers"),
        ({"worlds": {"revisit": 1.0}, "world_fraction": 0.5, "world_grounds": ("lava",)}, "grounds must be some of"),
        ({"kind": "videos", "path": Path("x"), "worlds": {"revisit": 1.0}}, "worlds: has no effect for kind"),
        ({"motion_weights": {"flies": 2.0}}, "unknown motion 'flies'"),
        ({"shape_weights": {"star": -1.0}}, "none may be negative"),
        ({"motion_weights": {"grows": 2.0}, "two_object_fraction": 1.0}, "motion_weights: has no effect where"),
        (
            {"kind": "videos", "path": Path("x"), "shape_weights": {"star": 2.0}},
            "shape_weights: has no effect for kind",
        ),
        ({"kind": "videos", "path": Path("x"), "height": 0}, "height must be above 0"),
        ({"fps": 8.0}, "fps: has no effect for kind 'procedural'"),
    ],
)
def test_settings_of_data_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def encoding(model: Path, **changes: Any) -> EncodeConfig:
    data = DataConfig(size=SIZE, latent_frames=HORIZON)
    return EncodeConfig(**{"model": str(model), "data": data, "count": 5, "per_shard": 2, "batch_size": 2, **changes})


def test_encoded_videos_are_what_the_source_and_the_encoder_give(
    folder: Path, tmp_path: Path, model_folder: Path
) -> None:
    data = DataConfig(kind="videos", path=folder, latent_frames=HORIZON)
    assert encode(encoding(model_folder, data=data, negative_prompt="blurry"), tmp_path / "out") == 3
    shards, pipe = Shards(tmp_path / "out"), SparseForcingPipeline.from_pretrained(str(model_folder))
    videos = list_videos(folder)
    assert shards.prompts == [video.prompt for video in videos]
    for item in (0, 3, 4):
        pixels = read_clip(videos[item].path, frames=FRAMES, size=(SIZE, SIZE), fps=8.0)
        latents, _ = shards[[item]]
        torch.testing.assert_close(latents, pipe.autoencoder.encode(pixels[None]).transpose(1, 2))
    stored = StoredText(shards)
    for prompt in ("", "blurry", videos[3].prompt):
        torch.testing.assert_close(stored.encode([prompt]), pipe.text.encode([prompt]).detach())
    with pytest.raises(ConfigError, match="no embedding of the prompt 'another'"):
        stored.encode(["another"])


def test_encoding_goes_on_where_it_stopped(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, calls = encoding(model_folder), [0]
    encode(config, tmp_path / "whole")
    inner = encode_module.encode_pixels

    def interrupted(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(encode_module, "encode_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(config, tmp_path / "out")
    with pytest.raises(WeightsError, match="2 of 5 items"):
        Shards(tmp_path / "out")
    assert encode(config, tmp_path / "out") == 2
    assert encode(config, tmp_path / "out") == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    with pytest.raises(ConfigError, match="other settings"):
        encode(replace(config, seed=1), tmp_path / "out")


def test_encoding_skips_bad_files_within_the_budget_over_all_runs(
    folder: Path, tmp_path: Path, model_folder: Path
) -> None:
    for number in (0, 1, 3):
        cut(folder / f"{number:03d}.mp4")
    data = DataConfig(kind="videos", path=folder, latent_frames=HORIZON, max_bad_samples=2)
    for _ in range(2):  # the second run remembers what the first one counted
        with pytest.raises(ConfigError, match="3 bad samples exceed max_bad_samples 2"):
            encode(encoding(model_folder, data=data), tmp_path / "out")
    more = replace(data, max_bad_samples=3)
    encode(encoding(model_folder, data=more), tmp_path / "out")
    shards = Shards(tmp_path / "out")
    assert shards.prompts == ["clip number 2", "clip number 4"]
    assert [colour(2)[0], colour(4)[0]] == pytest.approx(
        [(shards[[item]][0][0, 0, 0, 0, 0].item() + 1) * 127.5 for item in (0, 1)], abs=5
    )


def test_training_from_shards_loads_no_text_encoder(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(encoding(model_folder), tmp_path / "data")
    data = DataConfig(kind="shards", path=tmp_path / "data", latent_frames=HORIZON, caption_dropout=0.5)
    loop = LoopConfig(steps=2, global_batch=2, micro_batch=2, trackers=())

    def recipe(**changes: Any) -> ForcingRecipe:
        config = ForcingConfig(loop=loop, model=str(model_folder), data=replace(data, **changes))
        return ForcingRecipe(config, Accelerator(cpu=True))

    (expected,) = recipe(stored_text=False).losses(0, 0)

    def refuse(*args: Any, **settings: Any) -> Any:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(WordTextEncoder, "from_pretrained", refuse)
    trained = recipe()
    (loss,) = trained.losses(0, 0)
    torch.testing.assert_close(loss, expected)
    trained.update(0)
    trained.validate(1, tmp_path / "samples")
    trained.export(tmp_path / "pipeline")
    student = distill(model_folder, data=data)
    assert {"generator_loss", "critic_loss"} <= student.update(0).keys()
    monkeypatch.undo()
    assert SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline"))("a red circle", num_frames=8).frames.any()


def test_shards_that_do_not_fit_are_refused(tmp_path: Path, model_folder: Path) -> None:
    encode(encoding(model_folder, text=False), tmp_path / "data")
    loop = LoopConfig(steps=2, global_batch=2, micro_batch=2, trackers=())
    data = DataConfig(kind="shards", path=tmp_path / "data", latent_frames=HORIZON)
    config = ForcingConfig(loop=loop, model=str(model_folder), data=data)
    with pytest.raises(ConfigError, match="holds no text embeddings"):
        ForcingRecipe(config, Accelerator(cpu=True))
    longer = replace(config, data=replace(data, latent_frames=HORIZON + 2, stored_text=False))
    with pytest.raises(ConfigError, match=f"latent_frames: {HORIZON + 2}, but"):
        ForcingRecipe(longer, Accelerator(cpu=True))


def test_commands_encode_and_make_pairs(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--set", f"data.size={SIZE}", "--set", f"data.latent_frames={HORIZON}", "--set", "count=3"]
    encoding = ["data", "encode", str(tmp_path / "latents"), "--set", f"model={model_folder}", *size, "--json"]
    assert main(encoding) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["items"], answer["refused"], answer["shards_written"]) == (3, 0, 1)
    pairs = ["--set", f"teacher={model_folder}", "--set", "sampler.steps=2", "--set", "steps=4", *size]
    assert main(["data", "ode-pairs", str(tmp_path / "pairs"), *pairs]) == 0
    assert "items: 3" in capsys.readouterr().out
    for arguments, message in (
        (["encode", "X", "--num-clips", "3"], "--num-clips has no effect on data encode"),
        (["clips", "X", "--set", "count=3"], "--set has no effect on data clips"),
        (["encode", "X", "--set", "cuont=3"], "did you mean count?"),
        (["ode-pairs", "X", "--set", "steps=50"], "use a multiple of 4"),
        (["encode", "X", "--set", "model=nowhere"], "not an embedded model"),
    ):
        assert main(["data", arguments[0], str(tmp_path / "X"), *arguments[2:]]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encode", "ode-pairs"])
def test_processes_of_one_launch_write_what_one_process_writes(tmp_path: Path, model_folder: Path, kind: str) -> None:
    settings = {"data.size": SIZE, "data.latent_frames": HORIZON, "count": 5, "per_shard": 1, "batch_size": 1}
    own = {"model": model_folder} if kind == "encode" else {"teacher": model_folder, "sampler.steps": 2, "steps": 4}
    changes = [f"--set={name}={value}" for name, value in {**settings, **own}.items()]
    assert main(["data", kind, str(tmp_path / "one"), *changes]) == 0
    two = tmp_path / "two"

    def launch(*more: str) -> tuple[int | None, str]:
        return Forked(
            tmp_path / "launch.log", main, ["data", kind, str(two), "--json", *changes, *more], processes=2
        ).finish()

    code, output = launch()
    assert code == 0, output
    assert json_of(output) == {"folder": str(two), "items": 5, "refused": 0, "shards_written": 5}
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert [(two / name).read_bytes() for name in names] == [(tmp_path / "one" / name).read_bytes() for name in names]

    (two / "shard-00001.json").unlink()
    (two / "shard-00004.safetensors").write_bytes(b"half a file")
    (two / "shard-00004.json").unlink()
    assert main(["data", kind, str(two), *changes]) == 0  # one process goes on where two stopped
    assert [(two / name).read_bytes() for name in names] == [(tmp_path / "one" / name).read_bytes() for name in names]
    code, output = launch("--set=seed=1")
    assert code != 0
    assert output.count("error: ") >= 2
    assert output.count("holds data made with other settings") == 2  # every process says so, none waits
    with output_lock(two):
        assert launch()[1].count("another run (process") == 2


def test_prompts_alone_are_encoded_for_distillation(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\na red circle\n")
    config = EncodeConfig(
        model=str(model_folder), data=DataConfig(kind="prompts", path=tmp_path / "prompts.txt"), dtype="bfloat16"
    )
    encode(config, tmp_path / "out")
    shards = Shards(tmp_path / "out")
    assert shards.prompts == ["a red circle", "a blue star", "a red circle"]
    assert shards.shape("data") is None
    assert shards.tensor("text", [1]).dtype == torch.bfloat16
    data = DataConfig(kind="shards", path=tmp_path / "out", latent_frames=HORIZON)
    distill(model_folder, data=data).update(0)
    with pytest.raises(ConfigError, match="this stage needs clips"):
        make_source(data, 0, PatchAutoencoder(CHANNELS), OWN).clips(0, 1)


@pytest.mark.parametrize(
    ("name", "config"), [("latents", EncodeConfig), ("prompts", EncodeConfig), ("ode-pairs", PairsConfig)]
)
def test_shipped_data_configs_are_valid(name: str, config: type) -> None:
    folder = Path(__file__).parents[2] / "training" / "configs" / "data"
    settings = load_config(config, folder / f"wan-{name}.yaml")
    if isinstance(settings, PairsConfig):
        choose_kept_steps(settings)
