"""Latents on their way into a cache: float16 on the CPU, copied while the GPU goes on."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU in which latents are copied, beside the one that computes."""
    return torch.cuda.Stream(device)


class HalfLatents:
    """Latents `(B, …)` as float16 for the CPU. Of latents on a GPU the copy is begun at once and
    not waited for: it runs beside what the GPU is asked for next."""

    def __init__(self, latents: Tensor):
        latents = latents.detach()
        self.shape = latents.shape
        low, high = latents.float().flatten(1).aminmax(dim=1)
        # what rounds to float16's largest number, 65504; False for NaN
        finite = (low > -65520) & (high < 65520)
        half = latents.to(torch.float16)
        self._copied: torch.cuda.Event | None = None
        self._waiting: tuple[Tensor, ...] = ()  # on the GPU, where others must not get their memory
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
        """Return the latents, and which items `(B,)` are finite in float16 (NaN and what exceeds it
        are not)."""
        if self._copied is not None:
            self._copied.synchronize()
            self._waiting, self._copied = (), None
        return self._half, self._finite


def _begin_copy(tensor: Tensor) -> Tensor:
    """Return what will be a copy in page-locked memory, once the current stream has come there."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
