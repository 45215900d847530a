"""Refuse experts whose turns fall in step with the data, so that one of them would never see what
the other is trained on."""

from __future__ import annotations

from collections import Counter

from mmdit.config import ConfigError
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.mixture import MixedPlan
from mmdit.diffusion.expert_schedule import ExpertSchedule

LOOKED_AT = 20_000  # steps: a regular pattern shows long before
EXPECTED = 8  # steps on the same, on the average; none of them is no chance


def check_turns(
    experts: ExpertSchedule | None, plan: BatchPlan | MixedPlan, max_steps: int
) -> None:
    """Raise ConfigError where an expert has its turns and sees nothing of a source, or no single
    frames, or no clips: steps of a kind are spread evenly, and so are the turns."""
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
