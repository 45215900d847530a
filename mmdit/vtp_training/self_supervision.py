"""Self-distillation on class tokens (DINO, Caron et al. 2021) and on masked patches (iBOT, Zhou et
al. 2022).

Both terms use the same trunk and prototype head, and features before the bottleneck. The teacher is
an average of the student; its assignments are balanced by Sinkhorn-Knopp (Caron et al. 2020).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vtp.models import DINOHead
from vtp.models.vision import DinoVisionTransformer

from mmdit.config import ConfigError, least
from mmdit.rng import Draws


@dataclass(frozen=True)
class SelfSupervisionConfig:
    """The section `self_supervision:`."""

    # Weight of the loss; 0 is off.
    weight: float = 0.0
    # The share of a step's pictures that take part.
    fraction: float = 0.25
    # The number of classes by which student and teacher describe a picture.
    prototypes: int = 2048
    # The share of the teacher that is kept at each step.
    momentum: float = 0.996
    # Temperature of the student's softmax.
    student_temperature: float = 0.1
    # Temperature of the teacher's softmax.
    teacher_temperature: float = 0.06
    # The number of small crops of a picture, in addition to two large ones.
    local_crops: int = 2
    # The least and the greatest share of patches that are masked.
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    # The smallest side of a large crop, as a share of the picture's.
    crop_scale: float = 0.5

    def __post_init__(self):
        least(self, 0, "weight", "momentum", "local_crops")
        least(self, 2, "prototypes")
        least(self, 0, "crop_scale", above=True)
        least(self, 1e-6, "fraction")
        least(self, 0, "student_temperature", "teacher_temperature", above=True)
        for name in ("fraction", "momentum", "crop_scale"):
            if getattr(self, name) > 1:
                raise ConfigError(name, f"is {getattr(self, name)}, must be at most 1")
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ConfigError("mask_ratio", f"is [{low}, {high}], must be [low, high] in 0 … 1")


def taking_part(count: int, share: float, device: torch.device) -> Tensor:
    """Return which of `count` pictures take part: a share `share` of them, at least one. They are
    spread evenly, because a batch is sorted by kinds of pictures."""
    places = (torch.arange(count, dtype=torch.float64, device=device) / share).round()
    # counted once more without tensors, which would have to wait for a GPU
    number = sum(round(index / share) < count for index in range(count))
    return places[:number].long()


def hidden_patches(
    views: int, patches: int, low: float, high: float, device: torch.device
) -> tuple[Tensor, int]:
    """Return how many of its `patches` each of `views` hides, at least one, as int64 `(views,)` and
    in all. The numbers go in even steps through the shares from `low` to `high` (as in DINOv2,
    Oquab et al. 2023), so that all steps hide equally many, in tensors of the same shapes."""
    shares = (torch.arange(views, dtype=torch.float64, device=device) + 0.5) / views
    counts = ((low + (high - low) * shares) * patches).round().clamp(min=1).long()
    # once more without tensors, which would have to wait for a GPU
    each = ((low + (high - low) * ((view + 0.5) / views)) * patches for view in range(views))
    return counts, sum(max(1, round(count)) for count in each)


def random_crops(
    images: Tensor, draws: Draws, purpose: str, low: float, high: float, size: tuple[int, int]
) -> Tensor:
    """Return crops `(B, 3, *size)` with sides of `low … high` times the picture's, half of them
    mirrored, with random contrast and tint."""
    side = low + (high - low) * draws.uniform(f"{purpose}/side", 1)
    centre = (2 * draws.uniform(f"{purpose}/centre", 2) - 1) * (1 - side)
    mirror = 1 - 2 * (draws.uniform(f"{purpose}/mirror", 1) < 0.5).float()
    zero = torch.zeros_like(side)
    parts = [side * mirror, zero, centre[:, :1], zero, side, centre[:, 1:]]
    matrices = torch.cat(parts, 1).unflatten(1, (2, 3))
    where = F.affine_grid(matrices, [len(images), 3, *size], align_corners=False)
    crops = F.grid_sample(images, where, padding_mode="reflection", align_corners=False)
    contrast = 0.8 + 0.4 * draws.uniform(f"{purpose}/contrast", 1, 1, 1)
    return crops * contrast + 0.15 * draws.normal(f"{purpose}/tint", 3, 1, 1)


@torch.no_grad()
def balanced_assignments(logits: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Map `logits (N, K)` by Sinkhorn-Knopp to rows that sum to 1, such that all columns have the
    same sum."""
    scores = (logits.float() / temperature).T
    scores = torch.exp(scores - scores.max())
    for _ in range(rounds):
        scores = scores / scores.sum(1, keepdim=True).clamp(min=1e-30) / len(scores)
        scores = scores / scores.sum(0, keepdim=True).clamp(min=1e-30) / scores.shape[1]
    return (scores * scores.shape[1]).T


