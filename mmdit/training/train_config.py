"""The section `train:`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmdit.config import ConfigError, FilePath, Section, least, most
from mmdit.diffusion import Grid, SamplerConfig, Solver, build_objective, sampling_times
from mmdit.interfaces import LatentSpec
from mmdit.training.optim import LearningRate, OptimizerName

SAMPLER_KEYS = {
    "solver": "sample_solver",
    "steps": "sample_num_steps",
    "eta": "sample_eta",
    "shift": "sample_shift",
    "grid": "sample_grid",
}


@dataclass(frozen=True)
class TrainConfig(Section):
    """The section `train:`. A step sees `batch_size` × `grad_accum_steps` × processes samples."""

    # What the network learns; the sections `flow_matching:` and `diffusion:` (of ddpm) say more.
    objective: Literal["ddpm", "flow_matching"] = "flow_matching"
    # The type of matrix products: bfloat16 or float32. pure_bf16 also keeps weights and moments in
    # bfloat16 (Kahan-summed).
    precision: Literal["bf16", "fp32", "pure_bf16"] = "bf16"
    # Samples that a process computes in one micro-batch.
    batch_size: int = 32
    # Micro-batches of a process in one step.
    grad_accum_steps: int = 1
    # `adamw`, or `muon` for the matrices of the blocks and adamw for the rest, at the same learning
    # rate (`adamw8bit` is only read, from configs of old runs).
    optimizer: OptimizerName = "adamw"
    # Keep moments in the memory of the CPU: less memory on the GPU, slower steps.
    offload_optimizer: bool = False
    # The number of leading blocks whose frozen weights are kept in the memory of the CPU, and
    # copied to the GPU when they compute.
    offload_blocks: int = 0
    # The learning rate.
    lr: float = 1e-4
    # Whether the learning rate stays, or falls as a cosine until `max_steps`.
    lr_schedule: Literal["constant", "cosine"] = "constant"
    # The share of `lr` that is left at `max_steps` under `cosine`.
    lr_final: float = 0.0
    # Steps over which the learning rate rises from 0.
    warmup_steps: int = 100
    # The decay of AdamW's first and second moments.
    betas: tuple[float, float] = (0.9, 0.95)
    # Decoupled weight decay; norms, biases and position tables have none.
    weight_decay: float = 0.01
    # The largest global norm of a gradient; 0 does not clip.
    grad_clip: float = 1.0
    # Steps of the whole run.
    max_steps: int = 1000
    # Stop the run if more steps than this, between two reports or in a row, have no finite
    # gradient.
    max_skipped_steps: int = 10
    # Minutes after which a step, save or preview ends the job, with a message that names the
    # process that hangs.
    timeout_minutes: float = 30.0
    # Compile blocks; `auto`: with CUDA, unless blocks are offloaded. A small Video MMDiT trains
    # about as fast without (docs/speed.md), and starts at once.
    compile: Literal["auto", True, False] = "auto"
    # Replay steps and updates of small networks as CUDA graphs, which saves the time to launch
    # kernels.
    replays: bool = True
    # Start at step 0 from the weights of another run, checkpoint, export or LoRA file.
    init_from: FilePath | None = None
    # Steps between two reports.
    log_every_steps: int = 50
    # Steps between two checkpoints.
    save_every_steps: int = 1000
    # Write checkpoints from a copy while the training goes on. The copy takes as much host memory
    # as a checkpoint takes on the disk.
    save_in_background: bool = False
    # How many checkpoints are kept; 0 keeps all.
    keep_last: int = 3
    # Also keep the checkpoints of every n-th step for good; 0 keeps none.
    keep_every_steps: int = 0
    # The probability of dropping a caption in training, which guidance needs.
    cfg_dropout_prob: float = 0.1
    # Steps between two measurements on held-out items; 0 holds nothing out.
    val_every_steps: int = 0
    # The share of the items that is held out, chosen by a hash of their ids.
    val_share: float = 0.01
    # How many held-out items are measured, at fixed times with fixed noise.
    val_samples: int = 64
    # Steps between two previews; 0 draws none.
    sample_every_steps: int = 0
    # Pictures or clips of a preview; prompts are repeated if there are fewer.
    sample_num_images: int = 8
    # Steps of the sampler.
    sample_num_steps: int = 30
    # How the sampler steps. First order: ddim, euler; second order: heun, ab2, dpmpp_2m, unipc.
    sample_solver: Solver = "ab2"
    # Guidance; 1 is none.
    sample_cfg_scale: float = 3.0
    # Guidance acts at times within this range (0 is clean, 1 is noise).
    sample_cfg_interval: tuple[float, float] = (0.0, 1.0)
    # Fresh noise in the steps of ddim: 0 is deterministic, 1 the ancestral sampler.
    sample_eta: float = 0.0
    # Shift of the sampler's times; above 1 spends more steps at high noise.
    sample_shift: float = 1.0
    # The sampler's times before the shift: `even`, or those of Wan's official code or of Diffusers.
    sample_grid: Grid = "even"
    # Guidance of the low-noise expert of a pair, if it differs.
    sample_cfg_scale_low: float | None = None
    # What guidance leads away from, instead of the empty prompt.
    sample_negative_prompt: str = ""
    # Keys the noise of previews.
    sample_seed: int = 0
    # The prompts of previews.
    sample_prompts: tuple[str, ...] = field(default=())
    # The folder of a CLIP (transformers layout) that scores how well previews show their prompts;
    # null scores nothing. Scores go to samples/scores.jsonl and to the tracker.
    sample_clip: FilePath | None = None

    def __post_init__(self):
        least(self, 1, "batch_size", "grad_accum_steps", "max_steps", "val_samples")
        most(self, 1 << 20, "batch_size", "grad_accum_steps")
        least(self, 1, "log_every_steps", "save_every_steps")
        least(self, 1, "sample_num_images", "sample_num_steps")
        least(self, 0, "warmup_steps", "max_skipped_steps", "keep_last", "keep_every_steps")
        least(self, 0, "sample_every_steps", "val_every_steps", "offload_blocks")
        least(self, 0, "grad_clip", "weight_decay")
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
        if self.sample_clip and not self.sample_every_steps:
            raise ConfigError(
                "sample_clip",
                f"is {self.sample_clip} but sample_every_steps is 0: there is no preview to score;"
                " set sample_every_steps, or sample_clip to null",
            )
        if self.init_from == "":
            raise ConfigError("init_from", "is empty; name what to start from, or write null")
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
        """Refuse guidance of an expert that does not exist, Muon where the denoiser is frozen, and
        previews whose sampler has fewer noise levels than steps."""
        low = self.sample_cfg_scale_low
        if low is not None and not (run.experts.enabled or run.model.expert):
            raise ConfigError(
                "train.sample_cfg_scale_low",
                f"is {low}, but experts.enabled is false and model.expert null: there is no"
                " low-noise expert; leave it out, or set train.sample_cfg_scale",
            )
        adapters_alone = run.lora.enabled and run.lora.train_lora_only
        if self.optimizer == "muon" and (adapters_alone or run.model.freeze):
            key = "lora.train_lora_only" if adapters_alone else "model.freeze"
            raise ConfigError(
                "train.optimizer",
                f"is muon, which steps the matrices of the denoiser, but with {key} none of them is"
                " trained; use adamw",
            )
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
        """Return the sampler of previews, which the evaluation of post-training uses, too."""
        return SamplerConfig(**{name: getattr(self, key) for name, key in SAMPLER_KEYS.items()})

    @property
    def autocast(self) -> bool:
        """Return whether matrix products are computed in bfloat16."""
        return self.precision != "fp32"

    def compiles(self, device: str) -> bool:
        """Return whether blocks are compiled on a device of this type."""
        return self.compile is True or (
            self.compile == "auto" and device == "cuda" and not self.offload_blocks
        )

    def learning_rate(self) -> LearningRate:
        return LearningRate(
            self.lr, self.warmup_steps, self.lr_schedule, self.lr_final, self.max_steps
        )
