"""The nouns every layer shares. Conventions: latents `(B, F, H, W, C)`, `t = 0` clean and `t = 1`
noise, boolean masks with `True` = valid, pixels in `[0, 1]` as `(B, F, 3, H, W)` everywhere outside
a tokenizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.config import ConfigError, Section
from mmdit.rng import Draws

Picture = Literal["none", "first", "first_last"]  # which frames of a clip a model is given
Conditioning = Literal["none", "low_resolution"]  # what a model is given of a whole clip


@dataclass(frozen=True)
class LatentSpec:
    """Describe the latents of a tokenizer. This is the one place that converts between raw latents
    and model inputs.

    The cache holds raw latents; `normalize` is applied when a batch is used: `(z - mean_c) / std_c
    * scale` per channel.
    """

    channels: int
    spatial: int = 16  # pixels a latent cell covers along each axis
    mean: tuple[float, ...] = ()  # per channel; empty means 0
    std: tuple[float, ...] = ()  # per channel; empty means 1
    scale: float = 1.0
    # frames a latent frame covers; if above 1, the first latent frame still covers one frame only
    temporal: int = 1

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) != self.channels:
                raise ValueError(
                    f"latent {name} has {len(values)} values but the latents have {self.channels}"
                    " channels"
                )
        divisors = {"scale": (self.scale,), "std": self.std}
        for name, values in divisors.items():
            if not all(0 < value < math.inf for value in values):
                raise ValueError(
                    f"latent {name} holds {min(values)}; every value must be above 0 and finite"
                )

    # Kept, because making these tensors anew would stall every step: a copy to a GPU waits for the
    # work queued there. The cache keeps at most eight specs alive, and they are small.
    @lru_cache(maxsize=8)  # noqa: B019
    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # tensors made while sampling are used in training, too
            mean = torch.tensor(self.mean or (0.0,), dtype=torch.float32, device=device)
            std = torch.tensor(self.std or (1.0,), dtype=torch.float32, device=device)
            return mean, std / self.scale

    def normalize(self, raw: Tensor) -> Tensor:
        """Convert raw tokenizer latents `(…, C)` to the normalised ones of the network, in
        float32."""
        mean, std = self._affine(raw.device)
        return (raw.float() - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Convert normalised latents to raw ones, in float32; the inverse of `normalize`."""
        mean, std = self._affine(latents.device)
        return latents.float() * std + mean

    def frames(self, count: int) -> int:
        """Return the number of latent frames of a clip of `count` frames. ValueError names the
        nearest counts that fit."""
        if (count - 1) % self.temporal or count < 1:
            below = 1 + max(0, count - 1) // self.temporal * self.temporal
            raise ValueError(
                f"{count} frames are not {self.temporal}n + 1, as this tokenizer needs; the nearest"
                f" are {below} and {below + self.temporal}"
            )
        return 1 + (count - 1) // self.temporal

    def grid(self, width: int, height: int, patch: int = 1) -> tuple[int, int]:
        """Return the latent grid `(rows, columns)` of a picture of `width` by `height` pixels. A
        network takes `patch` by `patch` cells at a time, and the size must be a multiple of that;
        else ValueError names the nearest size that fits."""
        cell = self.spatial * patch
        if width % cell or height % cell:
            near = [max(cell, round(side / cell) * cell) for side in (width, height)]
            why = (
                "the tokenizer's downsampling"
                if patch == 1
                else f"the tokenizer's {self.spatial} times the model's patches of {patch}"
            )
            raise ValueError(
                f"size {width}x{height} is not a multiple of {cell}, {why}; the nearest is"
                f" {near[0]}x{near[1]}"
            )
        return height // self.spatial, width // self.spatial


