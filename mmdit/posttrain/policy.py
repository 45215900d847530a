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
    """The trained network and two frozen copies of its weights. `reference`: the weights from which
    the first run began. `old`: a copy that follows the policy after each epoch; at once, or slowly
    with NFT."""

    def __init__(self, setup: Setup):
        self.setup, self.model = setup, setup.learner.model
        parameters = self.model.named_parameters()
        self.trained = {name: p for name, p in parameters if p.requires_grad}
        self.reference, self.old = self.snapshot(), self.snapshot()

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the trained weights by their names in the network, sharded as they
        are."""
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def averaged(self) -> dict[str, Tensor]:
        """Return the running average (`ema:`) of the trained weights, by their names in the
        network."""
        ema = self.setup.state.ema
        assert ema is not None, "ema.enabled was checked"
        return {name.removeprefix("model."): value for name, value in ema.shadow.items()}

    @torch.no_grad()
    def renew_old(self, share: float) -> None:
        """Move `old` towards the policy, keeping the share `share` of it."""
        for name, parameter in self.trained.items():
            local(self.old[name]).lerp_(local(parameter), 1 - share)

    def carry_over_old(self, alphas: dict[str, float]) -> None:
        """Rescale the adapters of `old`, which were trained with other `alphas`, as those of the
        policy were rescaled, so that their output stays the same."""
        with holding(self.trained, self.old):
            carry_over(self.model, alphas)
            self.old = self.snapshot()

    def _call_with(self, weights: dict[str, Tensor], *inputs: object) -> Tensor:
        """Call the network with `weights` in place of the trained ones. A sharded network gathers
        the contents of its own parameters, whatever weights a call is given, so there the shards
        are swapped."""
        if self.setup.learner.sharded:
            with holding(self.trained, weights):
                return self.model(*inputs)
        return functional_call(self.model, weights, inputs)

    def velocity(self, text: TextTokens, weights: dict[str, Tensor] | None = None) -> Velocity:
        """Return the velocity field of the policy under the guidance of rollouts; with `weights`,
        that of a copy of the trained weights, which is not differentiated."""
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
