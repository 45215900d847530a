"""The VTP tokenizer: a checkpoint folder of our training or of the public release.

The network is the package `vtp` that is installed with mmdit; a clone of the public release can
replace it (`repo_path`). The network is moved between devices, but never cast: its rotary positions
are bfloat16 by design, and in the public code `.float()` or `.half()` would change them.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from mmdit.config import ConfigError, FilePath, least
from mmdit.foreign import read_json
from mmdit.interfaces import LatentSpec, Tokenizer, TokenizerSection
from mmdit.pixels import IMAGENET, Standard
from mmdit.shipped import find
from mmdit.tokenizers.checks import frames_of, latent_frames_of

STATS_FILE = "latent_stats.json"
UPSAMPLING = 16  # of the VTP pixel decoder, whatever the encoder's patch size


@dataclass(frozen=True)
class VTPTokenizerConfig(TokenizerSection):
    """The VTP tokenizer: one latent frame for every frame."""

    # Chooses the VTP tokenizer.
    type: Literal["vtp"] = "vtp"
    # A folder with config.json and model.safetensors. A relative path is tried from the working
    # directory, then among the files that come with mmdit.
    name_or_path: FilePath = "VTP/checkpoints/vtp_tiny_f16d64"
    # A clone of the public VTP release whose code runs the network; null is the package `vtp`.
    repo_path: FilePath | None = None
    # Pixels that a latent cell covers along each axis; must be the checkpoint's.
    latent_f: int = 16
    # Channels of a latent; must be the checkpoint's.
    latent_d: int = 64
    # Multiplies normalised latents, so that their size is about 1 (`mmdit estimate-latent-scale`).
    latent_scale: float = 1.0
    # File with the means and deviations that normalise latents: a path; `auto` for
    # latent_stats.json beside the weights, if it is there; or `none`.
    latent_stats: str = "auto"
    # Frames that go through the network at a time.
    chunk_size: int = 64
    # Compile the encoder's blocks on a GPU: faster after half a minute of preparation.
    compile: bool = False
    # Cache beside each clip the same clip as a model of this width and height in pixels could at
    # best have drawn it, for super-resolution; null caches the clip alone.
    low_resolution: tuple[int, int] | None = None

    def __post_init__(self):
        least(self, 0, "latent_f", "latent_d", "latent_scale", "chunk_size", above=True)


class VTPTokenizer(Tokenizer):
    """Pixels [0, 1] `(B, F, 3, H, W)` ↔ raw latents `(B, F, H/16, W/16, C)`, both float32 on
    `device`.

    dtype: float32, or bfloat16/float16 for autocast; None is float32 on a CPU and bfloat16 on a
    GPU. The weights are frozen, but gradients flow back to `latents` or `pixels` that require them.
    ConfigError: see `build_tokenizer`.
    """

    def __init__(
        self,
        config: VTPTokenizerConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        self._folder = _checkpoint(config.name_or_path)
        network: Any = _load(config, self._folder).requires_grad_(False).to(device)
        self._take(network, _spec(config, network.config, self._folder), device, dtype)
        self._chunk_size = config.chunk_size
        if config.compile and self.device.type == "cuda":
            for block in self._model.trunk.blocks:
                block.compile()

    def _take(
        self,
        network: Any,
        spec: LatentSpec,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self.spec, self.device = network, spec, torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self._chunk_size = VTPTokenizerConfig.chunk_size
        self._standard = Standard(IMAGENET, self.device)

    @classmethod
    def of_network(
        cls, network: Any, spec: LatentSpec, fingerprint: str, device: torch.device
    ) -> VTPTokenizer:
        """Return the tokenizer of a `VTPModel` that is already loaded and on `device`."""
        tokenizer = cls.__new__(cls)
        tokenizer._take(network, spec, device)
        tokenizer.fingerprint = fingerprint
        return tokenizer

    @property
    def network(self) -> Any:
        """Return the `VTPModel` that encodes and decodes."""
        return self._model

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all that raw latents depend on: the encoder's weights, the network,
        pixel normalisation. `latent_scale`, `latent_stats` and the decoder's weights do not count,
        so that existing caches and models can be used with a better decoder."""
        mean, deviation = IMAGENET
        digest = hashlib.sha256(f"{mean} {deviation}".encode())
        digest.update((self._folder / "config.json").read_bytes())
        whole = self._folder / "model.safetensors"
        shards = sorted(self._folder.glob("model-*.safetensors"))
        for file in [whole] if whole.is_file() else shards:
            with safe_open(file, "pt") as stored:
                for name in sorted(stored.keys()):
                    if name.startswith("trunk."):
                        tensor = stored.get_tensor(name).float().contiguous()
                        digest.update(f"{name} {tuple(tensor.shape)}".encode())
                        digest.update(tensor.numpy())
        return digest.hexdigest()

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode frame by frame. ValueError for a size that is not a multiple of 16: nothing is
        cropped silently."""
        latents = [
            self._run(self._model.get_reconstruction_latents, self._standard.to_standard(part))
            for part in self._chunks(frames_of(pixels, self.spec))
        ]
        return rearrange(torch.cat(latents), "(b f) c h w -> b f h w c", b=len(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode frame by frame, to pixels clamped to [0, 1]."""
        decoded = [
            self._run(self._model.get_latents_decoded_images, part)
            for part in self._chunks(latent_frames_of(latents, self.spec))
        ]
        pixels = self._standard.to_unit(torch.cat(decoded))
        return rearrange(pixels, "(b f) c h w -> b f c h w", b=len(latents))

    def _chunks(self, frames: Tensor):
        for part in frames.split(self._chunk_size):
            yield part.to(self.device, torch.float32)

    def _run(self, function, inputs: Tensor) -> Tensor:
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=narrow):
            return function(inputs).float()


