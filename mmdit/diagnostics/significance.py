"""Tell what several seeds show: whether a rate lies above a level, and not by luck.

A rate is tested twice, and the larger p-value decides. In the first test (Student's t) the units
are the seeds: another training gives another rate. In the second (the exact binomial) they are the
prompts of all seeds: only so many were asked. Either test alone can be fooled, the first by seeds
that agree by chance, the second by seeds that do not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def student_tail(t: float, freedom: int) -> float:
    """Return the probability that Student's t with `freedom` degrees of freedom is `t` or more
    (Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite sum)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 - inside) / 2


def mean_above(values: Sequence[float], level: float) -> float:
    """Return the p-value of Student's one-sided test of `mean of values <= level`; 1 for a single
    value. Values without any spread leave no room for luck: 0 if they lie above the level, else
    1."""
    if len(values) < 2:
        return 1.0
    spread = statistics.stdev(values)
    above = statistics.fmean(values) - level
    if spread == 0:
        return 0.0 if above > 0 else 1.0
    return student_tail(above / (spread / math.sqrt(len(values))), len(values) - 1)


def share_above(correct: int, count: int, level: float) -> float:
    """Return the p-value of the exact one-sided binomial test of `share <= level`: the probability
    of `correct` or more right ones among `count` if the share is `level`."""
    total = 0.0
    for k in range(correct, count + 1):
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        total += math.exp(ways + k * math.log(level) + (count - k) * math.log1p(-level))
    return min(total, 1.0)
