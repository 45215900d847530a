"""Small trainable updates beside frozen weights."""

from mmdit.adapters.lora import LoRAConfig, LoRALinear, adapters, count, coverage, inject, merge, remove, select
from mmdit.adapters.state import base_state, load_lora, load_lora_state, lora_state, save_lora

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "adapters",
    "base_state",
    "count",
    "coverage",
    "inject",
    "load_lora",
    "load_lora_state",
    "lora_state",
    "merge",
    "remove",
    "save_lora",
    "select",
]
