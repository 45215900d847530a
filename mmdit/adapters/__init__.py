"""Small trainable updates beside frozen weights."""

from mmdit.adapters.layers import Adapter, DoRALinear, LoKrLinear, LoRALinear, is_adapter
from mmdit.adapters.lora import LoRAConfig, adapters, count, coverage, inject, merge, remove, select
from mmdit.adapters.state import base_state, load_lora, load_lora_state, lora_state, save_lora

__all__ = [
    "Adapter",
    "DoRALinear",
    "LoKrLinear",
    "LoRAConfig",
    "LoRALinear",
    "adapters",
    "base_state",
    "count",
    "coverage",
    "inject",
    "is_adapter",
    "load_lora",
    "load_lora_state",
    "lora_state",
    "merge",
    "remove",
    "save_lora",
    "select",
]
