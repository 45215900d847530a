"""A Wan transformer with the interface that this project's trainer and samplers expect.

Axes: b sample · f latent frame · r row · c column · d channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from mmdit.config import ConfigError, FilePath
from mmdit.interfaces import ModelSection, TextTokens
from mmdit.models.wan import PATCH, Residual, WanDiT
from mmdit.nn import kernels
from mmdit.nn.activations import checkpointing_options
from mmdit.nn.encodings import ENCODINGS


@dataclass(frozen=True)
class WanModelConfig(ModelSection):
    """A transformer of Wan 2.1 or 2.2."""

    # Chooses Wan.
    type: Literal["wan"] = "wan"
    # The folder of a release, official or of Diffusers, or a weight file.
    name_or_path: FilePath = ""
    # The file or folder of the picture encoder of Wan 2.1 I2V and FLF2V, if `name_or_path` does not
    # hold it.
    clip: FilePath = ""
    # Which network of a pair (A14B) is trained: `high` on the times t >= `boundary`, `low` below
    # it.
    expert: Literal["high", "low"] | None = None
    # The time that divides the pair; null takes the published one, 0.875 for T2V-A14B and 0.9 for
    # I2V-A14B.
    boundary: float | None = None
    # The share of training steps on clips in which the first latent frame is given clean (TI2V-5B).
    first_frame: float = 0.0
    # The type in which weights are stored; less than float32 only for weights that adapters leave
    # frozen. Norms, modulation, head and the embeddings of time, patches and CLIP states stay in
    # float32. With float8, int8 and nf4 only the matrices of the blocks have fewer bits, and the
    # rest is as with bfloat16. float8: one scale a row, or those of an fp8_scaled file; int8: as
    # large, with one scale a row; nf4: 4.5 bits a weight, 16 quantiles with a scale for each 64
    # weights.
    dtype: Literal["float32", "bfloat16", "float8", "int8", "nf4"] = "float32"
    # The type of the blocks' matrix products in training: that of `train.precision`, or float8,
    # which multiplies the codes of `dtype: float8` by codes of the input and of the gradient (GPUs
    # from Ada and Hopper on). On other GPUs, and outside training, autocast's type is used.
    products: Literal["autocast", "float8"] = "autocast"
    # The type of the residual stream between blocks: float32, or that of autocast, which halves the
    # memory traffic.
    residual: Residual = "float32"
    # Recompute blocks in the backward pass: less memory, up to a third more time.
    checkpointing: bool = False
    # With `checkpointing`, recompute every n-th block only.
    checkpoint_every: int = 1
    # Keep the activations that blocks save for the backward pass (with `checkpointing`, their
    # inputs) in the memory of the CPU; they return to the GPU while the block behind computes
    # backward.
    offload_activations: bool = False
    # Freeze the model, and train the text encoder alone.
    freeze: bool = False

    def __post_init__(self):
        if not self.name_or_path:
            raise ConfigError(
                "name_or_path", "is empty; must be the folder of a Wan release, or a weight file"
            )
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ConfigError(
                "boundary",
                f"is {self.boundary}; must be between 0 and 1: 0.875 for T2V-A14B, 0.9 for"
                " I2V-A14B",
            )
        if self.checkpoint_every < 1:
            raise ConfigError("checkpoint_every", f"is {self.checkpoint_every}; must be at least 1")
        if not 0 <= self.first_frame <= 1:
            raise ConfigError(
                "first_frame",
                f"is {self.first_frame}; must be from 0 (never) to 1 (every step on clips)",
            )

    @property
    def patch(self) -> int:
        return PATCH[1]

    @property
    def released(self) -> bool:
        return True

    @property
    def takes_picture(self) -> bool:
        return True

    def without_part(self) -> dict[str, tuple[str, ...]]:
        return {} if self.checkpointing else {"model.checkpointing is false": ("checkpoint_every",)}

    def check(self, run: Any) -> None:
        """Refuse what a Wan transformer was not made for, and what its trainer cannot do."""
        flow = run.flow_matching
        asked = (run.train.objective, flow.path, flow.prediction, flow.time_scale)
        if asked != ("flow_matching", "linear", "velocity", 1000.0):
            raise ConfigError(
                "train.objective",
                "and flow_matching: Wan predicts the velocity on the linear path with time_scale"
                " 1000; leave these keys at their defaults",
            )
        if run.tread.enabled:
            raise ConfigError(
                "tread.enabled",
                "is true, but a Wan transformer routes no tokens; remove the section",
            )
        previews = run.train.sample_every_steps
        if self.expert and previews:
            raise ConfigError(
                "train.sample_every_steps",
                f"is {previews}, but the {self.expert}-noise expert alone draws no pictures; set it"
                " to 0 and use mmdit sample, which loads both",
            )
        super().check(run)
        boundaries = {self.boundary, run.experts.boundary} - {None}
        if run.experts.enabled and (self.expert or len(boundaries) > 1):
            raise ConfigError(
                "experts.boundary",
                f"is {run.experts.boundary}: a pair needs model.boundary alike, model.expert null",
            )

    def check_products(self, run: Any) -> None:
        if self.dtype != "float8" or not run.train.autocast or run.posttrain is not None:
            raise ConfigError(
                "model.products",
                f"is float8, but model.dtype is {self.dtype}: it multiplies the codes of a frozen"
                " base of model.dtype float8, with train.precision bf16 and without posttrain; set"
                " these, or leave it out",
            )

    @property
    def between(self) -> tuple[float, float]:
        """Return the range of times of the expert; its boundary must be known
        (`expert_choice.resolved`)."""
        if self.expert is None:
            return 0.0, 1.0
        assert self.boundary is not None
        return (self.boundary, 1.0) if self.expert == "high" else (0.0, self.boundary)

    def memory_options(self, frozen: bool) -> list[str]:
        options = []
        if frozen and self.dtype == "float32":
            options.append("model.dtype=bfloat16")
        options += checkpointing_options(self.checkpointing, self.offload_activations)
        if frozen and self.dtype not in ENCODINGS:
            options.append("model.dtype=float8")
        return options


class WanDenoiser(WanDiT):
    """`model(x (b, f, r, c, d), t (b,) on 0 … 1000, text) → velocity like x`, under the official
    names of parameters."""

    settings = WanModelConfig(name_or_path="unset")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: TextTokens,
        keep: Tensor | None = None,
        given: int = 0,
        y: Tensor | None = None,
        clip: Tensor | None = None,
        whole_times: bool = False,
    ) -> Tensor:
        """Return the velocity, shaped like `x`. The first `given` frames of `x` are clean, and
        their tokens are told t = 0. `y (1 or b, f, r, c, 20)`: I2V's mask and picture latents;
        `clip (1 or b, i, d)`: CLIP states of its picture. `whole_times`: round times down to whole
        numbers, as Wan's samplers do."""
        if self.settings.products == "float8" and self.training:
            kernels.warn_without_codes(x.device)
        t = t.floor() if whole_times else t
        if given:
            per_frame = x.shape[2] * x.shape[3] // 4
            t = t[:, None].repeat(1, x.shape[1] * per_frame)
            t[:, : given * per_frame] = 0
        context = torch.where(text.valid[..., None], text.embeddings, 0)[:, : self.config.text_len]
        y = (
            None
            if y is None
            else rearrange(y.expand(len(x), *y.shape[1:]), "b f r c d -> b d f r c")
        )
        clip = None if clip is None else clip.expand(len(x), *clip.shape[1:])
        velocity = super().forward(rearrange(x, "b f r c d -> b d f r c"), t, context, y, clip)
        return rearrange(velocity, "b d f r c -> b f r c d")

    @property
    def first_frame(self) -> float:
        return self.settings.first_frame

    @property
    def clip_weights(self) -> str:
        return (self.settings.clip or self.settings.name_or_path) if self.config.image_dim else ""

    def sampling_inputs(self, grid: str) -> dict[str, Any]:
        return {"whole_times": grid != "even"}

    def is_stored(self, name: str) -> bool:
        """Return whether checkpoints hold this entry: weights that are not trained stay in the
        release."""
        return self.get_parameter(name).requires_grad

    def check_trainable(self, run: Any) -> None:
        video, variant, settings = run.video, self.variant, self.settings
        if run.tokenizer.picture != self.picture:
            raise ConfigError(
                "tokenizer.picture",
                f"is {run.tokenizer.picture}, but {variant} is given {self.picture}: set it so and"
                " cache again",
            )
        if self.picture != "none" and (video.num_frames == 1 or video.image_fraction):
            raise ConfigError(
                "video.num_frames" if video.num_frames == 1 else "video.image_fraction",
                f"asks for single pictures, which {variant} is given already; train it on clips"
                " alone",
            )
        if self.picture != "none" and run.train.sample_every_steps:
            raise ConfigError(
                "train.sample_every_steps",
                f"is {run.train.sample_every_steps}, but {variant} draws from pictures; set it to 0"
                " and use mmdit sample with --image",
            )
        if self.picture != "none" and settings.first_frame:
            raise ConfigError(
                "model.first_frame",
                f"is {settings.first_frame}, but {variant} always has its picture: 0",
            )
        frozen = settings.freeze or (run.lora.enabled and run.lora.train_lora_only)
        if settings.dtype != "float32" and not frozen:
            raise ConfigError(
                "model.dtype",
                f"is {settings.dtype}, but these weights are trained, and small updates would"
                " vanish in it; use float32, or lora.enabled with train_lora_only",
            )
