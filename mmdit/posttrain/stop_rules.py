"""Measure how far the policy has moved, and decide when training must stop."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.interfaces import TextTokens
from mmdit.posttrain.policy import Policy
from mmdit.posttrain.rollouts import Rollouts
from mmdit.posttrain.setup import Setup
from mmdit.rng import Draws

PROBES = 32  # number of samples on which the drift is measured
PROBE_LEVELS = (0.9, 0.6, 0.3)


class StopRules:
    """Measures the drift, and compares it, and the growth of SRPO's latents, with their limits."""

    def __init__(self, setup: Setup, policy: Policy, rollouts: Rollouts):
        self.setup, self.policy, self.rollouts = setup, policy, rollouts
        self._text: TextTokens | None = None
        self._probes: list[tuple[float, Tensor, Tensor]] = []  # level, state, first velocity

    def _make_probes(self) -> TextTokens:
        setup = self.setup
        text = setup.text[torch.arange(min(PROBES, len(setup.prompts)), device=setup.device)]
        draws = Draws.of(setup.seed, -1, len(text), setup.device)
        velocity = self.policy.velocity(text, self.policy.reference)
        clean = self.rollouts.sample(velocity, draws).clean
        noise = draws.normal("probe", *setup.shape)
        for t in setup.levels.probes(PROBE_LEVELS):
            x = (1 - t) * clean + t * noise
            self._probes.append((t, x, velocity(x, t)))
        return text

    @torch.no_grad()
    def drift(self) -> float:
        """Return the mean squared change of the velocity since the start, on fixed samples of the
        initial model at fixed noise levels."""
        if self._text is None:
            self._text = self._make_probes()
        velocity = self.policy.velocity(self._text)
        changes = [(velocity(x, t) - first).square().mean().item() for t, x, first in self._probes]
        return sum(changes) / len(changes)

    def reason(self, drift: float) -> str | None:
        """Return why training must stop, or None if it may go on; all ranks agree on which.
        Checkpoints hold everything that is compared, so a run that a stop rule ended stays ended
        after a resume."""
        reason = self._reason(drift)
        if self.setup.world.any(reason is not None):
            return reason or "another process found a reason to"
        return None

    def _reason(self, drift: float) -> str | None:
        config, history = self.setup.config, self.setup.history
        if config.max_drift and drift > config.max_drift:
            return f"the drift {drift:.3g} is above posttrain.max_drift, {config.max_drift:g}"
        if "latent_std" in history:
            first, last = history["std"].item(), history["latent_std"].item()
            if last > config.srpo.max_std_growth * first:
                return (
                    f"the latents' deviation grew to {last:.3g} from {first:.3g}, above"
                    " posttrain.srpo.max_std_growth"
                )
        return None
