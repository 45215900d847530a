"""Keyed sequences of random choices, for captions and scenes."""

from __future__ import annotations

from mmdit.rng import key


class Choices:
    """A sequence of random choices, keyed by `parts`: sequences with different keys are
    independent."""

    def __init__(self, *parts: object):
        self.parts, self.drawn = parts, 0

    def below(self, count: int) -> int:
        """Return a whole number from 0 to `count - 1`."""
        self.drawn += 1
        number = key(*self.parts, self.drawn)
        return ((number >> 20) & 0xFFFF_FFFF) * count >> 32

    def pick(self, options: tuple):
        """Return one of the options."""
        return options[self.below(len(options))]

    def some(self, options: tuple, count: int) -> list:
        """Return `count` different options, in any order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]
