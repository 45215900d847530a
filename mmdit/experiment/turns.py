"""Refuse experts whose turns coincide with a pattern in the data, so that one of them would never
see some of what the other is trained on."""

from __future__ import annotations

from collections import Counter

from mmdit.config import ConfigError
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.mixture import MixedPlan
from mmdit.diffusion.expert_schedule import ExpertSchedule

LOOKED_AT = 20_000  # steps that are checked: a regular pattern shows long before
EXPECTED = 8  # steps of an expert on some data, on average; with so many, seeing none is not chance


def check_turns(
    experts: ExpertSchedule | None, plan: BatchPlan | MixedPlan, max_steps: int
) -> None:
    """Raise ConfigError if an expert would never see a source, or single frames, or clips, in its
    turns. This can happen because turns, and the steps on each kind of data, are spread evenly."""
    if experts is None or experts.routing != "block":
        return
    steps = range(min(max_steps, LOOKED_AT))
    pairs = Counter((experts.active(step), plan.seen_at(step)) for step in steps)
    turns, totals = Counter[str](), Counter[str]()
    for (expert, seen), count in pairs.items():
        turns[expert] += count
        totals[seen] += count
    for expert, trained in turns.items():
        for seen, count in totals.items():
            if trained * count >= EXPECTED * len(steps) and not pairs[expert, seen]:
                raise ConfigError(
                    "experts.switch_every",
                    f"is {experts.switch_every}, and all {count} steps on {seen} in the first"
                    f" {len(steps)} fall into turns of the other expert: {expert} would never see"
                    f" them. Take {experts.switch_every + 1}, or set experts.routing: by_sigma",
                )
