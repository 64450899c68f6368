"""Detectors and captioners behind one interface, for the dimensions whose official networks do not install anywhere.

VBench uses GRiT, UMT and Tag2Text. Anything else (an open-vocabulary detector and a captioner of transformers) is a
stand-in: its numbers carry that name and no total is made from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sparse_forcing.errors import ConfigError, MeasurementError

FRAMES = 16  # judged per video, each in the middle of an equal share


@dataclass(frozen=True, kw_only=True)
class Detection:
    """An object: its label, a score in 0..1, and its box (x0, y0, x1, y1) in pixels."""

    label: str
    score: float
    box: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.score, *self.box)):
            raise MeasurementError(f"the detector answered with numbers that are not finite for {self.label!r:.60}")


class Detector(Protocol):
    """Finds named objects in frames uint8 [F, H, W, 3]."""

    def detect(self, frames: np.ndarray, labels: Sequence[str]) -> list[list[Detection]]:
        """Accepted detections of each frame."""
        ...


class Captioner(Protocol):
    """Describes frames uint8 [F, H, W, 3]."""

    def caption(self, frames: np.ndarray) -> list[str]:
        """One sentence a frame."""
        ...


class StandInDetector:
    """Any zero-shot object detector of transformers, from a local folder."""

    def __init__(self, folder: Path, device: str, min_score: float = 0.25) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForZeroShotObjectDetection.from_pretrained(folder, local_files_only=True)
        self.model = model.to(device).eval()
        self.device, self.min_score = device, min_score

    @torch.inference_mode()
    def detect(self, frames: np.ndarray, labels: Sequence[str]) -> list[list[Detection]]:
        found = []
        for frame in frames:
            inputs = self.processor(text=[list(labels)], images=[frame], padding=True, return_tensors="pt")
            result = self.processor.post_process_grounded_object_detection(
                self.model(**inputs.to(self.device)),
                threshold=self.min_score,
                target_sizes=[frame.shape[:2]],
                text_labels=[list(labels)],
            )[0]
            boxes = zip(result["text_labels"], result["scores"].tolist(), result["boxes"].tolist())
            found.append([Detection(label=label, score=score, box=tuple(box)) for label, score, box in boxes])
        return found


class StandInCaptioner:
    """Any image captioner of transformers, from a local folder."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
        self.model = model.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def caption(self, frames: np.ndarray) -> list[str]:
        inputs = self.processor(images=list(frames), return_tensors="pt").to(self.device)
        written = self.model.generate(**inputs, num_beams=3, min_length=10, max_length=30)
        return [text.strip() for text in self.processor.batch_decode(written, skip_special_tokens=True)]


def load_stand_in(kind: str, folder: Path, device: str) -> Any:
    """A stand-in from a folder of transformers weights. Raises ConfigError when the folder cannot be used."""
    if not folder.is_dir():
        raise ConfigError(f"stand-in {kind}: {folder} is not a folder")
    builder = {"detector": StandInDetector, "captioner": StandInCaptioner}[kind]
    try:
        return builder(folder, device)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"stand-in {kind}: {folder}: {str(error).splitlines()[0]:.160}") from error
