"""Functions before and behind the `forward` of a module. They are part of it, where torch's hooks
watch its calls: a network with hooks is not replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Wrapped:
    """`before` change the inputs of `forward`, `behind` its output, each in the order in which they
    were added."""

    before: tuple[Callable[..., tuple], ...]
    behind: tuple[Callable[[Any, Any], Any], ...]

    def forward(self, *inputs, **named):
        for change in self.before:
            inputs = change(self, *inputs, **named)
        output = super().forward(*inputs, **named)
        for change in self.behind:
            output = change(self, output)
        return output


def wrap(
    module: nn.Module,
    before: Callable[..., tuple] | None = None,
    behind: Callable[[Any, Any], Any] | None = None,
) -> None:
    """Have `before(module, *inputs, **named)` return the positional inputs of the `forward` of
    `module`, and `behind(module, output)` its output. They are functions, so that copies of the
    module call them with themselves; names of weights stay."""
    if not isinstance(module, Wrapped):
        plain = type(module)
        module.__class__ = type(plain.__name__, (Wrapped, plain), {})
        module.before, module.behind = (), ()
    module.before += () if before is None else (before,)
    module.behind += () if behind is None else (behind,)
