"""Latents on their way into a cache: as float16 on the CPU, copied while the GPU computes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Return the CUDA stream on which latents are copied, beside the one that computes."""
    return torch.cuda.Stream(device)


class HalfLatents:
    """Latents `(B, …)` as float16 on the CPU. If they are on a GPU, the copy starts at once, and
    runs beside the GPU's later work until `wait` is called."""

    def __init__(self, latents: Tensor):
        latents = latents.detach()
        self.shape = latents.shape
        low, high = latents.float().flatten(1).aminmax(dim=1)
        # what rounds to at most float16's largest number, 65504; False for NaN
        finite = (low > -65520) & (high < 65520)
        half = latents.to(torch.float16)
        self._copied: torch.cuda.Event | None = None
        self._waiting: tuple[Tensor, ...] = ()  # held until they are copied from the GPU
        if not half.is_cuda:
            self._half, self._finite = half.cpu(), finite.cpu()
            return
        self._waiting = half, finite
        copying = _copying(half.device)
        copying.wait_stream(torch.cuda.current_stream(half.device))
        with torch.cuda.stream(copying):
            self._half, self._finite = map(_begin_copy, self._waiting)
            self._copied = copying.record_event()

    def wait(self) -> tuple[Tensor, Tensor]:
        """Return the latents, and for each item whether it is finite in float16, `(B,)`: NaN and
        values beyond its range are not."""
        if self._copied is not None:
            self._copied.synchronize()
            self._waiting, self._copied = (), None
        return self._half, self._finite


def _begin_copy(tensor: Tensor) -> Tensor:
    """Return a tensor in page-locked memory that the current stream fills with a copy."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
