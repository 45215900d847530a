"""The latents and captions of each step, for one rank, prepared in advance."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmdit.data.batches.batch_plan import BatchPlan, Grid
from mmdit.data.batches.mixture import MixedPlan
from mmdit.data.batches.on_the_fly import Encoding, UnencodedItems
from mmdit.data.batches.stores import InMemory, OnDisk, Part, open_store
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.dataset.captions import CaptionsConfig, all_captions, drawn_captions
from mmdit.data.dataset.frames import crop_shares
from mmdit.data.dataset.workers import results
from mmdit.files import with_tilde
from mmdit.interfaces import Batch
from mmdit.rng import Draws

COMPARED = 4096  # items whose texts enter `contents`: reading texts one by one is slow


class StepBatches(Dataset, ABC):
    """This rank's micro-batches of every step: pure functions of the step, prepared in advance.
    `sources`: the batches of each source, one or several."""

    plan: BatchPlan | MixedPlan
    num_workers: int
    sources: list[LatentBatches]

    @abstractmethod
    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of `step`. `Batch.indices` are positions in the global batch."""

    def __getitem__(self, step: int) -> list[Batch]:
        return self.step(step)  # as a map-style data set, for DataLoader's workers

    def iterate(self, start_step: int = 0, stop_step: int = 1 << 62) -> Iterator[list[Batch]]:
        """Yield the micro-batches of the steps in order, prepared in advance by one thread (from
        memory) or by `num_workers` processes (from disk, where reading many small files is limited
        by the interpreter). With 0 workers, or if items are encoded here, nothing is prepared in
        advance."""
        steps, stores = range(start_step, stop_step), [source.store for source in self.sources]
        if any(isinstance(store, Encoding) for store in stores):
            yield from map(self.step, steps)
        elif self.num_workers and all(isinstance(store, InMemory) for store in stores):
            yield from self._ahead(iter(steps))
        else:
            yield from results(self, steps, self.num_workers, torch.cuda.is_available())

    def _ahead(self, steps: Iterator[int]) -> Iterator[list[Batch]]:
        def make(step: int) -> list[Batch]:
            batches = self.step(step)
            if torch.cuda.is_available():
                return [batch.pin_memory() for batch in batches]
            return batches

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


def contents(cache: LatentCache, source: str = "") -> dict[str, Any]:
    """Return what tells the data of a `source` from other data, wherever and in whichever layout it
    is stored: the number of its items, and a check sum of their shapes, of the check sums of their
    latents, and of the ids and captions of at most `COMPARED` items. Files that are encoded during
    training have no latents, but a check sum `files_crc32`, see `stamps.crc_of_ends`."""
    total = zlib.crc32(cache.shapes.numpy().tobytes())
    total = zlib.crc32(cache.columns.places[:, 2].contiguous().numpy().tobytes(), total)
    for number in range(0, len(cache), math.ceil(len(cache) / COMPARED)):
        captions = all_captions(cache.captions[number], cache.facts[number])
        total = zlib.crc32("\0".join([cache.ids[number], *captions, ""]).encode(), total)
    path = with_tilde(str(cache.folder.resolve()))
    files = {} if cache.files_crc is None else {"files_crc32": cache.files_crc}
    return {"source": source, "path": path, "items": len(cache), "crc32": total, **files}


