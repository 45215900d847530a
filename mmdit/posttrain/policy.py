"""The trained network and frozen copies of its weights, as velocity fields."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from mmdit.adapters.strength import carry_over
from mmdit.diffusion import guided_by_expert
from mmdit.interfaces import TextTokens
from mmdit.posttrain.losses import wide
from mmdit.posttrain.setup import Setup
from mmdit.training.memory.shards import holding, local

Velocity = Callable[[Tensor, float | Tensor], Tensor]  # x (B, ...) and sigma to float32 (B, ...)


class Policy:
    """`reference`: the trained weights that the first run began from. `old`: a copy that follows
    the policy, slowly with NFT; AWM's is that of the epoch's beginning."""

    def __init__(self, setup: Setup):
        self.setup, self.model = setup, setup.learner.model
        parameters = self.model.named_parameters()
        self.trained = {name: p for name, p in parameters if p.requires_grad}
        self.reference, self.old = self.snapshot(), self.snapshot()

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the trained weights, by the network's names, sharded like them."""
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def averaged(self) -> dict[str, Tensor]:
        """Return the running average (`ema:`) of the trained weights, by the network's names."""
        ema = self.setup.state.ema
        assert ema is not None, "ema.enabled was checked"
        return {name.removeprefix("model."): value for name, value in ema.shadow.items()}

    @torch.no_grad()
    def renew_old(self, share: float) -> None:
        """Move `old` towards the policy; `share` of it stays as it was."""
        for name, parameter in self.trained.items():
            local(self.old[name]).lerp_(local(parameter), 1 - share)

    def carry_over_old(self, alphas: dict[str, float]) -> None:
        """Rescale the adapters of `old`, trained with other `alphas`, as those of the policy were:
        they compute what they did."""
        with holding(self.trained, self.old):
            carry_over(self.model, alphas)
            self.old = self.snapshot()

    def _call_with(self, weights: dict[str, Tensor], *inputs: object) -> Tensor:
        """Call the network with `weights` in place of the trained ones. Where it is sharded it
        gathers what its parameters hold, whatever a call is given, so the shards change places."""
        if self.setup.learner.sharded:
            with holding(self.trained, weights):
                return self.model(*inputs)
        return functional_call(self.model, weights, inputs)

    def velocity(self, text: TextTokens, weights: dict[str, Tensor] | None = None) -> Velocity:
        """Return the velocity field of the policy, or of a copy of its trained `weights`, which is
        not differentiated, with the guidance that rollouts have."""
        setup = self.setup
        rollout = setup.config.rollout
        networks: dict[str, Callable[..., Tensor]] = dict(setup.whole.networks())
        if weights is not None:
            networks[setup.levels.expert] = partial(self._call_with, weights)
        low = rollout.guidance if rollout.guidance_low is None else rollout.guidance_low
        denoise = guided_by_expert(
            setup.learner.objective,
            networks,
            setup.whole.expert_at,
            text,
            {"": rollout.guidance, "high": rollout.guidance, "low": low},
        )

        def field(x: Tensor, t: float | Tensor) -> Tensor:
            learns = torch.is_grad_enabled() and weights is None
            with (
                torch.set_grad_enabled(learns),
                torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.train.autocast),
            ):
                clean = denoise(x, t).float()
            return (x - clean) / (wide(t, x) if isinstance(t, Tensor) else t)

        return field
