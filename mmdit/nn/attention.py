"""Attention in space, in time and to text; the only call to a fused attention kernel.

Axes: b sample · f frame · n window · k place in the window · t text token · l any token · h head ·
d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.nn import kernels
from mmdit.nn.norm import RMSNorm
from mmdit.nn.position import Rotary, rotate
from mmdit.nn.products import joinable, joined
from mmdit.nn.tiles import WIDEST, Frames, Tiles
from mmdit.nn.window import Places, gather

observers: list[
    Callable[[Tensor, Tensor, Tensor | None], None]
] = []  # called with queries, keys and mask (diagnostics.attention_statistics)
GRID_LIMIT = 65_535  # CUDA's bound on the grid axes that the fused kernels give to batch and heads


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return softmax attention `(b, h, l, d)`. `q (b, h, l, d)`, `k`, `v (b, h, m, d)`; `valid`:
    bool broadcastable to `(b, h, l, m)`, True = attend (every query needs one valid key), or a bias
    on the logits."""
    for observer in observers:
        observer(q, k, valid)
    for axis in (0, 1):
        if q.shape[axis] > GRID_LIMIT:
            masks: Iterable[Tensor | None] = repeat(valid)
            if valid is not None and valid.shape[axis] > 1:
                masks = valid.split(GRID_LIMIT, axis)
            parts = zip(*(z.split(GRID_LIMIT, axis) for z in (q, k, v)), masks, strict=False)
            return torch.cat([attend(*part) for part in parts], axis)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid)


def gains_of(*norms: nn.Module) -> list[Tensor]:
    """Return the weights of the norms; none where queries and keys are not normed."""
    return [norm.weight for norm in norms if isinstance(norm, RMSNorm)]


class HeadedAttention(nn.Module):
    """Base of the layers that call `attend` with `num_heads` heads, or a multiple of them;
    observers look for this class."""

    num_heads: int


