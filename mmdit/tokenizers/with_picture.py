"""Make the training data of Wan's I2V models: beside the latents of each clip, those of its given
pictures are cached as further channels.

Axes: b clip · f frame · c channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.interfaces import Picture, Tokenizer
from mmdit.tokenizers.twofold import Twofold

GREY = 0.5  # the value of frames that are not given


def with_grey(first: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
    """Return a clip `(b, frames, 3, H, W)` that begins with the picture `first (b, 3, H, W)`, ends
    with the picture `last` if there is one, and is grey in between."""
    clip = torch.full_like(first, GREY)[:, None].repeat(1, frames, 1, 1, 1)
    clip[:, 0] = first
    if last is not None:
        clip[:, -1] = last
    return clip


class WithPicture(Twofold):
    """Wraps `tokenizer` for caches: `encode(pixels (b, f, 3, H, W))` gives twice its channels,
    those of the clip and then those of its first (and last) frame with grey frames elsewhere, which
    is what the model is given."""

    def __init__(self, tokenizer: Tokenizer, picture: Picture):
        super().__init__(tokenizer)
        self.picture = picture

    @property
    def name(self) -> str:
        return f"{self.plain.name} with the picture {self.picture}"

    @property
    def fingerprint(self) -> str:
        return f"{self.plain.fingerprint} {self.picture}"

    def encode(self, pixels: Tensor) -> Tensor:
        last = pixels[:, -1] if self.picture == "first_last" else None
        given = with_grey(pixels[:, 0], pixels.shape[1], last)
        return torch.cat([self.plain.encode(pixels), self.plain.encode(given)], -1)
