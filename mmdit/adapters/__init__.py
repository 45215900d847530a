"""Small trainable updates beside frozen weights.

How they are written to files depends on what a file is for, whoever writes it:

- Files that our own runs continue from (`state_dict`, checkpoints, `best/`, the export of a run)
  hold base and adapters apart, under their own names, with a config that says `lora:`.
  `train.init_from` takes them where the new config has the same adapters, and refuses others.
- A whole model for other programs (`save_dit`, `export --layout`, `export --merge`) holds merged
  weights, which are computed once and in float32; the model in memory keeps its adapters.
- A file of adapters (`interop.lora_writing`, `export --lora`, `lora*.safetensors`) holds the
  adapters alone, and the whole differences that came with them. If its format cannot hold these,
  it is refused.
"""

from mmdit.adapters.layers import Adapter, DoRALinear, LoKrLinear, LoRALinear, is_adapter
from mmdit.adapters.lora import LoRAConfig, adapters, coverage, inject, merge, remove, select
from mmdit.adapters.state import check_adapters, lora_state

__all__ = [
    "Adapter",
    "DoRALinear",
    "LoKrLinear",
    "LoRAConfig",
    "LoRALinear",
    "adapters",
    "check_adapters",
    "coverage",
    "inject",
    "is_adapter",
    "lora_state",
    "merge",
    "remove",
    "select",
]
