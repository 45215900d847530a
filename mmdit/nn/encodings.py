"""Matrices in fewer bits: codes, and scales that they are multiplied by.

float8   e4m3 with a scale for each row (nn/float8.py)
int8     whole numbers up to 127 with a scale for each row
nf4      4-bit NormalFloat (Dettmers et al. 2023, 2305.14314): the nearest of 16 quantiles of a
         normal distribution, two in a byte, with a scale for each 64 elements of a row
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.nn.float8 import FLOAT8, LEAST, encode_rows

BLOCK = 64  # elements of a row that share a scale in nf4
WHOLE = 127  # the largest code of int8


@dataclass(frozen=True)
class Encoding:
    """Turn a matrix `(out, in)` into codes `(out, in / per_code)` of the type `dtype` and float32
    scales `(out, …)`. `encode(weight)` returns both; `decode(codes, scales, dtype)` returns their
    product, rounded once."""

    dtype: torch.dtype
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    per_code: int = 1


def decode_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes times the scales `(out, 1)` of their rows; 8-bit codes are exact in any
    `dtype`."""
    return codes.to(dtype, copy=True).mul_(scale)


def encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales; the largest element of a row becomes 127 or -127."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=LEAST) / WHOLE
    return (weight / scale).round().to(torch.int8), scale


# The 16 numbers of nf4 as its authors published them: 7 quantiles below zero, zero, and 8 above it,
# evenly spaced in probability on each side and scaled to end at -1 and 1.
QUANTILES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def encode_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes `(out, in / 2)` and scales `(out, in / 64)`, rounded up: the last block of a row
    may be shorter. ValueError if the number of columns is odd."""
    columns = weight.shape[1]
    if columns % 2:
        raise ValueError(f"nf4 puts two columns into a byte, but a matrix has {columns} columns")
    blocks = F.pad(weight.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(2).clamp(min=LEAST)
    relative = (blocks / scale[..., None]).flatten(1)[:, :columns]
    nearest = torch.zeros_like(relative, dtype=torch.uint8)
    for low, high in pairwise(QUANTILES):  # on a CPU thrice as fast as torch.bucketize
        nearest += (relative > (low + high) / 2).view(torch.uint8)
    first, second = nearest.unflatten(1, (-1, 2)).unbind(2)
    return first << 4 | second, scale


def quantile_pairs(device: torch.device) -> Tensor:
    """Return the two numbers `(256, 2)` that each byte stands for. They are made anew, from Python
    numbers, for each product: a product that is compiled, or whose memory is planned, must not use
    a tensor from outside."""
    byte = torch.arange(256, device=device)
    halves = torch.stack([byte >> 4, byte & 15], 1)  # the high one is first
    pairs = halves.float()
    for code, quantile in enumerate(QUANTILES):
        pairs = pairs.masked_fill(halves == code, quantile)
    return pairs


def decode_nf4(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(out, in)`: the product of quantiles and scales in float32, rounded to `dtype`."""
    values = F.embedding(codes.int(), quantile_pairs(codes.device)).flatten(1)
    whole = values.shape[1] // BLOCK
    blocks, rest = values[:, : whole * BLOCK], values[:, whole * BLOCK :]
    blocks.unflatten(1, (whole, BLOCK)).mul_(scale[:, :whole, None])
    if rest.shape[1]:
        rest.mul_(scale[:, whole:])
    return values.to(dtype)


ENCODINGS = {
    "float8": Encoding(FLOAT8, encode_rows, decode_rows),
    "int8": Encoding(torch.int8, encode_int8, decode_rows),
    "nf4": Encoding(torch.uint8, encode_nf4, decode_nf4, per_code=2),
}
OF_CODES = {encoding.dtype: encoding for encoding in ENCODINGS.values()}
