"""Translate the names of the modules and parameters of a Wan transformer to those in Diffusers, one
to one. Our names are the official ones."""

from __future__ import annotations

import re

MODULES = {  # official → Diffusers, outside the blocks
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
PARAMETERS = {
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
BLOCK_MODULES = {  # inside a block
    **{
        f"{ours}.{part}": f"{theirs}.to_{part}"
        for ours, theirs in ATTENTIONS.items()
        for part in "qkv"
    },
    **{f"{ours}.o": f"{theirs}.to_out.0" for ours, theirs in ATTENTIONS.items()},
    **{
        f"{ours}.norm_{part}": f"{theirs}.norm_{part}"
        for ours, theirs in ATTENTIONS.items()
        for part in "qk"
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": (
        "norm2"
    ),  # Diffusers counts norms as they run: its norm2 is the one before cross-attention
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def diffusers_name(name: str) -> str:
    """Return the Diffusers name (`blocks.3.ffn.net.0.proj`) of an official module
    (`blocks.3.ffn.0`) or parameter. KeyError for a name that is not Wan's, or that of a mere
    container of modules."""
    if name in PARAMETERS:
        return PARAMETERS[name]
    if name in MODULES:
        return MODULES[name]
    if match := re.fullmatch(r"(blocks\.\d+)\.(.+)", name):
        block, inner = match.groups()
        if inner == "modulation":
            return f"{block}.scale_shift_table"
        if inner in BLOCK_MODULES:
            return f"{block}.{BLOCK_MODULES[inner]}"
    module, _, leaf = name.rpartition(".")
    if not module:
        raise KeyError(name)
    return f"{diffusers_name(module)}.{leaf}"
