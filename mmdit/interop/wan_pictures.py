"""The pictures that a Wan model continues: how it is told of them in sampling and in training, and
which model can be trained.

Axes: b sample · f latent frame · r row · c column · d channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.interfaces import Tokenizer
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.text_encoders.clip_vision import ClipVision, load_clip_vision
from mmdit.tokenizers.with_picture import Picture, with_grey

# channels that say which frames are given, before those of the picture's latents: one for each of 4
# frames
MASK = 4


def picture_of(model: WanDenoiser) -> Picture:
    """Which frames a model is given in further channels."""
    config = model.config
    return (
        "none"
        if config.in_dim == config.out_dim
        else "first_last"
        if config.image_positions
        else "first"
    )


def size_of_aspect(
    picture: tuple[int, int],
    area: int,
    multiple: int,
    given: tuple[int | None, int | None] = (None, None),
    closest: bool = False,
) -> tuple[int, int]:
    """Return width and height, in multiples of `multiple`, of the aspect of `picture` (width,
    height) and at most `area`, as the published code chooses them; a `given` side stays. `closest`
    (TI2V): of two sizes the one whose aspect is nearer.
    """

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
    first, second = whole(sides[0]), whole(sides[1])
    sizes = (first, whole(area / first)), (whole(area / second), second)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))


@dataclass
class Pictures:
    """Further inputs of `model` from pictures in [0, 1], or from the latents of a cache made by
    `tokenizers.with_picture`. CLIP's encoder (Wan 2.1) is loaded when it is first needed."""

    model: WanDenoiser
    tokenizer: Tokenizer
    device: torch.device | None = None  # None: where the model is

    @cached_property
    def clip(self) -> ClipVision:
        settings = self.model.settings
        device = self.device or next(self.model.parameters()).device
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        try:
            place = settings.clip or settings.name_or_path
            return load_clip_vision(place, dtype, device)
        except ValueError as error:
            raise ConfigError(
                "model.clip", f"{error}; {self.model.config.variant} needs it"
            ) from None

    def given(self, pictures: Tensor | None, frames: int) -> tuple[dict, Tensor | None]:
        """For sampling clips of `frames` with `pictures (n, 3, H, W)`, their first frame and for
        FLF2V their last: further inputs of the network, and the first latent frame `(1, 1, r, c,
        d)` if that is given (TI2V). ValueError: too many or too few."""
        config, kind = self.model.config, picture_of(self.model)
        count = 0 if pictures is None else len(pictures)
        takes_frame = config.in_dim == config.out_dim == 48
        if kind == "none" and not takes_frame and count:
            raise ValueError(
                f"{config.variant} takes no picture: use an I2V or TI2V model, or leave --image out"
            )
        if kind != "none" and count != 1 + (kind == "first_last") or count > 1 and kind == "none":
            wanted = (
                "two, its first and its last: give --image twice"
                if kind == "first_last"
                else "one: give it with --image"
            )
            raise ValueError(
                f"{config.variant} continues a picture, and takes {wanted}; it got {count}"
            )
        if not count:
            return {}, None
        spec = self.tokenizer.spec
        if takes_frame:
            return {"given": 1}, spec.normalize(self.tokenizer.encode(pictures[:1, None]))
        clip = with_grey(pictures[:1], frames, pictures[1:] if count == 2 else None)
        return self._inputs(spec.normalize(self.tokenizer.encode(clip)), pictures[None]), None

    @torch.no_grad()
    def of_latents(self, latents: Tensor) -> tuple[Tensor, dict]:
        """For training: raw `latents (b, f, r, c, 2 d)` to those of the clips and what the network
        is told of their pictures. What CLIP sees comes back from the latents: of the first frame
        alone, or of grey between the first and the last.
        """
        clips, given = latents.chunk(2, -1)
        pixels = None
        if self.model.config.image_dim:
            ends = self.tokenizer.decode(
                (given if self.model.config.image_positions else given[:, :1]).float()
            )
            pixels = ends[:, [0, -1] if self.model.config.image_positions else [0]]
        return clips, self._inputs(self.tokenizer.spec.normalize(given), pixels)

    def _inputs(self, latents: Tensor, pictures: Tensor | None) -> dict:
        """`latents (b, f, r, c, d)` normalised, `pictures (b, n, 3, H, W)`."""
        mask = latents.new_zeros(*latents.shape[:-1], MASK)
        mask[:, 0] = 1
        if picture_of(self.model) == "first_last":
            mask[:, -1, ..., -1] = 1  # of the last 4 frames the last one
        inputs = {"y": torch.cat([mask, latents], -1)}
        if self.model.config.image_dim:
            with torch.autocast(latents.device.type, enabled=False):
                states = self.clip(pictures.flatten(0, 1))
            inputs["clip"] = states.unflatten(0, pictures.shape[:2]).flatten(1, 2)
        return inputs


def check_trainable(model: WanDenoiser, config) -> None:
    """ConfigError unless this transformer can be trained by the experiment's `config`."""
    kind, video, variant = picture_of(model), config.video, model.config.variant
    asked = getattr(config.tokenizer, "picture", "none")
    if asked != kind:
        raise ConfigError(
            "tokenizer.picture",
            f"is {asked}, but {variant} is given {kind}: set it so and cache again",
        )
    if kind != "none" and (video.num_frames == 1 or video.image_fraction):
        raise ConfigError(
            "video.num_frames" if video.num_frames == 1 else "video.image_fraction",
            f"asks for single pictures, which {variant} is given already; train it on clips alone",
        )
    if kind != "none" and config.train.sample_every_steps:
        raise ConfigError(
            "train.sample_every_steps",
            f"is {config.train.sample_every_steps}, but {variant} draws from "
            "pictures; set it to 0 and use mmdit.scripts.sample with --image",
        )
    if kind != "none" and config.model.first_frame:
        raise ConfigError(
            "model.first_frame",
            f"is {config.model.first_frame}, but {variant} always has its picture: 0",
        )
    if config.model.dtype != "float32" and not (
        config.model.freeze or config.lora.enabled and config.lora.train_lora_only
    ):
        raise ConfigError(
            "model.dtype",
            f"is {config.model.dtype}, but these weights are trained, and small updates "
            "would vanish in it; use float32, or lora.enabled with train_lora_only",
        )
