"""The model type `arms`: the Video MMDiT and the arms that change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmdit.models import TreadConfig, VideoMMDiT, VideoMMDiTConfig
from tests.drivers.arms.block_modulation import block_modulation
from tests.drivers.arms.joint_text import joint_text
from tests.drivers.arms.sprint import sprint
from tests.drivers.arms.token_times import token_times
from tests.drivers.arms.u_skips import u_skips
from tests.drivers.arms.value_residual import value_residual
from tests.drivers.arms.wrapped import wrap

# In the order in which they are made, whatever the order of the config.
CHANGES = {
    "joint_text": joint_text,
    "block_modulation": block_modulation,
    "value_residual": value_residual,
    "u_skips": u_skips,
    "token_times": token_times,
    "sprint": sprint,
}
Change = Literal[
    "joint_text", "block_modulation", "value_residual", "u_skips", "token_times", "sprint"
]


@dataclass(frozen=True)
class ArmsConfig(VideoMMDiTConfig):
    type: Literal["arms"] = "arms"
    changes: tuple[Change, ...] = ()


def build_arms(
    config: ArmsConfig, latent_channels: int, text_dim: int, tread: TreadConfig | None = None
) -> VideoMMDiT:
    """Return a Video MMDiT with the changes of `config`; its other weights are those that it would
    have without them."""
    model = VideoMMDiT(config, latent_channels, text_dim, tread)
    for name, change in CHANGES.items():
        if name in config.changes:
            change(model)
    wrap(model, before=check_size)
    return model


def check_size(model: VideoMMDiT, x: Tensor, *rest, **named) -> tuple:
    """Raise ValueError for what arms are not made for."""
    frames, rows, columns = x.shape[1:4]
    if frames > 1 or model.windows(rows, columns).counts != (1, 1):
        raise ValueError(
            f"latents have {frames} frames of {rows}x{columns} cells, but the arms are for pictures"
            f" in one window (model.window_size {model.config.window_size}); use video_mmdit"
        )
    return x, *rest
