"""Change the alpha of adapters while they are in use. Every type of adapter has `alpha`, and
`scale`, which is computed from it."""

from __future__ import annotations

import math

import torch
from torch import nn

from mmdit.adapters.layers import Adapter, LoRALinear, is_adapter
from mmdit.adapters.lora import adapters


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all adapters, without those of the base layers, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


@torch.no_grad()
def set_alpha(layer: Adapter, alpha: float, preserve: bool = False) -> float:
    """Change alpha. With `preserve`, the outer factor is rescaled so that the layer's output does
    not change. Return the ratio of the old scale to the new one, by which that factor is, or would
    have to be, multiplied; it is 1 where alpha has no effect (LoKr with both factors whole).
    ValueError if alpha is not positive and finite."""
    if not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
        raise ValueError(f"alpha is {alpha!r}, must be a positive number")
    before = layer.scale
    layer.alpha = float(alpha)
    ratio = before / layer.scale
    if preserve:
        layer.outer.mul_(ratio)
    return ratio


def alphas(model: nn.Module) -> dict[str, float]:
    """Return the present alpha of every adapter, by layer."""
    return {name: float(layer.alpha) for name, layer in adapters(model).items()}


def carry_over(model: nn.Module, stored: dict[str, float]) -> None:
    """Rescale the weights of adapters that were trained with the alphas `stored`, so that they keep
    their strength under the present alphas of the layers. Layers that `stored` lacks are new and
    stay as they are."""
    for name, layer in adapters(model).items():
        wanted = layer.alpha
        set_alpha(layer, stored.get(name, wanted))
        set_alpha(layer, wanted, preserve=True)


def same_strength(model: nn.Module, stored: dict[str, float], rslora: bool) -> dict[str, float]:
    """Return the alphas `stored`, converted so that they give the same scale under the rule of the
    layers here. `rslora` tells the rule under which they were stored: scale = alpha / √rank, or
    alpha / rank if false."""
    result = dict(stored)
    for name, layer in adapters(model).items():
        if name in stored and isinstance(layer, LoRALinear) and layer.rslora != rslora:
            root = math.sqrt(layer.rank)
            result[name] = stored[name] * root if rslora else stored[name] / root
    return result


def load_alphas(model: nn.Module, stored: dict[str, float]) -> None:
    """Set the alphas that `alphas` returned. ValueError for a layer that has no adapter here."""
    layers = adapters(model)
    for name, alpha in stored.items():
        if name not in layers:
            raise ValueError(
                f"the stored alpha {alpha!r} is of {name!r}, which has no adapter: use the run's"
                " lora: section"
            )
        set_alpha(layers[name], alpha)
