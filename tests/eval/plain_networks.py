"""Small random checkpoints under the official names, and plain functional forward passes to compare with.

The functions here share no code with `sparse_forcing.eval.vbench.networks`: they read the same tensors by name and
write the formulas out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def randomize(state: State, seed: int = 0, scale: float = 0.05) -> State:
    """Random values for every floating-point tensor; positive variances, norm weights near one."""
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for name, value in state.items():
        if not value.is_floating_point():
            new[name] = value
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            new[name] = 1 + noise.abs()
        elif "norm" in name or "ln_" in name:
            new[name] = (1 + 0.2 * noise) if name.endswith("weight") else 0.1 * noise
        else:
            new[name] = noise * (scale if value.ndim < 2 else 1.0 / math.sqrt(max(1, value[0].numel())))
    return new


def linear(x: torch.Tensor, s: State, name: str) -> torch.Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def layer_norm(x: torch.Tensor, s: State, name: str, eps: float) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, causal: bool = False) -> torch.Tensor:
    """[N, D] each; one head after the other."""
    size = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(outputs, dim=1)


def plain_dino(image: torch.Tensor, s: State, heads: int) -> torch.Tensor:
    """Class feature [D] of one image [3, H, W]."""
    kernel = s["patch_embed.proj.weight"]
    patch = kernel.shape[-1]
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    patches = image[:, : rows * patch, : columns * patch].reshape(3, rows, patch, columns, patch)
    flat = patches.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    x = flat @ kernel.flatten(1).T + s["patch_embed.proj.bias"]
    x = torch.cat([s["cls_token"][0], x])
    table = s["pos_embed"][0]
    side = math.isqrt(len(table) - 1)
    if (rows, columns) != (side, side):
        grid = table[1:].T.reshape(1, -1, side, side)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        assert grid.shape[-2:] == (rows, columns)
        table = torch.cat([table[:1], grid[0].flatten(1).T])
    x = x + table
    block = 0
    while f"blocks.{block}.norm1.weight" in s:
        p = f"blocks.{block}"
        q, k, v = linear(layer_norm(x, s, f"{p}.norm1", 1e-6), s, f"{p}.attn.qkv").chunk(3, dim=1)
        change = linear(attend(q, k, v, heads), s, f"{p}.attn.proj")
        x = x + change * s.get(f"{p}.ls1.gamma", torch.ones(()))
        hidden = linear(layer_norm(x, s, f"{p}.norm2", 1e-6), s, f"{p}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, s, f"{p}.mlp.fc2") * s.get(f"{p}.ls2.gamma", torch.ones(()))
        block += 1
    return layer_norm(x, s, "norm", 1e-6)[0]


def plain_clip_blocks(x: torch.Tensor, s: State, prefix: str, heads: int, causal: bool = False) -> torch.Tensor:
    block = 0
    while f"{prefix}resblocks.{block}.ln_1.weight" in s:
        p = f"{prefix}resblocks.{block}"
        y = layer_norm(x, s, f"{p}.ln_1", 1e-5)
        q, k, v = (y @ s[f"{p}.attn.in_proj_weight"].T + s[f"{p}.attn.in_proj_bias"]).chunk(3, dim=1)
        x = x + linear(attend(q, k, v, heads, causal), s, f"{p}.attn.out_proj")
        hidden = linear(layer_norm(x, s, f"{p}.ln_2", 1e-5), s, f"{p}.mlp.c_fc")
        x = x + linear(hidden / (1 + torch.exp(-1.702 * hidden)), s, f"{p}.mlp.c_proj")
        block += 1
    return x


def plain_text(tokens: torch.Tensor, s: State, heads: int, prefix: str = "") -> torch.Tensor:
    """Text feature [E] of ids [N]."""
    t = {name.removeprefix(prefix): value for name, value in s.items() if name.startswith(prefix)}
    x = t["token_embedding.weight"][tokens] + t["positional_embedding"][: len(tokens)]
    x = layer_norm(plain_clip_blocks(x, t, "transformer.", heads, causal=True), t, "ln_final", 1e-5)
    return x[int(tokens.argmax())] @ t["text_projection"]


def plain_clip_image(image: torch.Tensor, s: State, heads: int) -> torch.Tensor:
    """Image feature [E] of [3, R, R]."""
    kernel = s["visual.conv1.weight"]
    patches = F.unfold(image[None], kernel.shape[-1], stride=kernel.shape[-1])[0].T @ kernel.flatten(1).T
    x = torch.cat([s["visual.class_embedding"][None], patches]) + s["visual.positional_embedding"]
    x = layer_norm(x, s, "visual.ln_pre", 1e-5)
    x = plain_clip_blocks(x, s, "visual.transformer.", heads)
    return layer_norm(x, s, "visual.ln_post", 1e-5)[0] @ s["visual.proj"]


def plain_viclip_video(frames: torch.Tensor, s: State, heads: int) -> torch.Tensor:
    """Video feature [E] of [T, 3, R, R]: tokens ordered by patch, then time; one class token."""
    p = "vision_encoder."
    kernel = s[f"{p}conv1.weight"][:, :, 0]
    size = kernel.shape[-1]
    per_frame = []
    for number, frame in enumerate(frames):
        patches = F.unfold(frame[None], size, stride=size)[0].T @ kernel.flatten(1).T
        patches = patches + s[f"{p}positional_embedding"][1:] + s[f"{p}temporal_positional_embedding"][0, number]
        per_frame.append(patches)
    tokens = [s[f"{p}class_embedding"] + s[f"{p}positional_embedding"][0]]
    for patch in range(len(per_frame[0])):
        tokens += [frame[patch] for frame in per_frame]
    x = layer_norm(torch.stack(tokens), s, f"{p}ln_pre", 1e-5)
    x = plain_clip_blocks(x, s, f"{p}transformer.", heads)
    return layer_norm(x, s, f"{p}ln_post", 1e-5)[0] @ s[f"{p}proj"]


def conv(x: torch.Tensor, s: State, name: str, stride: int = 1) -> torch.Tensor:
    weight = s[f"{name}.weight"]
    padding = tuple(side // 2 for side in weight.shape[-2:])
    return F.conv2d(x, weight, s[f"{name}.bias"], stride, padding)


def raft_norm(x: torch.Tensor, s: State, name: str) -> torch.Tensor:
    if f"{name}.running_mean" not in s:  # instance norm
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()
    shape = (1, -1, 1, 1)
    scaled = (x - s[f"{name}.running_mean"].view(shape)) / (s[f"{name}.running_var"].view(shape) + 1e-5).sqrt()
    return scaled * s[f"{name}.weight"].view(shape) + s[f"{name}.bias"].view(shape)


def plain_raft_encoder(x: torch.Tensor, s: State, p: str) -> torch.Tensor:
    x = raft_norm(conv(x, s, f"{p}.conv1", 2), s, f"{p}.norm1").relu()
    for layer in (1, 2, 3):
        for block in (0, 1):
            q = f"{p}.layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = raft_norm(conv(x, s, f"{q}.conv1", stride), s, f"{q}.norm1").relu()
            y = raft_norm(conv(y, s, f"{q}.conv2"), s, f"{q}.norm2").relu()
            if stride == 2:
                weight, bias = s[f"{q}.downsample.0.weight"], s[f"{q}.downsample.0.bias"]
                x = raft_norm(F.conv2d(x, weight, bias, 2), s, f"{q}.norm3")
            x = (x + y).relu()
    return conv(x, s, f"{p}.conv2")


def bilinear_at(picture: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Values of [h, w] at points (x, y), zero outside."""
    height, width = picture.shape
    total = torch.zeros_like(x)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        i, j = y.floor().long() + row, x.floor().long() + column
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        values = picture[i.clamp(0, height - 1), j.clamp(0, width - 1)]
        total = total + inside * (1 - (x - j).abs()) * (1 - (y - i).abs()) * values
    return total


