"""Describe a folder of a Wan release as a config of ours, with the sampling settings that were
published with it."""

from __future__ import annotations

from pathlib import Path

from mmdit.foreign import read_json
from mmdit.interop.wan_weights import EXPERT_FOLDERS, locate, stored_sizes
from mmdit.models.wan import WanConfig
from mmdit.models.wan_denoiser import WanModelConfig
from mmdit.weights import Checkpoint, is_wan_release

MARKS = ("model_index.json", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
NEGATIVE_PROMPT = (  # the official code's default
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_FIRST = {
    "I2V-14B": "镜头晃动，",
    "FLF2V-14B": "镜头切换，",
}  # a shaking camera, a cut: what two of them also avoid, first
I2V_14B_SHIFT_720P = 5.0
SIZE_480P, SIZE_720P, SIZE_5B = (832, 480), (1280, 720), (1280, 704)
PUBLISHED = {  # steps, shift, guidance (of the high expert, then of the low), boundary, size
    "T2V-1.3B": (50, 8.0, (6.0, 6.0), None, SIZE_480P),
    "T2V-14B": (50, 5.0, (5.0, 5.0), None, SIZE_720P),
    "I2V-14B": (40, 3.0, (5.0, 5.0), None, SIZE_480P),
    "FLF2V-14B": (50, 16.0, (5.0, 5.0), None, SIZE_720P),
    "T2V-A14B": (40, 12.0, (4.0, 3.0), 0.875, SIZE_720P),
    "I2V-A14B": (40, 5.0, (3.5, 3.5), 0.9, SIZE_720P),
    "TI2V-5B": (50, 5.0, (5.0, 5.0), None, SIZE_5B),
}


def published_boundary(settings: WanModelConfig, pair: bool) -> float:
    """Return the boundary between the experts of the release that `settings` name, which the
    headers of one of its files reveal. ValueError if they cannot be read."""
    stored = Checkpoint(locate(settings.name_or_path, "high" if pair else settings.expert))
    config = stored_sizes(stored, settings.name_or_path)
    return PUBLISHED["I2V-A14B" if config.in_dim > config.out_dim else "T2V-A14B"][3]


def published_shift(path: str | Path, width: int, height: int) -> float | None:
    """Return the time shift for clips of `width × height` of a release whose shift depends on the
    size (I2V-14B); None for other releases."""
    if variant_of(path) != "I2V-14B":
        return None
    small = width * height <= SIZE_480P[0] * SIZE_480P[1]
    return PUBLISHED["I2V-14B"][1] if small else I2V_14B_SHIFT_720P


def variant_of(path: str | Path) -> str | None:
    """Return the name in `PUBLISHED` of the release in `path`; None if there is no release."""
    release = _release(Path(path))
    return release and release[0]


def _has_boundary(index: Path) -> bool:
    return read_json(index, "index of a release").get("boundary_ratio") is not None


def release_config(path: str | Path) -> dict | None:
    """Return a config, as plain data, for the release in `path`; None if there is none. ValueError
    if it is incomplete or cannot be read."""
    path = Path(path)
    release = _release(path)
    if release is None:
        if is_wan_release(path):
            raise ValueError(
                f"{path} is a Wan transformer without its VAE (Wan2.1_VAE.pth, TI2V-5B:"
                " Wan2.2_VAE.pth; of Diffusers: vae/ and model_index.json); to sample from it"
                " fetch the rest of its release"
            )
        return None
    name, config, pair = release
    small = config.out_dim == 48
    published = PUBLISHED.get(name, PUBLISHED["TI2V-5B" if small else "T2V-14B"])
    steps, shift, (high, low), boundary, (width, height) = published
    if name == "I2V-14B" and "720p" in path.name.lower():
        shift, (width, height) = I2V_14B_SHIFT_720P, SIZE_720P
    return {
        "experiment_name": "wan",
        "video": {
            "width": width,
            "height": height,
            "fps": 24 if small else 16,
            "num_frames": 121 if small else 81,
        },
        "tokenizer": {
            "type": "wan_vae",
            "name_or_path": str(path),
            "latent_f": 16 if small else 8,
            "latent_d": config.out_dim,
        },
        "text_encoder": {"type": "umt5", "name_or_path": str(path)},
        "model": {
            "type": "wan",
            "name_or_path": str(path),
            "dtype": "bfloat16",
            "expert": "high" if pair else None,
            **({"boundary": boundary} if boundary else {}),
        },
        "lora": {"enabled": False},
        "train": {
            "sample_solver": "unipc",
            "sample_num_steps": steps,
            "sample_shift": shift,
            "sample_grid": "wan",
            "sample_cfg_scale": high,
            "sample_cfg_scale_low": low if pair else None,
            "sample_negative_prompt": NEGATIVE_FIRST.get(name, "") + NEGATIVE_PROMPT,
        },
    }


def _release(path: Path) -> tuple[str, WanConfig, bool] | None:
    """Return the name and the sizes of the release in `path`, and whether it has two experts; None
    if there is no release. ValueError if one of two experts is missing."""
    if not path.is_dir() or not any((path / mark).exists() for mark in MARKS):
        return None
    experts = [
        folder
        for folders in EXPERT_FOLDERS.values()
        for folder in folders
        if (path / folder).is_dir()
    ]
    pair = len(experts) == 2
    if len(experts) == 1 and (
        experts != ["transformer"] or _has_boundary(path / "model_index.json")
    ):
        raise ValueError(
            f"{path} holds one expert of two, {experts[0]}; fetch the other: the times are shared"
            " between them"
        )
    config = stored_sizes(Checkpoint(locate(path, "high" if pair else None)), path)
    name = config.variant.split(" ")[0]
    if pair:
        name = "I2V-A14B" if config.in_dim > config.out_dim else "T2V-A14B"
    return name, config, pair
