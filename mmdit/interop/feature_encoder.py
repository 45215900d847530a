"""Features of pictures by a network of timm with local weights, for rewards and metrics. Nothing is
downloaded, and nothing is unpickled."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.pixels import Standard
from mmdit.weights import Checkpoint, check_numbers, fill


def square(images: Tensor, size: int) -> Tensor:
    """Return `(N, 3, size, size)` in [0, 1]: the middle of `images (N, 3, H, W)`, whose short side
    becomes `size`."""
    short = min(images.shape[-2:])
    if short != size:
        images = F.interpolate(images, scale_factor=size / short, mode="bicubic", antialias=True)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size].clamp(0, 1)


class FeatureEncoder(nn.Module):
    """`encoder(pixels (N, 3, H, W) in [0, 1]) -> (N, width)` float32: pooled features, before any
    classifier. The network is frozen; the features are differentiable in the pixels.

    `name`: an architecture of timm. `weights`: its .safetensors file. ValueError: timm is missing
    or does not know the name, or the file does not fit.
    """

    def __init__(self, name: str, weights: str | Path):
        super().__init__()
        try:
            import timm
            from timm.data import resolve_model_data_config
        except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch
            raise ValueError(
                f"features need timm, which cannot be imported ({error}): pip install timm, and a"
                " torchvision of the same build as torch"
            ) from None
        if not timm.is_model(name):  # hf-hub: names would be fetched
            near = difflib.get_close_matches(name, timm.list_models(), 3)
            raise ValueError(
                f"timm has no model {name!r}; near names are {', '.join(near) or 'none'}"
            )
        if Path(weights).suffix != ".safetensors":
            raise ValueError(f"{weights} must be the .safetensors file of the timm model {name}")
        self.network = timm.create_model(name, pretrained=False, num_classes=0)
        classifier = self.network.pretrained_cfg.get("classifier") or ()
        _load(self.network, classifier, Checkpoint(weights), weights)
        self.requires_grad_(False).eval()
        settings = resolve_model_data_config(self.network)
        self.size, self.statistics = settings["input_size"][-1], (settings["mean"], settings["std"])

    def forward(self, pixels: Tensor) -> Tensor:
        images = square(pixels.float(), self.size)
        standard = Standard(self.statistics, images.device)
        return self.network(standard.to_standard(images)).float()


def _load(
    network: nn.Module, classifier: str | tuple[str, ...], stored: Checkpoint, source: str | Path
) -> None:
    """Load weights strictly, but for a classifier in the file; running means are buffers."""
    names = (classifier,) if isinstance(classifier, str) else classifier
    prefixes = tuple(f"{name}." for name in names)
    buffers = {n: b for n, b in network.named_buffers() if n in network.state_dict()}
    if missing := [name for name in buffers if name not in stored.entries]:
        raise ValueError(f"{source} lacks {len(missing)} tensors, first {missing[0]}")
    unused = [name for name in stored.entries if name.startswith(prefixes)]
    fill(network, stored, {}, source, ignored=(*buffers, *unused))
    for name, tensor in stored.tensors():
        if name in buffers:
            if buffers[name].is_floating_point():
                check_numbers(name, tensor, source)
            if tensor.shape != buffers[name].shape:
                raise ValueError(f"{source}: {name} is {tuple(tensor.shape)}, of another model")
            buffers[name].copy_(tensor)
