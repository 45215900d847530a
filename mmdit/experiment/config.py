"""The root of a configuration: one YAML file and its sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmdit import config as config_io
from mmdit.adapters import LoRAConfig
from mmdit.config import ConfigError, FilePath, check_sections
from mmdit.data.batches.latent_batches import DataConfig
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig
from mmdit.data.dataset.captions import CaptionsConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig
from mmdit.diffusion.experts import ExpertsConfig
from mmdit.models import ModelConfig, TreadConfig, VideoMMDiTConfig
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.text_encoders import ByteLevelConfig, TextEncoderConfig
from mmdit.tokenizers import TokenizerConfig, VTPTokenizerConfig
from mmdit.training.alpha.schedule import AlphaScheduleConfig
from mmdit.training.ema import EMAConfig
from mmdit.training.parallel import ParallelConfig
from mmdit.training.train_config import TrainConfig


@dataclass(frozen=True)
class ExperimentConfig:
    """One YAML file. Every section is a dataclass beside the code that it configures, and checks
    itself what it needs of the others (`Section.check`)."""

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
        name = self.experiment_name
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ConfigError(
                "experiment_name", f"is {name!r}, must be a folder name without separators"
            )
        check_sections(self)
        if self.num_workers < 0:
            raise ConfigError(
                "num_workers",
                f"is {self.num_workers}, must not be negative; 0 reads in the training process",
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.experiment_name


def load_experiment_config(path: str | Path, overrides: list[str] = ()) -> ExperimentConfig:
    """Read a YAML config with `section.key=value` overrides. ConfigError says file, line and dotted
    path."""
    return config_io.load(ExperimentConfig, path, overrides)