@dataclass
class TextTokens:
    """Hold encoded captions: `embeddings (B, T, D)` and `valid (B, T)` bool. A dropped
    (unconditional) caption, in caption dropout and in guidance alike, has no valid token. If the
    encoder has an encoded empty or negative prompt, it is `empty (N, D)`, and a dropped caption
    gets its rows instead."""

    embeddings: Tensor
    valid: Tensor
    empty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def drop(self, dropped: Tensor) -> TextTokens:
        """Return the tokens with the captions made unconditional where `dropped (B,)` is true."""
        if self.empty is None:
            return TextTokens(self.embeddings, self.valid & ~dropped[:, None])
        text = self.pad(max(self.valid.shape[1], len(self.empty)))
        instead = F.pad(self.empty, (0, 0, 0, text.valid.shape[1] - len(self.empty)))
        valid = torch.arange(text.valid.shape[1], device=dropped.device) < len(self.empty)
        rows = torch.where(
            dropped[:, None, None], instead.to(text.embeddings.dtype), text.embeddings
        )
        return TextTokens(rows, torch.where(dropped[:, None], valid, text.valid), self.empty)

    def null(self) -> TextTokens:
        """Return unconditional tokens for the same number of captions."""
        return self.drop(torch.ones(len(self), dtype=torch.bool, device=self.valid.device))

    def pad(self, length: int) -> TextTokens:
        """Append invalid tokens, up to `length` tokens in all."""
        extra = length - self.valid.shape[1]
        return TextTokens(
            F.pad(self.embeddings, (0, 0, 0, extra)),
            F.pad(self.valid, (0, extra), value=False),
            self.empty,
        )

    def __getitem__(self, index) -> TextTokens:
        return TextTokens(self.embeddings[index], self.valid[index], self.empty)

    def to(self, *args, **kwargs) -> TextTokens:
        embeddings = self.embeddings.to(*args, **kwargs)
        empty = None if self.empty is None else self.empty.to(*args, **kwargs)
        return TextTokens(embeddings, self.valid.to(device=embeddings.device), empty)

    @staticmethod
    def cat(parts: list[TextTokens]) -> TextTokens:
        longest = max(part.valid.shape[1] for part in parts)
        parts = [part.pad(longest) for part in parts]
        return TextTokens(
            torch.cat([p.embeddings for p in parts]),
            torch.cat([p.valid for p in parts]),
            parts[0].empty,
        )


@dataclass
class Batch:
    """One rank's part of a step. `indices (B,)` int64 are the positions in the global batch: with
    `(seed, purpose, step)` they key every random draw, so that neither resume nor the number of
    ranks changes what is drawn.
    """

    latents: Tensor  # (B, F, H, W, C), raw
    captions: list[str]
    ids: list[str]
    indices: Tensor
    facts: list[dict] = field(default_factory=list)
    crops: Tensor | None = (
        # (B, 4): left, top, right, bottom of the part shown, in shares of the picture; None: not
        # read
        None
    )
    places: Tensor | None = (
        None  # (B, 5): where tiles lie, see `diffusion.tiling`; None: not cut into tiles
    )

    def pin_memory(self) -> Batch:
        """Return this batch in page-locked memory, which a GPU can read while it computes.
        DataLoader calls the method by this name."""
        tensors = {name: getattr(self, name) for name in ("latents", "indices", "crops", "places")}
        return replace(
            self,
            **{name: tensor.pin_memory() for name, tensor in tensors.items() if tensor is not None},
        )


@dataclass(frozen=True)
class Boundary:
    """The time that divides two experts (on the linear path, a noise level). The boundary itself
    belongs to the noisier expert, as in Wan 2.2. `scale`: the factor by which times are multiplied
    for the network."""

    time: float
    scale: float = 1.0

    @property
    def threshold(self) -> float:
        """Return the boundary as networks get times: multiplied by `scale`, rounded to float32."""
        return torch.tensor(self.time * self.scale, dtype=torch.float64).float().item()

    def is_high(self, t: Tensor, whole_times: bool = False) -> Tensor:
        """Return which of the times `t (B,)`, scaled as networks get them, belong to the noisier
        expert: `(B,)` bool. With `whole_times` they are first rounded down to whole numbers, as in
        the official code of Wan."""
        return (t.floor() if whole_times else t) >= self.threshold


class Network(nn.Module):
    """What training and checkpoints ask of a denoiser and of a text encoder alike."""

    lr_scale: float = 1.0  # its learning rate as a multiple of train.lr

    def undecayed(self) -> set[str]:
        """Return the names of parameters that get no weight decay although they are not vectors:
        they act as offsets, not as maps."""
        return set()

    def matrices(self) -> set[str]:
        """Return the names of the parameters that map hidden states to hidden states, for which
        optimizers of matrices (Muon) are meant."""
        return set()

    def is_stored(self, name: str) -> bool:
        """Return whether a checkpoint holds the entry `name` of this network's state. Entries that
        are read again from elsewhere (frozen foreign weights) need not be stored."""
        return True


