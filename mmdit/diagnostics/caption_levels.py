"""Measure at which noise levels a network needs its captions. Where little noise hides a sample,
the caption adds nothing; under too much noise, nothing can be decided yet. The levels between are
those that training and the sampler must not miss.

What a caption says about a sample, in nats, is the integral over log SNR of half the SNR times the
amount by which the caption lowers the squared error of the clean estimate (Guo et al. 2005, "Mutual
information and minimum mean-square error"; for diffusion models Kong et al. 2302.03792). This holds
for a perfect network. At low noise, a real one overstates it: it predicts a little worse without
captions, which it has seen in one of ten training samples, and the SNR there multiplies the
difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmdit.diffusion import Objective, sampling_times
from mmdit.diffusion.samplers import SamplerConfig
from mmdit.rng import Draws
from mmdit.training.learner import Learner

LOG_SNRS = tuple(float(value) for value in range(-16, 3))  # starting with the noisiest
TIMES = 1 << 16  # times drawn to estimate the shares of training
BISECTIONS = 50
LEAST = 0.1  # nats per unit of log SNR; less may be chance


@dataclass(frozen=True)
class Level:
    """One noise level. `error`, `error_without`: mean squared errors of the clean estimate with and
    without captions; `nats`: what captions say, per unit of log SNR."""

    log_snr: float
    t: float
    error: float
    error_without: float
    nats: float


@torch.no_grad()
def caption_levels(
    learner: Learner,
    latents: Tensor,
    captions: list[str],
    log_snrs: Sequence[float] = LOG_SNRS,
    batch_size: int = 16,
    seed: int = 0,
    crops: Tensor | None = None,
    places: Tensor | None = None,
) -> list[Level]:
    """Return the measurements of the network of `learner` on raw `latents (b, F, H, W, C)`, at each
    of `log_snrs` that its objective trains. Both errors of a level use the same noise. `crops (b,
    4)`: which parts of their pictures the samples show, for a network with `model.crop`; `places
    (b, 5)`: where the samples lie in their clips, for a network trained on tiles. ValueError if the
    objective trains none of the levels."""
    clean, objective = learner.spec.normalize(latents), learner.objective
    text = learner.text_encoder(captions)
    dropped = torch.ones(len(captions), dtype=torch.bool, device=latents.device)
    texts, size = (text, text.drop(dropped)), clean[0].numel()
    given = {"crop": crops, "place": places}
    inputs = {name: value.to(clean.device) for name, value in given.items() if value is not None}
    levels = []
    for log_snr in log_snrs:
        t = time_of(objective, log_snr)
        if not objective.t_range[0] <= t <= objective.t_range[1]:
            continue
        errors = [0.0, 0.0]
        for rows in torch.arange(len(clean), device=clean.device).split(batch_size):
            draws = Draws(seed, round(100 * log_snr) % (1 << 31), rows)
            noise = draws.normal("noise", *clean.shape[1:])
            x = objective.path.add_noise(clean[rows], noise, t)
            part = {name: value[rows] for name, value in inputs.items()}
            for which, some in enumerate(texts):
                estimate = objective.denoiser(learner.model, some[rows], **part)(x, t)
                errors[which] += (estimate.float() - clean[rows]).square().sum().item()
        error, without = (value / len(clean) for value in errors)
        nats = 0.5 * math.exp(log_snr) * (without - error)
        levels.append(Level(log_snr, t, error / size, without / size, nats))
    if not levels:
        least, most = objective.t_range
        raise ValueError(
            f"the times of this training lie between {least:g} and {most:g}, where none of"
            " the noise levels that are measured lies"
        )
    return levels


def log_snr_at(objective: Objective, t: float) -> float:
    """Return log(alpha² / sigma²) at the time `t`; it is infinite at the ends of the path."""
    alpha, sigma = (float(value) for value in objective.path.alpha_sigma(t))
    if not alpha or not sigma:
        return math.inf if alpha else -math.inf
    return 2 * math.log(alpha / sigma)


def time_of(objective: Objective, log_snr: float) -> float:
    """Return the time with the log SNR `log_snr`, moved to the nearest one that training can
    draw."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_snr_at(objective, middle) > log_snr else (low, middle)
    return objective.path.snap((low + high) / 2)


def peak(levels: list[Level]) -> Level | None:
    """Return the noisiest level at which captions say at least `LEAST` and more than at its
    neighbours; None if there is none. The first level has only one neighbour, and the last one
    never counts."""
    nats = [-math.inf, *(level.nats for level in levels)]
    for level, before, here, after in zip(levels, nats, nats[1:], nats[2:]):
        if here >= LEAST and before < here > after:
            return level
    return None


def shares(
    objective: Objective, levels: list[Level], frames: int, sampler: SamplerConfig
) -> list[tuple[float, int]]:
    """Return, for each level, the share of the times drawn in training on clips of `frames` frames
    that are nearest to it in log SNR, and how many steps of the sampler begin there."""
    drawn = objective.draw_time(Draws.of(0, 0, TIMES), frames)
    alpha, sigma = objective.path.alpha_sigma(drawn)
    trained = 2 * (alpha / sigma).log()
    shift = sampler.shift * objective.clip_shift(frames)
    times = sampling_times(objective, sampler.steps, shift, grid=sampler.grid)
    steps = torch.tensor([log_snr_at(objective, t) for t in times[:-1]])
    centres = [level.log_snr for level in levels]
    edges = torch.tensor([(first + second) / 2 for first, second in pairwise(centres)])
    counts = [
        torch.bincount(torch.bucketize(values.float(), edges), minlength=len(levels))
        for values in (trained, steps)
    ]
    return list(zip((counts[0] / TIMES).tolist(), counts[1].tolist(), strict=True))


def format_levels(
    objective: Objective, levels: list[Level], frames: int, sampler: SamplerConfig
) -> str:
    """Return a table for people, starting with the noisiest level, and a sentence on where captions
    decide most."""
    visits = shares(objective, levels, frames, sampler)
    rows = [
        f"{level.log_snr:8.1f} {level.t:8.5f} {level.error:9.4f} {level.error_without:9.4f}"
        f" {level.nats:7.3f} {100 * trained:8.1f} % {steps:6d}"
        for level, (trained, steps) in zip(levels, visits, strict=True)
    ]
    head = " log SNR        t     error   without    nats   training  steps"
    most = peak(levels)
    if most is None:
        return "\n".join([head, *rows, "the captions decide nothing at these levels"])
    noisier = [visit for level, visit in zip(levels, visits) if level.log_snr <= most.log_snr]
    sentence = (
        f"captions decide most at t = {most.t:.4f}; at it and above, training spends"
        f" {100 * sum(share for share, _ in noisier):.1f} % of its times, and the sampler"
        f" {sum(steps for _, steps in noisier)} of its {sampler.steps} steps"
    )
    return "\n".join([head, *rows, sentence])
