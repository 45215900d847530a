"""The Wan VAEs as tokenizers: 2.1 (4x8x8, 16 channels) and 2.2 (4x16x16, 48 channels), from any
layout of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mmdit.config import ConfigError, FilePath, least
from mmdit.files import expanded
from mmdit.foreign import explain_errors, read_json
from mmdit.interfaces import LatentSpec, Tokenizer, TokenizerSection
from mmdit.pixels import from_signed, to_signed
from mmdit.tokenizers.checks import frames_of, latent_frames_of
from mmdit.tokenizers.wan_vae_network import GROUP, WanVAE, WanVAESizes
from mmdit.tokenizers.with_picture import Picture
from mmdit.weights import Checkpoint, fill, is_wan_release

FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")  # in the root of an official release


def _numbers(table: str) -> tuple[float, ...]:
    return tuple(map(float, table.split()))


STATISTICS = {  # mean and deviation of latents, by the number of channels: the released constants
    16: (
        _numbers("""
        -0.7571 -0.7089 -0.9113  0.1075 -0.1745  0.9653 -0.1517  1.5508
         0.4134 -0.0715  0.5517 -0.3632 -0.1922 -0.9497  0.2503 -0.2921
        """),
        _numbers("""
         2.8184  1.4541  2.3275  2.6558  1.2196  1.7708  2.6052  2.0743
         3.2687  2.1526  2.8652  1.5579  1.6382  1.1253  2.8251  1.9160
        """),
    ),
    48: (
        _numbers("""
        -0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557
        -0.1382  0.0542  0.2813  0.0891  0.1570 -0.0098  0.0375 -0.1825
        -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
        -0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230
        -0.0313 -0.1649  0.0117  0.0723 -0.2839 -0.2083 -0.0520  0.3748
         0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
        """),
        _numbers("""
         0.4765  1.0364  0.4514  1.1677  0.5313  0.4990  0.4818  0.5013
         0.8158  1.0344  0.5894  1.0901  0.6885  0.6165  0.8454  0.4978
         0.5759  0.3523  0.7135  0.6804  0.5833  1.4146  0.8986  0.5659
         0.7069  0.5338  0.4889  0.4917  0.4069  0.4999  0.6866  0.4093
         0.5709  0.6065  0.6415  0.4944  0.5726  1.2042  0.5458  1.6887
         0.3971  1.0600  0.3943  0.5537  0.5444  0.4089  0.7468  0.7744
        """),
    ),
}


@dataclass(frozen=True)
class WanVAETokenizerConfig(TokenizerSection):
    """The VAE of Wan 2.1 or 2.2, which joins four frames into one."""

    # Chooses a VAE of Wan.
    type: Literal["wan_vae"] = "wan_vae"
    # Wan2.1_VAE.pth, Wan2.2_VAE.pth, the release's folder that holds one, or a Diffusers folder.
    name_or_path: FilePath = ""
    # Pixels that a latent cell covers along each axis: 8 for Wan 2.1, 16 for Wan 2.2.
    latent_f: int = 8
    # Channels of a latent: 16 for Wan 2.1, 48 for Wan 2.2.
    latent_d: int = 16
    # Whether caches also hold the latents of each clip's first frame (`first`), or of its first and
    # last (`first_last`), to train I2V and FLF2V.
    picture: Picture = "none"
    # Cut frames into overlapping square tiles of this many pixels, which needs less memory; 0 does
    # not cut.
    tile: int = 0
    # The dtype of the arithmetic. The official code uses float32; bfloat16 changes latents by 1 %
    # (measured on tiny weights).
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def temporal(self) -> int:
        return GROUP

    def __post_init__(self):
        least(self, 0, "latent_f", "latent_d", above=True)
        if self.tile and (self.tile < 4 * self.latent_f or self.tile % (4 * self.latent_f)):
            raise ConfigError(
                "tile",
                f"is {self.tile}; must be a multiple of {4 * self.latent_f} (4 latent cells), or 0",
            )
        if not self.name_or_path:
            raise ConfigError(
                "name_or_path",
                "is empty; must name Wan2.1_VAE.pth, Wan2.2_VAE.pth or a folder that holds one",
            )


class WanVAETokenizer(Tokenizer):
    """Pixels [0, 1] `(B, 4n + 1, 3, H, W)` ↔ raw latents `(B, n + 1, H/f, W/f, C)` float32: the
    means of the VAE, which `spec` normalises.

    Weights are float32 and frozen. dtype: that of the arithmetic; None takes the config's.
    ConfigError: there are no such weights, they are not those of a Wan VAE, or have other sizes
    than the config says.
    """

    def __init__(
        self,
        config: WanVAETokenizerConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        self.device, self.tile = torch.device(device), config.tile // config.latent_f
        self.dtype = dtype or getattr(torch, config.dtype)
        try:
            place = _locate(expanded(config.name_or_path))
            self._model = _load(place).requires_grad_(False).to(self.device)
            mean, std = _statistics(place, self._model.sizes.channels)
        except ValueError as error:
            raise ConfigError("tokenizer.name_or_path", str(error)) from None
        sizes = self._model.sizes
        version, user = "2.1", "every Wan but TI2V-5B has"
        if sizes.residual:
            version, user = "2.2", "TI2V-5B alone has"
        for name, actual in (("latent_f", sizes.spatial), ("latent_d", sizes.channels)):
            if getattr(config, name) != actual:
                raise ConfigError(
                    f"tokenizer.{name}",
                    f"is {getattr(config, name)}, but {place} is a Wan {version} VAE with {actual},"
                    f" which {user}: take that of the model's release",
                )
        self.spec = LatentSpec(sizes.channels, sizes.spatial, mean, std, temporal=GROUP)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the encoder's weights; it does not depend on the file from which they
        came."""
        digest = hashlib.sha256(f"wan_vae {self._model.sizes}".encode())
        for name, value in sorted(self._model.state_dict().items()):
            if name.startswith(("encoder.", "conv1.")):
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode clips. ValueError unless the number of frames is 4n + 1: the official code would
        silently drop the last ones."""
        frames_of(pixels, self.spec)
        self.spec.frames(pixels.shape[1])
        signed = to_signed(pixels.to(self.device, torch.float32))
        signed = rearrange(signed, "b f c h w -> b c f h w")
        means = self._tiled(self._model.encode, signed, self.spec.spatial, 1)
        return rearrange(means, "b c f h w -> b f h w c")

    def decode(self, latents: Tensor) -> Tensor:
        latent_frames_of(latents, self.spec)
        raw = rearrange(latents.to(self.device, torch.float32), "b f h w c -> b c f h w")
        decoded = self._tiled(self._model.decode, raw, 1, self.spec.spatial)
        return rearrange(from_signed(decoded), "b c f h w -> b f c h w")

    def _tiled(
        self, function: Callable[[Tensor], Tensor], x: Tensor, inputs: int, outputs: int
    ) -> Tensor:
        """Return `function(x)`, computed in tiles of `tile` cells that are blended where they
        overlap. A cell is `inputs` values wide before the function and `outputs` after it."""
        rows, columns = x.shape[3] // inputs, x.shape[4] // inputs
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=narrow):
            if not self.tile or max(rows, columns) <= self.tile:
                return function(x).float()
            result = total = torch.zeros(0)
            overlap = self.tile // 4 * outputs
            for (top, height), (left, width) in product(
                _tiles(rows, self.tile), _tiles(columns, self.tile)
            ):
                down = slice(top * inputs, (top + height) * inputs)
                across = slice(left * inputs, (left + width) * inputs)
                part = function(x[..., down, across]).float()
                if not len(result):
                    result = part.new_zeros(*part.shape[:3], rows * outputs, columns * outputs)
                    total = torch.zeros_like(result[0, 0, 0])
                fade = _fade(height * outputs, overlap)[:, None] * _fade(width * outputs, overlap)
                down = slice(top * outputs, (top + height) * outputs)
                across = slice(left * outputs, (left + width) * outputs)
                result[..., down, across] += part * fade.to(part)
                total[down, across] += fade.to(part)
            return result / total


def _tiles(cells: int, tile: int) -> list[tuple[int, int]]:
    """Return (start, length) of the tiles that cover `cells`; each overlaps the one before by about
    a quarter, the last perhaps by more."""
    count = max(1, -(-(cells - tile) * 4 // (3 * tile)) + 1)
    return [(min(i * tile * 3 // 4, max(0, cells - tile)), min(tile, cells)) for i in range(count)]


def _fade(length: int, overlap: int) -> Tensor:
    position = torch.arange(length) + 0.5
    return torch.minimum(position, length - position).div(overlap).clamp(max=1)


# ── opening ───────────────────────────────────────────────────────────────────────────────────────
def _locate(path: Path) -> Path:
    if (path / "vae").is_dir():
        return path / "vae"
    files = [path / name for name in FILES if (path / name).is_file()]
    if len(files) > 1:
        raise ValueError(f"{path} holds {' and '.join(FILES)}: name the file")
    if not files and is_wan_release(path):
        raise ValueError(
            f"{path} is a Wan release that lacks its VAE, {FILES[0]} (TI2V-5B: {FILES[1]}; of"
            " Diffusers: vae/); fetch it, or name it in tokenizer.name_or_path"
        )
    return files[0] if files else path


DIFFERENT_IN_DIFFUSERS = {  # official → Diffusers: the tensors that reveal the sizes
    "decoder.conv1.weight": "decoder.conv_in.weight",
    "encoder.conv1.weight": "encoder.conv_in.weight",
    "conv2.weight": "post_quant_conv.weight",
}


def _load(place: Path) -> WanVAE:
    stored, prefix = Checkpoint(place), ""
    if all(name.startswith("model.") for name in stored.entries):  # as in some repacked files
        prefix = "model."
    bare = {name: name.removeprefix(prefix) for name in stored.entries}
    shapes = {bare[name]: entry.shape for name, entry in stored.entries.items()}
    official = dict(shapes)
    for ours, theirs in DIFFERENT_IN_DIFFUSERS.items():
        if theirs in shapes:
            official[ours] = shapes[theirs]
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
        official["encoder.downsamples.0.downsamples."] = ()
    try:
        sizes = WanVAESizes.infer(official)
    except KeyError as error:
        raise ValueError(
            f"{place} is no Wan VAE: {error} is missing among its {len(shapes)} tensors"
        ) from None
    with explain_errors(place, "Wan VAE"), torch.device("meta"):
        model = WanVAE(sizes)
    ours_of = {}
    if "decoder.conv_in.weight" in shapes:
        ours_of = {theirs: ours for ours, theirs in model.diffusers_names.items()}
    names = {name: ours_of.get(inner, inner) for name, inner in bare.items()}
    version = "2.2" if sizes.residual else "2.1"
    return fill(model, stored, names, f"{place}, read as a Wan {version} VAE,")


def _statistics(place: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation of each channel: from a config.json beside the weights, else
    the released ones."""
    file = (place if place.is_dir() else place.parent) / "config.json"
    stored = read_json(file, "config of a Wan VAE") if file.is_file() else {}
    try:
        if "latents_mean" in stored:
            mean, std = stored["latents_mean"], stored["latents_std"]
            if len(mean) == len(std) == channels:
                return tuple(map(float, mean)), tuple(map(float, std))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{file} is no config of a Wan VAE: {error!r}") from None
    if channels not in STATISTICS:
        raise ValueError(
            f"{place} has {channels} latent channels, of which no statistics are known; put a"
            " config.json with latents_mean and latents_std beside it"
        )
    return STATISTICS[channels]
