"""Check sums of what a resume reads from outside its run: frozen weights, the model from which
post-training began, prompts. Each checkpoint holds one, and a resume with another one is refused.
Also the check sum by which weights are identified."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mmdit.files import Sum, read_object
from mmdit.training.checkpoint import META, Meta
from mmdit.training.learner import Learner
from mmdit.training.memory.shards import whole
from mmdit.weights import bytes_of, header_of


def identity(source: Path) -> int | None:
    """Return the check sum that identifies the weights of a checkpoint folder or an export; None
    for those of older versions and for other files, which have none."""
    if source.is_file():
        crc = header_of(source).get("crc32")
        return None if crc is None else int(crc)
    return read_object(source / META).get("crc32")


def sum_of(states: Iterable[Mapping[str, Tensor]], *texts: object) -> int:
    """Return the CRC-32 of the names and numbers of `states`, and of plain values as JSON."""
    total = Sum()
    for state in states:
        for name in sorted(state):
            total.add(name.encode())
            total.add(bytes_of(whole(state[name].detach())))
    total.add(json.dumps(texts).encode())
    return total.crc


def frozen_elsewhere(learner: Learner) -> dict[str, Tensor]:
    """Return the weights of a learner that no checkpoint holds, because they never change."""
    state = learner.state_dict()
    return {name: value for name, value in state.items() if not learner.is_stored(name)}


def check_origin(meta: Meta, origin: dict, folder: Path) -> None:
    """Raise ValueError if a run would continue with other foreign weights than it began with.
    Checkpoints of earlier versions do not record them."""
    before, now = meta.origin.get("crc32"), origin.get("crc32")
    if before is None or before == now:
        return
    source = meta.origin.get("source") or "frozen weights that it reads from elsewhere"
    raise ValueError(
        f"{folder} began from {source}, and what is read from there is no longer the same (check"
        f" sum {before}, now {now}): a model, frozen weights, the type that they are kept in"
        " (model.dtype) or prompts were replaced, or the checkpoint is gone. Put them back, or"
        " start a new run"
    )
