"""Tell what a weight file holds, from its headers alone: names, shapes, dtypes, and which model or
adapter they belong to."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from mmdit.adapters import is_adapter
from mmdit.interop.lora_names import PARTS, common_prefix
from mmdit.interop.wan_weights import EXPERT_FOLDERS, Expert, infer_config, locate, official_names
from mmdit.terminal import shown
from mmdit.weights import DTYPES, SCALES, Checkpoint, Entry, shapes_of

# bytes of an element, by the name of its dtype in a header or a pickle; other dtypes have 1
BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
BYTES |= {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in DTYPES}
TITLES = {  # what a file is if it holds a tensor of this name
    "model.blocks.0.spatial.q.weight": "mmdit model",
    "trunk.cls_token": "VTP tokenizer",
    "decoder.conv1.weight": "Wan VAE",
    "post_quant_conv.weight": "Wan VAE (Diffusers)",
    "token_embedding.weight": "UMT5",
    "visual.pos_embedding": "CLIP picture encoder",
    "vision_model.embeddings.class_embedding": "CLIP picture encoder (transformers)",
    "embeddings.class_embedding": "CLIP picture encoder (transformers)",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
        "T5 or UMT5 (transformers)"
    ),
}


def inspect_weights(path: str | Path, expert: Expert | None = None) -> dict:
    """Return a report that JSON can hold: `kind`, `variant`, `layout`, `prefix`, `files`,
    `parameters`, `bytes`, `dtypes`, `groups` (numbered blocks as one row), `scaled` (how
    many float8 weights have a scale), `quantised` (the names of other scales). ValueError as
    `Checkpoint` and `locate` raise it.
    """
    path = Path(path)
    experts = set()
    for name, folders in EXPERT_FOLDERS.items():
        for folder in folders:
            if (path / folder).is_dir():
                experts.add(name)
    if len(experts) == 2 and expert is None:
        return {
            "kind": "two experts",
            "path": str(path),
            "experts": {name: inspect_weights(path, name) for name in EXPERT_FOLDERS},
        }
    place = locate(path, expert)
    stored = Checkpoint(place, parts=True)
    return report_of(place, stored.entries, stored.files, len(stored.scales))


def report_of(place: Path, entries: dict[str, Entry], files: list[Path], scaled: int = 0) -> dict:
    """Return the report on tensors that lie in `files`; see `inspect_weights`. ValueError if there
    are none."""
    if not entries:
        raise ValueError(f"{place} holds no tensor")
    size = {name: math.prod(entry.shape) for name, entry in entries.items()}
    report = {
        "path": str(place),
        **_kind(entries),
        "files": [file.name for file in files],
        "tensors": len(entries),
        "parameters": sum(size.values()),
        "bytes": sum(size[n] * BYTES.get(entry.dtype, 1) for n, entry in entries.items()),
        "dtypes": dict(Counter(entry.dtype for entry in entries.values())),
        "scaled": scaled,
        "quantised": [name for name in entries if SCALES.search(name)],
    }
    rows = defaultdict(list)
    for name, entry in entries.items():
        rows[re.sub(r"(^|[._])\d+(?=[._]|$)", r"\1*", name), entry.shape, entry.dtype].append(
            size[name]
        )
    report["groups"] = [
        {
            "name": name,
            "count": len(sizes),
            "shape": list(shape),
            "dtype": dtype,
            "parameters": sum(sizes),
        }
        for (name, shape, dtype), sizes in rows.items()
    ]
    return report


def _kind(entries: dict) -> dict:
    """Return the entries of a report that tell which model or adapter the names and shapes belong
    to."""
    parts = {}  # tensors of adapters, and of whole differences: (layer, part)
    for name in entries:
        if end := max((end for end in PARTS if name.endswith(end)), key=len, default=""):
            parts[name] = name.removesuffix(end), PARTS[end]
    of_adapters = {name: part for name, part in parts.items() if is_adapter("." + part[1])}
    base = {name: entry for name, entry in entries.items() if name not in parts}
    if parts and (of_adapters or not base):
        adapter = _adapter_kind(entries, of_adapters or parts)
        if not base:
            return adapter
        model = _kind(base)
        return {**adapter, **model, "kind": f"{model['kind']} with {adapter['kind']}"}
    names, layout, prefix = official_names(list(entries))
    try:
        config = infer_config(shapes_of(entries, names), "")
    except ValueError:
        return {
            "kind": next((title for name, title in TITLES.items() if name in entries), "unknown")
        }
    return {
        "kind": "Wan transformer",
        "variant": config.variant,
        "layout": layout,
        "prefix": prefix,
        "layers": config.num_layers,
        "width": config.dim,
        "channels": [config.in_dim, config.out_dim],
    }


def _adapter_kind(entries: dict, parts: dict[str, tuple[str, str]]) -> dict:
    """Return the entries of a report that describe adapters: their type, layers, ranks and
    alphas."""
    present = {part for _, part in parts.values()}
    if any(part.startswith("lokr") for part in present):
        title = "LoKr"
    elif "lora_magnitude" in present:
        title = "DoRA"
    elif any(is_adapter("." + part) for part in present):
        title = "LoRA"
    else:
        title = "whole differences"
    ranks = Counter(
        entries[name].shape[0]
        for name, (_, part) in parts.items()
        if part in ("lora_A", "lokr_w2_b") and entries[name].shape
    )
    return {
        "kind": title,
        "prefix": common_prefix(parts),
        "layers": len({layer for layer, _ in parts.values()}),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": sum(name.endswith(".alpha") for name in entries),
    }


def format_inspection(report: dict) -> str:
    """Return a report as text, for a person."""
    if "experts" in report:
        return "\n\n".join(
            f"{name}-noise expert\n{format_inspection(part)}"
            for name, part in report["experts"].items()
        )
    if "parts" in report:
        texts = (
            f"{shown(name)}\n{format_inspection(part)}" for name, part in report["parts"].items()
        )
        return "\n\n".join([f"{shown(report['path'])}: {report['kind']}", *texts])
    facts = [
        f"{key} {report[key]}"
        for key in ("variant", "layout", "layers", "ranks", "alphas")
        if report.get(key)
    ]
    facts += [f"prefix {report['prefix']!r}"] if report.get("prefix") else []
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report["dtypes"].items())
    lines = [
        f"{report['path']}: {', '.join([report['kind'], *facts])}",
        (
            f"{report['tensors']} tensors ({dtypes}) in {len(report['files'])} files,"
            f" {report['parameters']:,} parameters, {report['bytes'] / 1e9:.2f} GB"
        ),
    ]
    if report["scaled"]:
        lines.append(f"{report['scaled']} float8 weights with a scale each")
    if report["quantised"]:
        lines.append(
            f"quantised: {len(report['quantised'])} scale tensors, first "
            f"{shown(report['quantised'][0])}"
        )
    names = [shown(row["name"]) for row in report["groups"]]
    width = max(map(len, names))
    for name, row in zip(names, report["groups"], strict=True):
        shape = "x".join(map(str, row["shape"])) or "-"
        lines.append(
            f"  {name:{width}}  {row['count']:>4} x {shape:<18} {row['dtype']:<6} "
            f"{row['parameters']:>15,}"
        )
    return "\n".join(lines)
