"""Rows of a matrix as 8-bit floats (e4m3: 3 bits after the point, up to 448) with a float32 scale
for each row (Micikevicius et al. 2022, 2209.05433).

Products in training (nn/products.py) and frozen weights (nn/stored_weights.py) both use it; the
kernel in nn/fused/rounding.py computes the same in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
LEAST = (
    1e-30  # the least that counts as a row's largest element, so that rows of zeros have a scale
)


def encode_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode `x (m, k)`, its columns multiplied by `columns (k)`; return the codes `(m, k)` and the
    scales `(m, 1)`. Codes times scales differ from x by at most 2⁻⁴ of each element, or 2⁻¹⁰ of the
    row's scale where that is more. The largest element of a row becomes 448."""
    x = x.float() if columns is None else x.float() * columns
    scale = x.abs().amax(1, keepdim=True).clamp(min=LEAST) / LARGEST
    return (x / scale).to(FLOAT8), scale
