"""The tensors of adapters, separate from the base."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmdit.adapters.layers import is_adapter
from mmdit.adapters.lora import adapters
from mmdit.config import ConfigError


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of every adapter, as `<layer>.lora_A` and so on, and its present alpha as
    `<layer>.alpha` (0-d), for a safetensors file."""
    return {
        f"{name}.{part}": tensor
        for name, layer in adapters(model).items()
        for part, tensor in layer.state().items()
    }


def check_adapters(
    here: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object
) -> None:
    """Raise ConfigError unless every layer that has an adapter in `tensors` has one of the same
    type and sizes in `here`: a mixture of two types would compute neither. `source` names the
    file."""
    stored = {name: tuple(tensors[name].shape) for name in tensors if is_adapter(name)}
    layers = {name.rpartition(".")[0] for name in stored}
    present = {
        name: tuple(tensor.shape)
        for name, tensor in here.items()
        if is_adapter(name) and name.rpartition(".")[0] in layers
    }
    for name in sorted(stored | present):
        if stored.get(name) != present.get(name):
            raise ConfigError(
                "train.init_from",
                f"has adapters of another kind than lora: asks for: {name} is "
                f"{stored.get(name, 'not there')} in {source}, {present.get(name, 'not there')} "
                "here; set lora: as in the run that wrote it, or fold them into its weights with "
                "export --merge and start from that file",
            )