def cross_entropy(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the mean cross entropy of rows of `student` logits against rows of `target`
    probabilities."""
    return -(target * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1).mean()


class SelfSupervision(nn.Module):
    """The student's head, and the teacher's copies of trunk and head. The student's trunk belongs
    to the model and is passed in."""

    def __init__(self, config: SelfSupervisionConfig, trunk: DinoVisionTransformer):
        super().__init__()
        self.config = config
        self.head = DINOHead(trunk.embed_dim, config.prototypes, hidden_dim=512, bottleneck_dim=128)
        self.teacher_trunk = copy.deepcopy(trunk).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)

    def begin_from(self, trunk: nn.Module) -> None:
        """Copy the student's weights to the teacher, after they were replaced."""
        self.teacher_trunk.load_state_dict(trunk.state_dict())

    def loss(
        self, trunk: DinoVisionTransformer, images: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """Return `(class-token term, masked-patch term)` for normalised `images (B, 3, H, W)`."""
        config, (height, width) = self.config, images.shape[-2:]
        size, scale = (height, width), config.crop_scale
        views = torch.cat(
            [random_crops(images, draws, f"global{i}", scale, 1.0, size) for i in range(2)]
        )
        masks, flat = self._masks(draws, height * width // trunk.patch_size**2)
        with torch.no_grad():
            taught = self.teacher_trunk(views, is_training=True, use_bottleneck=False)
            class_logits = self.teacher_head(taught["x_norm_clstoken"])
            patch_logits = self.teacher_head(taught["x_norm_patchtokens"].flatten(0, 1)[flat])
            first, second = (
                balanced_assignments(logits, config.teacher_temperature)
                for logits in class_logits.chunk(2)
            )
            patch_target = balanced_assignments(patch_logits, config.teacher_temperature)
        temperature = config.student_temperature
        seen = trunk(views, is_training=True, use_bottleneck=False, masks=masks)
        classes = self.head(seen["x_norm_clstoken"])
        class_losses = [cross_entropy(classes, torch.cat([second, first]), temperature)]
        patches = self.head(seen["x_norm_patchtokens"].flatten(0, 1)[flat])
        patch_loss = cross_entropy(patches, patch_target, temperature)
        rows, columns = (max(16, math.ceil(side / 32) * 16) for side in (height, width))
        for index in range(config.local_crops):
            crop = random_crops(images, draws, f"local{index}", 0.25, scale, (rows, columns))
            seen = trunk(crop, is_training=True, use_bottleneck=False)
            logits = self.head(seen["x_norm_clstoken"])  # predicts both large crops
            class_losses.append(cross_entropy(logits, (first + second) / 2, temperature))
        return torch.stack(class_losses).mean(), patch_loss

    def _masks(self, draws: Draws, patches: int) -> tuple[Tensor, Tensor]:
        """Return `(2B, N)` bool, True = hidden, and the places of the hidden patches in it, flat
        and ascending."""
        order = torch.cat([draws.uniform(f"mask/ratio{i}", 1) for i in range(2)])[:, 0].argsort()
        low, high = self.config.mask_ratio
        counts, total = hidden_patches(len(order), patches, low, high, order.device)
        keys = torch.cat([draws.uniform(f"mask{i}", patches) for i in range(2)])
        masks = keys.argsort(1).argsort(1) < counts[order][:, None]
        # `nonzero` would wait for the GPU to tell how many there are
        return masks, (~masks).flatten().argsort(stable=True)[:total]

    @torch.no_grad()
    def update_teacher(self, trunk: nn.Module, progress: float) -> None:
        """Move the teacher's average towards the student. The momentum rises to 1 along half a
        cosine of the run's `progress` in [0, 1]."""
        momentum = 1 - (1 - self.config.momentum) * (math.cos(math.pi * progress) + 1) / 2
        for teacher, student in ((self.teacher_trunk, trunk), (self.teacher_head, self.head)):
            torch._foreach_lerp_(
                list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum
            )
