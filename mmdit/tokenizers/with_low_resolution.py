"""Make the training data of super-resolution: beside the latents of each clip, those of the same
clip as a small model would have drawn it, enlarged, are cached as further channels.

Axes: b clip · f frame · c channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.interfaces import Tokenizer
from mmdit.pixels import resized
from mmdit.tokenizers.twofold import Twofold


def enlarged_latents(tokenizer: Tokenizer, pixels: Tensor, width: int, height: int) -> Tensor:
    """Return the raw latents `(b, f, r, c, d)` of small clips `pixels (b, f, 3, H, W)` after these
    were enlarged to `width` by `height` pixels. Latents cannot be enlarged instead without a loss:
    a latent cell of the small clip covers several of the large one and cannot be divided among them
    linearly."""
    return tokenizer.encode(resized(pixels, width, height))


class WithLowResolution(Twofold):
    """Wraps `tokenizer` for caches: `encode(pixels (b, f, 3, H, W))` gives twice its channels,
    those of the clip and then those of the clip after a round trip through `tokenizer` at the size
    `small` (width, height), which is the best that a small model can draw."""

    def __init__(self, tokenizer: Tokenizer, small: tuple[int, int]):
        super().__init__(tokenizer)
        self.small = small

    @property
    def name(self) -> str:
        return "{} with low resolution {}x{}".format(self.plain.name, *self.small)

    @property
    def fingerprint(self) -> str:
        return "{} low resolution {}x{}".format(self.plain.fingerprint, *self.small)

    def encode(self, pixels: Tensor) -> Tensor:
        drawn = self.plain.decode(self.plain.encode(resized(pixels, *self.small)))
        height, width = pixels.shape[-2:]
        enlarged = enlarged_latents(self.plain, drawn, width, height)
        return torch.cat([self.plain.encode(pixels), enlarged], -1)
