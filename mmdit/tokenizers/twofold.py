"""Tokenizers for caches that hold a second clip beside each clip, as further channels."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mmdit.interfaces import Tokenizer


class Twofold(Tokenizer):
    """Wraps `tokenizer` for caches: `encode` gives twice its channels, those of the clip and then
    those of a second clip, which a subclass makes from it."""

    def __init__(self, tokenizer: Tokenizer):
        spec = tokenizer.spec
        self.of_clips = tokenizer
        self.spec = replace(spec, channels=2 * spec.channels, mean=2 * spec.mean, std=2 * spec.std)

    @property
    def plain(self) -> Tokenizer:
        return self.of_clips

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the clip alone, without the second one."""
        return self.plain.decode(latents[..., : self.plain.spec.channels])
