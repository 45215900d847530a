"""Sampling with networks that do not fit on the GPU together: they are kept in the memory of the
CPU, and accelerate's hooks bring each to the GPU when it is called. The samples stay the same bit
for bit: weights are moved, never changed.

model        one network at a time is on the GPU, as a whole: the text encoder, the denoiser (of a
             pair, the expert in use), or the tokenizer
sequential   the same, except that of the denoisers one block at a time is on the GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.interfaces import Tokenizer
from mmdit.nn.stored_weights import StoredWeight
from mmdit.training.pipeline import Pipeline

Offload = Literal["none", "model", "sequential"]


def offload_pipeline(pipeline: Pipeline, offload: Offload) -> None:
    """Prepare a pipeline whose networks are on the CPU to compute on `pipeline.device`; in place,
    after all changes to weights have been made. ConfigError if accelerate is missing, or cannot
    move such weights."""
    if offload == "none":
        return
    try:
        import accelerate
    except ImportError as error:
        raise ConfigError(
            "--offload", f"is {offload}, which needs accelerate ({error}); pip install accelerate"
        ) from None
    networks, device = pipeline.networks(), pipeline.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    denoisers = [network for name, network in networks.items() if name.startswith("model")]
    tokenizers = [network for name, network in networks.items() if name.startswith("tokenizer")]
    visitors = [pipeline.learner.text_encoder, *tokenizers]
    if offload == "model":
        visitors += denoisers
    visits = Visits(visitors, device)
    pipeline.tokenizer = VisitingTokenizer(pipeline.tokenizer, tokenizers, visits)
    if offload == "model":
        return
    for network in denoisers:
        if any(isinstance(weight, StoredWeight) for weight in network.parameters()):
            raise ConfigError(
                "--offload",
                "is sequential, which cannot move weights of model.dtype float8, int8 or nf4; use"
                " model",
            )
        network.register_forward_pre_hook(lambda *_: visits.send_home())
        accelerate.cpu_offload(
            network,
            device,
            offload_buffers=True,
            preload_module_classes=[type(part).__name__ for part in stages(network)],
        )


def stages(network: nn.Module) -> list[nn.Module]:
    """Return the parts of a network that are on the GPU one after the other: its blocks, and the
    layers before and behind them."""
    result: list[nn.Module] = []
    for part in network.children():
        result += part if isinstance(part, nn.ModuleList) else [part]
    return result


class Visits:
    """Networks of which one at a time is on `device`: calling one moves the others back."""

    def __init__(self, networks: Iterable[nn.Module], device: torch.device):
        from accelerate import cpu_offload_with_hook

        self.hooks = {}
        for network in networks:
            if next(network.parameters(), None) is None:
                network.to(device)
                continue
            network.to("cpu")
            _, self.hooks[network] = cpu_offload_with_hook(network, device)
            network.register_forward_pre_hook(lambda module, _: self.send_home(module))

    def send_home(self, but: nn.Module | None = None) -> None:
        """Move all networks except `but` back to the memory of the CPU."""
        for network, hook in self.hooks.items():
            away = next(network.parameters()).device.type != "cpu"
            if network is not but and away:
                hook.offload()
                torch.cuda.empty_cache()

    def call(self, networks: list[nn.Module], function: Callable[[Tensor], Tensor], x: Tensor):
        """Return `function(x)`, with `networks`, which it uses, on the device meanwhile."""
        self.send_home()
        for network in networks:
            if network in self.hooks:
                self.hooks[network].hook.pre_forward(network)
        result = function(x)
        self.send_home()
        return result


class VisitingTokenizer(Tokenizer):
    """`tokenizer`, whose networks are on the GPU while it encodes or decodes."""

    def __init__(self, tokenizer: Tokenizer, networks: list[nn.Module], visits: Visits):
        self.tokenizer, self.networks, self.visits = tokenizer, networks, visits
        self.spec, self.fingerprint = tokenizer.spec, tokenizer.fingerprint

    @property
    def name(self) -> str:
        return self.tokenizer.name

    def encode(self, pixels: Tensor) -> Tensor:
        return self.visits.call(self.networks, self.tokenizer.encode, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.visits.call(self.networks, self.tokenizer.decode, latents)
