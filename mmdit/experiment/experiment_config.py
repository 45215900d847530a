"""The root of a configuration: one YAML file with its sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmdit import config as config_io
from mmdit.adapters import LoRAConfig
from mmdit.config import ConfigError, FilePath, check_sections
from mmdit.data.batches.data_config import DataConfig
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig, target_sizes
from mmdit.data.dataset.captions import CaptionsConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig
from mmdit.diffusion.expert_schedule import ExpertsConfig
from mmdit.experiment.card_config import CardConfig
from mmdit.models import ModelConfig, TreadConfig, VideoMMDiTConfig
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.text_encoders import ByteLevelConfig, TextEncoderConfig
from mmdit.tokenizers import TokenizerConfig, VTPTokenizerConfig
from mmdit.training.alpha.schedule import AlphaScheduleConfig
from mmdit.training.ema import EMAConfig
from mmdit.training.parallel import ParallelConfig
from mmdit.training.trackers import TrackConfig
from mmdit.training.train_config import TrainConfig


@dataclass(frozen=True)
class ExperimentConfig:
    """One YAML file: scalar keys, and sections. Every section is a dataclass beside the code that
    it configures, and itself checks what it requires of other sections (`Section.check`)."""

    # The name of the run's folder within `output_dir`.
    experiment_name: str
    # The folder that holds all runs.
    output_dir: FilePath = "runs"
    # Keys every random draw: initial weights, order of the data, noise, crops in time.
    seed: int = 42
    # Processes that read and prepare data beside the training; 0 reads in the training process.
    num_workers: int = 4
    # Size, length and frame rate of the training samples; one frame is text-to-image.
    video: VideoConfig = field(default_factory=VideoConfig)
    # The tokenizer, which turns pixels into the latents that the model sees.
    tokenizer: TokenizerConfig = field(default_factory=VTPTokenizerConfig)
    # The text encoder, which turns captions into tokens.
    text_encoder: TextEncoderConfig = field(default_factory=ByteLevelConfig)
    # The network.
    model: ModelConfig = field(default_factory=VideoMMDiTConfig)
    # Settings of the objective `ddpm`.
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    # Settings of the objective `flow_matching`.
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    # Optimization, reports, checkpoints and previews.
    train: TrainConfig = field(default_factory=TrainConfig)
    # A tracker to which figures and previews are also sent.
    track: TrackConfig = field(default_factory=TrackConfig)
    # How a model is distributed over several GPUs.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # The moving average of the weights, with which pictures are drawn.
    ema: EMAConfig = field(default_factory=EMAConfig)
    # Several sizes of pictures in one training.
    bucketing: BucketingConfig = field(default_factory=BucketingConfig)
    # How pictures are cropped to their size.
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    # How captions are varied from step to step.
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    # The sources of the training data, and how they are read.
    data: DataConfig = field(default_factory=DataConfig)
    # Token routing, which makes training steps cheaper.
    tread: TreadConfig = field(default_factory=TreadConfig)
    # Adapters: small trained updates beside frozen weights.
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    # Alpha of adapters, changed in phases.
    alpha_schedule: AlphaScheduleConfig = field(default_factory=AlphaScheduleConfig)
    # Two sets of adapters, one for high and one for low noise.
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    # What the model card beside an export says about licence and data.
    card: CardConfig = field(default_factory=CardConfig)
    # Training with a reward; only `mmdit posttrain` reads it.
    posttrain: PosttrainConfig | None = None

    def __post_init__(self):
        name = self.experiment_name
        unseen = any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
        if Path(name).name != name or name in ("", "..") or unseen:
            raise ConfigError(
                "experiment_name",
                f"is {name!r}, must be a folder name without separators and control characters",
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

    @property
    def sample_size(self) -> tuple[int, int, int, int]:
        """Return the width, height, number of frames and frame rate of samples for which no other
        size is asked; with buckets, the size is that of the first one."""
        width, height = target_sizes(self.video, self.bucketing, self.tokenizer.latent_f)[0]
        return width, height, self.video.num_frames, self.video.sample_fps


def load_experiment_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML config, with `section.key=value` overrides. ConfigError names file, line and
    dotted path."""
    return config_io.load(ExperimentConfig, path, overrides)
