"""Rotary positions on the patch grid, in bfloat16 as the released weights were trained with them.

The rounding is part of the model: a float32 table moves the latents of a random network by 1e-3.
Every rounding is therefore written out, and the table is made on the CPU, so that all devices see
the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Table = tuple[Tensor, Tensor]  # sin, cos: each (h * w, head width), bfloat16


def _round(x: Tensor) -> Tensor:
    """Return `x` rounded to the nearest bfloat16, as float32 for the next operation."""
    return x.bfloat16().float()


def _coordinates(length: int) -> Tensor:
    """Return the centres of `length` patches along one axis, spread over (-1, 1) for any length."""
    centre = _round(torch.arange(length, dtype=torch.float32, device="cpu") + 0.5)
    return _round(_round(centre / length) * 2 - 1)


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate the last h·w tokens of `x (…, n, d)` by half-split rotation; the tokens before them
    (the class token) are not rotated.

    All of `x`, the class token included, is rounded to bfloat16 on the way; the result has the
    dtype of `x`.
    """
    sin, cos = (half.chunk(2, dim=-1) for half in table)
    prefix = x.shape[-2] - len(table[0])
    low = x.to(torch.bfloat16)
    first, second = low[..., prefix:, :].chunk(2, dim=-1)
    turned = (first * cos[0] - second * sin[0], second * cos[1] + first * sin[1])
    # float16 autocast refuses to join bfloat16
    rotated = torch.cat([half.to(x.dtype) for half in turned], dim=-1)
    return torch.cat((low[..., :prefix, :].to(x.dtype), rotated), dim=-2) if prefix else rotated


class RotaryEmbedding(nn.Module):
    """Tables of sin and cos for any grid; half of the angles come from the row, half from the
    column.

    head_dim: width of an attention head, a multiple of 4. The buffer `periods` stays bfloat16
    through `.float()`, `.half()` and loading (in the public release, `.float()` silently changes
    the positions).
    """

    def __init__(self, head_dim: int):
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                f"rotary positions need a head width divisible by 4, got {head_dim}; change"
                " embed_dim or num_heads"
            )
        # On the meta device torch.arange would import the compiler, which takes a second at every
        # start.
        steps = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device="cpu")
        periods = (100.0 ** _round(steps / (head_dim // 2))).bfloat16()
        self.register_buffer("periods", periods.to(torch.get_default_device()))
        self._tables: dict[tuple, Table] = {}

    def forward(self, h: int, w: int) -> Table:
        """Return (sin, cos) for a grid of h rows and w columns on the device of the module. The
        tables are cached by grid and device."""
        # under torch.compile, the length of a range turns a symbolic size into an integer
        return self._constant(len(range(h)), len(range(w)))

    def _constant(self, h: int, w: int) -> Table:
        where = (h, w, self.periods.device)
        if where not in self._tables:
            # a table made during sampling is used in training, too
            with torch.inference_mode(False), torch.no_grad():
                self._tables[where] = self._table(h, w)
        return self._tables[where]

    # A compiler would fuse the roundings away. torch.compiler.assume_constant_result sets the same
    # mark, but imports the compiler, which takes a second at the start of every command.
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _table(self, h: int, w: int) -> Table:
        periods = self.periods.cpu().float()
        rows, columns = (
            _round(2 * math.pi * _coordinates(length))[:, None] / periods for length in (h, w)
        )
        grid = torch.cat((rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)), dim=-1)
        angles = _round(grid).reshape(h * w, -1).repeat(1, 2)
        device = self.periods.device
        return angles.sin().bfloat16().to(device), angles.cos().bfloat16().to(device)

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        self.periods = self.periods.bfloat16()
        self._tables.clear()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._tables.clear()
