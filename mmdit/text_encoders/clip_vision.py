"""The picture encoder of Wan 2.1's I2V and FLF2V: the ViT-H/14 of CLIP (Radford et al. 2021,
2103.00020; weights of OpenCLIP with XLM-RoBERTa), from the official .pth or a Diffusers
`image_encoder/`. Wan reads the states before its last block.

Axes: b picture · l place (the class token first) · h head · d width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.foreign import count_blocks, read_json
from mmdit.nn.attention import attend
from mmdit.pixels import CLIP, Standard
from mmdit.weights import Checkpoint, Entry, fill

PLACES = (
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "image_encoder",
)  # in official and Diffusers releases
HEAD_DIM = 80  # of ViT-H/14; a config.json may say otherwise
NAMES = {  # transformers → ours (official but for q, k and v, which are one matrix there)
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.position_embedding.weight": "pos_embedding",
    "embeddings.patch_embedding": "patch_embedding",
    "pre_layrnorm": "pre_norm",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
    "self_attn": "attn",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_proj": "",
    "encoder.layers": "transformer",
}


@dataclass(frozen=True)
class ClipVisionSizes:
    dim: int
    hidden: int
    blocks: int  # that are run: all but the last one
    heads: int
    patch: int
    places: int  # patches of a picture, and the class token
    eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, sizes: ClipVisionSizes):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(sizes.dim, sizes.dim) for _ in range(4))
        self.heads = sizes.heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(part(x), "b l (h d) -> b h l d", h=self.heads)
            for part in (self.q, self.k, self.v)
        )
        return self.proj(rearrange(attend(q, k, v), "b h l d -> b l (h d)"))


class Block(nn.Module):
    def __init__(self, sizes: ClipVisionSizes):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.dim, sizes.eps) for _ in range(2))
        self.attn = Attention(sizes)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.dim, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClipVision(nn.Module):
    """`model(pixels (b, 3, H, W) in [0, 1])` → states `(b, 257, 1280)` before the last block,
    without the last norm."""

    def __init__(self, sizes: ClipVisionSizes):
        super().__init__()
        self.sizes = sizes
        self.patch_embedding = nn.Conv2d(3, sizes.dim, sizes.patch, sizes.patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.empty(sizes.dim))
        self.pos_embedding = nn.Parameter(torch.empty(sizes.places, sizes.dim))
        self.pre_norm = nn.LayerNorm(sizes.dim, sizes.eps)
        self.transformer = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))

    def forward(self, pixels: Tensor) -> Tensor:
        """As the official code the picture is squeezed to a square, whatever its aspect, without
        antialiasing."""
        side = round((self.sizes.places - 1) ** 0.5) * self.sizes.patch
        small = F.interpolate(pixels.float(), (side, side), mode="bicubic", align_corners=False)
        standard = Standard(CLIP, pixels.device).to_standard(small)
        return self.states(standard.to(self.pos_embedding.dtype))

    def states(self, x: Tensor) -> Tensor:
        """Of normalised pictures `(b, 3, side, side)`."""
        x = rearrange(self.patch_embedding(x), "b d row column -> b (row column) d")
        x = torch.cat([self.cls_embedding.expand(len(x), 1, -1), x], 1) + self.pos_embedding
        x = self.pre_norm(x)
        for block in self.transformer:
            x = block(x)
        return x


# ── reading ───────────────────────────────────────────────────────────────────────────────────────
class _Split:
    """A checkpoint's tensors, one matrix of q, k and v as three, and leading axes of length 1 left
    out."""

    def __init__(self, stored: Checkpoint):
        self.stored = stored
        self.entries: dict[str, Entry] = {}
        for name, entry in stored.entries.items():
            for part in self._names(name):
                rows, *rest = entry.shape or (1,)
                self.entries[part] = replace(
                    entry, shape=(rows // 3, *rest) if part != name else self._bare(entry.shape)
                )

    @staticmethod
    def _names(name: str) -> list[str]:
        return [name.replace("to_qkv", part) for part in "qkv"] if ".to_qkv." in name else [name]

    @staticmethod
    def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[next((axis for axis, length in enumerate(shape) if length != 1), 0) :]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.stored.tensors():
            parts = self._names(name)
            for part, piece in zip(
                parts, tensor.chunk(3) if len(parts) == 3 else [tensor], strict=True
            ):
                yield part, piece.reshape(self.entries[part].shape)


def our_name(name: str) -> str:
    """Of a parameter in either layout."""
    name = name.removeprefix("model.").removeprefix("visual.").removeprefix("vision_model.")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def load_clip_vision(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ClipVision:
    """From a release's folder, an `image_encoder/`, or a weight file. The text tower and what
    follows the states are left out. ValueError, in one sentence: it is not there, cannot be read,
    or is no such encoder."""
    path = Path(path)
    place = next((path / name for name in PLACES if (path / name).exists()), path)
    stored = _Split(Checkpoint(place))
    names = {name: our_name(name) for name in stored.entries}
    shapes = {names[name]: entry.shape for name, entry in stored.entries.items()}
    try:
        places, dim = shapes["pos_embedding"]
        found = {
            int(match[1]) for name in shapes if (match := re.match(r"transformer\.(\d+)\.", name))
        }
        blocks = count_blocks(found, len(shapes), place)
        sizes = ClipVisionSizes(
            dim,
            shapes["transformer.0.mlp.0.weight"][0],
            blocks - 1,
            max(1, dim // HEAD_DIM),
            shapes["patch_embedding.weight"][-1],
            places,
        )
    except (KeyError, ValueError) as error:
        known = (
            f", and it holds neither {' nor '.join(PLACES)}"
            if place == path and path.is_dir()
            else ""
        )
        reason = f"{error} is missing among its {len(shapes)} tensors{known}"
        raise ValueError(f"{place} is no CLIP picture encoder: {reason}") from None
    if place.is_dir() and (place / "config.json").is_file():
        sizes = _told(place / "config.json", sizes)
    with torch.device("meta"):
        model = ClipVision(sizes)
    own = {name for name, _ in model.named_parameters()}
    beyond = (
        "textual.",
        "log_scale",
        "post_",
        "head",
        "visual_projection.",
        "embeddings.",
        f"transformer.{blocks - 1}.",
    )
    ignored = tuple(name for name in shapes if name not in own and name.startswith(beyond))
    model = fill(
        model,
        stored,
        names,
        f"{place}, read as CLIP's picture encoder,",
        device,
        lambda _: dtype,
        ignored,
    )
    return model.requires_grad_(False)


def _told(file: Path, sizes: ClipVisionSizes) -> ClipVisionSizes:
    """`sizes` with what only a config.json of transformers knows. ValueError: it is of another
    network."""
    config = read_json(file, "config of a CLIP picture encoder")
    try:
        heads, kind = (
            config.get("num_attention_heads", sizes.heads),
            config.get("hidden_act", "gelu"),
        )
        result = replace(sizes, heads=heads, eps=config.get("layer_norm_eps", sizes.eps))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no config of a CLIP picture encoder: {error!r}") from None
    if kind != "gelu" or not isinstance(heads, int) or heads < 1 or sizes.dim % heads:
        raise ValueError(
            f"{file}: hidden_act is {kind!r} with {heads!r} heads; Wan's encoder has 'gelu', and"
            f" its width of {sizes.dim} must split into the heads"
        )
    return result