def plain_lookup(first: torch.Tensor, second: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Correlation features [4 * 81, h, w]; features [C, h, w], points [2, h, w] as (x, y); x varies slowest."""
    channels, height, width = first.shape
    out = points.new_zeros(4 * 81, height, width)
    window = torch.arange(-4, 5).to(points.dtype)
    for i in range(height):
        for j in range(width):
            volume = (first[:, i, j, None, None] * second).sum(0) / math.sqrt(channels)
            for level in range(4):
                if level:
                    volume = F.avg_pool2d(volume[None, None], 2)[0, 0]
                x = (points[0, i, j] / 2**level + window)[:, None].expand(9, 9)
                y = (points[1, i, j] / 2**level + window)[None].expand(9, 9)
                out[level * 81 : level * 81 + 81, i, j] = bilinear_at(volume, x, y).flatten()
    return out


def plain_raft(first: torch.Tensor, second: torch.Tensor, s: State, iterations: int) -> torch.Tensor:
    """Flow [2, H, W] between images [3, H, W] in 0..255."""
    a, b = first[None] / 127.5 - 1, second[None] / 127.5 - 1
    fa, fb = plain_raft_encoder(a, s, "fnet")[0], plain_raft_encoder(b, s, "fnet")[0]
    h, context = plain_raft_encoder(a, s, "cnet").chunk(2, dim=1)
    h, context = h.tanh(), context.relu()
    height, width = fa.shape[1:]
    origin = torch.stack(
        [torch.arange(width).expand(height, width), torch.arange(height)[:, None].expand(height, width)]
    )
    points = origin.to(first.dtype)
    u = "update_block"
    for _ in range(iterations):
        flow = (points - origin)[None]
        c = conv(plain_lookup(fa, fb, points)[None], s, f"{u}.encoder.convc1").relu()
        c = conv(c, s, f"{u}.encoder.convc2").relu()
        f = conv(conv(flow, s, f"{u}.encoder.convf1").relu(), s, f"{u}.encoder.convf2").relu()
        motion = conv(torch.cat([c, f], 1), s, f"{u}.encoder.conv").relu()
        x = torch.cat([context, motion, flow], 1)
        for n in "12":
            z = conv(torch.cat([h, x], 1), s, f"{u}.gru.convz{n}").sigmoid()
            r = conv(torch.cat([h, x], 1), s, f"{u}.gru.convr{n}").sigmoid()
            q = conv(torch.cat([r * h, x], 1), s, f"{u}.gru.convq{n}").tanh()
            h = (1 - z) * h + z * q
        points = points + conv(conv(h, s, f"{u}.flow_head.conv1").relu(), s, f"{u}.flow_head.conv2")[0]
    mask = 0.25 * conv(conv(h, s, f"{u}.mask.0").relu(), s, f"{u}.mask.2")[0]
    return plain_upsample(points - origin, mask)


def plain_upsample(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every fine pixel a softmax-weighted mean of the nine coarse neighbours, times eight."""
    _, height, width = flow.shape
    weights = mask.view(9, 8, 8, height, width).softmax(0)
    padded = F.pad(8 * flow, (1, 1, 1, 1))
    out = flow.new_zeros(2, 8 * height, 8 * width)
    for i in range(height):
        for j in range(width):
            around = padded[:, i : i + 3, j : j + 3].reshape(2, 9)
            fine = torch.einsum("nab,cn->cab", weights[..., i, j], around)
            out[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = fine
    return out
