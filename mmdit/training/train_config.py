"""The section `train:`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmdit.config import ConfigError, FilePath, Section
from mmdit.diffusion import Grid, SamplerConfig, Solver, build_objective, sampling_times
from mmdit.interfaces import LatentSpec
from mmdit.training.optim import LearningRate, OptimizerKind

SAMPLER_KEYS = {
    "solver": "sample_solver",
    "steps": "sample_num_steps",
    "eta": "sample_eta",
    "shift": "sample_shift",
    "grid": "sample_grid",
}


@dataclass(frozen=True)
class TrainConfig(Section):
    """`train:` section. `batch_size` is per process and micro-step: a step sees batch_size ×
    grad_accum_steps × processes."""

    objective: Literal["ddpm", "flow_matching"] = "flow_matching"
    precision: Literal["bf16", "fp32", "pure_bf16"] = (
        "bf16"  # of products; pure_bf16: of weights and moments, too (Kahan-summed)
    )
    batch_size: int = 32
    grad_accum_steps: int = 1
    optimizer: OptimizerKind = (
        "adamw"  # muon: for the matrices of the blocks, adamw for the rest, at the same lr
    )
    offload_optimizer: bool = (
        False  # moments wait in the memory of the CPU: less on the GPU, a slower step
    )
    # so many first blocks have their frozen weights in the memory of the CPU, and visit the GPU
    offload_blocks: int = 0
    lr: float = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_final: float = 0.0  # share of lr left at max_steps under cosine
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # global norm; 0 = off
    max_steps: int = 1000
    max_skipped_steps: int = (
        10  # more non-finite gradients between two reports, or in a row, stop the run
    )
    timeout_minutes: float = (
        30.0  # one step, save or preview that takes longer ends the job and names who stands still
    )
    compile: Literal["auto", True, False] = "auto"  # auto: with CUDA, unless blocks are offloaded
    # compiled steps of small networks are CUDA graphs, see training/graphs/training_graphs.py
    replays: bool = True
    init_from: FilePath | None = (
        None  # weights of another run, checkpoint or export; the step starts at 0
    )
    log_every_steps: int = 50
    save_every_steps: int = 1000
    keep_last: int = 3  # checkpoints kept; 0 keeps all
    keep_every_steps: int = 0  # besides, those of every n-th step are kept for good; 0 = none
    cfg_dropout_prob: float = 0.1
    val_every_steps: int = 0  # 0 = no item is held out
    val_share: float = (
        0.01  # of the items, chosen by a hash of their ids, are held out of the training
    )
    val_samples: int = 64  # of them are measured, at fixed times with fixed noise
    sample_every_steps: int = 0  # 0 = no previews
    sample_num_images: int = 8
    sample_num_steps: int = 30
    sample_solver: Solver = "ab2"
    sample_cfg_scale: float = 3.0
    sample_cfg_interval: tuple[float, float] = (0.0, 1.0)  # guidance acts for t inside
    sample_eta: float = 0.0  # ddim only
    sample_shift: float = (
        1.0  # time shift of the sampling grid; > 1 spends more steps at high noise
    )
    sample_grid: Grid = "even"  # wan, diffusers: Wan's own times
    sample_cfg_scale_low: float | None = (
        None  # of the low-noise expert of a pair, if it has another
    )
    sample_negative_prompt: str = ""  # what guidance leads away from, instead of the empty prompt
    sample_seed: int = 0
    sample_prompts: tuple[str, ...] = field(default=())

    def __post_init__(self):
        for name in (
            "batch_size",
            "grad_accum_steps",
            "max_steps",
            "log_every_steps",
            "save_every_steps",
            "val_samples",
            "sample_num_images",
            "sample_num_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"is {getattr(self, name)}, must be at least 1")
        for name in (
            "warmup_steps",
            "max_skipped_steps",
            "keep_last",
            "keep_every_steps",
            "sample_every_steps",
            "val_every_steps",
            "offload_blocks",
            "grad_clip",
            "weight_decay",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"is {getattr(self, name)}, must not be negative")
        if not 0 < self.timeout_minutes < 1e6:
            raise ConfigError(
                "timeout_minutes",
                f"is {self.timeout_minutes}, must be positive; give the longest step or "
                "preview time enough",
            )
        if not 0 < self.val_share < 1:
            raise ConfigError(
                "val_share", f"is {self.val_share}, must be between 0 and 1, for example 0.01"
            )
        if not 0 < self.lr < 1:
            raise ConfigError("lr", f"is {self.lr}, must be between 0 and 1, for example 1e-4")
        if self.keep_every_steps % self.save_every_steps:
            raise ConfigError(
                "keep_every_steps",
                f"is {self.keep_every_steps}, must be a multiple of save_every_steps "
                f"({self.save_every_steps}), for only those steps are saved",
            )
        if self.optimizer != "adamw" and (self.precision == "pure_bf16" or self.offload_optimizer):
            raise ConfigError(
                "optimizer",
                f"is {self.optimizer}, but train.precision pure_bf16 and train.offload_optimizer"
                " are made for adamw; use that, or neither",
            )
        if self.precision == "pure_bf16" and self.betas[1] > 0.99:
            raise ConfigError(
                "betas",
                f"are {self.betas} with precision pure_bf16, whose second moments would stand"
                " still: their steps of 1/256 are coarser than the update; lower the second to at"
                " most 0.99, or use precision bf16",
            )
        if self.offload_blocks and self.compile is True:
            raise ConfigError(
                "offload_blocks",
                f"is {self.offload_blocks} with compile: true, whose graphs know only weights that "
                "stay; set the one to 0 or the other to auto",
            )
        if not 0 <= self.cfg_dropout_prob <= 1:
            raise ConfigError(
                "cfg_dropout_prob", f"is {self.cfg_dropout_prob}, must be between 0 and 1"
            )
        if self.sample_every_steps and not self.sample_prompts:
            raise ConfigError(
                "sample_prompts",
                f"is empty but sample_every_steps is {self.sample_every_steps}; write a prompt "
                "or set it to 0",
            )
        if not 0 <= self.lr_final <= 1:
            raise ConfigError("lr_final", f"is {self.lr_final}, must be a share of lr, from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                "betas",
                f"are {list(self.betas)}, must be at least 0 and below 1, for example [0.9, 0.95]",
            )
        low, high = self.sample_cfg_interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                "sample_cfg_interval",
                f"is {[low, high]}, must be 0 <= low <= high <= 1 (0 clean, 1 noise); use [0, 1] "
                "for always",
            )
        try:
            self.sampler()
        except ConfigError as error:
            raise ConfigError(SAMPLER_KEYS[error.path], error.message) from None

    def check(self, run: Any) -> None:
        """Refuse previews whose sampler has fewer noise levels than steps."""
        if not self.sample_every_steps:
            return
        objective = build_objective(self.objective, run.diffusion, run.flow_matching)
        frames = LatentSpec(1, temporal=run.tokenizer.temporal).frames(run.video.num_frames)
        shift = self.sample_shift * objective.clip_shift(frames)
        try:
            sampling_times(objective, self.sample_num_steps, shift, grid=self.sample_grid)
        except ConfigError as error:
            raise ConfigError("train.sample_num_steps", error.message) from None

    def sampler(self) -> SamplerConfig:
        """The sampler of previews, which post-training's evaluation draws with, too."""
        return SamplerConfig(**{name: getattr(self, key) for name, key in SAMPLER_KEYS.items()})

    @property
    def autocast(self) -> bool:
        """Whether products are taken in bfloat16."""
        return self.precision != "fp32"

    def compiles(self, device: str) -> bool:
        """Whether blocks are compiled on a device of this type."""
        return self.compile is True or (
            self.compile == "auto" and device == "cuda" and not self.offload_blocks
        )

    def learning_rate(self) -> LearningRate:
        return LearningRate(
            self.lr, self.warmup_steps, self.lr_schedule, self.lr_final, self.max_steps
        )
