"""Stored tensors put into a network, an average or a policy, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmdit.adapters import is_adapter
from mmdit.training.memory.shards import Chosen, Stored, is_sharded, local, own_rows, place
from mmdit.weights import check_numbers

OF_EXPERTS = ("model.high.", "model.low.")


def _sections(odd: list[str]) -> str:
    """Return in words which sections of a config decide over these names."""
    adapted = [is_adapter(name) for name in odd]
    names = [] if all(adapted) else ["model:", "text_encoder:"]
    names += ["lora:"] if any(adapted) else []
    names += ["experts:"] if any(name.startswith(OF_EXPERTS) for name in odd) else []
    if len(names) == 1:
        return f"{names[0]} section"
    return f"{', '.join(names[:-1])} and {names[-1]} sections"


def assign(
    current: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: str,
    fresh: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy `tensors` into `current` (a `state_dict()`, sharded or not), strictly: names and shapes
    must agree, except those for which `fresh(name)` holds (adapters that start new). Of what lies
    in files and is sharded here a process reads its part, and vouches for that alone. ValueError
    lists what differs, or names a weight that is no finite number."""
    if isinstance(tensors, (Stored, Chosen)):
        stored = tensors.shapes
    else:
        stored = {name: tensor.shape for name, tensor in tensors.items()}
    missing = [name for name in current if name not in tensors and not fresh(name)]
    unexpected = [name for name in tensors if name not in current]
    shapes = [
        f"{n}: file {tuple(shape)}, model {tuple(current[n].shape)}"
        for n, shape in stored.items()
        if n in current and shape != current[n].shape
    ]
    if missing or unexpected or shapes:
        problems = []
        for label, names in (
            ("of another shape", shapes),
            ("missing in the file", missing),
            ("unknown to the model", unexpected),
        ):
            if names:
                more = " …" if len(names) > 3 else ""
                problems.append(f"{len(names)} {label} ({'; '.join(names[:3])}{more})")
        odd = [*missing, *unexpected, *(text.partition(":")[0] for text in shapes)]
        raise ValueError(
            f"{source} does not fit this model: {', '.join(problems)}. Use the"
            f" {_sections(odd)} of"
            " the run that wrote it"
        )
    with torch.no_grad():
        for name in tensors:
            like = current[name]
            if is_sharded(like) and isinstance(tensors, (Stored, Chosen)):
                value = mine = tensors.rows(name, *own_rows(like))
            else:
                value = tensors[name]
                mine = local(place(value, like))
            if like.is_floating_point():
                check_numbers(name, value, source)
            local(like).copy_(mine)
