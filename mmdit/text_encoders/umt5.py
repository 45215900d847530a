"""UMT5-XXL as Wan uses it (Chung et al. 2023, arXiv 2304.09151): from the official .pth, a
Diffusers or transformers folder, or a single file. A caption's tokens are trimmed to its length;
the denoiser pads them with zeros.

The network is that of the transformers library (4e-7 from the official code); names, cleaning and
tokens are here.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError, FilePath, shortened
from mmdit.files import expanded
from mmdit.interfaces import TextTokens
from mmdit.text_encoders.huggingface import (
    GROUP,
    LENGTH_STEP,
    HuggingFaceConfig,
    HuggingFaceEncoder,
)
from mmdit.text_encoders.stored import StoredEmbeddings, files_key
from mmdit.text_encoders.transformers_loading import explained
from mmdit.weights import Checkpoint, Keep, fill, is_wan_release, shapes_of

logger = logging.getLogger(__name__)
NORMS = ("norm.weight", "encoder.final_layer_norm.weight")
OFFICIAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
# Matches text that ftfy would not change: no control characters, no HTML entities.
PLAIN = re.compile(r"[\t\n\f\r -%'-~]*")
# beside the weights, in official and Diffusers releases
TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", ".")
IDLE = 32  # calls in a row that did not need the weights, after which these are dropped
END = 1  # the token at the end of every caption
# a tied copy of the embeddings; the tokenizer in ComfyUI's files
UNTRAINED_LAYOUT = ("encoder.embed_tokens.weight", "spiece_model")
NAMES = {  # official → transformers, inside a block
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
OUTSIDE = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}


@dataclass(frozen=True)
class UMT5Config(HuggingFaceConfig):
    """UMT5-XXL as Wan uses it. With `cache_dir`, the weights are loaded only when a caption has no
    embedding there (see `mmdit cache-text`)."""

    # Chooses UMT5.
    type: Literal["umt5"] = "umt5"
    # The most tokens of a caption that are read; Wan was trained with 512.
    max_length: int = 512
    # The dtype of its weights.
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    # The folder of tokenizer.json or spiece.model; if empty, they are searched for beside the
    # weights.
    tokenizer_path: FilePath = ""
    # With `freeze: false`, how many blocks from the top are trained, together with the last norm; 0
    # trains everything.
    train_blocks: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.train_blocks < 0 or (self.train_blocks and self.freeze):
            raise ConfigError(
                "train_blocks",
                f"is {self.train_blocks} with freeze: {self.freeze}; must be at least 0, and needs"
                " freeze: false to train them",
            )


class UMT5Encoder(HuggingFaceEncoder):
    """A `HuggingFaceEncoder` for which an empty caption is a text of one token; a dropped caption
    becomes that text."""

    config: UMT5Config
    place: Tensor
    encoder: Any  # UMT5EncoderModel, or nn.Identity while it is not loaded

    def __init__(self, config: UMT5Config, keep: Keep | None = None):
        self.keep = keep  # see `weights.fill`
        super().__init__(config)
        self.silent = {}
        self.idle = 0  # calls since the weights were last needed
        self.register_buffer(
            "place", torch.empty(0), persistent=False
        )  # tells the device while the encoder is not loaded

    def _open(self) -> tuple[Callable, nn.Module]:
        config = self.config
        path = _locate(expanded(config.name_or_path))
        with explained("weights", config.name_or_path, config.local_files_only):
            stored = Checkpoint(path)
            encoder = (
                nn.Identity()
                if config.cache_dir
                else _load(stored, path, getattr(torch, config.dtype), self.keep)
            )
            tokenizer, self.vocabulary = _tokenizer(
                Path(config.tokenizer_path) if config.tokenizer_path else None, path, stored
            )
            if not (names := [name for name in NORMS if name in stored.entries]):
                raise ValueError(
                    f"{path} is no UMT5 encoder: {NORMS[0]} is missing among its"
                    f" {len(stored.entries)} tensors"
                )
            (self.width,) = stored.entries[names[0]].shape
        return tokenizer, encoder

    @property
    def device(self) -> torch.device:
        return self.place.device if self.frozen else super().device

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        if isinstance(self.encoder, nn.Identity):
            path = _locate(expanded(self.config.name_or_path))
            logger.info("a caption is not in %s: loading the text encoder", self.config.cache_dir)
            self.encoder = (
                _load(Checkpoint(path), path, getattr(torch, self.config.dtype))
                .requires_grad_(False)
                .to(self.device)
            )
        self.idle = 0
        return super()._hidden(ids, mask)

    def _remembered(self, captions: list[str]) -> dict[str, Tensor]:
        known = super()._remembered(captions)
        self.idle += 1
        if self.config.cache_dir and self.idle > IDLE:
            self.put_away()
        return known

    @property
    def keeps_files(self) -> bool:
        return bool(self.config.cache_dir)

    def is_stored(self, name: str) -> bool:
        """Return whether checkpoints hold this entry of the state: with `train_blocks`, only what
        the run trains."""
        return name in self.train_names if self.config.train_blocks else super().is_stored(name)

    def put_away(self) -> None:
        if self.keeps_files and not isinstance(self.encoder, nn.Identity):
            logger.info(
                "the text encoder is put away: its embeddings are in %s", self.config.cache_dir
            )
            self.encoder = nn.Identity()

    def stored(self) -> StoredEmbeddings | None:
        """Return the folder of embeddings that is kept between runs; None if the config names
        none."""
        config = self.config
        if self._stored is None and config.cache_dir:
            folder = expanded(config.cache_dir)
            files = Checkpoint(_locate(expanded(config.name_or_path))).files
            settings = (config.dtype, config.max_length, GROUP, LENGTH_STEP, self.vocabulary)
            self._stored = StoredEmbeddings(folder, files_key(files, folder, *settings), self.dim)
        return self._stored

    def _prepare(self) -> int:
        if self.config.cache_dir:
            return self.width
        blocks = self.encoder.encoder.block
        if self.config.train_blocks > len(blocks):
            raise ConfigError(
                "train_blocks",
                f"is {self.config.train_blocks}, but the encoder has {len(blocks)} blocks",
            )
        if self.config.train_blocks:
            self.requires_grad_(False)
            for part in (
                *blocks[-self.config.train_blocks :],
                self.encoder.encoder.final_layer_norm,
            ):
                part.requires_grad_(True)
            self.train_names = {name for name, p in self.named_parameters() if p.requires_grad}
        return self.encoder.config.d_model

    def clean(self, caption: str) -> str:
        """Return a caption, cleaned as in the official code: broken Unicode repaired, HTML entities
        decoded twice, white space collapsed."""
        if not PLAIN.fullmatch(caption):
            try:
                import ftfy
            except ImportError:
                message = (
                    f"is umt5, and the caption {shortened(repr(caption), 60)} has more than plain"
                    " ASCII, which needs ftfy; pip install ftfy"
                )
                raise ConfigError("type", message) from None
            caption = ftfy.fix_text(caption)
        return re.sub(r"\s+", " ", html.unescape(html.unescape(caption)).strip()).strip()

    def _tokenize(self, captions: list[str]) -> list[list[int]]:
        tokens = [[*ids, END] for ids in self.tokenizer(captions)]
        for caption, ids in zip(captions, tokens, strict=True):
            self._report_length(caption, len(ids))
        most = self.config.max_length - 1
        return [[*ids[:-1][:most], END] for ids in tokens]

    def forward(self, captions: list[str]) -> TextTokens:
        text = super().forward([*captions, ""])
        return TextTokens(text.embeddings[:-1], text.valid[:-1], empty=text.embeddings[-1, :1])


# ── opening ───────────────────────────────────────────────────────────────────────────────────────
def _locate(path: Path) -> Path:
    if is_wan_release(path) and not any(
        (path / name).exists() for name in (OFFICIAL_FILE, "text_encoder")
    ):
        raise ValueError(
            f"{path} is a Wan release that lacks its text encoder, {OFFICIAL_FILE} (of Diffusers:"
            " text_encoder/); fetch it, or name it in text_encoder.name_or_path"
        )
    return next(
        (path / name for name in (OFFICIAL_FILE, "text_encoder") if (path / name).exists()), path
    )


def transformers_name(name: str) -> str:
    """Return the name in `UMT5EncoderModel` of a parameter with an official name; other names stay
    as they are."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
        return f"encoder.block.{match[1]}.{NAMES.get(match[2], match[2])}.weight"
    return OUTSIDE.get(name, name)


