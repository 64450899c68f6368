"""RAFT optical flow (Teed & Deng, arXiv 2003.12039) under the official parameter names (raft-things.pth).

Images [B, 3, H, W] in 0..255 -> flow [B, 2, H, W] in pixels (x, y). H and W must be multiples of 8 and large enough for
the coarsest correlation level to have two cells a side: with one, positions in it are divided by zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sparse_forcing.eval.vbench.networks.loading import load_into, need, read_state_dict

LEVELS, RADIUS, HIDDEN, STRIDE = 4, 4, 128, 8
SMALLEST_PADDED = STRIDE * 2**LEVELS  # pixels a side
SMALLEST = SMALLEST_PADDED - STRIDE + 1  # pixels a side that `pad_to_stride` brings to it


def _norm(kind: type[nn.Module], channels: int) -> nn.Module:
    return kind(channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; with a stride the shortcut is a 1x1 convolution and a norm of its own."""

    def __init__(self, inputs: int, channels: int, norm: type[nn.Module], stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm1, self.norm2 = _norm(norm, channels), _norm(norm, channels)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.norm3 = _norm(norm, channels)
            # The same norm under two names, as in the checkpoint.
            self.downsample = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride), self.norm3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class FeatureEncoder(nn.Module):
    """[B, 3, H, W] -> [B, outputs, H/8, W/8]."""

    def __init__(self, outputs: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = _norm(norm, 64)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        self.layer1 = self._stage(64, 64, norm, 1)
        self.layer2 = self._stage(64, 96, norm, 2)
        self.layer3 = self._stage(96, 128, norm, 2)
        self.conv2 = nn.Conv2d(128, outputs, 1)

    @staticmethod
    def _stage(inputs: int, channels: int, norm: type[nn.Module], stride: int) -> nn.Sequential:
        return nn.Sequential(ResidualBlock(inputs, channels, norm, stride), ResidualBlock(channels, channels, norm, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class MotionEncoder(nn.Module):
    """Correlation and flow -> 128 motion channels, the last two the flow itself."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(192 + 64, HIDDEN - 2, 3, padding=1)

    def forward(self, flow: torch.Tensor, correlation: torch.Tensor) -> torch.Tensor:
        c = F.relu(self.convc2(F.relu(self.convc1(correlation))))
        f = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([c, f], dim=1))), flow], dim=1)


class SeparableGRU(nn.Module):
    """A convolutional GRU, along rows and then along columns."""

    def __init__(self) -> None:
        super().__init__()
        for number, kernel, padding in ((1, (1, 5), (0, 2)), (2, (5, 1), (2, 0))):
            for gate in "zrq":
                self.add_module(f"conv{gate}{number}", nn.Conv2d(3 * HIDDEN, HIDDEN, kernel, padding=padding))

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for number in (1, 2):
            update, reset, candidate = (self.get_submodule(f"conv{gate}{number}") for gate in "zrq")
            both = torch.cat([h, x], dim=1)
            z, r = torch.sigmoid(update(both)), torch.sigmoid(reset(both))
            h = (1 - z) * h + z * torch.tanh(candidate(torch.cat([r * h, x], dim=1)))
        return h


class FlowHead(nn.Module):
    """Hidden state -> change of the flow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(HIDDEN, 256, 3, padding=1)
        self.conv2 = nn.Conv2d(256, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class UpdateBlock(nn.Module):
    """One refinement: the GRU, the change of the flow, and the mask for upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = MotionEncoder()
        self.gru = SeparableGRU()
        self.flow_head = FlowHead()
        self.mask = nn.Sequential(
            nn.Conv2d(HIDDEN, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, STRIDE * STRIDE * 9, 1)
        )

    def forward(
        self, h: torch.Tensor, context: torch.Tensor, correlation: torch.Tensor, flow: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.gru(h, torch.cat([context, self.encoder(flow, correlation)], dim=1))
        return h, self.flow_head(h)


def correlation_pyramid(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """All-pairs correlation of [B, C, h, w] features, average-pooled over the second image: [B h w, 1, h_i, w_i]."""
    channels, height = first.shape[1:3]
    volume = rearrange(first, "b c h w -> b (h w) c") @ rearrange(second, "b c h w -> b c (h w)") / channels**0.5
    pyramid = [rearrange(volume, "b l (h w) -> (b l) 1 h w", h=height)]
    for _ in range(LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2, 2))
    return pyramid


def look_up(pyramid: list[torch.Tensor], points: torch.Tensor) -> torch.Tensor:
    """Correlations around `points` [B, 2, h, w] at every level: [B, levels * (2r + 1)^2, h, w].

    In a window the x offset varies slowest: the order that the trained weights expect.
    """
    batch, _, height, _ = points.shape
    offsets = torch.linspace(-RADIUS, RADIUS, 2 * RADIUS + 1, device=points.device)
    window = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)
    centers = rearrange(points, "b xy h w -> (b h w) 1 1 xy")
    found = []
    for level, volume in enumerate(pyramid):
        size = volume.new_tensor([volume.shape[-1], volume.shape[-2]])
        grid = 2 * (centers / 2**level + window) / (size - 1) - 1
        sampled = F.grid_sample(volume, grid, align_corners=True)
        found.append(rearrange(sampled, "(b h w) 1 y x -> b (y x) h w", b=batch, h=height))
    return torch.cat(found, dim=1).contiguous()


def upsample(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, 2, h, w] -> [B, 2, 8h, 8w]: each fine pixel a convex combination of a 3x3 coarse neighbourhood."""
    weights = rearrange(mask, "b (n p q) h w -> b 1 n p q h w", n=9, p=STRIDE).softmax(dim=2)
    neighbours = F.unfold(STRIDE * flow, 3, padding=1)
    neighbours = rearrange(neighbours, "b (xy n) (h w) -> b xy n 1 1 h w", n=9, h=flow.shape[2])
    return rearrange((weights * neighbours).sum(dim=2), "b xy p q h w -> b xy (h p) (w q)")


class Raft(nn.Module):
    """The full model (not the small one)."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = FeatureEncoder(256, nn.InstanceNorm2d)
        self.cnet = FeatureEncoder(2 * HIDDEN, nn.BatchNorm2d)
        self.update_block = UpdateBlock()

    def forward(self, first: torch.Tensor, second: torch.Tensor, iterations: int = 20) -> torch.Tensor:
        if min(first.shape[-2:]) < SMALLEST_PADDED:
            raise ValueError(f"pictures of {list(first.shape[-2:])} pixels; RAFT needs {SMALLEST_PADDED} a side")
        first, second = 2 * first / 255 - 1, 2 * second / 255 - 1
        pyramid = correlation_pyramid(*self.fnet(torch.cat([first, second])).chunk(2))
        hidden, context = self.cnet(first).split(HIDDEN, dim=1)
        hidden, context = hidden.tanh(), context.relu()
        height, width = hidden.shape[-2:]
        rows, columns = torch.meshgrid(
            torch.arange(height, device=first.device), torch.arange(width, device=first.device), indexing="ij"
        )
        origin = torch.stack([columns, rows]).to(first.dtype).expand(len(first), -1, -1, -1)
        points = origin
        for _ in range(iterations):
            hidden, change = self.update_block(hidden, context, look_up(pyramid, points), points - origin)
            points = points + change
        return upsample(points - origin, 0.25 * self.update_block.mask(hidden))


def load_raft(path: Path) -> Raft:
    """Load RAFT from raft-things.pth. Raises WeightsError."""
    state = read_state_dict(path)
    need(state, "update_block.gru.convz1.weight", path)
    network = Raft()
    load_into(network, state, path)
    return network


def pad_to_stride(images: torch.Tensor) -> torch.Tensor:
    """Replicate borders so that both sides are multiples of 8, half on each side."""
    high, wide = (-side % STRIDE for side in images.shape[-2:])
    return F.pad(images, [wide // 2, wide - wide // 2, high // 2, high - high // 2], mode="replicate")
