"""The networks of an evaluation: built on first use from the user's weight files, never downloaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.errors import ConfigError, MeasurementError
from sparse_forcing.eval.measuring.failures import shorten
from sparse_forcing.eval.vbench.networks import efficientnet, tokenizer
from sparse_forcing.files import sha256_file

WEIGHT_FILES = {
    "dino": "dino_vitbase16_pretrain.pth",
    "dinov2": "dinov2_vitb14_pretrain.pth",
    "clip_b32": "ViT-B-32.pt",
    "clip_l14": "ViT-L-14.pt",
    "aesthetic_head": "sa_0_4_vit_l_14_linear.pth",
    "raft": "raft-things.pth",
    "viclip": "ViClip-InternVid-10M-FLT.pth",
    "musiq": "musiq_spaq_ckpt-358bb6af.pth",
    "tokenizer": "bpe_simple_vocab_16e6.txt.gz",
}
PLUGINS = {
    "interpolator": "a callable (frame0, frame1 [1, 3, H, W] in 0..1) -> the frame between them, such as AMT-S",
    "dreamsim": "a callable (images [B, 3, 224, 224] in 0..1) -> features [B, E]",
    "detector": "a Detector of sparse_forcing.eval.vbench.semantic",
    "captioner": "a Captioner of sparse_forcing.eval.vbench.semantic",
    "actions": "a callable (frames uint8 [16, H, W, 3]) -> {action label: score}",
}


def _builders() -> dict[str, Callable[[Path], Any]]:
    from sparse_forcing.eval.vbench.networks import aesthetic, clip, dino, musiq, raft, viclip

    return {
        "dino": dino.load_dino,
        "dinov2": dino.load_dino,
        "clip_b32": clip.load_clip,
        "clip_l14": clip.load_clip,
        "aesthetic_head": aesthetic.load_aesthetic_head,
        "raft": raft.load_raft,
        "viclip": viclip.load_viclip,
        "musiq": musiq.load_musiq,
        "tokenizer": tokenizer.ClipTokenizer,
    }


@dataclass(kw_only=True)
class Resources:
    """Networks by name. `networks` may hold ready-made ones (tests, notebooks); the rest comes from files and plugins.

    weights: folder searched (with subfolders) for the official file names; default the VBENCH_CACHE_DIR variable.
    plugins: name -> "module:function"; the function takes the device and returns what `PLUGINS` describes.
    stand_ins: name -> folder of a transformers model, used for `detector` and `captioner` and marked as a stand-in.
    """

    weights: Path | None = None
    device: str = "cpu"
    mode: str = "strict"
    plugins: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in self.plugins:
            if name not in PLUGINS:
                raise ConfigError(f"plugin {name!r} is unknown; known are {', '.join(PLUGINS)}")
        for name in self.stand_ins:
            if name not in ("detector", "captioner"):
                raise ConfigError(f"stand-in {name!r} is unknown; known are detector, captioner")
        if self.weights is not None and not self.weights.is_dir():
            raise ConfigError(f"{self.weights}: no such folder of weights")
        self._files = find_weight_files(self.weights)

    @property
    def compatible(self) -> bool:
        """Whether VBench's quirks are kept."""
        return self.mode == "vbench-compatible"

    def missing(self, name: str) -> str | None:
        """Why a network cannot be used, or None."""
        if name == "musiq" and name in self._files and importlib.util.find_spec("pyiqa") is None:
            return "needs the package pyiqa (non-commercial licence)"
        if name == "tokenizer" and name in self._files and (reason := tokenizer.missing()):
            return reason
        if name in self.networks or name in self._files or name in self.plugins or name in self.stand_ins:
            return None
        if name in WEIGHT_FILES:
            return f"needs {WEIGHT_FILES[name]} in the weights folder"
        if name == "efficientnet":
            return efficientnet.missing()
        return f"needs the plugin {name}: {PLUGINS[name]}"

    def network(self, name: str) -> Any:
        """A network, loaded on first use. Raises WeightsError or ConfigError when it cannot be."""
        if name not in self.networks:
            if name in self.plugins:
                self.networks[name] = _load_plugin(self.plugins[name], self.device)
            elif name in self.stand_ins:
                from sparse_forcing.eval.vbench.semantic import load_stand_in

                self.networks[name] = load_stand_in(name, Path(self.stand_ins[name]), self.device)
            elif name == "efficientnet" and self.missing(name) is None:
                self.networks[name] = efficientnet.load_efficientnet().to(self.device)
            elif name in self._files:
                network = _builders()[name](self._files[name])
                self.networks[name] = network.to(self.device) if isinstance(network, torch.nn.Module) else network
            else:
                raise ConfigError(f"{name}: {self.missing(name)}")
        return self.networks[name]

    def fingerprint(self, name: str) -> str:
        """What identifies a network in cache keys and reports: the sha256 of its file, or its plugin's name."""
        if name not in self._fingerprints:
            if name in self.plugins:
                mark = f"plugin {self.plugins[name]}"
            elif name in self.stand_ins:
                mark = f"stand-in {self.stand_ins[name]}"
            elif name == "efficientnet" and efficientnet.missing() is None:
                mark = sha256_file(efficientnet.weights_path())
            else:
                mark = sha256_file(self._files[name]) if name in self._files else _hash_given(self.networks[name])
            self._fingerprints[name] = mark
        return self._fingerprints[name]

    def features(self, name: str, images: torch.Tensor, call: Callable[[Any, torch.Tensor], torch.Tensor]) -> Any:
        """call(network, images on its device) without gradients, as a float32 array on the CPU.

        Raises MeasurementError when some of it is NaN or infinite: no score may be made of that.
        """
        with torch.inference_mode():
            found = call(self.network(name), images.to(self.device)).float().cpu()
        if not bool(found.isfinite().all()):
            raise MeasurementError(f"the network {name} answered with numbers that are not finite")
        return found.numpy()


def _hash_given(network: Any) -> str:
    """A network handed over in memory: by its parameters, so that equal ones share cached features."""
    if not isinstance(network, torch.nn.Module):
        return f"given {type(network).__qualname__} {id(network)}"
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return f"given {digest.hexdigest()}"


def find_weight_files(folder: Path | None) -> dict[str, Path]:
    """The official weight files by their networks' names, below a folder or else the VBENCH_CACHE_DIR variable's."""
    if folder is None and "VBENCH_CACHE_DIR" in os.environ:
        folder = Path(os.environ["VBENCH_CACHE_DIR"])
    if folder is None or not folder.is_dir():
        return {}
    wanted = {file: name for name, file in WEIGHT_FILES.items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = wanted.get(path.name) or wanted.get(path.with_suffix("").name + ".pth" * (path.suffix == ".safetensors"))
        if name is not None and path.is_file():
            found.setdefault(name, path)
    return found


def _load_plugin(target: str, device: str) -> Any:
    module, _, attribute = target.partition(":")
    if not (module and attribute) or module.startswith("."):
        raise ConfigError(f"plugin {target!r}: expected module:function")
    try:
        return getattr(importlib.import_module(module), attribute)(device)
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(f"plugin {target!r}: {shorten(f'{type(error).__name__}: {error}')}") from error
