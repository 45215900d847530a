"""Times of tokens (Self-Flow, Chefer et al. 2026, 2603.06507): some tokens of a sample are at a
second time, and the network is told the time of each; the teacher of self-alignment sees the whole
sample at the cleaner of the two. Here a token is told its time in the input, beside its place, and
the modulation knows the time of the sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mmdit.diffusion.objective import FlowMatching
from mmdit.models import VideoMMDiT
from mmdit.nn.conditioning import TimeEmbedding
from mmdit.rng import Draws, key
from tests.drivers.arms.wrapped import wrap


def token_times(model: VideoMMDiT) -> None:
    """Change `model` in place: latents may have a further channel, the times of their tokens. What
    it tells them is zero before training."""
    model.input.time = TimeEmbedding(model.config.dim)
    for weight in model.input.time.mlp[2].parameters():
        nn.init.zeros_(weight)
    wrap(model, before=take_times)
    wrap(model.input, behind=tell)


def take_times(model: VideoMMDiT, x: Tensor, t: Tensor, *rest, **named) -> tuple:
    if x.shape[-1] == model.latent_channels:  # all tokens are at the time of their sample
        model.input.embedded = model.input.time(t)[:, None, None, None]
        return x, t, *rest
    x, times = x[..., :-1], x[..., -1]
    embedded = model.input.time(times.flatten()).unflatten(0, times.shape)
    model.input.embedded = model.windows(*times.shape[2:]).partition(embedded)
    return x, t, *rest


def tell(layer: nn.Module, tokens: Tensor) -> Tensor:
    embedded, layer.embedded = layer.embedded, None
    return tokens + embedded.to(tokens.dtype)


def second_times(objective: FlowMatching, clean: Tensor, draws: Draws) -> Tensor:
    """Return the second times `(b,)`, of the same law as the first."""
    times = replace(draws, seed=key(draws.seed, "second time"))
    return objective.draw_time(times, clean.shape[1]).to(clean.device)


def at_two_times(objective: FlowMatching, x: Tensor, t: Tensor, clean: Tensor, draws: Draws):
    """Return the noisy latents `x` at the times `t` of networks, with a share of their tokens at
    the second time instead, and the time of each token as a further channel."""
    second = second_times(objective, clean, draws)
    other = objective.path.add_noise(clean, draws.normal("noise", *clean.shape[1:]), second)
    chosen = draws.uniform("tokens", *x.shape[1:4], 1) < objective.config.token_times
    times = [time.view(-1, 1, 1, 1, 1) for time in (objective.network_time(second), t)]
    return torch.cat([torch.where(chosen, other, x), torch.where(chosen, *times)], -1)
