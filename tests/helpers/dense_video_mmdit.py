"""A second implementation of the Video MMDiT for the tests: dense attention over all tokens of a
frame under explicit masks, complex-number rotary, no window layout. Slow and plain on purpose.
Axes: b sample · f frame · s place · d width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange


def windows_along(size: int, window: int, shifted: bool) -> tuple[list[int], int]:
    """The window every index of an axis lies in, and the window's extent."""
    count = math.ceil(size / window)
    extent = math.ceil(size / count)
    first = extent // 2 if shifted and count > 1 else 0  # the first window's end, when shifted
    return [(i - first) // extent if first else i // extent for i in range(size)], extent


def visible(rows: int, columns: int, window: int, pattern: str) -> torch.Tensor:
    """`(s, s)` bool from the definition: the whole frame, or equal window along both axes."""
    if pattern == "frame":
        return torch.ones(rows * columns, rows * columns, dtype=torch.bool)
    down, across = (
        windows_along(size, window, pattern == "shifted")[0] for size in (rows, columns)
    )
    names = [(down[r], across[c]) for r in range(rows) for c in range(columns)]
    return torch.tensor([[a == b for b in names] for a in names])


def turn(x, positions, base):
    """Rotary by complex numbers; `x (…, s, d)`, one list of positions `(s,)` per axis."""
    pairs = x.shape[-1] // 2
    per_axis = pairs // len(positions)
    frequencies = base ** (-torch.arange(per_axis, dtype=x.dtype) / per_axis)
    angles = torch.cat(
        [torch.as_tensor(p, dtype=x.dtype)[:, None] * frequencies for p in positions], dim=-1
    )
    z = torch.complex(x[..., :pairs], x[..., pairs:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def norm(x, weight=None):
    x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return x if weight is None else x * weight


def attention(layer, queries, keys, allowed, positions=(), base=1.0):
    """`queries (…, s, d)`, `keys (…, m, d)`, `allowed` broadcastable to `(…, heads, s, m)`."""
    q, k, v = layer.q(queries), layer.k(keys), layer.v(keys)
    q, k, v = (rearrange(z, "... s (h d) -> ... h s d", h=layer.num_heads) for z in (q, k, v))
    if hasattr(layer.q_norm, "weight"):
        q, k = norm(q, layer.q_norm.weight), norm(k, layer.k_norm.weight)
    if positions:
        q, k = turn(q, positions, base), turn(k, positions, base)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -math.inf)
    return layer.proj(rearrange(scores.softmax(dim=-1) @ v, "... h s d -> ... s (h d)"))


def block(layer, x, modulation, text, valid, grid, window, pattern, moments, subset):
    """`moments`: the positions of the frames in time; none for a set. `subset`: the tokens of a
    frame that are present, as indices into row-major order."""
    rows, columns = grid
    parts = [p[:, None, None] for p in (modulation + layer.table).unbind(dim=1)]

    def entered(i):
        return norm(x) * (1 + parts[3 * i + 1]) + parts[3 * i]

    h = entered(0)
    places = [subset // columns, subset % columns]
    allowed = visible(rows, columns, window, pattern)[subset][:, subset]
    x = x + parts[2] * attention(layer.spatial, h, h, allowed, places, 100.0)
    if x.shape[1] > 1:
        h = entered(1).transpose(1, 2)
        positions = [moments] if moments else []
        x = x + parts[5] * attention(
            layer.temporal, h, h, torch.tensor(True), positions, 1000.0
        ).transpose(1, 2)
    h = entered(2)
    x = x + parts[8] * attention(layer.cross, h, text[:, None], valid[:, None, None, None])
    h = entered(3)
    mlp = layer.mlp
    if hasattr(mlp, "gate"):
        change = mlp.down(F.silu(mlp.gate(h)) * mlp.up(h))
    else:
        change = mlp.down(F.gelu(mlp.up(h), approximate="tanh"))
    return x + parts[11] * change


def dense_forward(model, x, t, text, keep=None):
    """What `model(x, t, text, keep)` must give. `keep` as places `(row, column)` within the window,
    a set."""
    config, (rows, columns) = model.config, x.shape[2:4]
    condition = model.time(t)
    if model.pooled is not None:
        embedded = model.text.embed(norm(text.embeddings, model.text.norm.weight))
        pooled = [
            model.pooled.mlp(e[v].mean(dim=0)) if v.any() else model.pooled.null
            for e, v in zip(embedded, text.valid)
        ]
        condition = condition + torch.stack(pooled)
    condition = F.silu(condition)
    modulation = model.modulation(condition).unflatten(1, (12, config.dim))
    shift, scale = model.final_modulation(condition)[:, None, None].chunk(2, dim=-1)
    tokens = model.text.embed(norm(text.embeddings, model.text.norm.weight))
    tokens = torch.cat([model.text.null.expand(len(x), 1, -1), tokens], dim=1)
    valid = torch.cat([torch.ones(len(x), 1, dtype=torch.bool), text.valid], dim=1)
    where = torch.tensor(
        [
            [(2 * r + 1) / rows - 1, (2 * c + 1) / columns - 1]
            for r in range(rows)
            for c in range(columns)
        ],
        dtype=x.dtype,
    )
    h = model.input(rearrange(x, "b f r c d -> b f (r c) d")) + model.position(where)
    moments = []
    if config.temporal_position:
        moments = [config.frame_step * f for f in range(x.shape[1])]
        turned = [[f * 1000.0 ** (-i / 16) for i in range(16)] for f in moments]
        features = [[math.sin(a) for a in row] + [1 - math.cos(a) for a in row] for row in turned]
        features = torch.tensor(features, dtype=x.dtype)
        h = h + (features @ model.frame.embed.weight.T)[:, None]
        if config.joint_position:
            slow = [
                [
                    part(math.pi / 2 * 2**o * at)
                    for part in (math.sin, math.cos)
                    for at in place
                    for o in (0, 1)
                ]
                for place in where.tolist()
            ]
            products = torch.tensor(slow, dtype=x.dtype)[:, :, None] * features[:, None, None]
            h = h + products.flatten(-2) @ model.joint_position.embed.weight.T
    everything = torch.arange(rows * columns)
    subset = everything
    if keep is not None:
        height, width = (windows_along(n, config.window_size, False)[1] for n in (rows, columns))
        subset = torch.tensor(
            [i for i in everything.tolist() if (i // columns % height, i % columns % width) in keep]
        )
    first, end = model.span if keep is not None else (0, 0)
    before = h
    for index, layer in enumerate(model.blocks):
        routed = first <= index < end
        if index == first:
            before = h
        present = subset if routed else everything
        out = block(
            layer,
            h[:, :, present],
            modulation,
            tokens,
            valid,
            (rows, columns),
            config.window_size,
            config.pattern(index),
            moments,
            present,
        )
        h = h.index_copy(2, present, out)
        if index == end - 1 and keep is not None and model.tread.rescale:
            h = before + (h - before) * (height * width / len(keep))
    h = model.output(norm(h) * (1 + scale) + shift)
    return rearrange(h, "b f (r c) d -> b f r c d", r=rows)
