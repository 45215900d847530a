"""The items and frames of every training step. The plan is a pure function of (seed, step): resume
needs no state, every rank knows every step, and the number of ranks changes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.clips import frame_numbers, jitter_limits, latent_video, usable_frames
from mmdit.rng import Draws, key, uniform

# version of the order of items; 1 filled the last batch of each group and epoch by repetition
ORDER = 2
Grid = tuple[int, ...]  # latent (rows, columns)
# what items must have in common to share a batch: the grid and, if clips of one grid differ in it,
# the number of frames
Group = tuple[int, ...]
_CROP = re.compile(r"_c\d+$")


@dataclass(frozen=True)
class PlannedBatch:
    """The global batch of one step: the numbers `items (B,)` of items in the cache, and for each
    item ascending frame numbers, `frames (B, F)`."""

    grid: Grid
    items: Tensor
    frames: Tensor


@dataclass(frozen=True)
class _Epoch:
    """The batches of one epoch, in order: batch `i` has the group `groups[i]` and `items[i]`.
    `first`: the position of its first batch in the stream."""

    first: int
    groups: list[Group]
    items: Tensor  # (batches, size)


def by_shape(shapes: Tensor, items: Tensor) -> dict[Group, Tensor]:
    """Return, for each distinct row of `shapes (N, …)`, those of `items (n,)` that have it."""
    unique, inverse = torch.unique(shapes[items], dim=0, return_inverse=True)
    return {tuple(shape): items[inverse == number] for number, shape in enumerate(unique.tolist())}


class _Stream:
    """An endless sequence of batches over groups of equal shape, in which every item is seen
    equally often.

    The items of a group form an endless sequence of permutations, which is cut into batches of
    `size`. With n items, an epoch has n / size batches of the group on average: nothing is dropped,
    and a group smaller than a batch has a batch in some epochs only. The batches of an epoch are
    shuffled.
    """

    def __init__(self, groups: dict[Group, Tensor], size: int, seed: int, purpose: str):
        self.groups, self.size, self.seed, self.purpose = groups, size, seed, purpose
        self.items = sum(map(len, groups.values()))
        self._counts = torch.tensor([len(members) for members in groups.values()])
        self._phases = torch.tensor([key(seed, purpose, "phase", group) % size for group in groups])
        self._epoch = _Epoch(0, [], torch.empty(0))

    @property
    def epoch_steps(self) -> float:
        """Return the number of steps that see as many samples as there are items."""
        return self.items / self.size

    def batch(self, position: int) -> tuple[Group, Tensor]:
        """Return the group and the items `(size,)` of the batch at a position."""
        place = position - self._epoch.first
        if not 0 <= place < len(self._epoch.groups):
            self._epoch = self._make_epoch(self._epoch_at(position))
            place = position - self._epoch.first
        return self._epoch.groups[place], self._epoch.items[place]

    def _batches_before(self, epoch: int) -> Tensor:
        """Return the number of batches that each group has before an epoch."""
        return (epoch * self._counts + self._phases) // self.size

    def _epoch_at(self, position: int) -> int:
        """Return the epoch of the batch at `position`: the last epoch with at most that many
        batches before it."""
        low, high = 0, (position + len(self.groups) + 1) * self.size // self.items + 1
        while high - low > 1:
            middle = (low + high) // 2
            if int(self._batches_before(middle).sum()) <= position:
                low = middle
            else:
                high = middle
        return low

    def _make_epoch(self, epoch: int) -> _Epoch:
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        tables, groups = [], []
        bounds = zip(before.tolist(), after.tolist(), strict=True)
        for (group, members), (begin, end) in zip(self.groups.items(), bounds, strict=True):
            if begin < end:
                order = self._order(group, len(members), begin * self.size, end * self.size)
                tables.append(members[order].view(-1, self.size))
                groups += [group] * (end - begin)
        draws = Draws.of(key(self.seed, self.purpose, epoch), 0, len(groups))
        mixed = draws.bits("order").argsort(stable=True)
        mixed_groups = [groups[place] for place in mixed.tolist()]
        return _Epoch(int(before.sum()), mixed_groups, torch.cat(tables)[mixed])

    def _order(self, group: Group, count: int, begin: int, end: int) -> Tensor:
        """Return the items at `begin` to `end` of a group's endless sequence of permutations;
        `count`: the number of its items."""
        first, last = begin // count, math.ceil(end / count)
        numbers = torch.arange(first * count, last * count)
        bits = Draws(key(self.seed, self.purpose, group), 0, numbers).bits("order")
        orders = bits.view(-1, count).argsort(dim=1, stable=True).flatten()
        return orders[begin - first * count : end - first * count]


class BatchPlan:
    """The global batch of every step. `report()` says which items are used, repeated and left out.
    ValueError if nothing is left.

    A clip must have `1 + (num_frames - 1) * frame_stride` frames (or what the smallest of
    `frame_counts` needs), otherwise it is left out, and only its single frames are used, in image
    steps. The share of these is `image_fraction`, and they are spread evenly: step s is one if
    floor(s·f + phase(seed)) grows. The share `held_out` of the items, chosen by a hash of their
    ids, is in no batch.

    `name`: of one source among several (see `mixture`). Sources differ in their order of items, and
    if a source holds only single pictures, all of its steps are image steps, whatever `num_frames`
    is.
    """

    def __init__(
        self,
        cache: LatentCache,
        video: VideoConfig,
        global_batch: int,
        seed: int,
        held_out: float = 0.0,
        name: str = "",
    ):
        if global_batch < 1:
            raise ValueError(f"the global batch is {global_batch}; must be at least 1")
        other_rates = cache.rates - {video.fps}  # of video files
        if other_rates:
            rate = f"{min(other_rates):g}"
            raise ValueError(
                f"the cache {cache.folder} holds clips of video files at {rate} frames a second,"
                f" the config has video.fps: {video.fps:g}; set it to {rate}, or run the caching"
                " command again"
            )
        spec = cache.manifest.spec
        self.video, self.global_batch, self.seed = latent_video(video, spec), global_batch, seed
        self.name = name
        pictures = bool(name) and not (cache.shapes[:, 0] > 1).any()
        if pictures and self.video.num_frames > 1:
            self.video = replace(self.video, image_fraction=1.0)
        # samples start where a window that the tokenizer encoded started
        self.aligned = self.video.num_frames if spec.temporal > 1 else 1
        self._ids, self._counts, self._grids = cache.ids, cache.shapes[:, 0], cache.shapes[:, 1:3]
        self._frames = usable_frames(self._counts, self.video)  # of each item in a sample
        long_enough = self._frames > 0
        self.excluded = torch.nonzero(~long_enough).flatten()
        if pictures:
            self.excluded = self.excluded[:0]
        self.held_out = _held_out(cache.ids, held_out, seed)
        used = torch.ones(len(cache.ids), dtype=torch.bool).index_fill_(0, self.held_out, False)
        if held_out and not 0 < len(self.held_out) < len(cache.ids):
            purpose = "train on" if len(self.held_out) else "measure"
            raise ValueError(
                f"train.val_share {held_out:g} holds {len(self.held_out)} of the {len(cache.ids)}"
                f" items of the cache {cache.folder} out: none is left to {purpose}; change it, or"
                " set train.val_every_steps: 0"
            )
        fraction = self.video.image_fraction
        if fraction < 1 and not (long_enough & used).any():
            raise ValueError(
                f"no item of the cache {cache.folder} is long enough.\n{self.left_out()}"
                f"\n{self._remedy()}"
            )
        if len(self.held_out) and fraction < 1 and not long_enough[self.held_out].any():
            raise ValueError(
                f"train.val_share {held_out:g} holds {len(self.held_out)} items of the cache"
                f" {cache.folder} out, and every one is too short for a clip: raise it, or set"
                " train.val_every_steps: 0"
            )
        shapes = self._grids
        if self.video.frame_counts:
            shapes = torch.cat([shapes, self._frames[:, None]], 1)
        self.clips: _Stream | None = None
        self.images: _Stream | None = None
        if fraction < 1:
            groups = by_shape(shapes, torch.nonzero(long_enough & used).flatten())
            self.clips = _Stream(groups, global_batch, seed, f"clips {name}".strip())
        if fraction > 0:
            groups = by_shape(self._grids, torch.nonzero(used).flatten())
            self.images = _Stream(groups, global_batch, seed, f"images {name}".strip())
        phase_key = key(seed, "image_step", name) if name else key(seed, "image_step")
        self._phase = (phase_key >> 40) % (1 << 24) / (1 << 24)

    # ── the batches ───────────────────────────────────────────────────────────────────────────────
    def _images_before(self, step: int) -> int:
        return math.floor(step * self.video.image_fraction + self._phase)

    @property
    def items(self) -> int:
        """Return the number of items in an epoch: of clips, or of pictures if there are no
        clips."""
        stream = self.clips or self.images
        assert stream is not None  # one of them is used
        return stream.items

    @property
    def epoch_steps(self) -> float:
        """Return the number of steps in an epoch: those in which as many clips (or pictures, if
        there are none) are seen as there are."""
        fraction = self.video.image_fraction
        return self.items / self.global_batch / (1 - fraction if self.clips else fraction)

    def is_image_step(self, step: int) -> bool:
        """Return whether a step sees single frames."""
        return self._images_before(step + 1) > self._images_before(step)

    def seen_at(self, position: int) -> str:
        """Return in words what a step sees: clips, single frames of them, or pictures."""
        if self.clips is None or self.video.num_frames == 1:
            return "pictures"
        return "single frames" if self.is_image_step(position) else "clips"

    def batch(self, position: int, step: int | None = None) -> PlannedBatch:
        """Return the global batch at `position` (from 0) of this plan. `step`: the step of the
        training, which keys the draws of frames; it differs from `position` if other plans have
        steps, too."""
        step = position if step is None else step
        before = self._images_before(position)
        if self.images is not None and self.is_image_step(position):
            group, items = self.images.batch(before)
            frames = 1
        else:
            assert self.clips is not None  # without it every step is one of images
            group, items = self.clips.batch(position - before)
            frames = int(self._frames[items[0]])
        return self._planned(group, items, frames, Draws.of(self.seed, step, len(items)))

    def held_out_batches(self, most: int) -> list[PlannedBatch]:
        """Return the first `most` held-out items (clips, unless training sees pictures only), one
        batch for each shape. The draws for an item depend on its id alone."""
        items, frames = self.held_out, torch.ones_like(self._frames)
        if self.clips is not None:
            items, frames = items[self._frames[items] > 0], self._frames
        shapes = torch.cat([self._grids, frames[:, None]], 1)
        return [
            self._planned(group, members, group[2], self.item_draws(members))
            for group, members in by_shape(shapes, items[:most]).items()
        ]

    def item_draws(self, items: Tensor) -> Draws:
        """Return draws that depend on the ids of `items (B,)` and nothing else."""
        return Draws(self.seed, 0, torch.tensor([key(self._ids[i]) for i in items.tolist()]))

    def _planned(self, group: Group, items: Tensor, frames: int, draws: Draws) -> PlannedBatch:
        counts = self._counts[items]
        numbers = frame_numbers(counts, frames, self.video, draws, self.aligned)
        return PlannedBatch(group[:2], items, numbers)

    # ── what a person should know before training ─────────────────────────────────────────────────
    def left_out(self) -> str:
        """Return a text that says how many items are too short, and why; "" if none are."""
        if not len(self.excluded):
            return ""
        video, counts = self.video, self._counts[self.excluded]
        examples = self.excluded[:5].tolist()
        names = ", ".join(f"{self._ids[item]} ({int(self._counts[item])})" for item in examples)
        needed = f"{video.span}"
        if not video.shrink_video_to_frames:
            needed += f" (1 + {video.num_frames - 1}·{video.frame_stride})"
        return (
            f"left out {len(counts)} items of {int(counts.min())} to {int(counts.max())} frames,"
            f" for example {names}: num_frames {video.num_frames} with frame_stride"
            f" {video.frame_stride} needs {needed}."
        )

    def _remedy(self) -> str:
        """Return a text that names settings under which the items that are too short would be
        used."""
        counts = self._counts[self.excluded]
        shortest, longest = map(self._setting_for, (int(counts.min()), int(counts.max())))
        remedy = f"{shortest} would keep all of them"
        return f"{remedy}, {longest} the longest." if longest != shortest else f"{remedy}."

    def _setting_for(self, frames: int) -> str:
        """Return the setting under which clips of this many frames are used."""
        if self.video.shrink_video_to_frames:
            return f"video.num_frames: {frames}"
        stride = (frames - 1) // (self.video.num_frames - 1)
        if stride >= 1:
            return f"video.frame_stride: {stride}"
        return f"video.num_frames: {1 + (frames - 1) // self.video.frame_stride}"

    def table(self) -> list[dict]:
        """Return, for each group of clips and of images: the number of its items, of its batches in
        an epoch (on average), and of the places in a batch that repeat an item because the batch is
        larger than the group."""
        rows = []
        for name, stream in (("clips", self.clips), ("images", self.images)):
            for group, members in stream.groups.items() if stream else ():
                rows.append(
                    {
                        "steps": name,
                        "grid": list(group[:2]),
                        "frames": 1 if name == "images" else int(self._frames[members[0]]),
                        "items": len(members),
                        "batches": round(len(members) / self.global_batch, 3),
                        "repeats": max(0, self.global_batch - len(members)),
                    }
                )
        return rows

    def unmoved(self) -> int:
        """Return the number of clips in which `temporal_jitter` moves no frame, because frames are
        too close together."""
        if not self.video.temporal_jitter:
            return 0
        clips = self._frames > 1
        limits = jitter_limits(self._counts[clips], self._frames[clips], self.video)
        return int((limits == 0).sum())

    def report(self) -> str:
        """Return a text for people about what training will see."""
        lines = []
        for row in self.table():
            rows, columns = row["grid"]
            shown = "pictures" if row["frames"] == 1 else f"clips of {row['frames']} frames"
            if row["steps"] == "images" and self.clips is not None:
                shown = "single frames of clips"
            line = (
                f"  {shown}, {columns}x{rows} cells: {row['items']} items,"
                f" {row['batches']:g} batches of {self.global_batch} an epoch"
            )
            if row["repeats"]:
                times = math.ceil(self.global_batch / row["items"])
                line += f", each item up to {times} times in one"
            lines.append(line)
        what = "clips" if self.clips is not None and self.video.num_frames > 1 else "pictures"
        lines.append(f"  an epoch: {self.epoch_steps:.4g} steps, for {self.items} {what}")
        if len(self.held_out):
            lines.append(f"  {len(self.held_out)} items are held out for validation")
        if unmoved := self.unmoved():
            lines.append(
                f"  temporal_jitter moves no frame of {unmoved} clips: their frames lie less than 3"
                " apart"
            )
        if len(self.excluded):
            lines += [self.left_out(), self._remedy()]
        return "\n".join(lines)


def _held_out(ids: Sequence[str], share: float, seed: int) -> Tensor:
    """Return the numbers of the items whose hash is below `share`, lowest hash first. Adding items
    to a cache does not change this for the others. The crops of a picture (`id_c0`, `id_c1`) stay
    together."""
    if not share:
        return torch.empty(0, dtype=torch.int64)
    hashes = torch.tensor([uniform(seed, "held_out", _CROP.sub("", id)) for id in ids]).double()
    order = hashes.argsort(stable=True)
    return order[hashes[order] < share]
