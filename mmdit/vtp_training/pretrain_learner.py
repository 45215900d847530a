"""The model in training: all losses share one pass of the encoder. Axes: b picture, c latent
channel, h, w latent rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from vtp.models import VTPModel

from mmdit.rng import Draws
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_losses import (
    PatchDiscriminator,
    contrast_loss,
    discriminator_loss,
    reconstruction_loss,
)
from mmdit.vtp_training.self_supervision import SelfSupervision, taking_part


def noisy_latents(latents: Tensor, draws: Draws, amount: float) -> Tensor:
    """Add Gaussian noise with the standard deviation `u · std_c` to `latents (b, c, h, w)`: u is
    uniform in [0, amount] for each picture, std_c is that of the batch in each channel.

    The latents of a generator are never exact: a decoder trained with noise ignores errors of that
    size, and the encoder learns to spread information over the channels. The gradient flows through
    std_c, so that the encoder gains nothing by scaling its latents up.
    """
    if not amount:
        return latents
    std = latents.float().std((0, 2, 3), keepdim=True)
    level = amount * draws.uniform("latent_noise/level", 1, 1, 1)
    return latents + level * std * draws.normal("latent_noise", *latents.shape[1:])


@dataclass
class StepLosses:
    """`total`: the loss to differentiate; `parts`: scalars for the report; `pictures`: the
    predicted and the target pictures, for the discriminator, or None."""

    total: Tensor
    parts: dict[str, Tensor]
    pictures: tuple[Tensor, Tensor] | None = None


class TokenizerLearner(nn.Module):
    """The tokenizer and the further networks that its losses train. Networks of losses with weight
    0 are not built."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.config = config
        self.model = VTPModel(config.network())
        self.self_supervision = None
        if config.self_supervision.weight:
            self.self_supervision = SelfSupervision(config.self_supervision, self.model.trunk)
        else:
            self.model.trunk.mask_token.requires_grad_(False)
        if config.freeze_encoder:
            self.model.trunk.requires_grad_(False)
        self.discriminator = PatchDiscriminator() if config.adversarial.weight else None
        self.pixel_loss = reconstruction_loss

    def compile(self) -> None:
        """Compile, with one graph for each size, the transformer blocks (which share graphs) and
        the pixel loss."""
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, 8 * len(self.config.images.sizes)
        )
        decoder = self.model.pixel_decoder
        assert decoder is not None, "a tokenizer that is trained has one"
        for block in (*self.model.trunk.blocks, *decoder.blocks):
            block.compile(dynamic=False)
        self.pixel_loss = torch.compile(reconstruction_loss, dynamic=False)

    def generator_parts(self) -> nn.ModuleDict:
        """Return all modules that the main optimizer trains (the teacher among them gets no
        gradient)."""
        parts = {"model": self.model, "self_supervision": self.self_supervision}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    def forward(
        self,
        target: Tensor,
        tokens: Tensor | None,
        facts: Tensor,
        draws: Draws,
        adversarial: bool = False,
    ) -> StepLosses:
        """Return all losses of a step on the normalised pictures `target (b, 3, H, W)`; `tokens`
        and `facts`: see `PictureBatch`. `adversarial`: the last stage, with a frozen encoder and
        the discriminator's loss."""
        config = self.config
        trains_encoder = not (adversarial or config.freeze_encoder)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_encoder):
            features = self.model.trunk(target, is_training=True, use_bottleneck=False)
            latents = self.model.trunk.bottleneck(features["x_norm_patchtokens"])
            latents = rearrange(latents, "b (h w) c -> b c h w", h=target.shape[-2] // 16)
        noisy = noisy_latents(latents, draws, config.latent_noise)
        predicted = self.model.get_latents_decoded_images(noisy).float()
        terms = config.reconstruction
        pixel_loss, squared = self.pixel_loss(
            predicted, target, terms.l1, terms.l2, terms.gradient, terms.levels
        )
        parts = {"reconstruction": pixel_loss, "squared_error": squared.detach().mean()}
        total = terms.weight * pixel_loss
        if adversarial:
            parts["adversarial"] = -self._frozen_opinion(predicted).mean()
            total = total + config.adversarial.weight * parts["adversarial"]
        else:
            if config.contrast.weight and len(facts):  # a step with few pictures may have no shapes
                assert tokens is not None, "captions are made where this loss has a weight"
                parts["contrast"] = self._contrast(features["x_norm_clstoken"], tokens, facts)
                total = total + config.contrast.weight * parts["contrast"]
            if self.self_supervision is not None:
                settings = config.self_supervision
                chosen = taking_part(len(target), settings.fraction, target.device)
                parts["dino"], parts["ibot"] = self.self_supervision.loss(
                    self.model.trunk, target[chosen], draws[chosen]
                )
                total = total + settings.weight * (parts["dino"] + parts["ibot"])
        parts = {name: value.detach() for name, value in parts.items()}
        return StepLosses(total, parts, (predicted.detach(), target))

    def _contrast(self, class_tokens: Tensor, tokens: Tensor, facts: Tensor) -> Tensor:
        count = min(self.config.contrast.pairs, len(facts))
        image = F.normalize(self.model.visual_proj(class_tokens[:count]).float(), dim=-1)
        text = self.model.get_clip_text_feature(tokens[:count]).float()
        scale = self.model.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in CLIP
        return contrast_loss(image, text, scale, facts[:count])

    def _frozen_opinion(self, predicted: Tensor) -> Tensor:
        critic = self._critic()
        critic.requires_grad_(False)
        scores = critic(predicted)
        critic.requires_grad_(True)
        return scores

    def _critic(self) -> PatchDiscriminator:
        assert self.discriminator is not None, "the last stage has one"
        return self.discriminator

    def discriminator_loss(self, losses: StepLosses) -> Tensor:
        """Return the discriminator's loss on the pictures of the step, after the decoder's
        update."""
        critic = self._critic()
        assert losses.pictures is not None, "an adversarial step is not replayed"
        decoded, given = losses.pictures
        return discriminator_loss(critic(given), critic(decoded))
