"""What a video needs, told before anything is loaded: counted parts equal what is really held, advice really fits."""

from __future__ import annotations

import json
import resource
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.cli.flags import Parser
from sparse_forcing.cli.generate import add_arguments
from sparse_forcing.errors import SparseForcingError
from sparse_forcing.model_folder.live_bytes import peak_bytes
from sparse_forcing.sampling.generation import preflight
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.preflight import GIB, answer, cache_bytes, needs, outline
from sparse_forcing.sampling.generation.settings import explain_out_of_memory, resolve_settings
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.forked import Forked, json_of
from tests.wan_folder import VIDEO, WEIGHTS

PUBLISHED = GenerateConfig(model="wan-1.3b", preset="self-forcing", device="cuda")


def test_peak_is_what_lives_at_once() -> None:
    def work() -> torch.Tensor:
        x = torch.empty(1000, device="meta")
        for _ in range(5):
            x = x + 1  # two at a time
        y = x.view(10, 100)[:, :50]  # no bytes of its own
        del x
        return y.contiguous() * 2

    assert peak_bytes(work, "cuda") == 2 * 4000
    q = torch.empty(1, 1, 5000, 8, device="meta")
    assert peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), "cuda") == q.nbytes


def convolve(channels: int, made: int, device: str = "cpu", *, width: int = 418) -> torch.Tensor:
    x, weight = (
        torch.ones(*shape, device=device) for shape in ((1, channels, 6, 242, width), (made, channels, 3, 3, 3))
    )
    return torch.nn.functional.conv3d(x, weight, torch.zeros(made, device=device))


def print_peak(channels: int, made: int) -> int:
    """Print the most bytes that this process, which does nothing else, came to hold while it convolved."""
    convolve(channels, made, width=4)  # loads the library
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")
    convolve(channels, made)
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"took": 1024 * int(peak.split()[1]) - before}))
    return 0


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX2" or not Path("/proc/self/clear_refs").exists(),
    reason="asks Linux for the peak of a process; what kernels for other CPUs take was not measured",
)
@pytest.mark.parametrize(("channels", "made"), [(24, 24), (20, 20), (24, 3), (8, 8), (14, 4), (15, 4)])
def test_convolutions_on_a_cpu_take_what_is_counted(channels: int, made: int, tmp_path: Path) -> None:
    code, output = Forked(tmp_path / "log.txt", print_peak, channels, made).finish()
    assert code == 0, output
    counted = peak_bytes(lambda: convolve(channels, made, "meta"), "cpu")
    assert counted == pytest.approx(json_of(output)["took"], rel=0.1, abs=8 << 20)
    assert peak_bytes(lambda: convolve(channels, made, "meta"), "cuda") < 0.8 * counted


