"""Embeddings of a frozen encoder in files, so that a caption is encoded once, not once a run.

    <folder>/<key>/<hash of the caption>.safetensors        `embedding (T, dim)` in the encoder's precision

The key is a hash of all on which an embedding depends: weights, vocabulary, `max_length`. Another encoder finds none."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn


def encoder_key(encoder: nn.Module, tokenizer, *settings: object) -> str:
    """Hexadecimal; reads every weight once."""
    digest = hashlib.sha256(f"{type(encoder).__name__} {settings}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    digest.update(words.encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def files_key(files: list[Path], folder: Path, *settings: object) -> str:
    """As `encoder_key`, from weight files that are not loaded. Hashing gigabytes takes seconds, so `folder` remembers the hash of a
    file by its path, size and time."""
    memory, digest = folder / "weights.json", hashlib.sha256(repr(settings).encode())
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    for file in files:
        stat = file.stat()
        place = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if not isinstance(known.get(place), str):
            with file.open("rb") as stream:
                known[place] = _digest(stream)
            folder.mkdir(parents=True, exist_ok=True)
            aside = folder / f".writing-{os.getpid()}.tmp"
            aside.write_text(json.dumps(known))
            os.replace(aside, memory)
        digest.update(known[place].encode())
    return digest.hexdigest()


def _digest(stream) -> str:
    digest = hashlib.sha256()
    while data := stream.read(2**24):
        digest.update(data)
    return digest.hexdigest()


class StoredEmbeddings:
    """Reads and writes the folder of one key. Several processes may, at once."""

    def __init__(self, folder: Path, key: str, dim: int):
        self.folder, self.dim = folder / key[:32], dim
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, caption: str) -> Path:
        return self.folder / f"{hashlib.sha256(caption.encode(errors='surrogatepass')).hexdigest()}.safetensors"

    def load(self, captions: list[str]) -> dict[str, Tensor]:
        """Those of the captions that are there, whole; a damaged file is as good as none and is written anew."""
        found = {}
        for caption in captions:
            try:
                row = load_file(self._path(caption))["embedding"]
            except (OSError, SafetensorError, KeyError):
                continue
            if row.ndim == 2 and row.shape[1] == self.dim:
                found[caption] = row
        return found

    def save(self, rows: dict[str, Tensor]) -> None:
        for caption, row in rows.items():
            aside = self.folder / f".writing-{os.getpid()}.tmp"
            aside.write_bytes(save({"embedding": row.contiguous()}))
            os.replace(aside, self._path(caption))
