"""The picture encoder of Wan 2.1's I2V and FLF2V: the ViT-H/14 of CLIP (Radford et al. 2021,
2103.00020; weights of OpenCLIP with XLM-RoBERTa), from the official .pth or a Diffusers
`image_encoder/`. Wan reads the hidden states before its last block.

The network is written out here, in 70 lines, though transformers has one: that one's parameters
have other names in version 4 than in version 5, and the official file has yet others.

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
from mmdit.weights import Checkpoint, Entry, fill, shapes_of

# in official and Diffusers releases
PLACES = ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder")
HEAD_DIM = 80  # the width of a head in ViT-H/14; a config.json may give another
NAMES = {  # transformers → ours (the official ones, but these have q, k and v in one matrix)
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


# other contents of a file: the text tower, and the layers after the states that Wan reads
BEYOND = ("textual.", "log_scale", "post_", "head", "visual_projection.", "embeddings.")


@dataclass(frozen=True)
class ClipVisionSizes:
    dim: int
    hidden: int
    blocks: int  # the blocks that are run: all but the last one
    heads: int
    patch: int
    places: int  # patches of a picture, plus the class token
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
    """Maps pixels `(b, 3, H, W)` in [0, 1] to the states `(b, 257, 1280)` before the last block,
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
        """Return the states of pictures. Each is resized to a square whatever its aspect ratio,
        without antialiasing, as in the official code."""
        side = round((self.sizes.places - 1) ** 0.5) * self.sizes.patch
        small = F.interpolate(pixels.float(), (side, side), mode="bicubic", align_corners=False)
        standard = Standard(CLIP, pixels.device).to_standard(small)
        return self.states(standard.to(self.pos_embedding.dtype))

    def states(self, x: Tensor) -> Tensor:
        """Return the states of normalised pictures `(b, 3, side, side)`."""
        x = rearrange(self.patch_embedding(x), "b d row column -> b (row column) d")
        x = torch.cat([self.cls_embedding.expand(len(x), 1, -1), x], 1) + self.pos_embedding
        x = self.pre_norm(x)
        for block in self.transformer:
            x = block(x)
        return x


# ── reading ───────────────────────────────────────────────────────────────────────────────────────
class _Split:
    """The tensors of a checkpoint, with a joint matrix of q, k and v split into three, and leading
    axes of length 1 removed."""

    def __init__(self, stored: Checkpoint):
        self.stored = stored
        self.entries: dict[str, Entry] = {}
        for name, entry in stored.entries.items():
            shape = list(entry.shape)
            parts = self._names(name)
            if len(parts) == 3 and shape:
                shape[0] //= 3
            while len(parts) == 1 and shape[:1] == [1]:
                del shape[0]
            self.entries |= {part: replace(entry, shape=tuple(shape)) for part in parts}

    @staticmethod
    def _names(name: str) -> list[str]:
        return [name.replace("to_qkv", part) for part in "qkv"] if ".to_qkv." in name else [name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.stored.tensors():
            parts = self._names(name)
            pieces = tensor.chunk(3) if len(parts) == 3 else [tensor]
            for part, piece in zip(parts, pieces, strict=True):
                yield part, piece.reshape(self.entries[part].shape)


def our_name(name: str) -> str:
    """Return our name of a parameter that is given by its name in either layout."""
    name = name.removeprefix("model.").removeprefix("visual.").removeprefix("vision_model.")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def load_clip_vision(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ClipVision:
    """Load the encoder from the folder of a release, from an `image_encoder/`, or from a weight
    file. The text tower and the layers after the states are left out. ValueError, in one sentence,
    if it is not there, cannot be read, or is no such encoder."""
    path = Path(path)
    place = next((path / name for name in PLACES if (path / name).exists()), path)
    stored = _Split(Checkpoint(place))
    names = {name: our_name(name) for name in stored.entries}
    shapes = shapes_of(stored.entries, names)
    try:
        places, dim = shapes["pos_embedding"]
        matches = (re.match(r"transformer\.(\d+)\.", name) for name in shapes)
        blocks = count_blocks({int(match[1]) for match in matches if match}, len(shapes), place)
        sizes = ClipVisionSizes(
            dim,
            hidden=shapes["transformer.0.mlp.0.weight"][0],
            blocks=blocks - 1,
            heads=max(1, dim // HEAD_DIM),
            patch=shapes["patch_embedding.weight"][-1],
            places=places,
        )
    except (KeyError, ValueError) as error:
        reason = f"{error} is missing among its {len(shapes)} tensors"
        if place == path and path.is_dir():
            reason += f", and it holds neither {' nor '.join(PLACES)}"
        raise ValueError(f"{place} is no CLIP picture encoder: {reason}") from None
    if place.is_dir() and (place / "config.json").is_file():
        sizes = _with_config(place / "config.json", sizes)
    with torch.device("meta"):
        model = ClipVision(sizes)
    wanted = {name for name, _ in model.named_parameters()}
    beyond = (*BEYOND, f"transformer.{blocks - 1}.")
    ignored = tuple(name for name in shapes if name not in wanted and name.startswith(beyond))
    source = f"{place}, read as CLIP's picture encoder,"
    model = fill(model, stored, names, source, device, lambda _: dtype, ignored)
    return model.requires_grad_(False)


def _with_config(file: Path, sizes: ClipVisionSizes) -> ClipVisionSizes:
    """Return `sizes` with the values that only a config.json of transformers gives. ValueError if
    that describes another network."""
    config = read_json(file, "config of a CLIP picture encoder")
    heads = config.get("num_attention_heads", sizes.heads)
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu" or not isinstance(heads, int) or heads < 1 or sizes.dim % heads:
        raise ValueError(
            f"{file}: hidden_act is {activation!r} with {heads!r} heads; Wan's encoder has 'gelu',"
            f" and its width of {sizes.dim} must split into the heads"
        )
    return replace(sizes, heads=heads, eps=config.get("layer_norm_eps", sizes.eps))
