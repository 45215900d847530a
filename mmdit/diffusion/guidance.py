"""Classifier-free guidance as a denoiser around a denoiser (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmdit.diffusion.objective import Call, Denoise, Objective
from mmdit.diffusion.path import Time
from mmdit.interfaces import TextTokens


def guided(
    objective: Objective,
    model: Call,
    text: TextTokens,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Return `denoise(x, t)`: `unconditional + scale * (conditional - unconditional)`, from one
    network call on the doubled batch.

    The combination is made on x0. At a given x_t, x0 is affine in every other prediction and the
    two weights sum to one, so the same is obtained from eps, v or velocity. Scale 1 is one
    conditional call and scale 0 one unconditional call. Guidance acts where `interval[0] <= t <=
    interval[1]`; elsewhere the call is conditional (Kynkäänniemi et al. 2404.07724).
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        remedy = "must be 0 <= low <= high <= 1 (0 clean, 1 noise); use (0, 1) for always"
        raise ValueError(f"guidance interval is {tuple(interval)}; {remedy}")
    conditional = objective.denoiser(model, text)
    if scale == 1:
        return conditional
    unconditional = objective.denoiser(model, text.null())
    both = objective.denoiser(model, TextTokens.cat([text, text.null()]))

    def denoise(x: Tensor, t: Time) -> Tensor:
        strength: Tensor | float
        if isinstance(t, Tensor) and t.dim():
            inside = ((low <= t) & (t <= high)).reshape(-1, *[1] * (x.dim() - 1))
            strength, t = torch.where(inside, scale, 1.0).to(x.device), torch.cat([t, t])
        elif not low <= float(t) <= high:
            return conditional(x, t)
        elif scale == 0:
            return unconditional(x, t)
        else:
            strength = scale
        with_text, without = both(torch.cat([x, x]), t).chunk(2)
        return without + strength * (with_text - without)

    return denoise


def guided_by_expert(
    objective: Objective,
    networks: Mapping[str, Callable[..., Tensor]],
    expert_at: Callable[[Tensor], str],
    text: TextTokens,
    scales: Mapping[str, float],
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Return a denoiser that calls the network in charge of the noise level, with that network's
    guidance scale in `scales`. `expert_at` maps a time, scaled as networks get it, to a name in
    `networks`; a single network has the name "" (see `interfaces.Denoiser`)."""
    denoisers = {
        name: guided(objective, network, text, scales[name], interval)
        for name, network in networks.items()
    }

    def denoise(x: Tensor, t: Time) -> Tensor:
        return denoisers[expert_at(objective.network_time(t))](x, t)

    return denoise
