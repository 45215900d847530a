"""From captions to pixels: text encoder → sampler → tokenizer. Used by previews, `sample`, `evaluate` and the quickstart alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.data.captions import CaptionsConfig, with_trigger
from mmdit.diffusion import SamplerConfig, guided, sample
from mmdit.interfaces import Tokenizer
from mmdit.rng import Draws
from mmdit.training.learner import Learner


@dataclass(frozen=True)
class SampleSettings:
    """How to sample; `seed` and the index of a picture decide its noise, whatever the batch size."""

    sampler: SamplerConfig = SamplerConfig()
    cfg_scale: float = 3.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    @staticmethod
    def of(train) -> SampleSettings:
        """The `train.sample_*` keys."""
        sampler = SamplerConfig(train.sample_solver, train.sample_num_steps, train.sample_eta, train.sample_shift)
        return SampleSettings(sampler, train.sample_cfg_scale, train.sample_cfg_interval, train.sample_seed)


@dataclass
class Pipeline:
    """A learner in evaluation and a tokenizer. `device` is where the learner is. `captions`: prompts get its trigger word, as the
    captions in training do."""

    learner: Learner
    tokenizer: Tokenizer
    precision: str = "fp32"
    captions: CaptionsConfig = CaptionsConfig()

    @property
    def device(self) -> torch.device:
        return next(self.learner.model.parameters()).device

    @torch.no_grad()
    def latents(self, captions: list[str], width: int, height: int, frames: int, settings: SampleSettings, first: int = 0,
                guess: tuple[Tensor, float] | None = None) -> Tensor:
        """Raw latents `(B, F, h, w, C)`; sample `i` of the call draws the noise of picture `first + i`. `guess`: raw latents to
        start from, and the time they are noised to."""
        learner, device = self.learner, self.device
        rows, columns = learner.spec.grid(width, height)
        draws = Draws(settings.seed, 0, torch.arange(first, first + len(captions), device=device))
        noise = draws.normal("sample", frames, rows, columns, learner.spec.channels)
        was_training = learner.training
        learner.eval()
        try:
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision != "fp32")
            with autocast, torch.compiler.set_stance("force_eager"):
                text = learner.text_encoder([with_trigger(caption, self.captions) for caption in captions])
                denoise = guided(learner.objective, learner.model, text, settings.cfg_scale, settings.cfg_interval)
                start = (learner.spec.normalize(guess[0].to(device)), guess[1]) if guess else None
                clean = sample(denoise, noise, learner.objective, settings.sampler, draws, guess=start)
        finally:
            learner.train(was_training)
        return learner.spec.denormalize(clean)

    @torch.no_grad()
    def __call__(self, captions: list[str], width: int, height: int, frames: int = 1, settings: SampleSettings = SampleSettings(),
                 first: int = 0, batch_size: int = 64,
                 done: Callable[[int], object] | None = None) -> Tensor:
        """Pixels in [0, 1] `(B, F, 3, H, W)` on the CPU, `batch_size` captions at a time; `done(captions)` follows each batch."""
        parts = []
        for start in range(0, len(captions), batch_size):
            some = captions[start : start + batch_size]
            latents = self.latents(some, width, height, frames, settings, first + start)
            parts.append(self.tokenizer.decode(latents).float().cpu())
            if done:
                done(len(some))
        return torch.cat(parts)

    @torch.no_grad()
    def refine(self, pixels: Tensor, captions: list[str], width: int, height: int, strength: float,
               settings: SampleSettings = SampleSettings(), first: int = 0, done: Callable[[int], object] | None = None) -> Tensor:
        """Super-resolution: `pixels (B, F, 3, H, W)` enlarged to `width × height`, noised to t = `strength`, and denoised by this
        model, one clip at a time. What the small clip says stays; detail below that noise level is drawn anew."""
        parts = []
        for i, (clip, caption) in enumerate(zip(pixels, captions)):
            large = F.interpolate(clip, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
            guess = self.tokenizer.encode(large[None].to(self.device))
            latents = self.latents([caption], width, height, len(clip), settings, first + i, guess=(guess, strength))
            parts.append(self.tokenizer.decode(latents).float().cpu())
            if done:
                done(1)
        return torch.cat(parts)
