"""Write the weights of a run as one file to share; `checkpoint.load_weights` reads it."""

from __future__ import annotations

from pathlib import Path

import torch

from mmdit.files import clean, write_atomically
from mmdit.training.checkpoint import Weights, export_crc
from mmdit.training.errors import RunError
from mmdit.weights import check_numbers, is_finite, tensor_pieces


def export(weights: Weights, path: Path, dtype: torch.dtype) -> None:
    """Write one file with the weights in `dtype` and the config in its metadata. ValueError if a
    weight is not finite or too large for `dtype`; RunError if the file cannot be written."""
    tensors = {}
    for name, tensor in weights.tensors.items():
        if name.startswith("text_encoder.") and not tensor.is_floating_point():  # positions
            tensors[name] = tensor.contiguous()
            continue
        check_numbers(name, tensor, weights.source)
        tensors[name] = tensor.to(dtype).contiguous()
        if not is_finite(tensors[name]):
            raise ValueError(
                f"{weights.source}: the weight {name} is too large for {dtype}; choose --dtype "
                "bf16 or fp32"
            )
    text = weights.meta.to_json()
    metadata = {"mmdit": text, "crc32": str(export_crc(text, tensors))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent)
        write_atomically(path, tensor_pieces(tensors, metadata), flush=True)
    except OSError as error:
        raise RunError(
            f"could not write {path}: {error}; free disk space or choose another place"
        ) from error