# ── opening a checkpoint ──────────────────────────────────────────────────────────────────────────
def _checkpoint(name_or_path: str) -> Path:
    folder = find(name_or_path).resolve()
    if not (folder / "config.json").is_file():
        problem = "holds no config.json" if folder.exists() else "is not there"
        raise ConfigError(
            "tokenizer.name_or_path",
            f"is {name_or_path!r}, which {problem} (looked in {Path.cwd()} and among the files of"
            " mmdit); must be a VTP checkpoint folder. Give that of a release (hf download"
            " MiniMaxAI/VTP-Small-f16d64 --local-dir VTP/checkpoints/vtp_small), or train ours:"
            " mmdit train-vtp --config VTP/configs/vtp_tiny_f16d64.yaml",
        )
    return folder


def _load(config: VTPTokenizerConfig, folder: Path) -> torch.nn.Module:
    code = import_vtp(config.repo_path)
    try:
        return code.VTPModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    except Exception as error:  # on a foreign folder, the network's own code may raise anything
        raise ConfigError(
            "tokenizer.name_or_path", f"is {config.name_or_path!r}, which cannot be opened: {error}"
        ) from error


def import_vtp(repo_path: str | None = None) -> ModuleType:
    """Return `vtp.models.vtp_hf` of the installed package, or of the clone in `repo_path`. A
    process can hold only one package `vtp`: to ask for another is an error."""
    root = _installed_package() if repo_path is None else _clone(repo_path)
    loaded = sys.modules.get("vtp")
    if loaded is not None and loaded.__file__:
        origin = Path(loaded.__file__).resolve().parents[1]
        if origin != root:
            raise ConfigError(
                "tokenizer.repo_path",
                f"asks for the package vtp of {root}, but this process has already imported that"
                f" of {origin}; must be the same: use one repo_path for all tokenizers, or start a"
                " new process",
            )
    modules, search_path = set(sys.modules), list(sys.path)
    if repo_path is not None:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module("vtp.models.vtp_hf")
    except ImportError as error:
        # a half-imported package would hide the error at the next attempt
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] == "vtp":
                del sys.modules[name]
        problem = f"is {str(root)!r}, which cannot be imported: {error}; install its requirements"
        raise ConfigError("tokenizer.repo_path", problem) from error
    finally:
        sys.path[:] = search_path


def _installed_package() -> Path:
    """Return the folder that holds the installed package `vtp`. In a source tree that was never
    installed, this is `VTP/`, which is put on the import path."""
    spec = PathFinder.find_spec("vtp")
    folder = Path(__file__).resolve().parents[2] / "VTP"
    if (spec is None or spec.origin is None) and (folder / "vtp").is_dir():
        sys.path.append(str(folder))
        return folder
    if spec is None or spec.origin is None:
        raise ConfigError(
            "tokenizer.repo_path",
            "is null, but the package vtp is missing; install mmdit again, or give a clone of"
            " github.com/MiniMax-AI/VTP",
        )
    return Path(spec.origin).resolve().parents[1]


def _clone(repo_path: str) -> Path:
    root = find(repo_path).resolve()
    if not (root / "vtp" / "__init__.py").is_file():
        raise ConfigError(
            "tokenizer.repo_path",
            f"is {repo_path!r}; must be a clone of github.com/MiniMax-AI/VTP, or null",
        )
    return root


def _spec(config: VTPTokenizerConfig, network, folder: Path) -> LatentSpec:
    sizes = {"latent_f": network.vision_patch_size, "latent_d": network.vision_feature_bottleneck}
    for name, actual in sizes.items():
        if getattr(config, name) != actual:
            raise ConfigError(
                f"tokenizer.{name}",
                f"is {getattr(config, name)}, but the checkpoint {folder} has {actual}; set it to"
                f" {actual}",
            )
    if network.vision_patch_size != UPSAMPLING:
        raise ConfigError(
            "tokenizer.name_or_path",
            f"is {str(folder)!r} with vision_patch_size {network.vision_patch_size}, but the"
            f" decoder upsamples by {UPSAMPLING}, so pixels would come back in another size; must"
            f" be a checkpoint with patches of {UPSAMPLING}",
        )
    mean, std = _stats(config, folder)
    return LatentSpec(config.latent_d, config.latent_f, mean, std, config.latent_scale)


def _stats(config: VTPTokenizerConfig, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation of each channel; two empty tuples where there are no
    statistics."""
    setting, beside = config.latent_stats, folder / STATS_FILE
    if setting == "none" or (setting == "auto" and not beside.is_file()):
        return (), ()
    path = beside if setting == "auto" else find(setting)
    try:
        if not path.is_file():
            raise ValueError("not a file; must be auto, none or a path")
        values = read_json(path, 'statistics of latents, {"mean": [numbers], "std": [numbers]}')
        try:
            mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            wanted = '{"mean": [numbers], "std": [numbers]}'
            raise ValueError(f"{path} must hold {wanted}; reading it gave {error!r}") from None
        if not len(mean) == len(std) == config.latent_d:
            raise ValueError(
                f"{path} has {len(mean)} means and {len(std)} deviations; must be latent_d ="
                f" {config.latent_d} of each"
            )
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError(
                f"{path} has values that are not finite, or a deviation of 0 or less; measure them"
                " again"
            )
    except ValueError as error:
        raise ConfigError("tokenizer.latent_stats", f"is {setting!r}, {error}") from None
    return mean, std
