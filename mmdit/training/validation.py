"""Loss on held-out items at fixed times with fixed noise, so that curves are smooth from one
measurement to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit.data.batches.latent_batches import LatentBatches, StepBatches
from mmdit.diffusion.expert_schedule import FixedTimes
from mmdit.training.distributed import World
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState

QUANTILES = 9


@dataclass
class Validation:
    """Callable on a `TrainState`, by all ranks together. Every held-out item is measured at the
    middles of `QUANTILES` equal parts of the distribution of times, each item with noise of its
    own, whatever the step and the number of processes. If there are several sources, each is
    measured.
    """

    config: TrainConfig
    batches: StepBatches
    world: World

    def __call__(self, state: TrainState) -> dict[str, float | None]:
        """Return `val_loss` (the mean), `val_loss_q1` (the clearest times) … `q9` (the noisiest),
        `val_loss_ema` with averaged weights, and, with several sources, `val_loss/<name>` of each;
        None where a loss is not finite."""
        tables = [self._measure(state, source) for source in self.batches.sources]
        losses = _means(sum(tables[1:], tables[0]))
        values = {"val_loss": sum(losses) / QUANTILES}
        values |= {f"val_loss_q{i}": loss for i, loss in enumerate(losses, 1)}
        if state.ema:
            with state.ema.applied():
                averaged = [self._measure(state, source) for source in self.batches.sources]
            values["val_loss_ema"] = sum(_means(sum(averaged[1:], averaged[0]))) / QUANTILES
        if len(tables) > 1:
            for source, table in zip(self.batches.sources, tables, strict=True):
                values[f"val_loss/{source.plan.name}"] = sum(_means(table)) / QUANTILES
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    @torch.no_grad()
    def _measure(self, state: TrainState, source: LatentBatches) -> Tensor:
        """Return sums and counts of the losses of a source's items, `(2, QUANTILES)`."""
        device, size = self.world.device, self.config.batch_size
        table = torch.zeros(2, QUANTILES, device=device, dtype=torch.float64)  # sums and counts
        state.learner.eval()
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast)
        with state.learner.eager():
            for items in source.held_out(self.config.val_samples):
                samples = len(items.ids) * QUANTILES
                # Every rank takes part in each round; the last round repeats samples to fill up.
                rounds = math.ceil(samples / (size * self.world.data_size))
                everything = torch.arange(rounds * size * self.world.data_size)
                for numbers in everything[self.world.data_rank :: self.world.data_size].split(size):
                    rows, quantile = (numbers % samples) // QUANTILES, numbers % samples % QUANTILES
                    times = ((quantile + 0.5) / QUANTILES).to(device)
                    draws = FixedTimes(source.plan.seed, 0, items.indices[rows].to(device), times)
                    captions = [items.captions[i] for i in rows.tolist()]
                    crops, places = (
                        None if values is None else values[rows].to(device)
                        for values in (items.crops, items.places)
                    )
                    latents = items.latents[rows].to(device)
                    with autocast:  # batches are made outside it, which would refuse float16
                        losses, _ = state.learner(
                            latents, captions, draws, crops=crops, places=places
                        )
                    counted = (numbers < samples).to(device)
                    values = torch.stack(
                        [torch.where(counted, losses, 0.0).double(), counted.double()]
                    )
                    table.index_add_(1, quantile.to(device), values)
        self.world.sum_(table)
        return table


def _means(table: Tensor) -> list[float]:
    """Return the mean losses of a table of sums and counts."""
    return (table[0] / table[1]).tolist()
