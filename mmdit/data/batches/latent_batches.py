"""Which items a step sees, and their latents. The plan is a pure function of (seed, step): resume
needs no state, every rank knows every step, and the number of ranks changes nothing."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmdit.config import Section
from mmdit.data.batches.stores import Grid, Group, InMemory, OnDisk, by_shape, memory_bytes
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.captions import CaptionsConfig, drawn_captions
from mmdit.data.dataset.clips import frame_numbers, jitter_limits, latent_video, usable_frames
from mmdit.data.dataset.frames import crop_shares
from mmdit.data.dataset.workers import results
from mmdit.interfaces import Batch
from mmdit.rng import Draws, key, uniform

_CROP = re.compile(r"_c\d+$")
# version of the order of items: 1 filled the last batch of each group and epoch by repetition
ORDER = 2
MEMORY_SHARE = 0.25  # of the machine's memory, for caches held in it


@dataclass(frozen=True)
class DataConfig(Section):
    """The section `data:`."""

    # Hold the whole cache in memory; `auto`: if it takes at most a quarter of it.
    in_memory: Literal["auto", True, False] = "auto"


@dataclass(frozen=True)
class PlannedBatch:
    """One step's global batch: `items (B,)` numbers in the cache, `frames (B, F)` frame numbers
    within each, ascending."""

    grid: Grid
    items: Tensor
    frames: Tensor


def permutation(count: int, seed: int, *purpose: object) -> Tensor:
    """A keyed order of `count` things, the same on every platform and version."""
    return torch.argsort(Draws.of(key(seed, *purpose), 0, count).bits("order"), stable=True)


class _Stream:
    """An endless sequence of batches over groups of equal shape, in which every item is seen
    equally often. A group is an endless row of orders of its items, cut into batches of `size`.
    Epoch e has those of them that n / size batches an epoch come to for n items: nothing is
    dropped, and a group smaller than a batch has one in some epochs alone. An epoch's batches are
    mixed.
    """

    def __init__(self, groups: dict[Group, Tensor], size: int, seed: int, purpose: str):
        self.groups, self.size, self.seed, self.purpose = groups, size, seed, purpose
        self.items = sum(map(len, groups.values()))
        self._members = list(groups.items())
        self._counts = torch.tensor([len(members) for members in groups.values()])
        self._phases = torch.tensor([key(seed, purpose, "phase", group) % size for group in groups])
        self._epoch: tuple[int, int, list[Group], Tensor] = (
            0,
            0,
            [],
            torch.empty(0),
        )  # its first and next first position

    @property
    def epoch_steps(self) -> float:
        """Steps in which as many samples are seen as there are items."""
        return self.items / self.size

    def _before(self, epoch: int) -> Tensor:
        """Return how many batches each group had before this epoch."""
        return (epoch * self._counts + self._phases) // self.size

    def _epoch_at(self, position: int) -> int:
        """The epoch of the batch at `position`: the last one before which there were at most so
        many."""
        low, high = 0, (position + len(self.groups) + 1) * self.size // self.items + 1
        while high - low > 1:
            middle = (low + high) // 2
            if int(self._before(middle).sum()) <= position:
                low = middle
            else:
                high = middle
        return low

    def _plan(self, epoch: int) -> tuple[int, int, list[Group], Tensor]:
        before, after = self._before(epoch), self._before(epoch + 1)
        tables, groups = [], []
        for number in torch.nonzero(after > before).flatten().tolist():
            group, members = self._members[number]
            begin, end = int(before[number]), int(after[number])
            order = self._order(group, len(members), begin * self.size, end * self.size)
            tables.append(members[order].view(-1, self.size))
            groups += [group] * (end - begin)
        mixed = permutation(len(groups), self.seed, self.purpose, epoch)
        first = int(before.sum())
        return (
            first,
            first + len(groups),
            [groups[i] for i in mixed.tolist()],
            torch.cat(tables)[mixed],
        )

    def _order(self, group: Group, count: int, begin: int, end: int) -> Tensor:
        """Places `begin` to `end` of the endless row of orders of the group's `count` items."""
        first, last = begin // count, math.ceil(end / count)
        numbers = torch.arange(first * count, last * count)
        bits = Draws(key(self.seed, self.purpose, group), 0, numbers).bits("order")
        orders = bits.view(-1, count).argsort(dim=1, stable=True).flatten()
        return orders[begin - first * count : end - first * count]

    def batch(self, position: int) -> tuple[Group, Tensor]:
        if not self._epoch[0] <= position < self._epoch[1]:
            self._epoch = self._plan(self._epoch_at(position))
        first, _, groups, table = self._epoch
        return groups[position - first], table[position - first]