class Attention(HeadedAttention):
    """Separate linears `q`, `k`, `v`, `proj` (adapters find them by name), norms of queries and
    keys per head (Dehghani et al. 2023), dropout on what is added to the residual stream. `linear`:
    the class of the linears."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: bool = True,
        dropout: float = 0.0,
        linear: type[nn.Linear] = nn.Linear,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.q = linear(dim, dim, bias=False)
        self.k = linear(dim, dim, bias=False)
        self.v = linear(dim, dim, bias=False)
        self.proj = linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def heads(
        self, queries: Tensor, keys: Tensor, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each `(…, h, d)`. Norms and rotation are computed in at
        least float32; the results have the type of the values."""
        q, k, v = self.q(queries), self.k(keys), self.v(keys)
        q, k, v = (rearrange(z, "... (h d) -> ... h d", h=self.num_heads) for z in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q.to(v.dtype), k.to(v.dtype), v

    def fuses(self, x: Tensor) -> bool:
        return (
            kernels.can_run(x) and x.shape[-1] // self.num_heads in (32, 64, 128) and not observers
        )

    def side_by_side(self, x: Tensor) -> Tensor:
        """Return queries, keys and values of `x (…, h·d)`, `(…, 3·h·d)`."""
        layers = (self.q, self.k, self.v)
        if joinable(x, *layers):
            return joined(x, *layers)
        return torch.cat([layer(x) for layer in layers], -1)

    def grouped(self, x: Tensor, tiles: Tiles) -> Tensor:
        """Return `x (…, t, h·d)` after attention within the groups of `tiles`."""
        qkv, gains = self.side_by_side(x), gains_of(self.q_norm, self.k_norm)
        return kernels.attention.group_attention(qkv, gains, *tiles, self.num_heads)

    def self_attention_heads(
        self, x: Tensor, rotary: Rotary | None, token_axis: int
    ) -> list[Tensor]:
        """Return `heads(x, x, rotary)` for `x (…, h·d)`, computed by one kernel where it can run.
        The axes of `x` from `token_axis` to the last but one number the tokens of a group. They are
        cut into as many equal runs as `rotary` has rows, and the tokens of a run share its row."""
        if not self.fuses(x):
            return list(self.heads(x, x, rotary))
        turns = [] if rotary is None else [table.flatten(0, -2) for table in rotary]
        parts = kernels.heads.split_heads(
            self.side_by_side(x.flatten(token_axis, -2)),
            gains_of(self.q_norm, self.k_norm),
            turns,
            self.num_heads,
        )
        return [part.view(*x.shape[:-1], self.num_heads, -1) for part in parts]

    def output(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(x))


class SpatialAttention(Attention):
    """Attend within the windows of each frame (Swin, Liu et al. 2021, without wrap-round), or
    within whole frames; never to padding."""

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """Map `x (b, f, n, k, h·d)` to the same shape."""
        b, f = x.shape[:2]
        if places.tiles is not None and self.fuses(x):
            return self.output(self.grouped(x.flatten(0, 1).flatten(1, 2), places.tiles)).view_as(x)
        x = gather(x, places)
        parts = self.self_attention_heads(x, places.rotary, 3)
        if places.same is None:
            q, k, v = (rearrange(z, "b f g m h d -> (b f g) h m d") for z in parts)
            x = rearrange(attend(q, k, v), "(b f g) h m d -> b f g m (h d)", b=b, f=f)
        else:  # groups first, so that every sample, frame and head shares the mask of a group
            q, k, v = (rearrange(z, "b f g m h d -> g (b f h) m d") for z in parts)
            x = attend(q, k, v, places.same[:, None])
            x = rearrange(x, "g (b f h) m d -> b f g m (h d)", b=b, f=f)
        return gather(self.output(x), places, back=True)


class TemporalAttention(Attention):
    """Attend along time at each place, every frame to every frame."""

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """Return attention along time for `x (b, f, n, k, h·d)`, in the same shape. Without rotary
        tables it does not depend on the order of frames. If processes share the clip, `x` holds the
        frames of this process alone."""
        if frames.share is None:
            return self.along_time(x, frames)
        n, k = x.shape[2:4]
        seen = frames.share.to_whole(x.flatten(2, 3), 1, 2)
        seen = self.along_time(seen.unsqueeze(2), frames).squeeze(2)
        return frames.share.to_part(seen, 1, 2, n * k).unflatten(2, (n, k))

    def along_time(self, x: Tensor, frames: Frames) -> Tensor:
        """Return what `forward` does, for `x` with all frames of the clip."""
        n, k = x.shape[2:4]
        if frames.tiles is not None and self.fuses(x):
            return self.output(self.grouped(x.flatten(1, 3), frames.tiles)).view_as(x)
        parts = self.self_attention_heads(x, frames.rotary, 1)
        # Places count as further heads, so that tokens are read in the layout they have, without a
        # copy.
        parts = [rearrange(z, "b f n k h d -> b (n k h) f d") for z in parts]
        return self.output(rearrange(attend(*parts), "b (n k h) f d -> b f n k (h d)", n=n, k=k))


class CrossAttention(Attention):
    """Attend to the text tokens of the sample."""

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed keys and the values of `text (b, t, h·d)`, each shaped like it: all
        that depends on the text alone."""
        k, v = self.k(text), self.v(text)
        return self._normed(self.k_norm, k, v.dtype), v

    def _normed(self, norm: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        return norm(x.unflatten(-1, (self.num_heads, -1))).flatten(-2).to(dtype)

    def forward(self, x: Tensor, text: Tensor | tuple[Tensor, Tensor], valid: Tensor) -> Tensor:
        """Return attention from `x (b, f, n, k, h·d)` to `text (b, t, h·d)`, or to its
        `keys_values`, shaped like `x`. `valid (b, t)`: bool, with a valid token in every row."""
        queries, (keys, values) = (
            self.q(x.flatten(1, 3)),
            text if isinstance(text, tuple) else self.keys_values(text),
        )
        if keys.shape[1] <= WIDEST and self.fuses(x):
            gains = gains_of(self.q_norm)
            return self.output(
                kernels.attention.text_attention(
                    queries, keys, values, valid, gains, self.num_heads
                )
            ).view_as(x)
        queries = self._normed(self.q_norm, queries, values.dtype)
        q, k, v = (
            rearrange(z, "b l (h d) -> b h l d", h=self.num_heads) for z in (queries, keys, values)
        )
        read = attend(q, k, v, valid[:, None, None])
        return self.output(rearrange(read, "b h l d -> b l (h d)")).view_as(x)
