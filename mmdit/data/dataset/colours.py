"""Colours of pictures and videos as sRGB: ICC profiles, other primaries and curves, and tone
mapping of HDR to SDR.

HDR is tone-mapped as ITU-R BT.2390 (EETF) says, on the largest of red, green and blue, so that hues
stay: light up to half of diffuse white (203 cd/m² by BT.2408) is unchanged, a highlight of 1,000
cd/m² becomes white. Diffuse white itself becomes 229."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

NOTES = {  # what a person should know of how items were decoded: "3 items …"
    "profile": "had other colours than sRGB (a profile, primaries or a gamma): converted to sRGB",
    "profile ignored": (
        "have a colour profile that is broken or of another kind of picture: it is not used"
    ),
    "hdr": "are HDR (HLG or PQ): tone-mapped to SDR",
    "interlaced": (
        "are interlaced, which shows as combs where something moves: deinterlace them "
        "first (ffmpeg -vf bwdif)"
    ),
    "alpha not read": "are WebM with transparency, which is not read: what lies under it is shown",
}
MAX_PROFILE = 1 << 24  # bytes; profiles of printers have up to 3 MB
PART = 1 << 20  # pixels converted at once
WHITE_NITS, PEAK_NITS = 203.0, 1000.0  # cd/m²: diffuse white; the brightest that keeps its shape

Gamut = tuple[tuple[float, float], ...]  # x, y of red, green, blue and white
SRGB: Gamut = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290))
P3: Gamut = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290))
BT2020: Gamut = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290))
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


@dataclass(frozen=True)
class Coding:
    """Describe how stored numbers represent light, if not as in sRGB. `curve`: `srgb`, `pq`, `hlg`,
    or the exponent of a power law."""

    gamut: Gamut = SRGB
    curve: str | float = "srgb"

    @property
    def hdr(self) -> bool:
        return self.curve in ("pq", "hlg")


def coding_of(primaries: int, transfer: int) -> Coding | None:
    """Return the coding that code points of ITU-T H.273 name (in video, PNG's cICP, AVIF's nclx);
    None for sRGB's, or one that players treat like it (BT.709, BT.601)."""
    curves: dict[int, str | float] = {8: 1.0, 16: "pq", 18: "hlg"}
    curve = curves.get(transfer, "srgb")
    unstated = BT2020 if curve in ("pq", "hlg") else SRGB
    gamut = {1: SRGB, 9: BT2020, 11: P3, 12: P3}.get(primaries, unstated)
    return None if (gamut, curve) == (SRGB, "srgb") else Coding(gamut, curve)


