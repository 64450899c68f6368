"""How VBench samples frames and prepares them for its networks, exactly: resize, crop, normalise.

Shapes: frames are uint8 [F, H, W, 3]; results float32 [F, 3, h, w]. Section 3 of VBench's readers: `torchvision`
resizes tensors without antialiasing and without clamping, and PIL images with antialiasing; both are reproduced here
without torchvision.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def middle_frames(total: int, count: int) -> list[int]:
    """Indices of `count` frames, each in the middle of an equal share; the last repeats when there are too few.

    With bounds b = linspace(0, total, n + 1) truncated, n = min(count, total): index_i = (b_i + b_{i+1} - 1) // 2.
    """
    bounds = np.linspace(0, total, min(count, total) + 1).astype(int)
    picked = [int(low + high - 1) // 2 for low, high in itertools.pairwise(bounds)]
    return picked + [picked[-1]] * (count - len(picked))


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> float32 [F, 3, H, W] in 0..255."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "f h w c -> f c h w").float()


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after scaling the short side to `size`, the long side truncated to an integer."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(images - mean) / std by channel, images [F, 3, H, W]."""
    return (images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)


def resize(images: torch.Tensor, size: tuple[int, int], mode: str, *, antialias: bool = False) -> torch.Tensor:
    """Resize float [F, 3, H, W]; bicubic overshoot is kept."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode=mode, align_corners=False, antialias=antialias)


def center_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """The middle size x size of [F, 3, H, W], offsets rounded half to even."""
    top, left = (round((side - size) / 2.0) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def clip_input(frames: np.ndarray, size: int = 224) -> torch.Tensor:
    """CLIP's input from decoded frames: bicubic on floats (no antialias, no clamp), centre crop, normalise."""
    images = to_tensor(frames)
    images = resize(images, short_side_size(images.shape[-2], images.shape[-1], size), "bicubic")
    return normalize(center_crop(images, size) / 255.0, CLIP_MEAN, CLIP_STD)


def clip_input_uint8(frames: np.ndarray, size: int = 224) -> torch.Tensor:
    """CLIP's input from uint8 tensors: as `clip_input`, but the resized picture is rounded and clamped to 0..255."""
    images = to_tensor(frames)
    images = resize(images, short_side_size(images.shape[-2], images.shape[-1], size), "bicubic")
    images = images.clamp(0, 255).round()
    return normalize(center_crop(images, size) / 255.0, CLIP_MEAN, CLIP_STD)


def clip_input_pil(frames: np.ndarray, size: int = 224) -> torch.Tensor:
    """CLIP's input through PIL images: antialiased bicubic on 8-bit pixels, centre crop, normalise."""
    height, width = short_side_size(frames.shape[1], frames.shape[2], size)
    resized = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames]
    return normalize(center_crop(to_tensor(np.stack(resized)), size) / 255.0, CLIP_MEAN, CLIP_STD)


def dino_input(frames: np.ndarray, size: int = 224) -> torch.Tensor:
    """DINO's input: bilinear on floats (no antialias), short side to `size`, no crop, normalise."""
    images = to_tensor(frames)
    images = resize(images, short_side_size(images.shape[-2], images.shape[-1], size), "bilinear")
    return normalize(images / 255.0, IMAGENET_MEAN, IMAGENET_STD)


def dinov2_input(frames: np.ndarray, resize_to: int = 256, size: int = 224) -> torch.Tensor:
    """DINOv2's input: antialiased bicubic on floats (no rounding, no clamp) to 256, centre crop 224, normalise."""
    images = to_tensor(frames)
    images = resize(images, short_side_size(images.shape[-2], images.shape[-1], resize_to), "bicubic", antialias=True)
    return normalize(center_crop(images, size) / 255.0, IMAGENET_MEAN, IMAGENET_STD)


def dreamsim_input(frames: np.ndarray, size: int = 224) -> torch.Tensor:
    """DreamSim's input: antialiased bicubic on floats (no rounding, no clamp) to a square, in 0..1."""
    return resize(to_tensor(frames), (size, size), "bicubic", antialias=True) / 255.0


def musiq_input(frames: np.ndarray, longest: int = 512) -> torch.Tensor:
    """MUSIQ's input, VBench's mode "longer": long side at most `longest`, bilinear (no antialias); then / 255."""
    images = to_tensor(frames)
    height, width = images.shape[-2:]
    if max(height, width) > longest:
        scale = longest / max(height, width)
        images = resize(images, (int(height * scale), int(width * scale)), "bilinear")
    return images / 255.0
