"""What is trained: denoiser and text encoder under one objective. This is the module that DDP wraps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.interfaces import LatentSpec
from mmdit.rng import Draws


class Learner(nn.Module):
    """`forward` gives the per-sample losses of one micro-batch; everything random in it comes from `draws`."""

    def __init__(self, model: nn.Module, text_encoder: nn.Module, objective, spec: LatentSpec, caption_dropout: float = 0.0):
        super().__init__()
        self.model, self.text_encoder = model, text_encoder
        self.objective, self.spec, self.caption_dropout = objective, spec, caption_dropout
        self._compiled: list = []  # in a list: the compiled twin shares the parameters and is no submodule of its own

    def compile_model(self) -> None:
        """Run training steps through torch.compile; sampling keeps the plain model (its shapes vary)."""
        self._compiled.append(torch.compile(self.model))

    def is_stored(self, name: str) -> bool:
        """Whether a checkpoint holds this entry of the state: a frozen foreign encoder stays where it was loaded from."""
        return not (name.startswith("text_encoder.") and getattr(self.text_encoder, "stored_elsewhere", False))

    def stored_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if self.is_stored(name)}

    def forward(self, latents: Tensor, captions: list[str], draws: Draws, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`latents (b, F, H, W, C)` raw, `keep` as `models.routing` draws it. Returns `(losses (b,), t (b,))`, float32."""
        model = self._compiled[0] if self._compiled else self.model
        text = self.text_encoder(captions)
        if self.caption_dropout:
            text = text.drop(draws.uniform("caption_dropout") < self.caption_dropout)
        parts = self.objective.loss(model, self.spec.normalize(latents), text, draws, keep=keep)
        return parts.per_sample, parts.t
