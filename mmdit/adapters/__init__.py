"""Small trainable updates beside frozen weights.

What becomes of them on the way out of a model, whoever writes:

- what is ours to go on with holds both apart, under their own names, with a config that says
  `lora:` (`state_dict`, checkpoints, `best/`, the export of a run); `train.init_from` takes them
  where the new config has the same adapters, and refuses others;
- what is a whole model to others holds what the model computes, merged once and in float32
  (`save_dit`, `export --layout`, `export --merge`); the model in memory keeps its adapters;
- a file of adapters holds the adapters alone, and the whole differences that came with them
  (`interop.lora_writing`, `export --lora`, `lora*.safetensors`), or is refused where its format
  cannot hold them.
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