class Denoiser(Network):
    """A network from tensors to tensors, which knows nothing of schedules, losses or guidance.

    This is all that training, sampling, planning, post-training and export ask of it. The defaults
    are those of a network that takes latents, times and texts alone; a model overrides what differs
    (tests/test_denoiser_contract.py runs over all of them).
    """

    blocks: Any  # a ModuleList or a list of modules, in the order in which they compute
    patch: int = 1  # latent cells along each spatial axis that it takes at a time
    variant: str = "this model"  # what messages call it
    picture: Picture = "none"  # which frames of a clip it gets in further input channels
    conditioning: Conditioning = "none"  # whether it redraws a small clip that it is given
    takes_first_frame: bool = False  # whether a clip may begin with a given, clean latent frame
    first_frame: float = 0.0  # the share of training steps on clips in which it is given
    clip_weights: str = ""  # file or folder of the encoder of given pictures (CLIP); "": none
    lora_targets: tuple[str, ...] = ("q", "k", "v", "proj")  # adapters' default
    lora_only_if_named: tuple[str, ...] = ()  # layers adapted only by a target that names them
    context: Any = None  # the processes that share each clip, see `share_clips`
    encoding: str | None = None  # of the frozen matrices of `blocks`, by name (nn/encodings.py)

    def forward(self, x: Tensor, t: Tensor, text: Any, **inputs: Any) -> Tensor:
        """Return the prediction, shaped like `x (B, F, H, W, C)`. `t (B,)`: times as the objective
        scales them. `text`: TextTokens, or what `prepare` made of them. `inputs`: the further
        inputs that the methods below return."""
        raise NotImplementedError

    # ── one network, or several by noise level ────────────────────────────────────────────────────
    def networks(self) -> dict[str, Denoiser]:
        """Return its networks by the name of their expert; a single network has the name ""."""
        return {"": self}

    def expert_at(self, t: Tensor | float, **sampling_inputs: Any) -> str:
        """Return the name of the network that serves the times `t`, scaled as in `forward`, in
        calls with these `sampling_inputs`. ValueError if the times belong to several networks."""
        return ""

    # ── further inputs of a call ──────────────────────────────────────────────────────────────────
    def prepare(self, text: TextTokens) -> Any:
        """Return `text` as `forward` takes it in many calls with the same texts and weights:
        whatever depends on the text alone may be computed here, once."""
        return text

    def draw_keep(self, rows: int, columns: int, seed: int, step: int) -> Tensor | None:
        """Return the input `keep` of a training step on this grid: the places in a window whose
        tokens are not routed round blocks. None where nothing is routed."""
        return None

    def given_frames(self, frames: int, draws: Draws) -> int:
        """Return the input `given` of one step on clips of `frames` latent frames: how many of the
        first latent frames are given clean. Training tosses a coin in each step, keyed by `draws`;
        outside training, the case that is more frequent in training is always taken."""
        if frames == 1 or not self.first_frame:
            return 0
        if not self.training:
            return int(self.first_frame >= 0.5)
        assert isinstance(draws.seed, int), "training has one seed"
        coin = Draws.of(draws.seed, draws.step, 1).uniform("first_frame").item()
        return int(coin < self.first_frame)

    def sampling_inputs(self, grid: str) -> dict[str, Any]:
        """Return the further inputs of each call in sampling on the time grid `grid`
        (SamplerConfig)."""
        return {}

    # ── training ──────────────────────────────────────────────────────────────────────────────────
    def check_trainable(self, run: Any) -> None:
        """Raise ConfigError unless the loaded network can be trained as the configuration `run`
        says. (What is known before anything is loaded is checked by the section's `check`.)"""

    def number_frames(self, seed: int) -> None:
        """Prepare, in place, a network that has only seen pictures for its first training on
        clips."""

    def matrices(self) -> set[str]:
        return {
            f"blocks.{name}.weight"
            for name, part in self.blocks.named_modules()
            if isinstance(part, nn.Linear)
        }

    def train_flops(
        self, grid: tuple[int, int, int], text_tokens: int, kept: int | None = None
    ) -> int:
        """Return the floating-point operations of the matrix products of one sample's forward and
        backward pass. `grid`: latent (frames, rows, columns); `kept`: how many places of a window
        `draw_keep` kept. Counted as in Chowdhery et al. 2022 (2204.02311, appendix B): operations
        that the model needs, without those that an attention kernel or checkpointing repeats."""
        raise NotImplementedError

    def share_clips(self, context: Any) -> None:
        """Have the processes of `context` (an `nn.context_parallel.Context`) share each clip from
        now on, so that all of them take part in every call; None ends this. A network that ignores
        its `context` computes whole clips, which is correct but saves nothing."""
        for network in self.networks().values():
            network.context = context

    def can_be_captured(self, training: bool) -> bool:
        """Return whether a call (with `training`, a training step) can be captured in a CUDA graph:
        it never waits for the device, and depends on its inputs and weights alone."""
        return False

    # ── files of other programs ───────────────────────────────────────────────────────────────────
    def diffusers_names(self) -> dict[str, str]:
        """Return the names in Diffusers of the modules and parameters that are called otherwise
        there."""
        return {}


