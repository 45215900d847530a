"""The position-wise network of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.nn import kernels
from mmdit.nn.products import joinable, joined


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) · up(x))` (Shazeer 2020), two thirds as wide as a GELU network of the
    same cost."""

    def __init__(
        self, dim: int, ratio: float, dropout: float = 0.0, linear: type[nn.Linear] = nn.Linear
    ):
        super().__init__()
        hidden = self.hidden(dim, ratio)
        self.gate = linear(dim, hidden, bias=False)
        self.up = linear(dim, hidden, bias=False)
        self.down = linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @staticmethod
    def hidden(dim: int, ratio: float) -> int:
        multiple = 64 if dim >= 256 else 8  # widths that matrix units like
        return max(multiple, round(2 / 3 * ratio * dim / multiple) * multiple)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.can_run(x) and joinable(x, self.gate, self.up):
            both = joined(x, self.gate, self.up, apart=True)
            return self.dropout(self.down(kernels.swiglu.swiglu(both)))
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class GELU(nn.Module):
    """`down(gelu(up(x)))` (Vaswani et al. 2017 with Hendrycks & Gimpel 2016, tanh form)."""

    def __init__(
        self, dim: int, ratio: float, dropout: float = 0.0, linear: type[nn.Linear] = nn.Linear
    ):
        super().__init__()
        hidden = self.hidden(dim, ratio)
        self.up = linear(dim, hidden, bias=False)
        self.down = linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @staticmethod
    def hidden(dim: int, ratio: float) -> int:
        return max(8, round(ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))
