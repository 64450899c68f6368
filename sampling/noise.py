"""Where a rollout's noise comes from: seeds, one a video, or the caller; chunk by chunk, with a state to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """All randomness of a rollout."""

    def chunk(self, frames: int) -> Tensor:
        """[B, frames, C, H, W] noise a chunk starts from."""
        ...

    def fresh(self, frames: int) -> Tensor:
        """[B, frames, C, H, W] noise for re-noising."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What another source of the same kind and arguments goes on from."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another source's `state_dict`."""
        ...


class SeededNoise:
    """One generator per sample, so that a sample does not depend on the batch it is generated in."""

    def __init__(
        self, generators: list[torch.Generator], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.generators, self.shape, self.device, self.dtype = generators, shape, device, dtype

    def chunk(self, frames: int) -> Tensor:
        """[B, frames, C, H, W] the next draw of every sample's generator."""
        draws = [torch.randn(frames, *self.shape, generator=g, device=g.device) for g in self.generators]
        noise = torch.stack(draws).to(self.dtype)
        if self.device.type == "cuda" and noise.device.type == "cpu":  # from pinned memory, so that nothing waits
            return noise.pin_memory().to(self.device, non_blocking=True)
        return noise.to(self.device)

    fresh = chunk

    def state_dict(self) -> dict[str, Any]:
        """States of the generators."""
        return {"generators": [generator.get_state() for generator in self.generators]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another source's `state_dict`."""
        for generator, own in zip(self.generators, state["generators"]):
            generator.set_state(own.cpu())


class GivenNoise:
    """Noise of the whole video given by the caller, [B, F, C, H, W]; re-noising still draws."""

    def __init__(self, latents: Tensor, seeded: SeededNoise) -> None:
        self.latents, self.seeded, self.used = latents, seeded, 0

    def chunk(self, frames: int) -> Tensor:
        """The next frames of what was given."""
        self.used += frames
        return self.latents[:, self.used - frames : self.used]

    def fresh(self, frames: int) -> Tensor:
        return self.seeded.fresh(frames)

    def state_dict(self) -> dict[str, Any]:
        return {**self.seeded.state_dict(), "used": self.used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seeded.load_state_dict(state)
        self.used = state["used"]
