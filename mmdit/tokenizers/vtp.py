"""The VTP tokenizer: a checkpoint folder of our `VTP/` or of the public release, opened by either
code.

The network is imported by path, so that a clone of the public release can stand in for ours. It is
moved, never cast: its rotary positions are bfloat16 by design, and in the public code `.float()` or
`.half()` would change them.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from mmdit.config import ConfigError, FilePath
from mmdit.foreign import read_json
from mmdit.interfaces import LatentSpec, TokenizerSection
from mmdit.pixels import IMAGENET, Standard
from mmdit.tokenizers.checks import frames_of, latent_frames_of, require_positive

REPOSITORY = Path(__file__).resolve().parents[2]
STATS_FILE = "latent_stats.json"
UPSAMPLING = 16  # of the VTP pixel decoder, whatever the encoder's patch


@dataclass(frozen=True)
class VTPTokenizerConfig(TokenizerSection):
    """name_or_path: folder with config.json and model.safetensors; relative paths are tried from
    the working directory, then from the repository. repo_path: a clone of the public VTP release,
    or None for our own `VTP/`. latent_stats: "auto" (latent_stats.json in the checkpoint folder if
    there), "none", or a path; `{"mean": […], "std": […]}`. chunk_size: frames per network call.
    compile: the encoder's blocks, on a GPU: faster after half a minute of preparation.
    """

    type: Literal["vtp"] = "vtp"
    name_or_path: FilePath = "VTP/checkpoints/vtp_tiny_f16d64"
    repo_path: FilePath | None = None
    latent_f: int = 16
    latent_d: int = 64
    latent_scale: float = 1.0
    latent_stats: str = "auto"
    chunk_size: int = 64
    compile: bool = False

    def __post_init__(self):
        require_positive(self, "latent_f", "latent_d", "latent_scale", "chunk_size")


class VTPTokenizer:
    """Pixels [0, 1] `(B, F, 3, H, W)` ↔ raw latents `(B, F, H/16, W/16, C)`, both float32 on
    `device`.

    dtype: float32, or bfloat16/float16 for autocast; None is float32 on a CPU and bfloat16 on a
    GPU. The weights are frozen; gradients reach `latents` or `pixels` that ask for them.
    ConfigError: see `build_tokenizer`.
    """

    def __init__(
        self,
        config: VTPTokenizerConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self._folder = _checkpoint(config.name_or_path)
        self._model = _load(config, self._folder).requires_grad_(False).to(self.device)
        self._chunk_size = config.chunk_size
        for block in (
            self._model.trunk.blocks if config.compile and self.device.type == "cuda" else ()
        ):
            block.compile()
        self.spec = _spec(config, self._model.config, self._folder)
        self._standard = Standard(IMAGENET, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Of what raw latents depend on: the encoder's weights, the network, pixel normalisation;
        not of `latent_scale` or `latent_stats`, and not of the decoder's weights, so that a better
        decoder serves the caches and models there are.
        """
        mean, deviation = IMAGENET
        digest = hashlib.sha256(f"{mean} {deviation}".encode())
        digest.update((self._folder / "config.json").read_bytes())
        whole = self._folder / "model.safetensors"
        for file in (
            [whole] if whole.is_file() else sorted(self._folder.glob("model-*.safetensors"))
        ):
            with safe_open(file, "pt") as stored:
                for name in sorted(stored.keys()):
                    if name.startswith("trunk."):
                        tensor = stored.get_tensor(name).float().contiguous()
                        digest.update(f"{name} {tuple(tensor.shape)}".encode())
                        digest.update(tensor.numpy())
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """How many the network has."""
        return sum(weight.numel() for weight in self._model.parameters())

    def encode(self, pixels: Tensor) -> Tensor:
        """ValueError for a size that is not a multiple of 16: nothing is cut silently."""
        frames = frames_of(pixels, self.spec)
        latents = [
            self._run(
                self._model.get_reconstruction_latents,
                self._standard.to_standard(part.to(self.device, torch.float32)),
            )
            for part in frames.split(self._chunk_size)
        ]
        return rearrange(torch.cat(latents), "(b f) c h w -> b f h w c", b=len(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Clamped to [0, 1]."""
        frames = latent_frames_of(latents, self.spec)
        decoded = [
            self._run(self._model.get_latents_decoded_images, part.to(self.device, torch.float32))
            for part in frames.split(self._chunk_size)
        ]
        pixels = self._standard.to_unit(torch.cat(decoded))
        return rearrange(pixels, "(b f) c h w -> b f c h w", b=len(latents))

    def _run(self, function, inputs: Tensor) -> Tensor:
        with torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            return function(inputs).float()


# ── opening a checkpoint ──────────────────────────────────────────────────────────────────────────
def _locate(path: str) -> Path | None:
    """`path` from the working directory, else from the repository."""
    candidates = (Path(path).expanduser(), REPOSITORY / path)
    return next((candidate.resolve() for candidate in candidates if candidate.exists()), None)


def _checkpoint(name_or_path: str) -> Path:
    folder = _locate(name_or_path)
    if folder is None or not (folder / "config.json").is_file():
        problem = "is not there" if folder is None else "holds no config.json"
        raise ConfigError(
            "tokenizer.name_or_path",
            f"is {name_or_path!r}, which {problem} (looked in {Path.cwd()} and {REPOSITORY}); must"
            " be a VTP checkpoint folder. Give that of a release (hf download"
            " MiniMaxAI/VTP-Small-f16d64 --local-dir VTP/checkpoints/vtp_small), or train ours:"
            " python -m mmdit.scripts.train_vtp --config"
            " VTP/configs/vtp_tiny_f16d64.yaml",
        )
    return folder


def _load(config: VTPTokenizerConfig, folder: Path) -> torch.nn.Module:
    code = import_vtp(config.repo_path)
    try:
        return code.VTPModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    except Exception as error:  # whatever a folder of others does to the network's own code
        raise ConfigError(
            "tokenizer.name_or_path", f"is {config.name_or_path!r}, which cannot be opened: {error}"
        ) from error


def import_vtp(repo_path: str | None) -> ModuleType:
    """`vtp.models.vtp_hf` from our VTP/ or from `repo_path`. A process holds one package `vtp`:
    another is an error."""
    root = REPOSITORY / "VTP" if repo_path is None else _locate(repo_path)
    if root is None or not (root / "vtp" / "__init__.py").is_file():
        raise ConfigError(
            "tokenizer.repo_path",
            f"is {repo_path!r}; must be a clone of github.com/MiniMax-AI/VTP, or null",
        )
    loaded = sys.modules.get("vtp")
    origin = (
        Path(loaded.__file__).resolve().parents[1]
        if loaded is not None and loaded.__file__
        else None
    )
    if loaded is not None and origin != root:
        raise ConfigError(
            "tokenizer.repo_path",
            f"asks for the package vtp of {root}, but this process has already imported that of"
            f" {origin}; must be the same: use one repo_path for all tokenizers, or start a new"
            " process",
        )
    before = set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module("vtp.models.vtp_hf")
    except ImportError as error:
        for name in (
            set(sys.modules) - before
        ):  # a half-imported package would hide the error the next time
            if name.partition(".")[0] == "vtp":
                del sys.modules[name]
        problem = f"is {str(root)!r}, which cannot be imported: {error}; install its requirements"
        raise ConfigError("tokenizer.repo_path", problem) from error
    finally:
        sys.path.remove(str(root))


def _spec(config: VTPTokenizerConfig, network, folder: Path) -> LatentSpec:
    for name, actual in (
        ("latent_f", network.vision_patch_size),
        ("latent_d", network.vision_feature_bottleneck),
    ):
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
    return LatentSpec(
        channels=config.latent_d,
        spatial=config.latent_f,
        mean=mean,
        std=std,
        scale=config.latent_scale,
    )


def _stats(config: VTPTokenizerConfig, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.latent_stats == "none" or (
        config.latent_stats == "auto" and not (folder / STATS_FILE).is_file()
    ):
        return (), ()
    path = folder / STATS_FILE if config.latent_stats == "auto" else _locate(config.latent_stats)
    if path is None or not path.is_file():
        raise ConfigError(
            "tokenizer.latent_stats",
            f"is {config.latent_stats!r}, not a file; must be auto, none or a path",
        )
    problem = None
    try:
        values = read_json(path, 'statistics of latents, {"mean": [numbers], "std": [numbers]}')
        mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
        if len(mean) != config.latent_d or len(std) != config.latent_d:
            problem = (
                f"has {len(mean)} means and {len(std)} deviations; must be latent_d ="
                f" {config.latent_d} of each"
            )
        elif not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            problem = (
                "has values that are not finite, or a deviation of 0 or less; measure them again"
            )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        problem = f'must hold {{"mean": [numbers], "std": [numbers]}}; reading it gave {error!r}'
    if problem:
        raise ConfigError("tokenizer.latent_stats", f"is {config.latent_stats!r}: {path} {problem}")
    return mean, std
