"""Text encoders of the transformers library: T5, UMT5, T5Gemma, CLIP and their like, from a folder
or a hub name."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError, FilePath, most
from mmdit.files import expanded
from mmdit.interfaces import TextEncoder, TextEncoderSection, TextTokens
from mmdit.text_encoders.stored import RecentEmbeddings, StoredEmbeddings, encoder_key
from mmdit.text_encoders.transformers_loading import (
    load_encoder,
    most_tokens,
    network_settings,
)
from mmdit.text_encoders.words import MOST_WORDS

logger = logging.getLogger(__name__)

GROUP, LENGTH_STEP = 8, 16  # a frozen encoder computes on (GROUP, a multiple of LENGTH_STEP) tokens


@dataclass(frozen=True)
class HuggingFaceConfig(TextEncoderSection):
    """An encoder of the transformers library: T5, CLIP and their like."""

    # Chooses an encoder of transformers.
    type: Literal["hf"] = "hf"
    # A folder, or a name on the Hugging Face hub.
    name_or_path: FilePath = ""
    # Width of its tokens. The encoder knows it; a width that is given must agree.
    dim: int | None = None
    # The most tokens of a caption that are read, counted by the encoder's own tokenizer.
    max_length: int = 77
    # Leave its weights as they are.
    freeze: bool = True
    # If not frozen, its learning rate as a multiple of `train.lr`; for pre-trained weights usually
    # less than 1.
    lr_scale: float = 1.0
    # The dtype of its weights; an encoder that is trained needs float32.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Never ask the hub.
    local_files_only: bool = False
    # Megabytes of memory for the embeddings of captions that were read (frozen encoders).
    cache_mb: int = 1024
    # A folder in which embeddings are kept for later runs (frozen encoders).
    cache_dir: FilePath = ""

    @property
    def released(self) -> bool:
        return True

    def __post_init__(self):
        if not self.name_or_path:
            raise ConfigError(
                "name_or_path",
                "is empty; must be a folder or a hub name such as google/flan-t5-base",
            )
        if not 0 < self.lr_scale <= 1000:
            raise ConfigError(
                "lr_scale",
                f"is {self.lr_scale}; must be above 0 and at most 1000; freeze: true trains"
                " nothing",
            )
        if self.max_length < 1:
            raise ConfigError("max_length", f"is {self.max_length}; must be at least 1 token")
        most(self, MOST_WORDS, "max_length")
        if self.cache_mb < 0:
            raise ConfigError(
                "cache_mb", f"is {self.cache_mb}; must be at least 0 (0: nothing is kept)"
            )
        if self.cache_dir and not self.freeze:
            raise ConfigError(
                "cache_dir",
                f"is {self.cache_dir!r} with freeze: false; embeddings of an encoder that is "
                "trained change with each step; leave it empty",
            )
        if not self.freeze and self.dtype != "float32":
            remedy = (
                "set dtype: float32 (train.precision still computes in half precision) or freeze:"
                " true"
            )
            raise ConfigError(
                "dtype",
                f"is {self.dtype} with freeze: false; small updates would vanish in it; {remedy}",
            )


class HuggingFaceEncoder(TextEncoder):
    """Returns the encoder's last hidden states, one token per tokenizer token, end markers
    included.

    A frozen encoder computes outside autocast and in batches of fixed shapes, so that an embedding
    depends on its caption alone and not on the rest of the batch; embeddings are remembered. A
    trained one computes one batch, padded to its longest caption. Dropout is off in both cases,
    because a resumed run must repeat itself.
    """

    encoder: Any  # a network of the transformers library

    def __init__(self, config: HuggingFaceConfig):
        super().__init__()
        self.config, self.lr_scale = config, config.lr_scale
        self.frozen = config.freeze
        self.tokenizer, self.encoder = self._open()
        self.reported = False
        self.unsaved: OSError | None = None  # why embeddings cannot be written
        self.forget()
        self.requires_grad_(not self.frozen)
        self.train()
        self.dim = self._prepare()
        if config.dim not in (None, self.dim):
            raise ConfigError(
                "dim",
                f"is {config.dim}, but {config.name_or_path} gives {self.dim}; write that or leave"
                " it out",
            )
        self.silent = {"": torch.zeros(0, self.dim)}  # captions that have no tokens

    def is_stored(self, name: str) -> bool:
        """Return whether checkpoints hold this entry of the state: a frozen encoder is not copied
        into them."""
        return not self.frozen

    def _open(self) -> tuple[Any, nn.Module]:
        config = self.config
        tokenizer, encoder = load_encoder(
            config.name_or_path, getattr(torch, config.dtype), config.local_files_only
        )
        most = most_tokens(tokenizer, encoder)
        if most is not None and config.max_length > most:
            raise ConfigError(
                "max_length",
                f"is {config.max_length}, but {config.name_or_path} reads at most {most}; set"
                f" {most}",
            )
        return tokenizer, encoder

    def _prepare(self) -> int:
        """Freeze parameters that do not influence the tokens, and return the width of these."""
        with torch.set_grad_enabled(not self.frozen):
            example = self._hidden(*self._pad(self._tokenize(["a"])))
        # poolers and the like do not influence the tokens, and DDP would wait for their gradients
        if not self.frozen:
            parameters = list(self.parameters())
            gradients = torch.autograd.grad(example.sum(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.requires_grad_(gradient is not None)
        return example.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.encoder.get_input_embeddings().weight.device

    def clean(self, caption: str) -> str:
        return caption.strip()

    def train(self, mode: bool = True) -> HuggingFaceEncoder:
        super().train(mode)
        self.encoder.eval()
        return self

    def forget(self) -> None:
        """Forget the embeddings in memory. This happens by itself when the module is moved or a
        state is loaded."""
        self._recent = RecentEmbeddings(self.config.cache_mb * 2**20)
        self._stored: StoredEmbeddings | None = None

    def stored(self) -> StoredEmbeddings | None:
        """Return the folder of embeddings that is kept between runs; None if the config names
        none."""
        if self._stored is None and self.config.cache_dir:
            self._tokenize(["a"])  # sets the truncation, which enters the key
            # the shape of a batch influences rounding
            settings = (self.config.max_length, GROUP, LENGTH_STEP)
            key = encoder_key(self.encoder, self.tokenizer, *settings)
            of_network = network_settings(self.config.name_or_path, self.config.local_files_only)
            folder = expanded(self.config.cache_dir)
            self._stored = StoredEmbeddings(folder, key, self.dim, of_network)
        return self._stored

    def _apply(self, *arguments, **keywords):
        self.forget()
        return super()._apply(*arguments, **keywords)

    def _load_from_state_dict(self, *arguments):
        self.forget()
        super()._load_from_state_dict(*arguments)

    def forward(self, captions: list[str]) -> TextTokens:
        """Return the tokens `(B, T, dim)` of the captions, float32 on this module's device; T is
        the length of the longest, at least 1."""
        device = self.device
        captions = [self.clean(caption) for caption in captions]
        if self.frozen:
            known = self._remembered(captions)
            lengths = [len(known[caption]) for caption in captions]
            embeddings = torch.zeros(len(captions), max([1, *lengths]), self.dim)
            for row, caption in zip(embeddings, captions, strict=True):
                row[: len(known[caption])] = known[caption]
            embeddings = embeddings.to(device)
        else:
            tokens = self._tokenize(captions)
            lengths = [len(part) for part in tokens]
            embeddings = self._hidden(*self._pad(tokens)).float()
        valid = (
            torch.arange(embeddings.shape[1], device=device)
            < torch.tensor(lengths, device=device)[:, None]
        )
        return TextTokens(torch.where(valid[..., None], embeddings, 0.0), valid)

    # ── one batch ─────────────────────────────────────────────────────────────────────────────────
    def _tokenize(self, captions: list[str]) -> list[list[int]]:
        """Return the token numbers of each caption; none for an empty one, to which the tokenizer
        would add its markers."""
        filled = [caption for caption in captions if caption]
        if not filled:
            return [[] for _ in captions]
        limit = self.config.max_length
        tokens = self.tokenizer(filled, truncation=True, max_length=limit)["input_ids"]
        for caption, ids in zip(filled, tokens, strict=True):
            if len(ids) == limit and not self.reported:
                whole = self.tokenizer(caption, verbose=False)["input_ids"]
                self._report_length(caption, len(whole))
        remaining = iter(tokens)
        return [next(remaining) if caption else [] for caption in captions]

    def _report_length(self, caption: str, length: int) -> None:
        """Warn, once, about a caption of `length` tokens if that is more than `max_length`."""
        if length > self.config.max_length and not self.reported:
            logger.warning(
                "a caption has %d tokens, text_encoder.max_length is %d: the rest is not read"
                " (said once): %.80s",
                length,
                self.config.max_length,
                caption,
            )
            self.reported = True

    def _pad(self, tokens: list[list[int]], length: int = 1) -> tuple[Tensor, Tensor]:
        """Return token numbers and attention mask, both `(B, T)` int64, T at least `length`. A row
        without tokens attends to its first padding, as a softmax over nothing gives nan."""
        length = max([length, *map(len, tokens)])
        filler = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.tensor([row + [filler] * (length - len(row)) for row in tokens])
        lengths = torch.tensor([max(1, len(row)) for row in tokens])
        return ids, (torch.arange(length) < lengths[:, None]).long()

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        device = self.device
        return self.encoder(
            input_ids=ids.to(device), attention_mask=mask.to(device)
        ).last_hidden_state

    def rows(self, captions: list[str]) -> list[Tensor]:
        """Return the tokens `(length, dim)` of each caption on the CPU, as a frozen encoder keeps
        them."""
        cleaned = [self.clean(caption) for caption in captions]
        known = self._remembered(cleaned)
        return [known[caption] for caption in cleaned]

    # ── frozen: every caption once ────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def _remembered(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the tokens `(length, dim)` of each distinct caption on the CPU, in the encoder's
        precision."""
        known = self.silent | self._recent.load(captions)
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        files = self.stored() if new else None
        if files:
            known |= files.load(new)
            new = [caption for caption in new if caption not in known]
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        for caption, ids in zip(new, self._tokenize(new), strict=True):
            length = min(ceil(max(1, len(ids)) / LENGTH_STEP) * LENGTH_STEP, self.config.max_length)
            by_length.setdefault(length, []).append((caption, ids))
        for length, items in by_length.items():
            for start in range(0, len(items), GROUP):
                encoded = self._encode_group(items[start : start + GROUP], length)
                known |= encoded
                if files and self.unsaved is None:
                    self._save(files, encoded)
        self._recent.save(
            {caption: known[caption] for caption in known if caption not in self.silent}
        )
        return known

    def _save(self, files: StoredEmbeddings, rows: dict[str, Tensor]) -> None:
        """Write embeddings to files. If the folder cannot be written to, as one that others share,
        warn once and go on."""
        try:
            files.save(rows)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self.unsaved = error
            logger.warning(
                "captions that are not in text_encoder.cache_dir are encoded in each run, for it"
                " can only be read (said once): %s",
                error,
            )

    def _encode_group(self, items: list[tuple[str, list[int]]], length: int) -> dict[str, Tensor]:
        """Return the embeddings of at most `GROUP` captions of about one length, computed in a
        batch that is filled up to `GROUP`. ValueError if they are not finite."""
        tokens = [ids for _, ids in items]
        tokens += tokens[:1] * (GROUP - len(tokens))
        with torch.autocast(self.device.type, enabled=False):
            hidden = self._hidden(*self._pad(tokens, length)).cpu()
        rows = {caption: row[: len(ids)].clone() for (caption, ids), row in zip(items, hidden)}
        for caption, row in rows.items():
            if not row.isfinite().all():
                remedy = "damaged weights?"
                if self.config.dtype == "float16":
                    remedy = "set text_encoder.dtype: bfloat16 or float32"
                raise ValueError(
                    f"{self.config.name_or_path} gives infinite or NaN embeddings for {caption!r};"
                    f" {remedy}"
                )
        return rows
