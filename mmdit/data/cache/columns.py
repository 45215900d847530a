"""The index of an opened cache, of whichever layout: one column for each property of the items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit.data.cache.items import Entry


class Lazy(Sequence):
    """A sequence of `count` values, each computed by `get(number)` when it is asked for."""

    def __init__(self, count: int, get: Callable[[int], Any]):
        self.numbers, self.get = range(count), get

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.get(self.numbers[index])


def cut_part(values: Any, ends: Any, index: int) -> Any:
    """Return part `index` of values that lie end to end; `ends (N + 1)` begins with 0."""
    return values[int(ends[index]) : int(ends[index + 1])]


@dataclass
class Columns:
    """The properties of all items, in the order of their ids. `shapes (N, 4)` int64: frames, rows,
    columns, channels; `places (N, 3)` int64: bytes of the file, offset of the numbers in it, CRC-32
    of the numbers. `rates`: the frame rates at which video files among the sources were read.
    """

    ids: Sequence[str]
    captions: Sequence[str]
    facts: Sequence[dict]
    sources: Sequence[dict]
    files: Sequence[str]  # relative to the folder
    shapes: Tensor
    places: Tensor
    rates: set[float]
    frame_crcs: Sequence[np.ndarray]  # see `Entry`

    @staticmethod
    def of(entries: Iterable[Entry]) -> Columns:
        """Return the columns of `entries`, sorted by id."""
        ordered = sorted(entries, key=lambda entry: entry.id)
        places = [(entry.bytes, entry.offset, entry.crc) for entry in ordered]
        ends = np.cumsum([0, *(len(entry.frame_crcs) for entry in ordered)])
        crcs = chain.from_iterable(entry.frame_crcs for entry in ordered)
        values = np.fromiter(crcs, np.uint32, int(ends[-1]))
        return Columns(
            ids=[entry.id for entry in ordered],
            captions=[entry.caption for entry in ordered],
            facts=[entry.facts for entry in ordered],
            sources=[entry.source for entry in ordered],
            files=[entry.file for entry in ordered],
            shapes=torch.tensor([entry.shape for entry in ordered], dtype=torch.int64),
            places=torch.tensor(places, dtype=torch.int64),
            rates={entry.fps for entry in ordered if entry.fps is not None},
            frame_crcs=Lazy(len(ordered), partial(cut_part, values, ends)),
        )

    def entry(self, index: int) -> Entry:
        """Return the entry of item `index`."""
        size, offset, crc = self.places[index].tolist()
        return Entry(
            self.ids[index],
            self.files[index],
            self.shapes[index].tolist(),
            self.captions[index],
            size,
            offset,
            crc,
            self.frame_crcs[index].tolist(),
            self.facts[index],
            self.sources[index],
        )