class LatentBatches(StepBatches):
    """This rank's part of every step, as `accum` micro-batches; together the parts of all ranks are
    exactly the plan's global batch. `crops`: batches say which part of its picture each item shows.
    `tile`: rows and columns of cells of the tiles to cut, at drawn places, which batches state.

    Latents come raw and float16, as stored. `step(s)` is pure; `iterate` works in advance. `prefix`
    is put in front of every caption. ValueError if the global batch cannot be split evenly.
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
        tile: Grid | None = None,
        prefix: str = "",
    ):
        if plan.global_batch % (world * accum):
            raise ValueError(
                f"the global batch of {plan.global_batch} cannot be split over {world} processes"
                f" and {accum} accumulation steps; make it a multiple of {world * accum}"
            )
        self.plan: BatchPlan = plan
        self.rank, self.world, self.accum = rank, world, accum
        self.num_workers, self.captions = num_workers, captions or CaptionsConfig()
        self._origins, self.tile, self.prefix = cache.sources if crops else None, tile, prefix
        self.cache = cache
        self.store: InMemory | OnDisk | Encoding
        if isinstance(cache, UnencodedItems):
            self.store = Encoding(cache, num_workers)
        else:
            self.store = open_store(cache, in_memory, progress=rank == 0)
        self.sources = [self]

    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of `step`. `Batch.indices` are positions in the global batch."""
        return self.at(step, step)

    def at(self, position: int, step: int) -> list[Batch]:
        """Return the micro-batches at `position` of the plan, with the draws of `step` of the
        training."""
        planned = self.plan.batch(position, step)
        positions = torch.arange(self.rank, self.plan.global_batch, self.world)
        batches = []
        for part in positions.chunk(self.accum):
            draws = Draws(self.plan.seed, step, part)
            batches.append(
                self._batch(planned.grid, planned.items[part], planned.frames[part], draws)
            )
        return batches

    def held_out(self, most: int) -> Iterator[Batch]:
        """Yield the first `most` held-out items, the same on every rank, in one batch for each
        shape; their `indices` are keys of the items."""
        for planned in self.plan.held_out_batches(most):
            draws = self.plan.item_draws(planned.items)
            yield self._batch(planned.grid, planned.items, planned.frames, draws)

    def _batch(self, grid: Grid, items: Tensor, frames: Tensor, draws: Draws) -> Batch:
        numbers = items.tolist()
        captions, ids, facts = map(list, zip(*map(self.store.text, numbers), strict=True))
        crops = None
        if self._origins is not None:
            crops = torch.tensor([crop_shares(self._origins[number]) for number in numbers])
        tiles, places = None, None
        if self.tile is not None:
            tiles, places = self._draw_tiles(grid, frames, draws)
        return Batch(
            latents=self.store.gather(grid, items, frames, tiles),
            captions=[
                self.prefix + text for text in drawn_captions(captions, self.captions, draws)
            ],
            ids=ids,
            indices=draws.indices,
            facts=facts,
            crops=crops,
            places=places,
        )

    def _draw_tiles(self, grid: Grid, frames: Tensor, draws: Draws) -> tuple[list[Part], Tensor]:
        """Return for each item a tile of its grid, and its place `(B, 5)`, see
        `diffusion.tiling`."""
        assert self.tile is not None
        whole = torch.tensor(grid)
        size = torch.minimum(whole, torch.tensor(self.tile))
        corners = (draws.uniform("tile", 2).double() * (whole - size + 1)).long()
        first = frames[:, :1] // self.plan.video.frame_stride
        if frames.shape[1] == 1:
            first = torch.zeros_like(first)  # a picture has no place in time
        ends = (corners + size).tolist()
        tiles = [
            (slice(None), slice(top, bottom), slice(left, right))
            for (top, left), (bottom, right) in zip(corners.tolist(), ends, strict=True)
        ]
        return tiles, torch.cat([first, corners, whole.expand(len(frames), 2)], 1)


class MixedBatches(StepBatches):
    """This rank's part of every step, where the items of a step come from one of several sources,
    as `plan` says. `sources`: the batches of each source, for the plans that `plan` mixes."""

    def __init__(self, sources: list[LatentBatches], plan: MixedPlan):
        self.plan: MixedPlan = plan
        self.sources = sources
        self.num_workers = sources[0].num_workers

    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of `step`. `Batch.indices` are positions in the global batch."""
        source, position = self.plan.mixture.at(step)
        return self.sources[source].at(position, step)
