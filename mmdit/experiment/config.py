"""The root of a configuration: one YAML file, its sections, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmdit import config as config_io
from mmdit.adapters import (
    LoRAConfig,
)
from mmdit.config import ConfigError, FilePath
from mmdit.data.batches.latent_batches import DataConfig
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig, target_sizes
from mmdit.data.dataset.captions import CaptionsConfig
from mmdit.data.dataset.clips import clip_plan
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig, build_objective
from mmdit.diffusion.experts import ExpertsConfig
from mmdit.interfaces import LatentSpec
from mmdit.models import ModelConfig, TreadConfig, VideoMMDiTConfig, WanModelConfig
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.text_encoders import ByteLevelConfig, TextEncoderConfig
from mmdit.tokenizers import TokenizerConfig, VTPTokenizerConfig
from mmdit.training.alpha.schedule import AlphaScheduleConfig
from mmdit.training.ema import EMAConfig
from mmdit.training.parallel import ParallelConfig
from mmdit.training.pipeline import check_levels
from mmdit.training.train_config import TrainConfig


@dataclass(frozen=True)
class ExperimentConfig:
    """One YAML file. Every section is a dataclass beside the code it configures; README lists all
    keys."""

    experiment_name: str
    output_dir: FilePath = "runs"
    seed: int = 42
    num_workers: int = 4
    video: VideoConfig = field(default_factory=VideoConfig)
    tokenizer: TokenizerConfig = field(default_factory=VTPTokenizerConfig)
    text_encoder: TextEncoderConfig = field(default_factory=ByteLevelConfig)
    model: ModelConfig = field(default_factory=VideoMMDiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    bucketing: BucketingConfig = field(default_factory=BucketingConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tread: TreadConfig = field(default_factory=TreadConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    alpha_schedule: AlphaScheduleConfig = field(default_factory=AlphaScheduleConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    posttrain: PosttrainConfig | None = None  # for mmdit.scripts.posttrain alone

    def __post_init__(self):
        if (
            Path(self.experiment_name).name != self.experiment_name
            or self.experiment_name in ("", "..")
            or "\0" in self.experiment_name
        ):
            raise ConfigError(
                "experiment_name",
                f"is {self.experiment_name!r}, must be a folder name without separators",
            )
        wan = isinstance(self.model, WanModelConfig)
        target_sizes(
            self.video, self.bucketing, self.tokenizer.latent_f * (1 + wan)
        )  # every size must suit the tokenizer, and patches
        clip_plan(
            self.video, LatentSpec(1, temporal=getattr(self.tokenizer, "temporal", 1))
        )  # ConfigError: what it cannot cut
        if wan:
            self._check_wan()
        elif getattr(self.tokenizer, "picture", "none") != "none":
            raise ConfigError(
                "tokenizer.picture",
                f"is {self.tokenizer.picture}; only Wan's I2V models take one: set it to none",
            )
        elif self.lora.enabled and self.lora.train_lora_only and not self.train.init_from:
            raise ConfigError(
                "train.init_from",
                "is empty but lora.train_lora_only is true: adapters would train on random frozen"
                " weights; name the run, checkpoint or export to adapt",
            )
        if self.model.freeze and (self.lora.enabled or not (wan or self.train.init_from)):
            raise ConfigError(
                "model.freeze",
                "is true "
                + (
                    "with lora.enabled, which trains adapters in it; set one of them to false"
                    if self.lora.enabled
                    else (
                        "without train.init_from: the text encoder would learn for random weights;"
                        " name a run"
                    )
                ),
            )
        for name in (name for name in ("alpha_schedule", "experts") if getattr(self, name).enabled):
            if not self.lora.enabled:
                raise ConfigError(
                    f"{name}.enabled",
                    "is true, but lora.enabled is false: it is about adapters; set both or none",
                )
            if self.parallel.type == "fsdp":
                raise ConfigError(
                    f"{name}.enabled",
                    "is true with parallel.type fsdp, which cuts what must be whole; use ddp",
                )
            if self.posttrain is not None:
                raise ConfigError(
                    f"{name}.enabled",
                    "is true with a posttrain section, whose loops know nothing of it; remove one",
                )
        if (
            self.experts.enabled
            and wan
            and (
                self.model.expert or len({self.model.boundary, self.experts.boundary} - {None}) > 1
            )
        ):
            raise ConfigError(
                "experts.boundary",
                f"is {self.experts.boundary}: a pair needs model.boundary alike, model.expert null",
            )
        if self.experts.enabled and not self.lora.train_lora_only:
            raise ConfigError(
                "experts.enabled",
                "is true with lora.train_lora_only false: both would train their common base",
            )
        if (
            self.alpha_schedule.enabled
            and self.alpha_schedule.on_change == "ramp"
            and self.train.compile is not False
        ):
            raise ConfigError(
                "alpha_schedule.on_change",
                "is ramp: blocks would be compiled anew; set train.compile: false",
            )
        own, stored = self.train, getattr(self.model, "dtype", "float32")
        if getattr(self.model, "products", "") == "float8" and (
            own.precision == "fp32" or self.lora.enabled or self.posttrain is not None
        ):
            raise ConfigError(
                "model.products",
                "is float8, for whole models in bfloat16, not with train.precision fp32, lora or"
                " posttrain; leave it out",
            )
        if self.parallel.type == "fsdp" and (
            own.optimizer != "adamw"
            or own.offload_optimizer
            or own.offload_blocks
            or stored == "float8"
        ):
            raise ConfigError(
                "parallel.type",
                "is fsdp, which cuts parameters, but train.optimizer other than adamw,"
                " train.offload_optimizer, train.offload_blocks and model.dtype float8 need whole"
                " ones; use adamw without these, or ddp",
            )
        if self.num_workers < 0:
            raise ConfigError(
                "num_workers",
                f"is {self.num_workers}, must not be negative; 0 reads in the training process",
            )
        if own.sample_every_steps:
            self._check_previews()
        if self.posttrain is not None and not (wan or self.train.init_from):
            raise ConfigError(
                "train.init_from",
                "is empty with a posttrain section, which improves a trained model; name its run",
            )

    def _check_previews(self) -> None:
        """That the sampler of previews has as many noise levels as it has steps."""
        objective = build_objective(self.train.objective, self.diffusion, self.flow_matching)
        frames = LatentSpec(1, temporal=getattr(self.tokenizer, "temporal", 1)).frames(
            self.video.num_frames
        )
        check_levels(self.train, objective, frames)

    def _check_wan(self) -> None:
        """What a Wan transformer was made for, and what its trainer can do."""
        flow, train = self.flow_matching, self.train
        if (train.objective, flow.path, flow.prediction, flow.time_scale) != (
            "flow_matching",
            "linear",
            "velocity",
            1000.0,
        ):
            raise ConfigError(
                "train.objective",
                "and flow_matching: Wan predicts the velocity on the linear path with time_scale"
                " 1000; leave these keys at their defaults",
            )
        if self.tread.enabled:
            raise ConfigError(
                "tread.enabled",
                "is true, but a Wan transformer routes no tokens; remove the section",
            )
        if self.model.expert and train.sample_every_steps:
            raise ConfigError(
                "train.sample_every_steps",
                f"is {train.sample_every_steps}, but the {self.model.expert}-noise expert alone"
                " draws no pictures; set it to 0 and use mmdit.scripts.sample, which loads both",
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.experiment_name


def load_experiment_config(path: str | Path, overrides: list[str] = ()) -> ExperimentConfig:
    """Read a YAML config with `section.key=value` overrides; ConfigError says file, line and dotted
    path."""
    return config_io.load(ExperimentConfig, path, overrides)
