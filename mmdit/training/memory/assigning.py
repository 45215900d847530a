"""Copy stored tensors into a network, an average or a policy, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmdit.adapters import is_adapter
from mmdit.training.memory.shards import Chosen, Stored, is_sharded, local, own_rows, place
from mmdit.weights import check_numbers

OF_EXPERTS = ("model.high.", "model.low.")


def _sections(odd: list[str]) -> str:
    """Return, in words, the sections of a config that decide which of these names exist."""
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
    """Copy `tensors` into `current` (a `state_dict()`, sharded or not). Names and shapes must
    agree, except for the names for which `fresh(name)` holds: these may be missing (new adapters).
    Where `current` is sharded and the tensors are in files, a process reads and checks its own part
    alone. ValueError lists what differs, or names a weight that is not finite."""
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