# ── ICC profiles ──────────────────────────────────────────────────────────────────────────────────
def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Return a picture without transparency, of any mode, in mode RGB and sRGB; and a key of NOTES,
    or "". A broken profile is ignored."""
    if image.mode not in ("L", "CMYK"):
        image = in_mode(image, "L" if image.mode == "1" else "RGB")
    transform, note = _transform(profile, image.mode) if profile else (None, "")
    if transform is None:
        return in_mode(image, "RGB"), note
    return transform.apply(in_mode(image, transform.input_mode)), note


def changes_colours(profile: bytes | None, mode: str) -> bool:
    """Return whether `to_srgb` changes, or has a note for, pictures of this mode."""
    return bool(profile) and _transform(profile, mode) != (None, "")


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return the picture in this mode; itself, not a copy, if it has it."""
    return image if image.mode == mode else image.convert(mode)


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """Return the transform from a profile to sRGB, and a note; None if the profile is that of sRGB,
    or cannot be used."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        space = opened.profile.xcolor_space.strip()
        if mode == "L" and space == "RGB":  # a grey value then means equal red, green and blue
            mode = "RGB"
        if space != {"L": "GRAY"}.get(mode, mode):
            return None, "profile ignored"
        transform = ImageCms.ImageCmsTransform(opened, srgb, mode, "RGB")
        if mode == "RGB" and _changes_nothing(transform):
            return None, ""
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None, "profile ignored"
    return transform, "profile"


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether the transform moves none of 729 colours, evenly spread, by more than one
    level."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    before = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    after = np.asarray(transform.apply(Image.fromarray(before)))
    return np.abs(after.astype(int) - before).max() <= 1


# ── primaries and curves ──────────────────────────────────────────────────────────────────────────
def stored_to_srgb(pixels: np.ndarray, coding: Coding) -> np.ndarray:
    """Convert uint8 or uint16 `(H, W, 3)` of this coding to sRGB, uint8."""
    shown = np.empty(pixels.shape, np.uint8)
    light_of = _light(coding.curve, np.iinfo(pixels.dtype).max + 1)
    into_srgb = _between(coding.gamut)
    rows = max(1, PART // pixels.shape[1])
    for first in range(0, len(pixels), rows):
        light = light_of[pixels[first : first + rows]]
        if coding.curve == "hlg":  # the display's part of the curve (BT.2100: OOTF of 1,000 cd/m²)
            luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
            light *= (PEAK_NITS / WHITE_NITS) * luminance[..., None] ** np.float32(0.2)
        if coding.hdr:
            brightest = light.max(-1)
            light *= np.interp(brightest, *_tone_gains()).astype(np.float32)[..., None]
        steps = np.clip(light @ into_srgb, 0, 1) * np.float32(65535) + np.float32(0.5)
        shown[first : first + rows] = _srgb_numbers()[steps.astype(np.uint16)]
    return shown


@lru_cache(maxsize=8)
def _light(curve: str | float, levels: int) -> np.ndarray:
    """Return the linear light of every stored number. 1 is white, for PQ diffuse white; for HLG it
    is light of the scene, with 1 as the brightest."""
    value = np.linspace(0, 1, levels)
    if curve == "srgb":
        light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    elif curve == "hlg":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
    elif curve == "pq":
        light = _pq_to_nits(value) / WHITE_NITS
    else:
        light = value ** float(curve)
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _srgb_numbers() -> np.ndarray:
    """Return the uint8 sRGB values of 65,536 steps of linear light."""
    light = np.linspace(0, 1, 65536)
    value = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return (value * 255).round().astype(np.uint8)


@lru_cache(maxsize=1)
def _tone_gains() -> tuple[np.ndarray, np.ndarray]:
    """Return the light levels, from none to far above the peak (in units of diffuse white), and the
    factor by which each is multiplied: BT.2390's EETF."""
    light = np.linspace(0, (10_000 / WHITE_NITS) ** 0.5, 4096) ** 2
    source, target = _nits_to_pq(PEAK_NITS), _nits_to_pq(WHITE_NITS) / _nits_to_pq(PEAK_NITS)
    knee = 1.5 * target - 0.5
    given = np.minimum(_nits_to_pq(light * WHITE_NITS) / source, 1)
    t = np.maximum(given - knee, 0) / (1 - knee)
    bent = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * target
    )
    mapped = _pq_to_nits(np.where(given < knee, given, bent) * source) / WHITE_NITS
    return light, np.where(light > 0, mapped / np.maximum(light, 1e-12), 1.0)


def _pq_to_nits(value: np.ndarray) -> np.ndarray:
    power = np.power(value, 32 / 2523)
    ratio = np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
    return 10_000 * ratio ** (16384 / 2610)


def _nits_to_pq(nits: np.ndarray | float) -> np.ndarray:
    power = np.power(np.asarray(nits) / 10_000, 2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


@lru_cache(maxsize=8)
def _between(gamut: Gamut) -> np.ndarray:
    """Return `(3, 3)` such that linear `rgb @ matrix` is the same colour in sRGB's primaries, with
    white mapped to white (Bradford)."""
    here, there = (BRADFORD @ _xyz(white) for white in (gamut[3], SRGB[3]))
    adapted = np.linalg.inv(BRADFORD) @ np.diag(there / here) @ BRADFORD
    return (np.linalg.inv(_to_xyz(SRGB)) @ adapted @ _to_xyz(gamut)).T.astype(np.float32)


def _xyz(corner: tuple[float, float]) -> np.ndarray:
    x, y = corner
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _to_xyz(gamut: Gamut) -> np.ndarray:
    columns = np.stack([_xyz(corner) for corner in gamut[:3]], 1)
    return columns * np.linalg.solve(columns, _xyz(gamut[3]))
