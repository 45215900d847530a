"""Random draws that are pure functions of `(seed, purpose, step, index in the global batch)`.

A counter-based generator: each number is a hash of its key and its position (splitmix64, Steele et
al. 2014), computed with tensor operations. Nothing needs saving to resume, a rank draws only its
own samples, and the device does not matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def key(*parts: object) -> int:
    """Return a signed 64-bit integer made of any printable parts. It is the same in every process,
    on every platform and in every version."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator for draws that concern the whole run or step (initial weights, the
    order of an epoch)."""
    return torch.Generator().manual_seed(key(*parts) & 0x7FFF_FFFF_FFFF_FFFF)


def uniform(*parts: object) -> float:
    """Return a number in [0, 1), made of the highest 53 bits of the key of `parts`."""
    unsigned = key(*parts) % (1 << 64)
    return (unsigned >> 11) * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # A logical shift: the shift of int64 is arithmetic and copies the sign.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


@dataclass(frozen=True)
class Draws:
    """Keyed draws for the samples `indices (B,)` of one step's global batch. `seed`: one for all
    samples, or a tuple with one for each. Draws of one number a sample (an empty `shape`) are made
    on the device of `indices`, in training the CPU, since launching their fifty kernels on a GPU
    takes longer. Draws with a shape are made on `device`, or where `indices` lie if it is None.
    `keys`: the key of every purpose, which then replaces seed and step; a CUDA graph reads them
    from a tensor."""

    seed: int | tuple[int, ...]
    step: int
    indices: Tensor
    device: torch.device | None = field(default=None, kw_only=True)
    keys: Mapping[str, int | Tensor] | None = field(default=None, kw_only=True)

    @staticmethod
    def of(seed: int, step: int, count: int, device: torch.device | str = "cpu") -> Draws:
        return Draws(seed, step, torch.arange(count, device=device))

    def _keys(self, purpose: str) -> int | Tensor:
        """Return the key of a purpose, or one for each sample."""
        if self.keys is not None:
            return self.keys[purpose]
        if isinstance(self.seed, int):
            return key(self.seed, purpose, self.step)
        each = [key(seed, purpose, self.step) for seed in self.seed]
        return torch.tensor(each, dtype=torch.int64, device=self.indices.device)

    def bits(self, purpose: str, *shape: int) -> Tensor:
        """Return int64 `(B, *shape)`, uniform over all 64-bit patterns."""
        keys = self._keys(purpose)
        rows = _mix(_mix(self.indices.long() * _GOLDEN + keys))
        if shape and self.device is not None:
            rows = rows.to(self.device, non_blocking=True)
        count = math.prod(shape)
        columns = torch.arange(1, count + 1, device=rows.device) * _GOLDEN
        return _mix(rows[:, None] + columns).reshape(len(rows), *shape)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Return float32 `(B, *shape)` in [0, 1), in steps of 2⁻²⁴."""
        return _shift_right(self.bits(purpose, *shape), 40).float() * 2.0**-24

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Return float32 `(B, *shape)`, standard normal (Box-Muller on the two halves of 64
        bits)."""
        bits = self.bits(purpose, *shape)
        radius = torch.sqrt(-2.0 * torch.log((_shift_right(bits, 32).double() + 0.5) * 2.0**-32))
        angle = (bits & 0xFFFF_FFFF).double() * (2.0**-32 * 2.0 * math.pi)
        return (radius * torch.cos(angle)).float()

    def __getitem__(self, index) -> Draws:
        assert isinstance(self.seed, int), "training has one seed"
        return replace(self, indices=self.indices[index])
