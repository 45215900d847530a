"""Encoders of pictures and clips for metrics, opened by what lies at a path. Nothing is downloaded,
and nothing that could run code is opened.

tokenizer                     latents of a tokenizer: our own frozen features
pixels                        the small picture itself: distances are differences of pixels
a folder of VTP               likewise
a folder of transformers      CLIP, DINOv2, DINOv3, VideoMAE
a file of Inception V3        pt_inception-2015-12-05-6726825d.pth (pytorch-fid),
                              weights-inception-2015-12-05-6726825d.pth (torch-fidelity),
                              inception_v3_google-0cc3c7bd.pth (torchvision), as they are or as
                              .safetensors
a file of I3D                 rgb_imagenet.pt (pytorch-i3d)
a file with a name            any network of timm, see `feature_encoder`
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.files import hashed
from mmdit.foreign import explain_errors, read_json
from mmdit.interfaces import Tokenizer
from mmdit.interop import i3d, inception
from mmdit.interop.clip_similarity import Similarity
from mmdit.interop.feature_encoder import FeatureEncoder, load_network
from mmdit.interop.picture_resizing import Resize, resized_square
from mmdit.pixels import IMAGENET, Standard, to_signed
from mmdit.shipped import find
from mmdit.text_encoders.transformers_loading import check_folder
from mmdit.tokenizers import VTPTokenizerConfig, build_tokenizer
from mmdit.weights import Checkpoint

TOKENIZER, PIXELS = "tokenizer", "pixels"
PIXEL_SIDE, PIXEL_FRAMES = 16, 3  # the small pictures that are compared pixel by pixel
ClipRule = Literal["middle", "halves"]
PICTURE_NETWORKS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
INCEPTION_PART, I3D_PART = "Mixed_7c.branch_pool.conv.weight", "Mixed_5c.b3b.conv3d.weight"
PAPER_COUNTS = {  # with how many samples papers compute these distances
    "inception": "50,000 samples, all pictures of the training set (Heusel et al. 2017)",
    "i3d": "2,048 clips of 16 frames on both sides (StyleGAN-V's protocol of FVD)",
    "clip": "50,000 samples (clean-fid's FID-CLIP)",
    "dino": "50,000 samples (FD-DINOv2, Stein et al. 2023)",
    "videomae": "2,048 clips of 16 frames (content-debiased FVD, Ge et al. 2024)",
}


@dataclass
class Encoder:
    """`encoder(pixels (N, F, 3, H, W) in [0, 1])` returns frozen features `(N, D)` float32.

    `facts`: what a result must say about it. `reads`: whether `network` takes pictures `(N, 3, H,
    W)` or whole clips. Of a clip, a network for pictures sees the middle frame; with `halves` it
    sees all frames, and the features are their means over the first and over the second half of the
    frames, concatenated.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    reads: Literal["pictures", "clips"]
    device: torch.device
    facts: dict[str, Any] = field(default_factory=dict)
    halves: bool = False
    tokenizer: Tokenizer | None = None  # if the features come from one

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device)
        if self.reads == "clips":
            return self.network(pixels).float().cpu()
        if not self.halves:
            return self.network(pixels[:, (pixels.shape[1] - 1) // 2]).float().cpu()
        return joined_halves(self.of_frames(pixels))

    @torch.no_grad()
    def of_frames(self, pixels: Tensor) -> Tensor:
        """Return the features `(N, F, D)` of every frame. ValueError if the encoder reads whole
        clips."""
        if self.reads == "clips":
            raise ValueError(f"{self.name} reads whole clips, and has no features of one frame")
        frames = self.network(pixels.to(self.device).flatten(0, 1)).float().cpu()
        return frames.unflatten(0, pixels.shape[:2])


def joined_halves(frames: Tensor) -> Tensor:
    """Return `(N, 2 D)` from the features `(N, F, D)` of frames: their means over the first and
    over the second half, concatenated. ValueError if there is a single frame."""
    if frames.shape[1] < 2:
        raise ValueError("clips=halves needs clips, of two frames at least; set --frames")
    return torch.cat([half.mean(1) for half in frames.tensor_split(2, dim=1)], 1)


def open_encoder(
    weights: str,
    device: torch.device | str = "cpu",
    name: str = "",
    resize: Resize | None = None,
    clips: ClipRule = "middle",
    tokenizer: Tokenizer | None = None,
) -> Encoder:
    """Return the encoder at `weights`, which is a path, `tokenizer` or `pixels`.

    `name`: the architecture, for a file of timm, which does not reveal it. `resize`: for Inception
    and I3D, "tensorflow" if not given. `tokenizer`: the one that the word stands for; without it,
    the one that comes with mmdit. `clips`: see `Encoder.halves`. ValueError if there is no such
    encoder, it does not fit, or it would run code.
    """
    path, device, is_published = find(weights), torch.device(device), False
    if name:
        encoder = _timm(name, path, device)
    elif weights == PIXELS:
        encoder = _pixels(device)
    elif weights == TOKENIZER or _model_type(path) == "vtp":
        if weights != TOKENIZER or tokenizer is None:
            tokenizer = _vtp(path if weights != TOKENIZER else None, device)
        encoder = _tokenizer(tokenizer, device)
    elif path.is_dir():
        encoder = _transformers(path, device)
    else:
        encoder, is_published = _published(path, device, resize or "tensorflow"), True
    if resize and not is_published:
        raise ValueError(
            f"resize={resize} is for Inception and I3D; {encoder.name} has"
            f" {encoder.facts['resize']}"
        )
    if clips == "halves":
        if encoder.reads == "clips":
            raise ValueError(f"clips=halves is for encoders of pictures; {encoder.name} sees clips")
        encoder.halves = True
    if encoder.reads == "pictures":
        rules = {"middle": "the middle frame", "halves": "means over both halves of the frames"}
        encoder.facts["of_a_clip"] = rules[clips]
    return encoder


def _model_type(path: Path) -> str:
    """Return the model_type in the config.json at `path`; "" if there is none."""
    if not (path / "config.json").is_file():
        return ""
    return str(read_json(path / "config.json", "config of an encoder").get("model_type", ""))


def digest(files: list[Path]) -> str:
    """Return the SHA-256 of the concatenated contents of files."""
    result = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashed(result, stream)
    return result.hexdigest()


def _facts(weights: Checkpoint, resize: str, size: int, normalisation: str, paper: str) -> dict:
    """Return what a result says about an encoder."""
    facts = {
        "weights": str(weights.path),
        "weights_sha256": digest(weights.files),
        "resize": resize,
        "size": size,
        "normalisation": normalisation,
    }
    return facts | ({"papers": PAPER_COUNTS[paper]} if paper else {})


# ── tokenizers ────────────────────────────────────────────────────────────────────────────────────
def _vtp(folder: Path | None, device: torch.device) -> Tokenizer:
    """Return the VTP tokenizer in a folder, or the one that comes with mmdit."""
    if folder is None:
        return build_tokenizer(VTPTokenizerConfig(), device)
    channels = read_json(folder / "config.json", "config of a VTP tokenizer")
    latent_d = channels.get("vision_feature_bottleneck", 64)
    return build_tokenizer(VTPTokenizerConfig(name_or_path=str(folder), latent_d=latent_d), device)


def pooled_latents(latents: Tensor) -> Tensor:
    """Return features of raw latents `(N, f, h, w, C)`: `(N, 5 C)` for pictures, `(N, 10 C)` for
    clips. They are the means over the four quarters of the picture, and the deviation over all of
    it; for clips, these over the first and over the second half of the latent frames,
    concatenated."""
    parts = []
    for half in latents.tensor_split(min(2, latents.shape[1]), dim=1):
        frame = rearrange(half.mean(1), "n h w c -> n c h w")
        quarters = F.adaptive_avg_pool2d(frame, 2).flatten(1)
        parts += [quarters, half.flatten(1, 3).std(1, correction=0)]
    return torch.cat(parts, 1)


def _tokenizer(tokenizer: Tokenizer, device: torch.device) -> Encoder:
    facts = {
        "weights_sha256": tokenizer.fingerprint,
        "resize": "none: the size of the samples, as the tokenizer is trained",
        "features": "means of raw latents over quarters of the picture, deviations over all of it;"
        " of clips for both halves of the frames",
    }
    name = type(tokenizer).__name__

    def network(pixels: Tensor) -> Tensor:
        return pooled_latents(tokenizer.encode(pixels))

    return Encoder(name, network, "clips", device, facts, tokenizer=tokenizer)


# ── pixels ────────────────────────────────────────────────────────────────────────────────────────
def small_pixels(pixels: Tensor) -> Tensor:
    """Return `(N, D)` from unit pixels `(N, F, 3, H, W)`: the picture, or the first, middle and
    last frame of a clip, at 16 x 16, divided by √D. The Euclidean distance of two items is thus the
    root mean square difference of their small pixels, from 0 to 1."""
    frames = pixels.shape[1]
    places = torch.linspace(0, frames - 1, min(frames, PIXEL_FRAMES)).round().long()
    shown = pixels[:, places.to(pixels.device)].flatten(0, 1)
    side = (PIXEL_SIDE, PIXEL_SIDE)
    small = F.interpolate(shown, side, mode="bilinear", antialias=True)
    features = small.unflatten(0, (len(pixels), len(places))).flatten(1)
    return features / features.shape[1] ** 0.5


def _pixels(device: torch.device) -> Encoder:
    facts = {
        "resize": f"{PIXEL_SIDE}x{PIXEL_SIDE}, bilinear with antialiasing",
        "features": "the small pixels, of clips those of the first, middle and last frame; a"
        " distance is the root mean square of their differences",
    }
    return Encoder(PIXELS, small_pixels, "clips", device, facts)


# ── networks of others ────────────────────────────────────────────────────────────────────────────
def _timm(name: str, path: Path, device: torch.device) -> Encoder:
    encoder = FeatureEncoder(name, path).to(device)
    mean, deviation = encoder.statistics
    normalisation = f"mean {mean}, deviation {deviation}"
    facts = _facts(Checkpoint(path), "crop", encoder.size, normalisation, "")
    return Encoder(name, encoder, "pictures", device, facts)


def _refuse_program(path: Path) -> None:
    """Raise ValueError for TorchScript, whose code would run."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise ValueError(
            f"{path} is TorchScript, a program that would be run, and is refused; take a file of"
            " weights alone: pt_inception-2015-12-05-6726825d.pth of pytorch-fid has the same"
            " Inception V3, rgb_imagenet.pt of pytorch-i3d the same I3D"
        )


def _published(path: Path, device: torch.device, resize: Resize) -> Encoder:
    """Return Inception V3 or I3D, whichever the names of the tensors in a file indicate."""
    if path.is_file():
        _refuse_program(path)
    stored = Checkpoint(path)
    if INCEPTION_PART in stored.entries:
        return _inception(stored, device, resize)
    if I3D_PART in stored.entries:
        return _i3d(stored, device, resize)
    raise ValueError(
        f"{path} holds neither Inception V3 nor I3D; for a network of timm give"
        f" name=TIMM_MODEL,weights={path}, for CLIP, DINOv2 or VideoMAE the folder of transformers"
    )


def _inception(stored: Checkpoint, device: torch.device, resize: Resize) -> Encoder:
    classes = stored.entries["fc.weight"].shape[0] if "fc.weight" in stored.entries else 0
    if classes not in inception.CLASSES:
        raise ValueError(
            f"{stored.path} is an Inception V3 of {classes} classes; must be one of 1008 (of the"
            " Frechet inception distance) or 1000 (torchvision)"
        )
    variant = inception.CLASSES[classes]
    network = inception.InceptionV3(variant)
    load_network(network, ("fc", "AuxLogits"), stored, stored.path)
    network.requires_grad_(False).eval().to(device)
    of_pytorch = resize == "pytorch"

    def features(pictures: Tensor) -> Tensor:
        images = resized_square(pictures.float(), inception.SIZE, resize)
        # TensorFlow's graph maps 0 … 255 in this way; pytorch-fid maps 255 to 1
        return network(to_signed(images) if of_pytorch else (images * 255 - 128) / 128)

    normalisation = "2x - 1" if of_pytorch else "(255x - 128) / 128"
    paper = "inception" if variant == "fid" else ""
    facts = _facts(stored, resize, inception.SIZE, normalisation, paper)
    return Encoder(f"inception ({variant})", features, "pictures", device, facts)


def _i3d(stored: Checkpoint, device: torch.device, resize: Resize) -> Encoder:
    network = i3d.I3D()
    load_network(network, (), stored, stored.path)
    network.requires_grad_(False).eval().to(device)

    def features(clips: Tensor) -> Tensor:
        if clips.shape[1] < i3d.FEWEST_FRAMES:
            raise ValueError(
                f"I3D needs {i3d.FEWEST_FRAMES} frames or more (16 in papers), these clips have"
                f" {clips.shape[1]}; set --frames"
            )
        frames = resized_square(clips.flatten(0, 1).float(), i3d.SIZE, resize)
        return network(to_signed(frames).unflatten(0, clips.shape[:2]))

    return Encoder(
        "i3d", features, "clips", device, _facts(stored, resize, i3d.SIZE, "2x - 1", "i3d")
    )


def _transformers(folder: Path, device: torch.device) -> Encoder:
    """Return the CLIP, DINOv2, DINOv3 or VideoMAE in a folder of transformers."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json; give the folder of a CLIP, DINOv2 or VideoMAE of"
            " transformers, or of a VTP tokenizer"
        )
    model_type, stored = _model_type(folder), Checkpoint(folder)
    if model_type == "clip":
        similarity = Similarity(folder).to(device)
        facts = _facts(stored, "crop", similarity.size, "CLIP's mean and deviation", "clip")
        return Encoder("clip", similarity.picture_features, "pictures", device, facts)
    if model_type not in (*PICTURE_NETWORKS, "videomae"):
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {model_type!r}; must be clip, videomae,"
            f" {', '.join(PICTURE_NETWORKS)} or vtp"
        )
    network = _network(folder, device)
    standard = Standard(IMAGENET, device)

    def resized(pictures: Tensor, size: int, way: Resize) -> Tensor:
        return standard.to_standard(resized_square(pictures.float(), size, way))

    if model_type == "videomae":
        frames, size = network.config.num_frames, network.config.image_size
        facts = _facts(stored, "pytorch", size, "ImageNet's mean and deviation", "videomae")

        def clip_features(clips: Tensor) -> Tensor:
            first = (clips.shape[1] - frames) // 2
            if first < 0:
                raise ValueError(
                    f"{folder} reads clips of {frames} frames, these have {clips.shape[1]}; set"
                    " --frames"
                )
            clips = clips[:, first : first + frames]
            images = resized(clips.flatten(0, 1), size, "pytorch").unflatten(0, clips.shape[:2])
            return network(pixel_values=images).last_hidden_state.mean(1)

        facts |= {"frames": f"the middle {frames}", "features": "the mean of all tokens"}
        return Encoder("videomae", clip_features, "clips", device, facts)
    size = 224  # fixed, whatever size the network was last trained at
    facts = _facts(stored, "clean", size, "ImageNet's mean and deviation", "dino")

    def features(pictures: Tensor) -> Tensor:
        return network(pixel_values=resized(pictures, size, "clean")).pooler_output

    return Encoder(model_type, features, "pictures", device, facts | {"features": "the CLS token"})


def _network(folder: Path, device: torch.device) -> nn.Module:
    """Return the network in a folder of transformers. ValueError if tensors are missing."""
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ValueError(
            f"{folder} needs transformers ({error}): pip install transformers"
        ) from None
    with explain_errors(folder, "encoder in the transformers layout"):
        check_folder(folder)
        network, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors, first {missing[0]}")
    return network.requires_grad_(False).eval().to(device, torch.float32)