def _load(
    stored: Checkpoint, place: Path, dtype: torch.dtype, keep: Keep | None = None
) -> nn.Module:
    import transformers

    names = {name: transformers_name(name) for name in stored.entries}
    shapes = shapes_of(stored.entries, names)
    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        vocabulary, width = shapes["shared.weight"]
        feedforward = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
        inner = shapes[f"{attention}.q.weight"][0]
        second = "encoder.block.1.layer.0."
        bias = f"{second}SelfAttention.relative_attention_bias.weight"
        if f"{second}layer_norm.weight" in shapes and bias not in shapes:
            raise KeyError(bias)  # T5 shares the bias of block 0
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{place} is no UMT5 encoder: {error} is missing among its {len(shapes)} tensors"
        ) from None
    blocks = len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")})
    config = transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=feedforward,
        num_layers=blocks,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    model.set_input_embeddings(model.shared)
    decoder = tuple(name for name in shapes if name.startswith(("decoder.", "lm_head.")))
    return fill(
        model,
        stored,
        names,
        f"{place}, read as UMT5,",
        dtype=lambda _: dtype,
        ignored=(*UNTRAINED_LAYOUT, *decoder),
        keep=keep,
    )


def _tokenizer(
    folder: Path | None, place: Path, stored: Checkpoint
) -> tuple[Callable[[list[str]], list[list[int]]], str]:
    """Return the function from captions to token numbers without markers, and a hash of the
    vocabulary. ValueError if there is no tokenizer, or one with another vocabulary."""
    root = place.parent if place.is_file() or place.name == "text_encoder" else place
    folders = [folder] if folder else [root / name for name in TOKENIZER_FOLDERS]
    files = [folder / name for name in ("tokenizer.json", "spiece.model") for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        vocabulary = file.read_bytes()
    elif "spiece_model" in stored.entries:  # ComfyUI's files hold it as a tensor
        tensor = next(tensor for name, tensor in stored.tensors() if name == "spiece_model")
        vocabulary = tensor.numpy().tobytes()
    else:
        raise ValueError(
            f"no tokenizer.json or spiece.model in {', '.join(map(str, folders))}; set"
            " text_encoder.tokenizer_path to the folder of google/umt5-xxl's tokenizer"
        )
    if file is not None and file.suffix == ".json":
        encode, size = _from_json(file)
    else:
        encode, size = _from_sentencepiece(vocabulary)
    names = ("shared.weight", "token_embedding.weight")
    rows = max(stored.entries[name].shape[0] for name in names if name in stored.entries)
    if size > rows:
        raise ValueError(
            f"the tokenizer has {size} entries, the embedding {rows}; they belong to different"
            " models"
        )
    return encode, hashlib.sha256(vocabulary).hexdigest()


def _from_json(file: Path) -> tuple[Callable[[list[str]], list[list[int]]], int]:
    import tokenizers

    reader = tokenizers.Tokenizer.from_file(str(file))
    reader.no_truncation()
    reader.no_padding()

    def encode(captions: list[str]) -> list[list[int]]:
        return [row.ids for row in reader.encode_batch(captions, add_special_tokens=False)]

    return encode, reader.get_vocab_size()


def _from_sentencepiece(vocabulary: bytes) -> tuple[Callable[[list[str]], list[list[int]]], int]:
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(
            "its tokenizer is a spiece.model, which needs sentencepiece: pip install sentencepiece"
        ) from None
    reader = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    return reader.encode, reader.get_piece_size()
