"""Features of pictures from a timm network with local weights, for rewards and metrics. Nothing is
downloaded, and nothing is unpickled."""

from __future__ import annotations

import difflib
from pathlib import Path

from torch import Tensor, nn

from mmdit.interop.picture_resizing import square
from mmdit.pixels import Standard
from mmdit.weights import Checkpoint, check_numbers, fill


class FeatureEncoder(nn.Module):
    """`encoder(pixels (N, 3, H, W) in [0, 1])` returns `(N, width)` float32: pooled features,
    before any classifier. The network is frozen; the features are differentiable in the pixels.

    `name`: an architecture of timm. `weights`: its .safetensors file. ValueError if timm is missing
    or does not know the name, or if the file does not fit.
    """

    def __init__(self, name: str, weights: str | Path):
        super().__init__()
        try:
            import timm
            from timm.data import resolve_model_data_config
        except (ImportError, RuntimeError, OSError) as error:  # perhaps of torchvision
            raise ValueError(
                f"features need timm, which cannot be imported ({error}): pip install timm, and a"
                " torchvision of the same build as torch"
            ) from None
        if not timm.is_model(name):  # names with hf-hub: would be downloaded
            near = difflib.get_close_matches(name, timm.list_models(), 3)
            raise ValueError(
                f"timm has no model {name!r}; near names are {', '.join(near) or 'none'}"
            )
        if Path(weights).suffix != ".safetensors":
            raise ValueError(f"{weights} must be the .safetensors file of the timm model {name}")
        self.network = timm.create_model(name, pretrained=False, num_classes=0)
        classifier = self.network.pretrained_cfg.get("classifier") or ()
        load_network(self.network, classifier, Checkpoint(weights), weights)
        self.requires_grad_(False).eval()
        settings = resolve_model_data_config(self.network)
        self.size, self.statistics = settings["input_size"][-1], (settings["mean"], settings["std"])

    def forward(self, pixels: Tensor) -> Tensor:
        images = square(pixels.float(), self.size)
        standard = Standard(self.statistics, images.device)
        return self.network(standard.to_standard(images)).float()


def load_network(
    network: nn.Module, unused: str | tuple[str, ...], stored: Checkpoint, source: str | Path
) -> None:
    """Load all weights strictly into `network`, buffers such as running means included. The file
    may hold the parts `unused`, such as a classifier, and may lack the number of batches behind
    running means. ValueError if it does not fit; `source` names it."""
    names = (unused,) if isinstance(unused, str) else unused
    prefixes = tuple(f"{name}." for name in names)
    buffers = {n: b for n, b in network.named_buffers() if n in network.state_dict()}
    needed = [name for name in buffers if not name.endswith("num_batches_tracked")]
    if missing := [name for name in needed if name not in stored.entries]:
        raise ValueError(f"{source} lacks {len(missing)} tensors, first {missing[0]}")
    left_out = [name for name in stored.entries if name.startswith(prefixes)]
    fill(network, stored, {}, source, ignored=(*buffers, *left_out))
    for name, tensor in stored.tensors():
        if name in buffers:
            if buffers[name].is_floating_point():
                check_numbers(name, tensor, source)
            if tensor.shape != buffers[name].shape:
                raise ValueError(f"{source}: {name} is {tuple(tensor.shape)}, of another model")
            buffers[name].copy_(tensor)
