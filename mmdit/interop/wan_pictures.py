"""The pictures that a Wan model continues, as inputs of the network in sampling and in training.

Axes: b sample · f latent frame · r row · c column · d channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.interfaces import Denoiser, Tokenizer
from mmdit.rng import Draws
from mmdit.text_encoders.clip_vision import ClipVision, load_clip_vision
from mmdit.tokenizers.with_picture import with_grey

# number of channels, before those of the picture's latents, that mark given frames: one for each of
# the 4 frames in a latent frame
MASK = 4


def size_of_aspect(
    picture: tuple[int, int],
    area: int,
    multiple: int,
    given: tuple[int | None, int | None] = (None, None),
    closest: bool = False,
) -> tuple[int, int]:
    """Return a width and height with the aspect ratio of `picture` (width, height), in multiples of
    `multiple` and of at most `area`, chosen as in the published code. A side in `given` is kept.
    `closest` (TI2V): the one of two candidates whose aspect ratio is nearer; for a square, the
    wider one."""

    def whole(length: float) -> int:
        return max(multiple, int((length + 1e-6) // multiple) * multiple)

    ratio = picture[0] / picture[1]
    width, height = given
    if width:
        return width, height or whole(width / ratio)
    if height:
        return whole(height * ratio), height
    sides = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if not closest:
        return whole(sides[0]), whole(sides[1])

    def distance(size: tuple[int, int]) -> float:
        aspect = size[0] / size[1]
        return max(ratio / aspect, aspect / ratio)

    first, second = whole(sides[0]), whole(sides[1])
    by_width, by_height = (first, whole(area / first)), (whole(area / second), second)
    return by_width if distance(by_width) < distance(by_height) else by_height


@dataclass
class Pictures:
    """Makes further inputs of `model` from pictures in [0, 1], or from the latents of a cache that
    was made with `tokenizers.with_picture`. CLIP's encoder (Wan 2.1) is loaded when it is first
    needed."""

    model: Denoiser
    tokenizer: Tokenizer
    device: torch.device | None = None  # None: that of the model

    @cached_property
    def clip(self) -> ClipVision:
        device = self.device or next(self.model.parameters()).device
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        try:
            return load_clip_vision(self.model.clip_weights, dtype, device)
        except ValueError as error:
            raise ConfigError("model.clip", f"{error}; {self.model.variant} needs it") from None

    def check(self, count: int, frames: int) -> None:
        """Raise ValueError unless clips of `frames` frames can be drawn from `count` pictures."""
        model = self.model
        wanted = {"none": min(count, 1), "first": 1, "first_last": 2}[model.picture]
        if count and model.picture == "none" and not model.takes_first_frame:
            raise ValueError(
                f"{model.variant} takes no picture: use an I2V or TI2V model, or leave --image out"
            )
        if count != wanted:
            two = "two, its first and its last, by --image twice"
            what = two if wanted == 2 else "one, by --image"
            raise ValueError(
                f"{model.variant} continues a picture, and takes {what} of mmdit sample; it got"
                f" {count}"
            )
        if wanted == 2 and frames < 2:
            raise ValueError(
                f"{model.variant} goes from a first picture to a last, but the clip has 1 frame:"
                " give --frames 5 or more"
            )
        if count and model.picture == "none" and frames == 1:
            raise ValueError(
                f"{model.variant} keeps the first frame that it is given, and a clip of 1 frame has"
                " no other: give --frames 5 or more"
            )

    def given(self, pictures: Tensor | None, frames: int) -> tuple[dict, Tensor | None]:
        """Return, for sampling clips of `frames` frames, the further inputs of the network, and the
        first latent frame `(1, 1, r, c, d)` where that is given (TI2V), else None. `pictures (n, 3,
        H, W)` are the first frame, and for FLF2V also the last. ValueError: see `check`."""
        model, spec = self.model, self.tokenizer.spec
        self.check(0 if pictures is None else len(pictures), frames)
        if pictures is None:
            return {}, None
        if model.picture == "none":
            return {"given": 1}, spec.normalize(self.tokenizer.encode(pictures[:1, None]))
        clip = with_grey(pictures[:1], frames, pictures[1:] if len(pictures) == 2 else None)
        return self._inputs(spec.normalize(self.tokenizer.encode(clip)), pictures[None]), None

    @torch.no_grad()
    def of_latents(self, latents: Tensor, draws: Draws | None = None) -> tuple[Tensor, dict]:
        """Return, for training, the latents of the clips and the further inputs of the network,
        from raw `latents (b, f, r, c, 2 d)` of clips and their pictures. The pictures for CLIP are
        decoded from these: from the first latent frame alone, or, with a last picture, from all of
        them."""
        clips, given = latents.chunk(2, -1)
        pixels = None
        if self.model.clip_weights and self.model.picture == "first_last":
            pixels = self.tokenizer.decode(given.float())[:, [0, -1]]
        elif self.model.clip_weights:
            pixels = self.tokenizer.decode(given[:, :1].float())[:, :1]
        return clips, self._inputs(self.tokenizer.spec.normalize(given), pixels)

    def _inputs(self, latents: Tensor, pictures: Tensor | None) -> dict:
        """Return the further inputs for normalised `latents (b, f, r, c, d)` of the given frames,
        and for `pictures (b, n, 3, H, W)`, which CLIP sees."""
        mask = latents.new_zeros(*latents.shape[:-1], MASK)
        mask[:, 0] = 1
        if self.model.picture == "first_last":
            mask[:, -1, ..., -1] = 1  # the last of the 4 frames of the last latent frame
        inputs = {"y": torch.cat([mask, latents], -1)}
        if self.model.clip_weights:
            with torch.autocast(latents.device.type, enabled=False):
                states = self.clip(pictures.flatten(0, 1))
            inputs["clip"] = states.unflatten(0, pictures.shape[:2]).flatten(1, 2)
        return inputs
