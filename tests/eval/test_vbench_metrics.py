"""Each network dimension against its formula written out, with random networks: sampling, resize, crop, mean."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparse_forcing.errors import MeasurementError
from sparse_forcing.eval.measuring.registry import Measurement, all_metrics
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.metrics.quality.dynamic_degree import is_dynamic, is_static, top_mean
from sparse_forcing.eval.metrics.semantic.objects import relation_score
from sparse_forcing.eval.vbench import transforms as T
from sparse_forcing.eval.vbench.networks import clip, dino, raft, viclip
from sparse_forcing.eval.vbench.semantic import Detection
from tests.eval import plain_networks as plain
from tests.eval.conftest import clip_of, moving_disc, score

FRAMES = moving_disc(11)[:, :, :56]  # not square


def prepared(module: torch.nn.Module, seed: int = 0) -> tuple[torch.nn.Module, plain.State]:
    module.load_state_dict(plain.randomize(module.state_dict(), seed))
    return module.requires_grad_(False).eval(), module.state_dict()


class Words:
    """A tokenizer of letters: a .. z -> 1 .. 26."""

    def __call__(self, text: str, context: int, *, truncate: bool) -> torch.Tensor:
        letters = [1 + ord(letter) % 26 for letter in text if letter.isalpha()]
        ids = [48, *letters[: context - 2], 49]
        return torch.tensor([ids + [0] * (context - len(ids))])


def small_clip(seed: int = 0) -> tuple[torch.nn.Module, plain.State]:
    visual = clip.ImageEncoder(width=64, layers=1, patch=32, positions=50, embedding=24)
    return prepared(clip.Clip(visual=visual, width=64, layers=1, context=77, vocabulary=50, embedding=24), seed)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def mean_consistency(features: list[torch.Tensor]) -> float:
    total = 0.0
    for number in range(1, len(features)):
        previous = max(0.0, cosine(features[number - 1], features[number]))
        total += (previous + max(0.0, cosine(features[0], features[number]))) / 2
    return total / (len(features) - 1)


def test_subject_consistency() -> None:
    network, state = prepared(dino.DinoTransformer(width=64, depth=1, patch=32, positions=50))
    expected = mean_consistency([plain.plain_dino(image, state, 1) for image in T.dino_input(FRAMES)])
    given = score("subject_consistency", FRAMES, Resources(networks={"dino": network}))
    assert given == pytest.approx(expected, abs=1e-4)
    assert 0 < expected < 0.9999


def test_background_consistency() -> None:
    network, state = small_clip()
    expected = mean_consistency([plain.plain_clip_image(image, state, 1) for image in T.clip_input(FRAMES)])
    given = score("background_consistency", FRAMES, Resources(networks={"clip_b32": network}))
    assert given == pytest.approx(expected, abs=1e-4)


def test_aesthetic_quality() -> None:
    network, state = small_clip()
    head, _ = prepared(torch.nn.Linear(24, 1), 1)
    features = [plain.plain_clip_image(image, state, 1) for image in T.clip_input(FRAMES)]
    ratings = [float(head.weight[0] @ (f / f.norm()) + head.bias) / 10 for f in features]
    given = score("aesthetic_quality", FRAMES, Resources(networks={"clip_l14": network, "aesthetic_head": head}))
    assert given == pytest.approx(np.mean(ratings), abs=1e-4)


def test_appearance_style_is_the_logit_of_the_style_words_and_uses_the_style_words_and_antialiased_frames() -> None:
    network, state = small_clip()
    prompt = "A beautiful coastal beach in spring, waves lapping on sand, Van Gogh style"
    text = plain.plain_text(Words()("Van Gogh style", 77, truncate=False)[0], state, 1)
    expected = np.mean([cosine(plain.plain_clip_image(i, state, 1), text) for i in T.clip_input_pil(FRAMES)])
    expected *= float(state["logit_scale"].exp()) / 100  # the logit, as VBench divides it
    assert abs(expected) > 1e-3
    resources = Resources(networks={"clip_b32": network, "tokenizer": Words()})
    assert score("appearance_style", FRAMES, resources, prompt) == pytest.approx(expected, abs=1e-4)
    other = all_metrics()["appearance_style"].compute(clip_of(FRAMES, "a cat").whole(), resources)
    assert other.value is None


@pytest.mark.parametrize("name", ["overall_consistency", "temporal_style"])
def test_text_video_similarity(name: str) -> None:
    vision = viclip.VideoEncoder(width=64, layers=1, patch=56, positions=17, embedding=16, frames=8)
    text = clip.TextEncoder(width=64, layers=1, context=32, vocabulary=50, embedding=16)
    network, state = prepared(viclip.ViClip(vision_encoder=vision, text_encoder=text))
    prompt = "a red disc moves over a texture and further on, in a long sentence that is cut"
    frames = T.clip_input_uint8(FRAMES[[0, 1, 2, 4, 5, 6, 8, 9]])
    assert T.middle_frames(11, 8) == [0, 1, 2, 4, 5, 6, 8, 9]
    expected = cosine(
        plain.plain_viclip_video(frames, state, 1),
        plain.plain_text(Words()(prompt, 32, truncate=True)[0], state, 1, "text_encoder."),
    )
    resources = Resources(networks={"viclip": network, "tokenizer": Words()})
    assert score(name, FRAMES, resources, prompt) == pytest.approx(expected, abs=1e-4)


def test_imaging_quality_averages_frames_and_is_a_fraction() -> None:
    network = lambda image: image.mean().reshape(1, 1) * 100  # noqa: E731
    given = score("imaging_quality", FRAMES, Resources(networks={"musiq": network}))
    assert given == pytest.approx(FRAMES.mean() / 255, abs=1e-4)


class ColorBackbone(torch.nn.Module):
    """Feature maps that are the input itself."""

    def extract_features(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 128, 128)
        return images


def test_imagenet_consistency_pools_feature_maps() -> None:
    features = [torch.tensor((f.mean(axis=(0, 1)) - 127) / 128) for f in FRAMES.astype(np.float64)]
    given = score("imagenet_consistency", FRAMES, Resources(networks={"efficientnet": ColorBackbone()}))
    assert given == pytest.approx(mean_consistency(features), abs=1e-4)


def test_motion_smoothness_pads_truncates_and_compares_odd_frames() -> None:
    frames = moving_disc(6)[:, :50, :37]
    network = lambda first, second: 0.25 * first + 0.75 * second  # noqa: E731
    errors = []
    for middle in (1, 3):
        blended = 0.25 * frames[middle - 1].astype(np.float32) + 0.75 * frames[middle + 1]
        errors.append(np.abs(np.floor(blended + 1e-3).astype(int) - frames[middle]).mean())
    given = score("motion_smoothness", frames, Resources(networks={"interpolator": network}))
    assert given == pytest.approx(1 - np.mean(errors) / 255, abs=1e-4)


def test_motion_smoothness_shows_the_network_whole_multiples_of_16() -> None:
    shapes = []

    def network(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(first.shape))
        return first

    score("motion_smoothness", moving_disc(3)[:, :50, :37], Resources(networks={"interpolator": network}))
    assert shapes == [(1, 3, 64, 48)]


def doubled(frames: np.ndarray) -> np.ndarray:
    """Every pixel twice in both directions: 128 x 128."""
    return frames.repeat(2, axis=1).repeat(2, axis=2)


class ShiftFlow:
    """A flow network that answers with fixed magnitudes, pair after pair."""

    def __init__(self, magnitudes: list[float]) -> None:
        self.magnitudes = list(magnitudes)

    def __call__(self, first: torch.Tensor, second: torch.Tensor, iterations: int) -> torch.Tensor:
        assert iterations == 20
        assert first.shape[-2] % 8 == first.shape[-1] % 8 == 0
        flow = torch.zeros(1, 2, *first.shape[-2:])
        rows = first.shape[-2] // 10  # the fastest tenth of the picture
        flow[:, 0, :rows] = self.magnitudes.pop(0)
        return flow


def test_dynamic_degree_samples_eight_frames_a_second_and_counts_moving_pairs() -> None:
    frames = doubled(moving_disc(16))  # 16 fps: 8 sampled frames, 7 pairs, at least round(4 * 8 / 16) = 2 must move
    threshold = 6 * 128 / 256
    for moving, expected in ((1, 0.0), (2, 1.0)):
        speeds = [threshold + 0.1] * moving + [threshold - 0.1] * (7 - moving)
        flow = ShiftFlow(speeds)
        assert score("dynamic_degree", frames, Resources(networks={"raft": flow})) == expected
        assert flow.magnitudes == []


def test_dynamic_degree_rounds_half_to_even() -> None:
    assert is_dynamic(np.array([0.0]), 2, 64)  # round(0.5) = 0 pairs needed
    assert not is_dynamic(np.array([]), 1, 64)
    assert not is_dynamic(np.array([9.0] + [0.0] * 8), 10, 256)  # round(2.5) = 2
    assert is_dynamic(np.array([9.0] * 2 + [0.0] * 7), 10, 256)


def test_top_mean_takes_the_truncated_share() -> None:
    assert top_mean(np.arange(50.0).reshape(5, 10), 0.05) == pytest.approx(48.5)
    assert top_mean(np.arange(59.0).reshape(1, 59), 0.05) == pytest.approx(57.5)


def test_pictures_too_small_for_the_network_are_not_judged() -> None:
    resources = Resources(networks={"raft": ShiftFlow([])})
    for side in (64, 113, 120):
        view = clip_of(np.zeros((3, side, 200, 3), np.uint8)).whole()
        with pytest.raises(MeasurementError, match="at least 121 pixels"):
            all_metrics()["dynamic_degree"].compute(view, resources)
        with pytest.raises(MeasurementError, match="at least 121 pixels"):
            is_static(view, resources)


def test_raft_is_finite_from_its_smallest_picture_on() -> None:
    network, _ = prepared(raft.Raft())
    pair = torch.rand(2, 3, 121, 121, generator=torch.Generator().manual_seed(0)) * 255
    padded = raft.pad_to_stride(pair)
    assert bool(network(padded[:1], padded[1:], 1).isfinite().all())
    with pytest.raises(ValueError, match="RAFT needs 128"):
        network(padded[:1, :, :120], padded[1:, :, :120], 1)


def test_numbers_that_are_not_finite_are_no_measurement() -> None:
    nan = lambda first, second, iterations: torch.full((1, 2, *first.shape[2:]), float("nan"))  # noqa: E731
    resources = Resources(networks={"raft": nan, "musiq": lambda image: image.mean().reshape(1, 1) / 0})
    view = clip_of(doubled(moving_disc(4))).whole()
    with pytest.raises(MeasurementError, match="raft answered with numbers that are not finite"):
        is_static(view, resources)  # a video whose motion is unknown is not a static one
    for name in ("dynamic_degree", "flow_magnitude", "imaging_quality"):
        with pytest.raises(MeasurementError, match="not finite"):
            all_metrics()[name].compute(view, resources)
    for wrong in (
        {"value": float("nan")},
        {"value": 1.0, "count": float("inf")},
        {"value": 1.0, "details": {"a": [float("nan")]}},
    ):
        with pytest.raises(MeasurementError, match="not a finite number"):
            Measurement(**wrong)
    with pytest.raises(MeasurementError, match="detector"):
        Detection(label="a", score=0.5, box=(0.0, float("nan"), 1.0, 1.0))


def test_static_filter() -> None:
    frames = doubled(moving_disc(9))  # 8 pairs and two more; round(2 * 9 / 16) = 1 pair may move
    slow, fast = 0.1, 3 * 128 / 256 + 0.1
    for speeds, expected in (
        ([fast] + [slow] * 9, True),
        ([fast] * 2 + [slow] * 8, False),
        ([slow] * 8 + [fast, slow], True),
        ([slow] * 8 + [slow, 2 * fast], False),
    ):
        assert is_static(clip_of(frames).whole(), Resources(networks={"raft": ShiftFlow(speeds)})) is expected


def test_dynamic_degree_with_a_real_network_matches_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_forcing.eval.metrics.quality.dynamic_degree.ITERATIONS", 2)
    network, state = prepared(raft.Raft())
    frames = doubled(moving_disc(3, speed=9))
    resources = Resources(networks={"raft": network})
    view = clip_of(frames, fps=8).whole()
    given = all_metrics()["dynamic_degree"].compute(view, resources).details["magnitude"]
    images = T.to_tensor(frames)
    magnitudes = []
    for first, second in ((0, 1), (1, 2)):
        flow = plain.plain_raft(images[first], images[second], state, 2)
        largest = flow.norm(dim=0).flatten().sort().values
        magnitudes.append(float(largest[-int(0.05 * len(largest)) :].mean()))
    assert given == pytest.approx(np.mean(magnitudes), rel=1e-5)


class Boxes:
    """A detector that answers from a list."""

    def __init__(self, frames: list[list[Detection]]) -> None:
        self.frames = frames

    def detect(self, frames: np.ndarray, labels: object) -> list[list[Detection]]:
        assert len(frames) == 16
        return [self.frames[number % len(self.frames)] for number in range(len(frames))]


def box(label: str, x: float, y: float, score: float = 0.9) -> Detection:
    return Detection(label=label, score=score, box=(x, y, x + 10, y + 10))


def test_object_dimensions() -> None:
    frames = moving_disc(20)
    seen = Resources(networks={"detector": Boxes([[box("bird", 0, 0), box("cat", 30, 0)], [box("bird", 0, 0)]])})
    assert score("object_class", frames, seen, "a bird") == 1.0
    assert score("multiple_objects", frames, seen, "a bird and a cat") == 0.5
    colours = Resources(
        networks={"detector": Boxes([[box("red bicycle", 0, 0, 0.4)], [box("blue bicycle", 0, 0)], []])}
    )
    assert score("color", frames, colours, "a red bicycle") == pytest.approx(6 / 11)


def test_a_colour_counts_when_any_object_has_it() -> None:
    """Not the object alone that the detector is surest of; what is not asked for does not count as seen."""
    both = [box("red bicycle", 0, 0, 0.4), box("blue bicycle", 30, 0, 0.9)]
    frames = [both, [box("blue bicycle", 0, 0)], [box("red car", 0, 0), box("bicycle", 0, 0)]]
    resources = Resources(networks={"detector": Boxes(frames)})
    assert score("color", moving_disc(16), resources, "a red bicycle") == pytest.approx(6 / 11)


def test_what_a_detector_returns_counts_under_its_label_only() -> None:
    others = Resources(networks={"detector": Boxes([[box("cat", 0, 0)], [box("cat", 0, 0), box("bird", 30, 0)]])})
    assert score("object_class", moving_disc(16), others, "a bird") == 0.5
    prompt = "a bicycle on the left of a car, front view"
    strangers = Boxes([[box("bicycle", 0, 0), box("dog", 40, 0), box("tree", 80, 0)]])
    for mode in ("strict", "vbench-compatible"):
        resources = Resources(networks={"detector": strangers}, mode=mode)
        assert score("spatial_relationship", moving_disc(16), resources, prompt) == 0.0


@pytest.mark.parametrize("answer", [[[box("bird", 0, 0)]], []])
def test_answers_for_some_of_the_frames_are_no_measurement(answer: list[list[Detection]]) -> None:
    detector = SimpleNamespace(detect=lambda frames, labels: answer)
    captioner = SimpleNamespace(caption=lambda frames: ["an alley at night"] * len(answer))
    resources = Resources(networks={"detector": detector, "captioner": captioner})
    for name, text in (("object_class", "a bird"), ("color", "a red bicycle"), ("scene", "alley")):
        with pytest.raises(MeasurementError, match=f"answered for {len(answer)} of 16 frames"):
            score(name, moving_disc(16), resources, text)


def test_spatial_relationship_checks_the_side_only_in_strict_mode() -> None:
    frames = moving_disc(16)
    wrong_side = Boxes([[box("bicycle", 40, 0), box("car", 0, 5)]])
    prompt = "a bicycle on the left of a car, front view"
    assert score("spatial_relationship", frames, Resources(networks={"detector": wrong_side}), prompt) == 0.0
    compatible = Resources(networks={"detector": wrong_side}, mode="vbench-compatible")
    assert score("spatial_relationship", frames, compatible, prompt) == 1.0


def test_overlap_lowers_a_relation() -> None:
    first, second = (0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)
    assert relation_score(first, second, "on the left of", directed=True) == pytest.approx(0.1 / (50 / 150))
    assert relation_score(first, (20.0, 0.0, 30.0, 10.0), "on the left of", directed=True) == 1.0
    assert relation_score(first, (0.0, 20.0, 10.0, 30.0), "on the left of", directed=True) == 0.0
    assert relation_score(first, (0.0, 20.0, 10.0, 30.0), "on the top of", directed=True) == 1.0


def test_scene_and_human_action() -> None:
    frames = moving_disc(16)

    class Captions:
        def caption(self, pictures: np.ndarray) -> list[str]:
            return ["an alley at night", "a valley"] * 8

    strict = Resources(networks={"captioner": Captions()})
    loose = Resources(networks={"captioner": Captions()}, mode="vbench-compatible")
    assert score("scene", frames, strict, "alley") == 0.5
    assert score("scene", frames, loose, "alley") == 1.0
    for value, expected in ((0.84996, 1.0), (0.84994, 0.0)):
        scores = {"riding a bike": value, **{f"other {n}": 0.9 for n in range(4)}}
        resources = Resources(networks={"actions": lambda pictures, scores=scores: scores})
        assert score("human_action", frames, resources, "A person is riding a bike") == expected


def test_features_are_kept_on_disk_and_shared_by_windows(tmp_path: Path) -> None:
    from sparse_forcing.eval.measuring.frames import ArraySource
    from sparse_forcing.eval.measuring.kept import FeatureStore
    from sparse_forcing.eval.measuring.manifest import Entry
    from sparse_forcing.eval.measuring.view import Clip

    calls = []

    def network(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images[..., ::40, ::40].flatten(1)

    resources = Resources(networks={"dino": torch.nn.Identity()})
    resources.networks["dino"].forward = network
    metric = all_metrics()["subject_consistency"]
    for _ in range(2):
        store = FeatureStore(tmp_path)
        clip_ = Clip(
            source=ArraySource(FRAMES), fps=16, entry=Entry(video=Path("a.mp4")), sha256="ab" * 32, store=store
        )
        whole = metric.compute(clip_.whole(), resources).value
        part = metric.compute(clip_.whole().part(3, 7), resources).value
        assert whole != part
    assert calls == [11]
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(b"damaged")
    clip_ = Clip(
        source=ArraySource(FRAMES),
        fps=16,
        entry=Entry(video=Path("a.mp4")),
        sha256="ab" * 32,
        store=FeatureStore(tmp_path),
    )
    assert metric.compute(clip_.whole(), resources).value == whole
    assert calls == [11, 11]
