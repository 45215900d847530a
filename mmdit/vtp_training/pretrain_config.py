"""Configuration of a tokenizer pre-training run: the root, which `python -m mmdit.scripts.train_vtp
--config` decodes, and its sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vtp.models import VTPConfig
from vtp.tokenizers import ByteTokenizer

from mmdit.config import (
    MOST_BLOCKS,
    ConfigError,
    FilePath,
    changed_keys,
    check_sections,
    in_one_line,
    least,
    most,
)
from mmdit.training.ema import EMAConfig
from mmdit.vtp_training.images import ImagesConfig
from mmdit.vtp_training.pretrain_losses import (
    AdversarialConfig,
    ContrastConfig,
    ReconstructionConfig,
)
from mmdit.vtp_training.self_supervision import SelfSupervisionConfig


@dataclass(frozen=True)
class NetworkConfig:
    """The section `model:`: those keys of the checkpoint's config.json that set the sizes of the
    network."""

    # Width of the encoder.
    vision_embed_dim: int = 192
    # Blocks of the encoder.
    vision_depth: int = 6
    # Heads of the encoder.
    vision_num_heads: int = 3
    # Width of its MLP as a multiple of the encoder's width.
    vision_mlp_ratio: float = 4.0
    # Normalise queries and keys, which keeps attention bounded at the high learning rates of a
    # short run.
    vision_use_qk_norm: bool = True
    # Channels of a latent.
    vision_feature_bottleneck: int = 64
    # Width of the decoder.
    decoder_embed_dim: int = 256
    # Blocks of the decoder.
    decoder_depth: int = 6
    # Heads of the decoder.
    decoder_num_heads: int = 4
    # Normalise queries and keys of the decoder.
    decoder_use_qk_norm: bool = True
    # Width of the text tower.
    text_embed_dim: int = 192
    # Blocks of the text tower.
    text_depth: int = 4
    # Heads of the text tower.
    text_num_heads: int = 3
    # The most bytes of a caption that are read.
    text_context_length: int = 128

    def __post_init__(self):
        whole = [name for name, value in vars(self).items() if type(value) is int]
        least(self, 1, *whole)
        least(self, 2, "text_context_length")  # for the start and end tokens
        least(self, 0, "vision_mlp_ratio", above=True)
        most(self, MOST_BLOCKS, "vision_depth", "decoder_depth", "text_depth", "vision_mlp_ratio")
        for part in ("vision", "decoder"):
            width, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            if width % (4 * heads):
                raise ConfigError(
                    f"{part}_embed_dim",
                    f"is {width} with {part}_num_heads {heads}; must be a multiple of 4 x heads,"
                    " for rotary positions",
                )
        if self.text_embed_dim % self.text_num_heads:
            raise ConfigError(
                "text_embed_dim",
                f"is {self.text_embed_dim}, must be a multiple of text_num_heads"
                f" {self.text_num_heads}",
            )


@dataclass(frozen=True)
class OptimizationConfig:
    """The section `train:`. The learning rate is a function of the step and the planned number of
    steps."""

    # The planned number of steps.
    max_steps: int = 12000
    # Plan as many steps as fit into this many minutes, at the speed that is measured early in the
    # run; null plans `max_steps`.
    max_minutes: float | None = None
    # The learning rate.
    lr: float = 1.5e-3
    # The share of `lr` that is left at the last step.
    final_lr: float = 0.01
    # Steps over which the learning rate rises from 0.
    warmup_steps: int = 300
    # Decoupled weight decay.
    weight_decay: float = 0.02
    # The decay of AdamW's second moments.
    beta2: float = 0.98
    # The largest global norm of the gradient; 0 does not clip.
    clip_norm: float = 1.0
    # Stop the run after more steps than this in a row without a finite gradient.
    max_skipped_steps: int = 10
    # Compile the network on a GPU.
    compile: bool = True
    # Replay losses, gradients and updates as CUDA graphs, which saves the time to launch their
    # kernels one by one. Losses of the adversarial stage are launched.
    replays: bool = True
    # Steps between two reports.
    log_every_steps: int = 50
    # Steps between two evaluations.
    eval_every_steps: int = 1000
    # Steps between two checkpoints.
    save_every_steps: int = 2000
    # The number of moving shapes on which the exported checkpoint is scored.
    evaluation_samples: int = 512

    def __post_init__(self):
        least(self, 1, "max_steps", "log_every_steps", "eval_every_steps", "save_every_steps")
        least(self, 1, "evaluation_samples")
        least(self, 0, "warmup_steps", "weight_decay", "clip_norm", "max_skipped_steps")
        least(self, 0, "final_lr", "beta2")
        least(self, 0, "max_minutes", "lr", above=True)
        if self.warmup_steps >= self.max_steps:
            raise ConfigError(
                "warmup_steps", f"is {self.warmup_steps}, must be below max_steps {self.max_steps}"
            )
        for name, example in (("lr", 1.5e-3), ("beta2", 0.98)):
            value = getattr(self, name)
            if value >= 1:
                raise ConfigError(name, f"is {value}, must be below 1, for example {example}")
        if self.final_lr > 1:
            raise ConfigError("final_lr", f"is {self.final_lr}, must be a share of lr, from 0 to 1")


@dataclass(frozen=True)
class PretrainConfig:
    """The root of the configuration of a tokenizer pre-training. A loss with weight 0 is not built,
    costs nothing and leaves no tensor in the export."""

    # The folder of the run.
    output_dir: FilePath = "runs/vtp_tiny_f16d64"
    # An exported checkpoint folder of the same network to start from, for a further stage.
    init_from: FilePath | None = None
    # Keys every random draw.
    seed: int = 0
    # The network.
    model: NetworkConfig = field(default_factory=NetworkConfig)
    # The pictures that it learns from, which are generated.
    images: ImagesConfig = field(default_factory=ImagesConfig)
    # The loss between the decoded picture and the original.
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    # A discriminator, which sharpens the decoder in a last stage.
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    # The contrast of pictures and captions, which gives latents meaning.
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    # Self-distillation, which needs no captions.
    self_supervision: SelfSupervisionConfig = field(default_factory=SelfSupervisionConfig)
    # The largest amount of Gaussian noise, in standard deviations of a channel, that is added to
    # latents before they are decoded, because the latents of a generator are never exact. 0 is off.
    latent_noise: float = 0.2
    # Train the decoder alone: latents, their statistics and all caches stay valid.
    freeze_encoder: bool = False
    # Optimization, reports and checkpoints.
    train: OptimizationConfig = field(default_factory=OptimizationConfig)
    # The moving average of the weights; it is what is exported.
    ema: EMAConfig = field(default_factory=EMAConfig)

    def __post_init__(self):
        least(self, 0, "latent_noise")
        if self.freeze_encoder:
            if not self.init_from:
                raise ConfigError(
                    "freeze_encoder",
                    "is true without init_from: a random encoder would stay random; name a"
                    " checkpoint",
                )
            if self.contrast.weight or self.self_supervision.weight:
                raise ConfigError(
                    "freeze_encoder",
                    f"is true with contrast.weight {self.contrast.weight} and"
                    f" self_supervision.weight {self.self_supervision.weight}, which train the"
                    " encoder; set them to 0, or it to false",
                )
        if not self.ema.enabled:
            raise ConfigError(
                "ema.enabled",
                "is false, but the average is what is exported: set ema.decay to 0 for none",
            )
        if not self.ema.use_for_sampling:
            raise ConfigError(
                "ema.use_for_sampling",
                "is false, but a tokenizer draws no previews; leave it out (ema.decay: 0 is no"
                " average)",
            )
        for reason, section, names in self.without_part():
            for name, usual in changed_keys(getattr(self, section), names).items():
                value, must = map(in_one_line, (getattr(getattr(self, section), name), usual))
                raise ConfigError(
                    f"{section}.{name}",
                    f"is {value}, which has no effect where {reason}; leave it out (it is {must}"
                    f" then), or set {reason.split()[0]}",
                )
        check_sections(self)

    def without_part(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield, for keys that have no effect with this configuration, the reason, their section
        and their names."""
        for loss in ("adversarial", "contrast", "self_supervision"):
            section = getattr(self, loss)
            if not section.weight:
                names = tuple(name for name in vars(section) if name != "weight")
                yield f"{loss}.weight is 0", loss, names
        if not self.reconstruction.gradient:
            yield "reconstruction.gradient is 0", "reconstruction", ("levels",)
        mix = vars(self.images.mix)
        if not mix["piles"]:
            yield "images.mix.piles is 0", "images", ("objects",)
        if not mix["shapes"]:
            yield "images.mix.shapes is 0", "images", ("shape_pool",)
        if mix["shapes"] == sum(mix.values()):
            only = "images.mix.shapes has no other beside it"
            yield only, "images", ("texture_pool", "refresh_every")

    @property
    def run_dir(self) -> Path:
        """Return the folder of the run."""
        return Path(self.output_dir)

    def network(self) -> VTPConfig:
        """Return the contents of the checkpoint's config.json. The text tower exists only if it is
        trained."""
        return VTPConfig(
            image_size=256,
            train_clip=self.contrast.weight > 0,
            text_vocab_size=ByteTokenizer.vocab_size,
            decoder_norm_layer="rmsnorm",
            **vars(self.model),
        )