class ModelSection(Section):
    """The base of the configs of models: what the rest of the program asks of the section `model:`,
    with the answers of a network that is trained from scratch."""

    freeze: bool

    @property
    def patch(self) -> int:
        """Return how many latent cells along each axis the network takes at a time."""
        return 1

    @property
    def released(self) -> bool:
        """Return whether the weights come from a release, and not from a seed."""
        return False

    @property
    def takes_picture(self) -> bool:
        """Return whether the network may be given a picture that a clip begins (and ends) with."""
        return False

    @property
    def dtype(self) -> str:
        """Return the type in which frozen weights are stored."""
        return "float32"

    @property
    def crop(self) -> bool:
        """Return whether the network is told which part of its picture each sample shows."""
        return False

    @property
    def conditioning(self) -> Conditioning:
        """Return what the network is given of a whole clip, besides latents, time and text."""
        return "none"

    @property
    def augmentation(self) -> float:
        """Return the largest noise level at which training gives the network its condition."""
        return 0.0

    @property
    def takes_place(self) -> bool:
        """Return whether the network can be told where in its clip a tile lies."""
        return False

    @property
    def expert(self) -> str | None:
        """Return which of a release's two experts this network is, "high" or "low"."""
        return None

    @property
    def boundary(self) -> float | None:
        """Return the time between two experts; None where the release or `experts:` says it."""
        return None

    @property
    def between(self) -> tuple[float, float]:
        """Return the range of times, least and greatest, that the network serves."""
        return 0.0, 1.0

    def without_part(self) -> dict[str, tuple[str, ...]]:
        """Return the keys of this section that have no effect in training because of its other
        keys, grouped by the reason."""
        return {}

    @property
    def depth(self) -> int | None:
        """Return the number of blocks; None where the release says it."""
        return None

    def lengths(self) -> dict[str, int]:
        """Return the sizes in this section by key; each is the length of some axis of some
        weight."""
        return {}

    def memory_options(self, frozen: bool) -> list[str]:
        """Return overrides of this section that each save memory in training, the cheapest in time
        first; `frozen`: the weights themselves are not trained."""
        return []

    @property
    def products(self) -> str:
        """Return the type of the matrix products in training; `autocast`: as `train.precision`
        says."""
        return "autocast"

    def check(self, run: Any) -> None:
        if self.conditioning == "low_resolution" and run.tokenizer.low_resolution is None:
            raise ConfigError(
                "model.conditioning",
                "is low_resolution, but tokenizer.low_resolution is null: name the size of the"
                " small clips, for example [448, 256], and cache again",
            )
        if self.conditioning != "none" and run.train.sample_every_steps:
            raise ConfigError(
                "train.sample_every_steps",
                f"is {run.train.sample_every_steps}, but this model redraws small clips, which"
                " previews have none of; set it to 0 and use mmdit sample with --refine",
            )
        if self.freeze and run.lora.enabled:
            raise ConfigError(
                "model.freeze",
                "is true with lora.enabled, which trains adapters in it; set one of them to false",
            )
        if self.freeze and not (self.released or run.train.init_from):
            raise ConfigError(
                "model.freeze",
                "is true without train.init_from: the text encoder would learn for random weights;"
                " name a run",
            )
        if self.products == "float8":
            self.check_products(run)

    def check_products(self, run: Any) -> None:
        """Refuse products of 8-bit floats where they would be ignored, or where a loss would
        compare their results with those of other products."""
        whole = run.train.autocast and not run.lora.enabled and run.posttrain is None
        if not whole:
            raise ConfigError(
                "model.products",
                "is float8, for whole models in bfloat16, not with train.precision fp32, lora or"
                " posttrain; leave it out",
            )


