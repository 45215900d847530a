"""LoRA, DoRA and LoKr files of other programs, read into and written from any of our models: PEFT,
Diffusers, kohya, ComfyUI and their relatives.

In all of them `ΔW = s B A` (LoKr: `s W1 ⊗ W2`). They differ in how they name a layer and where they
keep `s` (the table in `lora_names`): in `.alpha` tensors (s = alpha / rank), in a config beside the
weights or in the file's header (`lora_settings`), or nowhere (s = 1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Generator, nn

from mmdit.adapters.layers import Adapter
from mmdit.adapters.lora import Make, adapters, add_differences, differences, insert
from mmdit.interfaces import Denoiser
from mmdit.interop.lora_reading import Update, experts_in, read_lora
from mmdit.interop.lora_writing import save_lora

__all__ = ["experts_in", "load_lora", "read_lora", "save_lora"]


@torch.no_grad()
def load_lora(
    model: Denoiser, path: str | Path, expert: Literal["high", "low"] | None = None
) -> list[str]:
    """Adapt `model` in place with the LoRA at `path`; return the names of the adapted layers. Whole
    differences (of distilled models) are added to the parameters, until `remove` takes them off
    again. ValueError: see `read_lora`; the model is then unchanged."""
    if adapters(model) or differences(model):
        raise ValueError("the model has adapters already: merge or remove them first")
    content = read_lora(model, path, expert)
    insert(model, {name: _maker(update) for name, update in content.updates.items()})
    add_differences(model, content.differences)
    return list(content.updates)


def _maker(update: Update) -> Make:
    def make(base: nn.Linear, _generator: Generator) -> Adapter:
        return update.adapter(base)

    return make
