"""Several sources in one training: decide which of them a step sees. Like the plan of each source,
this is a pure function of (seed, step).

A step's global batch comes from a single source, because a batch has one size and one number of
frames. The steps of a source are spread evenly and numbered, so that its plan need not know of the
others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.rng import uniform


class Mixture:
    """Shares the steps of a training out among sources.

    The first source gets step s if floor(s·f + phase(seed)) grows, where f is its share. The
    remaining steps are numbered anew and shared out among the other sources in the same way. So in
    any number of steps each source has its share to within a few steps, and exactly so on average
    over seeds.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        total = math.fsum(shares)
        self.shares = [share / total for share in shares]
        # each source's share, except the last one's, of the steps that the sources before it leave
        left = [math.fsum(shares[number:]) for number in range(len(shares))]
        self._fractions = [share / rest for share, rest in zip(shares, left, strict=True)][:-1]
        self._phases = [uniform(seed, "source", number) for number in range(len(shares) - 1)]

    def at(self, step: int) -> tuple[int, int]:
        """Return the number (from 0) of the source of a step, and how many steps that source had
        before."""
        position = step
        pairs = zip(self._fractions, self._phases, strict=True)
        for source, (fraction, phase) in enumerate(pairs):
            before = math.floor(position * fraction + phase)
            if math.floor((position + 1) * fraction + phase) > before:
                return source, before
            position -= before
        return len(self.shares) - 1, position

    def counts(self, steps: int) -> list[int]:
        """Return how many of the first `steps` steps each source has."""
        counts, left = [], steps
        for fraction, phase in zip(self._fractions, self._phases, strict=True):
            counts.append(math.floor(left * fraction + phase))
            left -= counts[-1]
        return [*counts, left]


class MixedPlan:
    """The source of every step, and what is seen of each source. `plans`: of the sources, each with
    its `name`; `shares`: of the steps; `max_steps`: the length of the training, for the report."""

    def __init__(self, plans: list[BatchPlan], shares: Sequence[float], max_steps: int):
        self.plans, self.max_steps = plans, max_steps
        self.global_batch, self.seed = plans[0].global_batch, plans[0].seed
        self.mixture = Mixture(shares, self.seed)

    def seen_at(self, step: int) -> str:
        """Return in words what a step sees."""
        source, position = self.mixture.at(step)
        return f"{self.plans[source].seen_at(position)} of the source {self.plans[source].name}"

    def table(self) -> list[dict]:
        """Return the rows of every source's plan, with its name as `source`."""
        return [{"source": plan.name} | row for plan in self.plans for row in plan.table()]

    def shares(self) -> list[dict]:
        """Return, for each source, its share of the steps, as configured and as counted over the
        training, and its epochs. `epoch_steps` counts steps of the training until as many of its
        samples were seen as it has items."""
        rows = []
        counts = self.mixture.counts(self.max_steps)
        for plan, asked, count in zip(self.plans, self.mixture.shares, counts, strict=True):
            rows.append(
                {
                    "source": plan.name,
                    "share": asked,
                    "steps": count,
                    "counted": count / self.max_steps,
                    "epoch_steps": plan.epoch_steps / asked,
                    "epochs": count / plan.epoch_steps,
                }
            )
        return rows

    def report(self) -> str:
        """Return a text for people about what training will see."""
        rows = self.shares()
        lines = [f"{len(rows)} sources; each step is of one of them"]
        for plan, row in zip(self.plans, rows, strict=True):
            lines.append(
                "source {source}: {share:.2%} of the steps; it has {steps:,} of {of:,}"
                " ({counted:.2%}), which are {epochs:.4g} epochs of {epoch_steps:.4g} steps of the"
                " training. Among its own steps:".format(**row, of=self.max_steps)
            )
            lines.append(plan.report())
        longest = max(row["epoch_steps"] for row in rows)
        lines.append(f"every source has had an epoch after {longest:.4g} steps of the training")
        return "\n".join(lines)
