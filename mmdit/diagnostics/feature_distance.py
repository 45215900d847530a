"""Measure how far samples are from real pictures or clips in the features of one frozen encoder:
Frechet and kernel distance, precision and recall, density and coverage, and whether samples are
copies."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor

from mmdit.data.dataset.captions import all_captions
from mmdit.data.dataset.media_sets import Shape
from mmdit.data.dataset.records import Record
from mmdit.diagnostics.cache_sheet import CELL, FRAMES, fitted
from mmdit.diagnostics.distribution_distance import (
    Moments,
    frechet_distance,
    frechet_limit,
    kernel_distance,
)
from mmdit.diagnostics.frame_scores import FrameScores, consistency, steadiness
from mmdit.diagnostics.neighbours import (
    DENSITY_NEIGHBOURS,
    NEIGHBOURS,
    closer_share,
    copy_scores,
    manifold_scores,
    nearest_distances,
)
from mmdit.diagnostics.real_items import RealItems
from mmdit.interfaces import Tokenizer
from mmdit.interop.encoders import ClipRule, Encoder, joined_halves, open_encoder
from mmdit.interop.picture_resizing import WAYS
from mmdit.pixels import to_uint8, to_unit
from mmdit.training.media import contact_sheet

FEWEST = 2048  # with fewer samples, the distance shows their number more than the model
KEYS = ("name", "weights", "resize", "clips", "reference")
BATCH = 64
SHOWN = 16  # pairs on the sheet of copies
PAIRS = 32  # pairs on the sheet of nearest items
PENDING_BYTES = 1 << 28  # of samples that wait for a common search of their nearest items


def read_setting(setting: str) -> dict[str, str]:
    """Return the parts of `--features`, by key: `PATH`, or `key=value` separated by commas.
    ValueError if a key is unknown, empty or repeated, or none names the weights."""
    first, *rest = setting.split(",")
    if "=" not in first:
        first = f"weights={first}"
    parts = [part.partition("=")[::2] for part in (first, *rest)]
    values = dict(parts)
    for key, count in Counter(key for key, _ in parts).items():
        if count > 1:
            raise ValueError(f"--features is {setting!r}, which gives {key} {count} times")
    wrong = [key for key, value in values.items() if key not in KEYS or not value]
    if wrong or "weights" not in values:
        raise ValueError(
            f"--features is {setting!r}, must be PATH, the word tokenizer or pixels, or"
            " name=TIMM_MODEL,weights=FILE.safetensors; behind it, divided by commas, perhaps"
            " resize=tensorflow|pytorch|clean, clips=middle|halves and reference=SOURCE"
        )
    for key, allowed in (("resize", tuple(WAYS)), ("clips", get_args(ClipRule))):
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"--features: {key}={values[key]}, must be one of {allowed}")
    return values


class Pair(NamedTuple):
    """A sample, uint8 `(F, 3, H, W)`, the number of the real item nearest to it, and their
    distance."""

    name: str
    distance: float
    nearest: int
    pixels: Tensor


class FeatureSet:
    """The features of a set of items, with the names of the items and the scores of their
    frames."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.parts: list[Tensor] = []
        self.names: list[str] = []
        self.moments, self.frames = Moments(), FrameScores()

    @property
    def features(self) -> Tensor:
        """Return the features of all items `(N, D)`."""
        return torch.cat(self.parts)

    def add(self, pixels: Tensor, names: list[str]) -> Tensor:
        """Add items, uint8 `(B, F, 3, H, W)`; return their features `(B, D)`. ValueError if the
        encoder cannot read them, or their features are not finite or of another width."""
        try:
            features = torch.cat([self._encoded(to_unit(part)) for part in pixels.split(BATCH)])
        except ValueError as error:  # a size or number of frames that the encoder does not accept
            raise ValueError(f"{names[0]}: {error}") from None
        check_finite(features, names)
        if self.parts and self.parts[0].shape[1] != features.shape[1]:
            raise ValueError(
                f"features of {names[0]} have width {features.shape[1]}, those before"
                f" {self.parts[0].shape[1]}: clips and pictures cannot be compared"
            )
        if pixels.shape[1] > 1:
            self.frames.add("steadiness", steadiness(to_unit(pixels)))
        self.parts.append(features)
        self.names += names
        self.moments.add(features)
        return features

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Return the features of a batch of items. If the encoder reads every frame, the
        consistency of the frames is recorded, too."""
        if not self.encoder.halves:
            return self.encoder(pixels)
        frames = self.encoder.of_frames(pixels)
        features = joined_halves(frames)
        self.frames.add("consistency", consistency(frames))
        return features


def check_finite(features: Tensor, names: list[str]) -> None:
    """Raise ValueError if `features (N, …)` are not all finite, which would make scores
    meaningless."""
    broken = (~features.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the features of {names[broken[0]]} and {len(broken) - 1} more are nan or infinite:"
            " the weights of the encoder may be damaged, or too large for their precision"
        )


def _check_count(option: str, source: str, items: FeatureSet) -> None:
    """Raise ValueError for fewer than two real items, before samples are drawn in vain."""
    if len(items.names) < 2:
        raise ValueError(
            f"--{option}: of {source} {len(items.names)} item could be read, two or more are needed"
        )


class FeatureDistance:
    """Compares samples with real pictures or clips.

    `setting`: see `read_setting`. `real`: a folder, a JSONL file or a cache; to look for copies, it
    must hold the training items. `held_out`: the same for real items that were not trained on.
    `shape`: the size and frames to which real items are brought; for an encoder that sees one frame
    of a clip, one frame of each is taken. `tokenizer`: the tokenizer that this word in the setting
    stands for.
    """

    def __init__(
        self,
        setting: str,
        shape: Shape,
        device: torch.device,
        real: str | None = None,
        held_out: str | None = None,
        tokenizer: Tokenizer | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        values = read_setting(setting)
        named = values.pop("reference", None)
        self.real_source, self.held_out_source = real or named or "", held_out
        if not self.real_source:
            raise ValueError("--features needs real items to compare with; give --real SOURCE")
        if real and named:
            raise ValueError(f"real items are named twice: --real {real}, reference={named}")
        self.encoder = open_encoder(device=device, tokenizer=tokenizer, **values)
        one_frame = self.encoder.reads == "pictures" and not self.encoder.halves
        self.shape = replace(shape, frames=1, stride=1) if one_frame else shape
        self.seed = seed
        known = [tokenizer, self.encoder.tokenizer]
        tokenizers = [one for one in known if one is not None]
        reading = (self.shape, tokenizers, num_workers, shape.frames > 1 and one_frame)
        self.items = RealItems(self.real_source, *reading)
        self.real = FeatureSet(self.encoder)
        self.records: list[Record] = []
        for records, pixels in self.items.read(BATCH):
            self.real.add(pixels, [record.id for record in records])
            self.records += records
        _check_count("real", self.real_source, self.real)
        self.held_out = FeatureSet(self.encoder) if held_out else None
        if self.held_out:
            others = RealItems(str(held_out), *reading)
            for records, pixels in others.read(BATCH):
                self.held_out.add(pixels, [record.id for record in records])
            _check_count("held_out", str(held_out), self.held_out)
        self._begin()

    def _begin(self) -> None:
        """Start without any sample."""
        self.drawn = FeatureSet(self.encoder)
        self.distances: list[Tensor] = []  # from samples to the nearest real item
        self.nearest: list[Tensor] = []
        self.captions: dict[str, str] = {}  # of samples, by name
        self.closest: list[Pair] = []
        self.first: list[Pair] = []  # the first samples in the order of their names
        self.pending: list[tuple[Tensor, Tensor, list[str]]] = []

    def anew(self) -> FeatureDistance:
        """Return an object for other samples, with the same encoder and real items."""
        other = copy.copy(self)
        other._begin()
        return other

    def add(
        self,
        pixels: Tensor,
        names: list[str] | None = None,
        captions: list[str] | None = None,
    ) -> None:
        """Add samples `(B, F, 3, H, W)`, as uint8, or in [0, 1] and then rounded as a file would
        be; with their `names` (numbers if not given) and the `captions` of what they should show,
        if known."""
        stored = pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)
        stored, count = stored.cpu(), len(self.drawn.names)
        names = names or [f"{count + i:04d}" for i in range(len(stored))]
        self.captions |= zip(names, captions or [""] * len(names), strict=True)
        self.pending.append((self.drawn.add(stored, names), stored, names))
        if sum(part.nbytes for _, part, _ in self.pending) > PENDING_BYTES:
            self._find_nearest()

    def _find_nearest(self) -> None:
        """Find the nearest real item of each waiting sample, and keep the pixels of those samples
        that a sheet will show."""
        if not self.pending:
            return
        features, stored, names = zip(*self.pending)
        self.pending = []
        distances, nearest = nearest_distances(torch.cat(features), self.real.features, 1)
        self.distances.append(distances[:, 0].sqrt())
        self.nearest.append(nearest[:, 0])
        clips = [clip for part in stored for clip in part]
        columns = sum(names, []), self.distances[-1].tolist(), self.nearest[-1].tolist(), clips
        pairs = [Pair(*row) for row in zip(*columns, strict=True)]
        by_distance = sorted([*self.closest, *pairs], key=lambda pair: (pair.distance, pair.name))
        self.closest = by_distance[:SHOWN]
        self.first = sorted([*self.first, *pairs], key=lambda pair: pair.name)[:PAIRS]

    def report(self) -> dict:
        """Return the scores and everything on which they depend, ready for JSON."""
        self._find_nearest()
        report = {
            "encoder": self.encoder.name,
            "reference": self.real_source,
            "frechet_distance": frechet_distance(self.drawn.moments, self.real.moments),
        }
        samples, real = self.drawn.features, self.real.features
        limit = frechet_limit(samples, self.real.moments, self.seed)
        few = min(len(samples), len(real)) <= max(NEIGHBOURS, DENSITY_NEIGHBOURS)
        report |= {
            "frechet_limit": limit,
            "kernel_distance": kernel_distance(samples, real, self.seed),
            "neighbours": None if few else manifold_scores(samples, real),
            "copies": self._copies(),
            "samples": len(samples),
            "pictures": len(real),
            "width": samples.shape[1],
            "rank": {
                "samples": self.drawn.moments.root()[1],
                "pictures": self.real.moments.root()[1],
            },
            "seed": self.seed,
            "k": {"precision, recall": NEIGHBOURS, "density, coverage": DENSITY_NEIGHBOURS},
            "real_items": asdict(self.shape),
            **self.encoder.facts,
        }
        if self.drawn.frames.values:
            report["frames"] = {
                "samples": self.drawn.frames.report(),
                "real": self.real.frames.report() or None,
            }
        if warnings := list(self._warnings(limit, few)):
            report["warning"] = "\n".join(warnings)
        return report

    def _control(self) -> tuple[str, Tensor]:
        """Return the name of the control items, and their distances `(K,)` to the nearest real
        item: held-out items, or without these the real items among themselves."""
        if self.held_out:
            distances = nearest_distances(self.held_out.features, self.real.features, 1)[0]
            return "held-out items", distances[:, 0].sqrt()
        features = self.real.features
        distances = nearest_distances(features, features, 1, same=True)[0]
        which = "real items among themselves: too near where these repeat each other"
        return which, distances[:, 0].sqrt()

    def _copies(self) -> dict:
        """Return `copy_scores`, and for each sample the nearest real item."""
        control, distances = self._control()
        distances_of_samples = torch.cat(self.distances)
        nearest = torch.cat(self.nearest).tolist()
        pairs = zip([self.real.names[number] for number in nearest], distances_of_samples.tolist())
        return {
            "control": control,
            "held_out": self.held_out_source,
            **copy_scores(distances_of_samples, distances),
            "own_caption": self._own_caption(nearest),
            "nearest": dict(zip(self.drawn.names, pairs, strict=True)),
        }

    def _own_caption(self, nearest: list[int]) -> dict[str, int] | None:
        """Return how many samples have the caption of a real item, and how many of these are
        nearest to an item with that caption; None if no sample has one."""
        of_item = [set(all_captions(record.caption, record.facts)) for record in self.records]
        known = set().union(*of_item) - {""}
        captions = [self.captions[name] for name in self.drawn.names]
        shared = [(caption, n) for caption, n in zip(captions, nearest) if caption in known]
        if not shared:
            return None
        met = sum(caption in of_item[number] for caption, number in shared)
        return {"samples": len(shared), "nearest": met}

    def _warnings(self, limit: dict | None, few: bool) -> Iterator[str]:
        fewest, width = min(self.drawn.moments.count, self.real.moments.count), self.width
        if fewest < FEWEST:
            yield (
                f"{fewest} samples or real items: below {FEWEST} the distance is larger than it"
                " should be; compare it only with one of as many samples and the same items, or"
                " look at the kernel distance"
            )
        if fewest <= width:
            yield (
                f"{fewest} features of width {width} have a singular covariance: nothing is known"
                " of the directions in which they do not vary"
            )
        if limit is None:
            yield f"no limit of the Frechet distance: it needs {2 * width} samples"
        if few:
            yield "too few for precision and recall"

    @property
    def width(self) -> int:
        """Return the width of the features."""
        return len(self.real.moments.mean)

    def copies_sheet(self) -> Image.Image:
        """Draw the samples that are nearest to a real item, each beside that item."""
        self._find_nearest()
        return self._sheet(self.closest)

    def nearest_sheet(self) -> Image.Image:
        """Draw the first samples by name, each beside the real item that is nearest to it."""
        self._find_nearest()
        return self._sheet(self.first)

    def _sheet(self, pairs: list[Pair]) -> Image.Image:
        """Draw samples beside their nearest real items. The text says what share of the control
        items is farther from the nearest real item than the sample is."""
        control, distances = self._control()
        of = control.partition(":")[0]
        cells, captions = [], []
        for name, distance, number, clip in pairs:
            record = self.records[number]
            item = self.items.read_one(record, self.shape.size)
            if len(item) == 1 < len(clip):
                clip = clip[(len(clip) - 1) // 2][None]
            share = closer_share(torch.tensor([distance], dtype=torch.float64), distances)
            cells += [_shown(clip), _shown(item)]
            captions += [
                f"sample {name}: {self.captions[name]}",
                f"nearest real, {distance:.4g} away, nearer than {share:.0%} of {of}:"
                f" {self.real.names[number]} {record.caption}",
            ]
        shown = torch.stack(cells)
        drawn_rows = (shown < 1).flatten(0, 2).any(0).any(1).nonzero()
        height = int(drawn_rows.max()) + 1 if len(drawn_rows) else CELL  # below, all is white
        return contact_sheet(
            shown[..., :height, :], captions, 8 if shown.shape[1] == 1 else 2, height
        )


def _shown(clip: Tensor) -> Tensor:
    """Return a few frames of a uint8 clip, in [0, 1] and fitted into squares, for a sheet."""
    places = torch.linspace(0, len(clip) - 1, min(len(clip), FRAMES)).round().long()
    return fitted(to_unit(clip[places]))


def format_features(report: dict) -> str:
    """Return the report as lines for people."""
    kernel, copies = report["kernel_distance"], report["copies"]
    lines = [
        f"Frechet distance of {report['encoder']} features {report['frechet_distance']:.3f}:"
        f" {report['samples']} samples, {report['pictures']} real items of {report['reference']}"
    ]
    if report["frechet_limit"]:
        lines.append(f"  for infinitely many samples {report['frechet_limit']['value']:.3f}")
    spread = "" if kernel["deviation"] is None else f" ± {kernel['deviation']:.3g} over subsets"
    lines.append(f"  kernel distance {kernel['value']:.4g}{spread} (unbiased)")
    if report["neighbours"]:
        scores = report["neighbours"].items()
        lines.append("  " + ", ".join(f"{name} {value:.3f}" for name, value in scores))
    medians = [copies[name]["median"] for name in ("sample_distances", "control_distances")]
    control = copies["control"].partition(":")[0]
    lines += [
        f"  nearest real item: {medians[0]:.4g} from a sample, {medians[1]:.4g} from {control}"
        " (medians)",
        f"  {copies['suspicious']:.1%} of the samples are nearer than 99 % of those (1 % expected),"
        f" {copies['identical']} identical; a sample is nearer than one of those with probability"
        f" {copies['closer']:.3f} (0.5 expected)",
    ]
    if shared := copies["own_caption"]:
        lines.append(
            f"  of {shared['samples']} samples with the caption of a real item"
            f" {shared['nearest']} are nearest to such an item"
        )
    for which, scores in (report.get("frames") or {}).items():
        if scores:
            text = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            lines.append(f"  frames of {which}: {text}")
    if "warning" in report:
        lines += [f"  {warning}" for warning in report["warning"].splitlines()]
    return "\n".join(lines)
