"""Keep the embeddings of a frozen encoder, in memory for this run and in files for later ones, so
that a caption is encoded once, not once a run.

<folder>/<key>/<hash of the caption>.safetensors   `embedding (T, dim)`, the encoder's precision

A file names its caption, its check sum, and the settings of the network that made it; all are
compared before it is used. The key is a hash of everything else on which an embedding depends:
weights, vocabulary, `max_length`. So another encoder has another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmdit.files import clean, hashed, read_object, write_atomically
from mmdit.weights import bytes_of, tensor_pieces


def encoder_key(encoder: nn.Module, tokenizer, *settings: object) -> str:
    """Return a hexadecimal hash of all on which an embedding depends, except what only the
    network's config says, see `network_settings`. Every weight is read once."""
    digest = hashlib.sha256(f"{type(encoder).__name__} {settings}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    digest.update(words.encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def files_key(files: list[Path], folder: Path, *settings: object) -> str:
    """Return a hash like `encoder_key`, for weight files that are not loaded. Hashing gigabytes
    takes seconds, so `weights.json` in `folder` remembers the hash of each file with its path, size
    and modification time."""
    memory, digest = folder / "weights.json", hashlib.sha256(repr(settings).encode())
    known = read_object(memory)
    for file in files:
        stat = file.stat()
        place = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if not isinstance(known.get(place), str):
            with file.open("rb") as stream:
                known[place] = hashed(hashlib.sha256(), stream).hexdigest()
            with contextlib.suppress(OSError):  # the folder may be read-only
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(memory, json.dumps(known))
        digest.update(known[place].encode())
    return digest.hexdigest()


class RecentEmbeddings:
    """Keeps embeddings in memory, at most `limit` bytes: the least recently used are dropped."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.rows: OrderedDict[str, Tensor] = OrderedDict()

    def load(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the embeddings of those captions that are in memory."""
        return {caption: self.rows[caption] for caption in captions if caption in self.rows}

    def save(self, rows: dict[str, Tensor]) -> None:
        for caption, row in rows.items():
            if caption not in self.rows:
                self.rows[caption] = row
                self.bytes += row.nbytes
            self.rows.move_to_end(caption)
        while self.bytes > self.limit:
            _, row = self.rows.popitem(last=False)
            self.bytes -= row.nbytes


class StoredEmbeddings:
    """Reads and writes the folder of one key; several processes may do so at once. `settings`: a
    hash of the network's config. Earlier versions did not store it, and their files without it are
    accepted."""

    def __init__(self, folder: Path, key: str, dim: int, settings: str = ""):
        self.key, self.settings = key[:32], settings
        self.folder, self.dim = folder / self.key, dim
        clean(self.folder, self.folder.parent)

    def _path(self, caption: str) -> Path:
        name = hashlib.sha256(caption.encode(errors="surrogatepass")).hexdigest()
        return self.folder / f"{name}.safetensors"

    def load(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the embeddings of those captions that have an intact file. A file that is damaged,
        or of another caption, counts as missing, and will be overwritten."""
        rows = {}
        for caption in captions:
            try:
                with safe_open(self._path(caption), "pt") as file:
                    metadata, row = file.metadata() or {}, file.get_tensor("embedding")
            except (OSError, SafetensorError, KeyError):
                continue
            fits = row.ndim == 2 and row.shape[1] == self.dim
            # the oldest versions wrote no metadata, later ones all but the settings
            older = {}, _metadata(caption, row)
            if fits and metadata in (*older, _metadata(caption, row, self.settings)):
                rows[caption] = row
        return rows

    def save(self, rows: dict[str, Tensor]) -> None:
        """Write embeddings, one file for each caption. OSError if that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for caption, row in rows.items():
            metadata = _metadata(caption, row, self.settings)
            pieces = tensor_pieces({"embedding": row}, metadata)
            write_atomically(self._path(caption), pieces)


def _metadata(caption: str, row: Tensor, settings: str = "") -> dict[str, str]:
    """Return the metadata of a file; the caption in ASCII, as JSON."""
    said = {"caption": json.dumps(caption), "crc32": str(zlib.crc32(bytes_of(row)))}
    return said | ({"settings": settings} if settings else {})
