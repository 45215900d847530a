"""A Wan transformer as this project's trainer and samplers call their networks.

Axes: b sample · f latent frame · r row · c column · d channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.config import ConfigError, FilePath
from mmdit.interfaces import ModelSection, TextTokens
from mmdit.models.wan import PATCH, Residual, WanDiT
from mmdit.rng import Draws


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
    # The time at which the pair changes over; null is as published, 0.875 for T2V-A14B and 0.9 for
    # I2V-A14B.
    boundary: float | None = None
    # The share of the steps on clips whose first latent frame is given clean (TI2V-5B).
    first_frame: float = 0.0
    # The type of the stored weights; less than float32 only for weights that adapters leave frozen.
    # float8: the matrices of the blocks, with one scale a row; the rest is bfloat16.
    dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    # The type of the stream between blocks: float32, or that of autocast, which is half the
    # traffic.
    residual: Residual = "float32"
    # Recompute blocks in the backward pass: less memory, up to a third more time.
    checkpointing: bool = False
    # With `checkpointing`, recompute every n-th block only.
    checkpoint_every: int = 1
    # Train the text encoder alone.
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
                " to 0 and use mmdit.scripts.sample, which loads both",
            )
        super().check(run)
        boundaries = {self.boundary, run.experts.boundary} - {None}
        if run.experts.enabled and (self.expert or len(boundaries) > 1):
            raise ConfigError(
                "experts.boundary",
                f"is {run.experts.boundary}: a pair needs model.boundary alike, model.expert null",
            )

    @property
    def between(self) -> tuple[float, float]:
        """The times of the expert, once its boundary is known (`experiment.resolved`)."""
        return {"high": (self.boundary, 1.0), "low": (0.0, self.boundary)}.get(
            self.expert, (0.0, 1.0)
        )


class WanDenoiser(WanDiT):
    """`model(x (b, f, r, c, d), t (b,) on 0 … 1000, text) → velocity like x`, under the official
    names of parameters."""

    settings = WanModelConfig(name_or_path="unset")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: TextTokens,
        keep: None = None,
        given: int = 0,
        y: Tensor | None = None,
        clip: Tensor | None = None,
        whole_times: bool = False,
    ) -> Tensor:
        """`given`: so many first frames of `x` are clean, and their tokens are told t = 0. `y (1 or
        b, f, r, c, 20)`: I2V's mask and picture; `clip (1 or b, i, d)`: states of it.
        `whole_times`: timesteps are cut to whole numbers, as Wan's samplers do."""
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

    def given_frames(self, frames: int, draws: Draws) -> int:
        """Return how many first frames are given clean in the step of `draws`, on clips of
        `frames`. Training tosses a coin a step; what is measured outside it is always the case that
        training has more often."""
        if not self.training:
            return int(frames > 1 and self.settings.first_frame >= 0.5)
        coin = Draws.of(draws.seed, draws.step, 1).uniform("first_frame").item()
        return int(frames > 1 and coin < self.settings.first_frame)

    def stored_elsewhere(self, name: str) -> bool:
        """What is not trained stays in the release: a checkpoint need not hold it."""
        return not self.get_parameter(name).requires_grad

    def draw_keep(self, rows: int, columns: int, seed: int, step: int) -> None:
        """No tokens are routed round blocks here."""

    def number_frames(self, seed: int) -> None:
        """Frames have positions from the start."""

    def undecayed(self) -> set[str]:
        return {
            name
            for name, weight in self.named_parameters()
            if weight.ndim < 2 or name.endswith(("modulation", "emb_pos"))
        }

    def matrices(self) -> set[str]:
        return {
            f"blocks.{name}.weight"
            for name, part in self.blocks.named_modules()
            if isinstance(part, nn.Linear)
        }

    def train_flops(
        self, grid: tuple[int, int, int], text_tokens: int, kept: int | None = None
    ) -> int:
        """As `VideoMMDiT.train_flops`."""
        frames, rows, columns = grid
        tokens, keys = frames * rows * columns // 4, text_tokens + 1

        def weights(*parts: nn.Module) -> int:
            return sum(
                w.numel() * (2 + w.requires_grad)
                for part in parts
                for w in part.parameters()
                if w.ndim == 2
            )

        total = tokens * weights(self.head.head) + keys * weights(self.text_embedding)
        for block in self.blocks:
            cross = block.cross_attn
            total += tokens * weights(
                block.self_attn, block.ffn, cross.q, cross.o
            ) + keys * weights(cross.k, cross.v)
            total += 6 * tokens * self.config.dim * (tokens + keys)
        return 2 * total