@pytest.mark.parametrize(
    ("memory", "knobs"),
    [
        ("full", {}),
        ("window", {"window_frames": 6}),
        ("sink", {"window_frames": 6, "sink_frames": 1}),
        ("heavy_hitter", {"window_frames": 3, "persistent_blocks": 2, "tile": (1, 2, 2)}),
        ("sparse", {"window_frames": 6, "persistent_blocks": 2, "tile": (1, 2, 2)}),
        ("sparse", {"window_frames": 6, "persistent_blocks": 2, "tile": (3, 2, 2), "cache_dtype": "int8"}),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cache_is_what_a_rollout_holds(wan: Path, memory: str, knobs: dict, guidance: float) -> None:
    config = GenerateConfig(
        model=str(wan),
        preset="self-forcing",
        memory=memory,
        guidance_scale=guidance,
        height=32,
        width=32,
        num_frames=45,
        **knobs,
    )
    model = outline(config)
    settings = resolve_settings(config, model)  # type: ignore[arg-type]
    pipe = SparseForcingPipeline.from_pretrained(str(wan)).with_defaults(model.defaults)
    chunks = list(
        pipe.stream(
            "a cat",
            memory=settings.memory,
            num_inference_steps=1,
            guidance_scale=guidance,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
        )
    )
    held = max(chunk.cache_bytes for chunk in chunks)
    counted = (2 if guidance > 1 else 1) * cache_bytes(model, settings, 12, 4)
    assert counted == held if memory in ("full", "window", "sink") else 0.8 * held < counted < 1.05 * held


def test_weights_are_those_that_are_loaded(wan: Path) -> None:
    config = GenerateConfig(model=str(wan), **VIDEO)
    need, pipe = needs(config, outline(config), "cpu"), SparseForcingPipeline.from_pretrained(str(wan))
    for name, part in (("transformer", pipe.transformer), ("text_encoder", pipe.text_encoder)):
        assert getattr(need, name) == sum(x.nbytes for x in part.parameters())  # type: ignore[attr-defined]
    text = pipe.transformer.encode_text(pipe.encode_prompt(["a cat", ""]))  # with guidance
    assert need.text == sum(x.nbytes for pair in text for x in pair)
    assert need.cache == 0  # plain Wan
    half = needs(replace(config, dtype="bfloat16"), outline(config), "cpu")
    assert half.transformer == need.transformer // 2
    assert half.activations < need.activations
    short, long = (replace(config, num_frames=frames, height=256, width=256) for frames in (9, 81))
    first, second = (needs(each, outline(each), "cpu") for each in (short, long))
    assert second.activations > 3 * first.activations  # seven times as many tokens, and as much text
    assert second.decoding > first.decoding


def test_published_sizes_are_known_before_they_are_downloaded() -> None:
    need = needs(PUBLISHED, outline(PUBLISHED))
    assert need.transformer == 2 * 1_418_996_800
    assert need.cache == 21 * 1560 * 184_320  # spec: 184,320 bytes a token
    assert need.text == 512 * 184_320
    assert 10 * GIB < need.text_encoder < 11 * GIB
    large = replace(PUBLISHED, model="wan-14b")
    assert needs(large, outline(large)).transformer == 2 * 14_288_491_584


def test_advice_makes_a_video_fit() -> None:
    def shortage(config: GenerateConfig, limit: int) -> str | None:
        return answer(config, outline(config), "cuda", limit).remark

    said = shortage(PUBLISHED, 10 * GIB)
    assert said is not None
    parser = Parser(prog="generate")
    add_arguments(parser)
    words = vars(parser.parse_args(shlex.split(said.partition("it fits with ")[2])))
    changes = {name: value for name, value in words.items() if name not in ("suite", "check", "json")}
    assert changes["text_encoder_device"] == "cpu"
    assert shortage(replace(PUBLISHED, **changes), 10 * GIB) is None
    assert shortage(PUBLISHED, 200 * GIB) is None
    assert "no setting" in str(shortage(PUBLISHED, GIB))


def test_running_out_of_memory_names_what_took_it_and_two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "resolve_device", lambda name: name)
    took, flags = preflight.relief(PUBLISHED)
    assert took == " (cache 5.6 GiB and decoding 3.8 GiB of 14 GiB)"
    assert flags == ["--memory sparse --cache-dtype int8", "--tiled-decoding"]
    _, on_a_cpu = preflight.relief(replace(PUBLISHED, device="cpu", dtype="bfloat16"))
    assert on_a_cpu == ["--memory sparse --cache-dtype int8", "--weights int8"]
    settings = resolve_settings(PUBLISHED, outline(PUBLISHED))  # type: ignore[arg-type]
    with pytest.raises(SparseForcingError) as error, explain_out_of_memory(settings, PUBLISHED):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert (
        f"with --memory full{took}; use --memory sparse --cache-dtype int8, or use --tiled-decoding, or lower"
        in str(error.value)
    )
    assert preflight.relief(replace(PUBLISHED, model="nowhere/at/all")) == ("", [])


def test_doctor_says_whether_a_video_fits(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "wan-14b", "--vram", "16", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["fits"], answer["fits_with"], answer["kernels"]) == (False, ["--offload blocks"], ["dense"])
    assert answer["total"] > answer["bytes"]["transformer"]
    assert (
        main(["doctor", "--model", str(wan), "--seconds", "2", "--height", "32", "--width", "32", "--vram", "1"]) == 0
    )
    assert "fits into 1.0 GiB" in capsys.readouterr().out


def test_generate_asks_what_doctor_answers_about_this_cpu(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(wan), "--device", "cpu", "--height", "32", "--width", "32", "--num-frames", "5"]
    assert main(["doctor", *words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["device"] == "cpu"
    assert answer["total"] > answer["bytes"]["process"] > GIB // 8
    assert answer["bytes"]["loading"] == 0  # float32 is what is stored
    monkeypatch.setattr(preflight, "obtainable_bytes", lambda: GIB // 8)
    assert main(["doctor", *words]) == 1
    assert "does not fit into 0.1 GiB" in capsys.readouterr().out
    assert main(["generate", "a cat", *words, "--num-inference-steps", "1", "--output", str(tmp_path / "v.mp4")]) == 0
    assert "warning: needs about" in capsys.readouterr().err


def test_files_of_another_type_lie_beside_the_weights_while_they_are_read(wan: Path) -> None:
    config = GenerateConfig(model=str(wan), dtype="bfloat16", **VIDEO)
    need, size = needs(config, outline(config), "cpu"), (wan / "transformer" / WEIGHTS).stat().st_size
    assert need.loading == size
    assert need.headroom == 1
    small = needs(replace(config, dtype="float32", weights="int8"), outline(config), "cpu")
    assert small.transformer + small.loading == 2 * need.transformer  # whole before it is rounded
    assert needs(config, outline(config), "cuda").loading == 0


def test_what_waits_between_chunks_is_on_a_cpu_too() -> None:
    tiled = replace(PUBLISHED, tiled_decoding=True, dtype="float32")
    on_a_gpu, on_a_cpu = (needs(tiled, outline(tiled), device).decoding for device in ("cuda", "cpu"))
    assert on_a_cpu > 2 * on_a_gpu


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vram", "16"], "--vram has no effect without --model"),
        (["--seconds", "3"], "without --model"),
        (["--model", "nowhere/at/all"], "not an embedded model"),
        (["--model", "wan-1.3b", "--height", "7"], "not a positive multiple"),
        (["--model", "tiny", "--tiled-decoding"], "is for Wan's autoencoder"),
        (["--model", "wan-1.3b", "--tiny-vae", "nowhere.pth"], "no such file"),
    ],
)
def test_questions_without_an_answer(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err