class BatchPlan:
    """Every step's global batch. `report()` says what is used, repeated and left out; ValueError if
    nothing is left.

    A clip must have `1 + (num_frames - 1) * frame_stride` frames (or those of the smallest of
    `frame_counts`), else it is left out (its single frames still serve the steps that
    `image_fraction` gives to images). Those steps are spread evenly: step s is one if floor(s·f +
    phase(seed)) grows. The share `held_out` of the items, by a hash of their ids, is in no batch.
    """

    def __init__(
        self,
        cache: LatentCache,
        video: VideoConfig,
        global_batch: int,
        seed: int,
        held_out: float = 0.0,
    ):
        if global_batch < 1:
            raise ValueError(f"the global batch is {global_batch}; must be at least 1")
        spec = cache.manifest.spec
        self.video, self.global_batch, self.seed = latent_video(video, spec), global_batch, seed
        self.aligned = (
            self.video.num_frames if spec.temporal > 1 else 1
        )  # samples start where a window of the tokenizer did
        rates = cache.rates - {video.fps}
        if rates:
            raise ValueError(
                f"the cache {cache.folder} holds clips of video files at {min(rates):g} frames a"
                f" second, the config has video.fps: {video.fps:g}; set it to {min(rates):g}, or"
                " run the caching command again"
            )
        video = self.video
        self._ids, self._counts, grids = cache.ids, cache.shapes[:, 0], cache.shapes[:, 1:3]
        self._shapes = grids
        self._frames = usable_frames(self._counts, video)
        long_enough = self._frames > 0
        self.held_out = _held_out(cache.ids, held_out, seed)
        used = torch.ones(len(cache.ids), dtype=torch.bool).index_fill_(0, self.held_out, False)
        if held_out and not 0 < len(self.held_out) < len(cache.ids):
            none = "train on" if len(self.held_out) else "measure"
            raise ValueError(
                f"train.val_share {held_out:g} holds {len(self.held_out)} of the {len(cache.ids)}"
                f" items of the cache {cache.folder} out: none is left to {none}; change it, or set"
                " train.val_every_steps: 0"
            )
        self.excluded = torch.nonzero(~long_enough).flatten()
        self._excluded_names = [
            (cache.ids[i], int(self._counts[i])) for i in self.excluded[:5].tolist()
        ]
        if video.image_fraction < 1 and not (long_enough & used).any():
            raise ValueError(
                f"no item of the cache {cache.folder} is long enough.\n{self._explain_excluded()}"
            )

        def stream(name: str, shapes: Tensor, members: Tensor) -> _Stream:
            return _Stream(by_shape(shapes, members), global_batch, seed, name)

        shapes = torch.cat([grids, self._frames[:, None]], 1) if video.frame_counts else grids
        self.clips = (
            stream("clips", shapes, torch.nonzero(long_enough & used).flatten())
            if video.image_fraction < 1
            else None
        )
        self.images = (
            stream("images", grids, torch.nonzero(used).flatten()) if video.image_fraction else None
        )
        if len(self.held_out) and self.clips and not long_enough[self.held_out].any():
            raise ValueError(
                f"train.val_share {held_out:g} holds {len(self.held_out)} items of the cache"
                f" {cache.folder} out, and every one is too short for a clip: raise it, or set"
                " train.val_every_steps: 0"
            )
        self._phase = (key(seed, "image_step") >> 40 & 0xFFFFFF) * 2.0**-24

    def _images_before(self, step: int) -> int:
        return math.floor(step * self.video.image_fraction + self._phase)

    def is_image_step(self, step: int) -> bool:
        return self._images_before(step + 1) > self._images_before(step)

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of `step` (from 0)."""
        before = self._images_before(step)
        if self.is_image_step(step):
            (group, items), frames = self.images.batch(before), 1
        else:
            group, items = self.clips.batch(step - before)
            frames = int(self._frames[items[0]])
        draws = Draws.of(self.seed, step, len(items))
        return PlannedBatch(
            group[:2],
            items,
            frame_numbers(self._counts[items], frames, self.video, draws, self.aligned),
        )

    def held_out_batches(self, most: int) -> list[PlannedBatch]:
        """The first `most` held-out items (clips, unless training sees pictures alone), one batch a
        shape, with keys that make all that is drawn for an item its own."""
        items = (
            self.held_out if self.clips is None else self.held_out[self._frames[self.held_out] > 0]
        )
        frames = torch.ones_like(self._frames) if self.clips is None else self._frames
        shapes = torch.cat([self._shapes, frames[:, None]], 1)
        return [
            PlannedBatch(
                group[:2],
                own,
                frame_numbers(
                    self._counts[own], group[2], self.video, self.own_draws(own), self.aligned
                ),
            )
            for group, own in by_shape(shapes, items[:most]).items()
        ]

    def own_draws(self, items: Tensor) -> Draws:
        """Draws that depend on the ids of `items (B,)` and nothing else."""
        return Draws(self.seed, 0, torch.tensor([key(self._ids[i]) for i in items.tolist()]))

    # what a person should know before training
    def _explain_excluded(self) -> str:
        counts = self._counts[self.excluded]
        shortest, longest = int(counts.min()), int(counts.max())
        video = self.video

        def setting(frames: int) -> str:
            if video.shrink_video_to_frames:
                return f"video.num_frames: {frames}"
            stride = (frames - 1) // (video.num_frames - 1)
            if stride >= 1:
                return f"video.frame_stride: {stride}"
            return f"video.num_frames: {1 + (frames - 1) // video.frame_stride}"

        names = ", ".join(f"{id} ({frames})" for id, frames in self._excluded_names)
        return (
            f"left out {len(counts)} items of {shortest} to {longest} frames, for example {names}:"
            f" num_frames {video.num_frames} with frame_stride {video.frame_stride} needs"
            f" {video.span}{'' if video.shrink_video_to_frames else f' (1 + {video.num_frames - 1}·{video.frame_stride})'}.\n{setting(shortest)}"
            " would keep all of them"
            + (
                f", {setting(longest)} the longest."
                if setting(longest) != setting(shortest)
                else "."
            )
        )

    def table(self) -> list[dict]:
        """Per kind of step and grid: items, batches in an epoch (on average), and how many places
        of a batch are filled by repetition, as it has more of them than there are items."""
        return [
            {
                "steps": name,
                "grid": list(group[:2]),
                "frames": 1 if stream is self.images else int(self._frames[members[0]]),
                "items": len(members),
                "batches": round(len(members) / stream.size, 3),
                "repeats": max(0, stream.size - len(members)),
            }
            for name, stream in (("clips", self.clips), ("images", self.images))
            if stream
            for group, members in stream.groups.items()
        ]

    def unmoved(self) -> int:
        """Clips whose frames lie too close together for `temporal_jitter` to move any."""
        long_enough = self._frames > 1
        counts, frames = self._counts[long_enough], self._frames[long_enough]
        return (
            int((jitter_limits(counts, frames, self.video) == 0).sum())
            if self.video.temporal_jitter
            else 0
        )

    def _repeated(self, items: int) -> str:
        """Return the sentence about a group of so many items."""
        return (
            ""
            if items >= self.global_batch
            else f", each item up to {math.ceil(self.global_batch / items)} times in one"
        )

    def report(self) -> str:
        lines = [
            f"  {row['steps']} {row['grid'][1]}x{row['grid'][0]} cells, {row['frames']} frames:"
            f" {row['items']} items, {row['batches']:g} batches of {self.global_batch} an"
            f" epoch{self._repeated(row['items'])}"
            for row in self.table()
        ]
        if len(self.held_out):
            lines.append(f"  {len(self.held_out)} items are held out for validation")
        if self.unmoved():
            lines.append(
                f"  temporal_jitter moves no frame of {self.unmoved()} clips: their frames lie less"
                " than 3 apart"
            )
        return "\n".join(lines + ([self._explain_excluded()] if len(self.excluded) else []))


def _held_out(ids: list[str], share: float, seed: int) -> Tensor:
    """Numbers of the items whose hash is below `share`, lowest first; more items in a cache change
    nothing for those it had. The crops of a picture (`id_c0`, `id_c1`) stay together."""
    if not share:
        return torch.empty(0, dtype=torch.int64)
    hashes = torch.tensor([uniform(seed, "held_out", _CROP.sub("", id)) for id in ids]).double()
    order = hashes.argsort(stable=True)
    return order[hashes[order] < share]


class LatentBatches(Dataset):
    """This rank's part of every step, as `accum` micro-batches; together the ranks' parts are
    exactly the plan's global batch.

    Latents come raw and float16, as stored. `step(s)` is pure; `iterate` works ahead. ValueError if
    the global batch cannot be split evenly.
    """

    def __init__(
        self,
        cache: LatentCache,
        plan: BatchPlan,
        *,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
        in_memory: Literal["auto", True, False] = "auto",
        num_workers: int = 4,
        captions: CaptionsConfig | None = None,
        crops: bool = False,
    ):
        if plan.global_batch % (world * accum):
            raise ValueError(
                f"the global batch of {plan.global_batch} cannot be split over {world} processes"
                f" and {accum} accumulation steps; make it a multiple of {world * accum}"
            )
        self.cache, self.plan, self.rank, self.world, self.accum = cache, plan, rank, world, accum
        self.num_workers, self.in_memory, self.captions = (
            num_workers,
            in_memory,
            captions or CaptionsConfig(),
        )
        self.crops = crops  # whether batches say which part of its picture each item shows
        if in_memory == "auto":
            local = int(
                os.environ.get("LOCAL_WORLD_SIZE", 1)
            )  # every process of this machine holds its own copy
            self.in_memory = cache.nbytes * local <= MEMORY_SHARE * memory_bytes()
        self._store = InMemory(cache, rank == 0) if self.in_memory else OnDisk(cache)

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of `step`. `Batch.indices` are positions in the global batch."""
        planned = self.plan.batch(step)
        mine = torch.arange(self.rank, self.plan.global_batch, self.world)
        return [
            self._batch(
                planned.grid,
                planned.items[own],
                planned.frames[own],
                Draws(self.plan.seed, step, own),
            )
            for own in mine.chunk(self.accum)
        ]

    def held_out(self, most: int) -> Iterator[Batch]:
        """The first `most` held-out items, the same on every rank, a batch a shape; `indices` are
        keys of the items."""
        for planned in self.plan.held_out_batches(most):
            yield self._batch(
                planned.grid, planned.items, planned.frames, self.plan.own_draws(planned.items)
            )

    def _batch(self, grid: Grid, items: Tensor, frames: Tensor, draws: Draws) -> Batch:
        numbers = items.tolist()
        captions, ids, facts = map(list, zip(*self._store.texts(numbers), strict=True))
        return Batch(
            latents=self._store.gather(grid, items, frames),
            captions=drawn_captions(captions, self.captions, draws),
            ids=ids,
            indices=draws.indices,
            facts=facts,
            crops=(
                torch.tensor([crop_shares(self.cache.sources[i]) for i in numbers])
                if self.crops
                else None
            ),
        )

    __getitem__ = step  # as a map-style data set, for DataLoader's workers

    def iterate(self, start_step: int = 0, stop_step: int = 1 << 62) -> Iterator[list[Batch]]:
        """Steps in order, made ahead of time by one thread (from memory) or by `num_workers`
        processes (from disk: reading many small files is bound by the interpreter). 0 workers:
        nothing ahead."""
        steps = range(start_step, stop_step)
        if self.num_workers and self.in_memory:
            yield from self._ahead(iter(steps))
        else:
            yield from results(self, steps, self.num_workers, torch.cuda.is_available())

    def _ahead(self, steps: Iterator[int]) -> Iterator[list[Batch]]:
        def make(step: int) -> list[Batch]:
            batches = self.step(step)
            return (
                [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches
            )

        with ThreadPoolExecutor(1, "batches") as pool:
            waiting = deque(pool.submit(make, step) for step in islice(steps, 2))
            try:
                while waiting:
                    ready = waiting.popleft().result()
                    waiting.extend(pool.submit(make, step) for step in islice(steps, 1))
                    yield ready
            finally:
                for future in waiting:
                    future.cancel()