class TextEncoderSection(Section):
    """The base of the configs of text encoders: what the rest of the program asks of the section
    `text_encoder:`, with the answers of an encoder whose weights are made from a seed."""

    freeze: bool
    max_length: int

    @property
    def dim(self) -> int | None:
        """Return the width of the tokens; None where the release says it."""
        return None

    @property
    def depth(self) -> int | None:
        """Return the number of blocks; None where the release says it."""
        return None

    @property
    def released(self) -> bool:
        """Return whether the weights come from files of another program."""
        return False

    @property
    def local_files_only(self) -> bool:
        """Return whether nothing is fetched from a hub."""
        return True

    @property
    def cache_dir(self) -> str:
        """Return the folder in which embeddings are kept for the next run, or ""."""
        return ""


class TokenizerSection(Section):
    """The base of the configs of tokenizers: what the rest of the program asks of the section
    `tokenizer:`, with the answers of a tokenizer of single frames."""

    latent_f: int

    @property
    def temporal(self) -> int:
        """Return how many frames a latent frame covers."""
        return 1

    @property
    def repo_path(self) -> str | None:
        """Return a folder whose Python code is run in place of our own."""
        return None

    @property
    def picture(self) -> str:
        """Return which pictures are cached beside each clip: none, first or first_last."""
        return "none"

    @property
    def low_resolution(self) -> tuple[int, int] | None:
        """Return the width and height of the small clips that are cached beside the clips, if
        any."""
        return None

    def check(self, run: Any) -> None:
        small, cell = self.low_resolution, self.latent_f * run.model.patch
        if small is not None and (min(small) < cell or small[0] % cell or small[1] % cell):
            raise ConfigError(
                "tokenizer.low_resolution",
                f"is {list(small)}; both must be multiples of {cell}, as the sizes of clips are",
            )
        if self.picture != "none" and not run.model.takes_picture:
            raise ConfigError(
                "tokenizer.picture",
                f"is {self.picture}; only Wan's I2V models take one: set it to none",
            )


class Tokenizer(ABC):
    """Turns pixels in `[0, 1]` `(B, F, 3, H, W)` into raw latents `(B, f, H/spatial, W/spatial,
    C)`, where f is `spec.frames(F)`, and back."""

    spec: LatentSpec
    fingerprint: str  # changes when the weights or the configuration change

    @property
    def precision(self) -> str:
        """Return the type in which pixels are encoded, "" where the config does not choose it. All
        latents of a cache are encoded in one type."""
        return "" if self.plain is self else self.plain.precision

    @property
    def name(self) -> str:
        """Return the name of this tokenizer in manifests and messages."""
        return type(self).__name__

    @property
    def plain(self) -> Tokenizer:
        """Return the tokenizer of the clips alone, if the cache holds more (`WithPicture`); else
        self."""
        return self

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the raw latents of `pixels`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels of raw `latents`."""


class TextEncoder(Network):
    """Turns captions into `TextTokens`. An empty caption has no valid token, or is encoded as a
    text (`TextTokens.empty`). Trainable encoders have parameters that require a gradient."""

    dim: int
    keeps_files: bool = False  # whether it reads known embeddings from files, without its weights

    def forward(self, captions: list[str]) -> TextTokens:
        raise NotImplementedError

    def put_away(self) -> None:
        """Free the memory of weights that the encoder loads again when it needs them."""
