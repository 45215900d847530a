"""Parameters of tests that run with `pytest -m thorough`: more cases of what others have shown."""

from collections.abc import Callable, Iterable

import pytest


def thorough(*values: object) -> list:
    """Return `values` with the mark; a tuple holds the values of several arguments."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.thorough) for row in rows]


def thorough_unless(is_kept: Callable[..., bool], values: Iterable) -> list:
    """Return `values` in their order, with the mark where `is_kept(value)` is false."""
    return [
        value if is_kept(value) else pytest.param(value, marks=pytest.mark.thorough)
        for value in values
    ]
