"""Loss on held-out items at fixed times with fixed noise: curves that a few training steps do not
shake."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.diffusion.expert_schedule import FixedTimes
from mmdit.training.distributed import World
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState

QUANTILES = 9


@dataclass
class Validation:
    """Callable on a `TrainState`, by all ranks together. Every held-out item is measured at the
    middles of `QUANTILES` equal parts of the distribution of times, each item with noise of its
    own; step and number of processes do not enter.
    """

    config: TrainConfig
    batches: LatentBatches
    world: World

    def __call__(self, state: TrainState) -> dict[str, float | None]:
        """Return `val_loss` (their mean), `val_loss_q1` (the clearest) … `q9` (the noisiest), and
        `val_loss_ema` of the averaged weights; None where a loss is not finite."""
        losses = self._measure(state)
        values = {"val_loss": sum(losses) / QUANTILES}
        values |= {f"val_loss_q{i}": loss for i, loss in enumerate(losses, 1)}
        if state.ema:
            with state.ema.applied():
                values["val_loss_ema"] = sum(self._measure(state)) / QUANTILES
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    @torch.no_grad()
    def _measure(self, state: TrainState) -> list[float]:
        device, size = self.world.device, self.config.batch_size
        table = torch.zeros(2, QUANTILES, device=device, dtype=torch.float64)  # sums and counts
        state.learner.eval()
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast)
        with autocast, torch.compiler.set_stance("force_eager"):
            for items in self.batches.held_out(self.config.val_samples):
                samples = len(items.ids) * QUANTILES
                # Every rank takes part in each round, with repeats if need be.
                rounds = math.ceil(samples / (size * self.world.size))
                everything = torch.arange(rounds * size * self.world.size)
                for numbers in everything[self.world.rank :: self.world.size].split(size):
                    rows, quantile = (numbers % samples) // QUANTILES, numbers % samples % QUANTILES
                    times = ((quantile + 0.5) / QUANTILES).to(device)
                    draws = FixedTimes(
                        self.batches.plan.seed, 0, items.indices[rows].to(device), times
                    )
                    captions = [items.captions[i] for i in rows.tolist()]
                    crops, places = (
                        None if values is None else values[rows].to(device)
                        for values in (items.crops, items.places)
                    )
                    losses, _ = state.learner(
                        items.latents[rows].to(device), captions, draws, crops=crops, places=places
                    )
                    counted = (numbers < samples).to(device)
                    values = torch.stack(
                        [torch.where(counted, losses, 0.0).double(), counted.double()]
                    )
                    table.index_add_(1, quantile.to(device), values)
        self.world.sum_(table)
        return (table[0] / table[1]).tolist()
