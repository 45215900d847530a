"""Recognise what a picture or clip shows from its pixels, without labels or a network, and measure
how often it is what was asked for.

Axes: b samples, f frames, h rows, w columns; s slots. With `one` object there is one slot, whatever
its colour; with `many`, a slot holds a connected component, followed from frame to frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, permutations
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from mmdit.data.moving_shapes.facts import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    SQUARE,
    VARIANTS,
    Facts,
    Object,
    check_choice,
    relation_of,
)
from mmdit.data.moving_shapes.render import render
from mmdit.pixels import to_uint8, to_unit

CONTRAST = 0.16  # RGB distance ([0, 1]) from the background at which a pixel belongs to an object
FULL = 0.9  # share of the canvas above which a mask is not an object
OVERLAP = 0.6  # with less, a mask is none of the shapes
STILL = 0.10  # of S: a smaller displacement from the first frame to the last counts as none
# in units of S: half way from the widest small shape to the narrowest large one
SIDE_LIMIT = SIZES["small"][1] + SQUARE * SIZES["large"][0]
PATCH = 40  # masks and templates are compared at PATCH x PATCH
SMALLEST = 0.002  # of S²: smaller components are specks
CHUNK_PIXELS = {"cpu": 1 << 21, "cuda": 1 << 24}
SLOTS = 5  # of `many`: one more than there can be objects, to see when there are too many
LOST = 10.0  # larger than any distance between an object's places in two frames
UNKNOWN = -1


@dataclass(frozen=True)
class Predictions:
    """Recognised values: indices into the vocabularies in the order of facts.py, `UNKNOWN` (−1)
    where nothing was recognised."""

    background: Tensor  # (B,)
    present: Tensor  # (B, S) bool: slots that hold an object in every frame
    stray: Tensor  # (B,) bool: an object appears or vanishes
    color: Tensor  # (B, S), like those below
    shape: Tensor
    size: Tensor
    motion: Tensor | None  # None for single frames
    place: Tensor | None = None  # (B, F, S, 2): centres of objects, in units of S

    def __len__(self) -> int:
        return len(self.background)

    def map(self, function: Callable[[Tensor], Tensor]) -> Predictions:
        """Return predictions with the function applied to every column that is not None."""
        columns: dict[str, Any] = {
            name: None if column is None else function(column)
            for name, column in vars(self).items()
        }
        return Predictions(**columns)

    @staticmethod
    def cat(parts: list[Predictions]) -> Predictions:
        columns: dict[str, Any] = {}
        for name, first in vars(parts[0]).items():
            values = [getattr(part, name) for part in parts]
            columns[name] = None if first is None else torch.cat(values)
        return Predictions(**columns)


@torch.no_grad()
def oracle(pixels: Tensor, variant: str = "one") -> Predictions:
    """Return what `pixels (B, F, 3, H, W)`, in [0, 1] or uint8, show; motion only for clips (F >
    1)."""
    check_choice("variant", variant, VARIANTS)
    if pixels.ndim != 5 or pixels.shape[2] != 3:
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)}; must be (samples, frames, 3, height, width)"
        )
    frames, _, height, width = pixels.shape[1:]
    chunk = max(1, CHUNK_PIXELS.get(pixels.device.type, 1 << 21) // (frames * height * width))
    return Predictions.cat([_look(part, variant) for part in pixels.split(chunk)])


def _look(pixels: Tensor, variant: str) -> Predictions:
    clips, frames, _, height, width = pixels.shape
    side = min(height, width)
    images = rearrange(pixels, "b f c h w -> (b f) c h w")
    images = (
        to_unit(images) if images.dtype == torch.uint8 else images.float().nan_to_num().clamp(0, 1)
    )
    border = torch.cat(
        [images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]], dim=-1
    )
    backdrop = border.median(-1).values  # (n, 3)
    mask = (images - backdrop[..., None, None]).square_().sum(1) > CONTRAST**2  # (n, h, w)
    neighbours = F.avg_pool2d(mask[:, None].float(), 3, 1, 1, count_include_pad=False)[:, 0]
    mask &= neighbours > 0.4  # removes single pixels of noise, but not corners of shapes
    masks = mask[:, None] if variant == "one" else _largest(mask)
    slots = masks.shape[1]
    # measure only the slots that hold something
    image, slot = masks.flatten(2).any(-1).nonzero(as_tuple=True)
    measured = _measure(images[image], backdrop[image], masks[image, slot], side)

    def per_clip(x: Tensor) -> Tensor:
        every = x.new_zeros(clips * frames, slots, *x.shape[1:])
        every[image, slot] = x
        return rearrange(every, "(b f) s ... -> b f s ...", f=frames)

    looks = [per_clip(x) for x in measured]
    if variant == "many":
        looks = _followed(*looks)
    holds, color, overlap, side_length, centre = looks
    present = holds.all(1)
    overlap = overlap.mean(1)
    named = _nearest(color.median(1).values, COLORS)
    backdrop = rearrange(backdrop, "(b f) c -> b f c", f=frames)
    size = (side_length.median(1).values > SIDE_LIMIT).long()
    return Predictions(
        background=_nearest(backdrop.median(1).values, BACKGROUNDS),
        present=present,
        stray=(holds.any(1) & ~present).any(1),
        color=named.where(present, UNKNOWN),
        shape=overlap.argmax(-1).where(present & (overlap.amax(-1) >= OVERLAP), UNKNOWN),
        size=size.where(present, UNKNOWN),
        motion=_motion(centre).where(present, UNKNOWN) if frames > 1 else None,
        place=centre,
    )


def _measure(images: Tensor, backdrop: Tensor, masks: Tensor, side: int) -> tuple[Tensor, ...]:
    """Return measurements for each mask `(n, h, w)`: whether it is an object, its colour, its
    overlap with the shapes, its longer side and its centre in units of S."""
    # The object's colour is measured in its interior. The edge of its mask is where the colour is
    # half way between that colour and the background's.
    color = _masked_median(images, _eroded(masks))
    axis = color - backdrop
    half_way = ((color + backdrop) / 2 * axis).sum(-1)
    masks = masks & (torch.einsum("nchw,nc->nhw", images, axis) > half_way[:, None, None])
    share = masks.float().mean((1, 2))
    box = _box(masks)
    side_length = torch.maximum(box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]) / side
    return (
        (share > 0) & (share < FULL),
        color,
        _overlap(masks, box),
        side_length,
        _centroid(masks) / side,
    )


def _nearest(color: Tensor, names: dict[str, tuple[int, int, int]]) -> Tensor:
    known = to_unit(torch.tensor(list(names.values()), device=color.device))
    return (color[..., None, :] - known).norm(dim=-1).argmin(-1)


def _eroded(mask: Tensor) -> Tensor:
    """Return the mask without its outermost pixels, or the mask itself if nothing would be left."""
    inner = -F.max_pool2d(-mask[:, None].float(), 3, 1, 1)[:, 0] > 0.5
    return torch.where(inner.flatten(1).any(1)[:, None, None], inner, mask)


def _masked_median(images: Tensor, mask: Tensor) -> Tensor:
    """Return the median over the mask for each channel, `(n, 3)`, computed from counts in 256 bins;
    0 where the mask is empty."""
    stride = max(1, min(mask.shape[1:]) // 64)  # some thousands of pixels suffice
    images, mask = images[..., ::stride, ::stride], mask[..., ::stride, ::stride]
    bins = to_uint8(images).long() + 256 * torch.arange(3, device=images.device)[:, None, None]
    counts = images.new_zeros(len(images), 3 * 256)
    weight = repeat(mask, "n h w -> n (c h w)", c=3).float()
    counts.scatter_add_(1, rearrange(bins, "n c h w -> n (c h w)"), weight)
    below = rearrange(counts, "n (c k) -> n c k", c=3).cumsum(-1)
    return (below < below[..., -1:] / 2).sum(-1) / 255 * mask.flatten(1).any(1)[:, None]


def _largest(mask: Tensor) -> Tensor:
    """Return the SLOTS largest connected components as masks `(n, SLOTS, h, w)`, without specks."""
    index = _components(mask)
    flat, count = index.flatten(1), max(int(index.max()), SLOTS) + 1
    area = flat.new_zeros(len(mask), count).scatter_add_(1, flat, torch.ones_like(flat))
    area[:, 0] = 0
    areas, numbers = area.sort(dim=1, descending=True, stable=True)
    numbers = numbers.where(areas >= SMALLEST * min(mask.shape[1:]) ** 2, UNKNOWN)
    return torch.stack([index == number[:, None, None] for number in numbers[:, :SLOTS].T], dim=1)


def _followed(holds: Tensor, color: Tensor, *others: Tensor) -> list[Tensor]:
    """Return the measurements of all frames' slots, `(b, f, s, …)`, with each object in the slot
    that it has in the first frame. The slots of each frame are matched to those of the frame before
    so that the sum of the distances of places and colours is least."""
    looks = [x.clone() for x in (holds, color, *others)]
    holds, color, *_, centre = looks
    orders = torch.tensor(list(permutations(range(SLOTS))), device=holds.device)
    for f in range(1, holds.shape[1]):
        way = (centre[:, f - 1, :, None] - centre[:, f, None]).norm(dim=-1)
        way += (color[:, f - 1, :, None] - color[:, f, None]).norm(dim=-1)
        both = holds[:, f - 1, :, None] & holds[:, f, None]
        neither = ~holds[:, f - 1, :, None] & ~holds[:, f, None]
        way = way.where(both, LOST).where(~neither, 0)  # (b, s, s)
        total = way[:, torch.arange(SLOTS, device=way.device), orders].sum(-1)  # (b, orders)
        order = orders[total.argmin(1)]
        rows = torch.arange(len(order), device=order.device)[:, None]
        for x in looks:
            x[:, f] = x[:, f][rows, order]
    return looks


def _components(mask: Tensor) -> Tensor:
    """Return `(n, h, w)` int64: pixels joined through their four neighbours share a number from 1
    on; 0 outside the mask.

    The largest number in a run of pixels spreads over the run, by rows and by columns in turn,
    until nothing changes.
    """
    height, width = mask.shape[1:]
    numbers = torch.arange(1, height * width + 1, device=mask.device).reshape(1, height, width)
    label = numbers * mask
    rows, columns = _runs(mask), _runs(mask.mT)
    while True:
        before = label
        label = _spread(_spread(label, rows).mT, columns).mT
        if torch.equal(label, before):
            break
    winners = (label == numbers) & mask  # the one pixel of each component whose number won
    ranks = F.pad(winners.flatten(1).cumsum(1), (1, 0))
    return ranks.gather(1, label.flatten(1)).reshape(mask.shape)


def _runs(mask: Tensor) -> Tensor:
    """Return the number of the horizontal run that each pixel belongs to; 0 outside the mask."""
    starts = mask & ~F.pad(mask, (1, 0))[..., :-1]
    return starts.flatten(1).cumsum(1).reshape(mask.shape) * mask


def _spread(label: Tensor, runs: Tensor) -> Tensor:
    index = runs.flatten(1)
    largest = torch.zeros_like(index).scatter_reduce_(1, index, label.flatten(1), "amax")
    return largest.gather(1, index).reshape(label.shape)


def _box(mask: Tensor) -> Tensor:
    """Return left, right, top and bottom of the mask in pixels, `(n, 4)`; right and bottom are
    exclusive."""
    sides = []
    for line in (mask.any(1), mask.any(2)):  # columns, then rows
        length = line.shape[-1]
        first = line.float().argmax(-1)
        last = length - line.flip(-1).float().argmax(-1)
        sides += [first, last]
    return torch.stack(sides, dim=-1).float()


def _cut(mask: Tensor, box: Tensor) -> Tensor:
    """Return the part of the mask within its box, scaled to `(n, PATCH, PATCH)`, with soft
    edges."""
    height, width = mask.shape[-2:]
    steps = (torch.arange(PATCH, device=mask.device) + 0.5) / PATCH
    x = (box[:, :1] + steps * (box[:, 1:2] - box[:, :1])) * 2 / width - 1
    y = (box[:, 2:3] + steps * (box[:, 3:] - box[:, 2:3])) * 2 / height - 1
    grid = torch.stack(
        [repeat(x, "n w -> n h w", h=PATCH), repeat(y, "n h -> n h w", w=PATCH)], dim=-1
    )
    return F.grid_sample(mask[:, None].float(), grid, align_corners=False)[:, 0]


def _overlap(mask: Tensor, box: Tensor) -> Tensor:
    """Return the intersection over union of the cut mask and the best template of each shape, `(n,
    shapes)`."""
    patch = (_cut(mask, box) > 0.5).float().flatten(1)
    known = _templates(mask.device)
    both = torch.einsum("np,skp->nsk", patch, known)
    return (both / (patch.sum(-1)[:, None, None] + known.sum(-1) - both).clamp(min=1)).amax(-1)


@lru_cache
def _templates(device: torch.device) -> Tensor:
    """Return `(shapes, renderings, PATCH²)`: each shape drawn at several sizes, because a few
    pixels change what its box cuts out."""
    rows = []
    for shape in SHAPES:
        views = []
        for radius, offset in ((0.16, 0.5), (0.17, 0.503), (0.25, 0.5), (0.27, 0.503), (0.45, 0.5)):
            item = Object("white", shape, "small", None, offset, offset, radius, (255, 255, 255))
            picture = render([Facts("black", (item,))], 64, 64)
            mask = picture[:, 0, 0] > 133  # half way from the background to white
            views.append((_cut(mask, _box(mask)) > 0.5).float().flatten())
        rows.append(torch.stack(views))
    return torch.stack(rows).to(device)


def _centroid(mask: Tensor) -> Tensor:
    """Return the centre of the mask as (x, y) in pixels, `(n, 2)`."""
    weight = mask.float()
    total = weight.sum((1, 2)).clamp(min=1)
    x = (weight.sum(1) * torch.arange(mask.shape[2], device=mask.device)).sum(-1) / total
    y = (weight.sum(2) * torch.arange(mask.shape[1], device=mask.device)).sum(-1) / total
    return torch.stack([x, y], dim=-1)


def _motion(path: Tensor) -> Tensor:
    """Return the motion `(b, s)` of centres with the paths `path (b, f, s, 2)`, in units of S, from
    the least-squares displacement between the first frame and the last."""
    time = torch.linspace(-0.5, 0.5, path.shape[1], device=path.device)
    shift = torch.einsum("f,bfsd->bsd", time, path) / (time**2).sum()
    x, y = shift.unbind(-1)
    still = torch.full_like(x, STILL)
    return torch.stack([still, -x, x, -y, y], dim=-1).argmax(-1)  # in the order of MOTIONS


# ── scoring ───────────────────────────────────────────────────────────────────────────────────────
BACKGROUND = tuple(BACKGROUNDS)
VOCABULARY = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": tuple(MOTIONS),
}
JUDGED = ("count", "color", "shape", "size", "position", "background", "motion")


def score_samples(predictions: Predictions, facts: list[Facts]) -> dict[str, Tensor]:
    """Return bool `(B,)` for each attribute: whether it is right for every object of the sample;
    and for `all`: whether every attribute of the sample is right. If the canvas shows anything else
    besides the objects, `all` is wrong.

    Objects in the picture are assigned to those of the facts in favour of the picture: so that most
    of what the caption states is right, shapes before other attributes."""
    if len(predictions) != len(facts):
        raise ValueError(
            f"{len(predictions)} predictions for {len(facts)} facts; there must be one each"
        )
    moving = [item.objects[0].motion is not None for item in facts]
    if any(moving) and predictions.motion is None:
        raise ValueError(
            "the facts are of clips but the predictions of single frames; give the oracle all"
            " frames"
        )
    columns = vars(predictions).items()
    guesses = {name: column.tolist() for name, column in columns if column is not None}
    right: dict[str, list[bool]] = {name: [] for name in (*JUDGED, "all")}
    for i, item in enumerate(facts):
        seen = {name: column[i] for name, column in guesses.items()}
        verdict = _verdict(seen, item)
        for name in JUDGED:
            right[name].append(verdict[name])
        stated = all(verdict[name] for name in item.attributes)
        right["all"].append(verdict["count"] and stated)
    return {name: torch.tensor(values, dtype=torch.bool) for name, values in right.items()}


def _verdict(seen: dict[str, Any], item: Facts) -> dict[str, bool]:
    """Return for each attribute whether the recognised values `seen` of a sample agree with its
    facts."""
    count = len(item.objects)
    slots = sorted(range(len(seen["present"])), key=lambda slot: not seen["present"][slot])
    slots = slots[: max(count, sum(seen["present"]))]  # includes empty slots if objects are missing
    best: dict[str, bool] = {}
    most = (-1, False)
    for chosen in permutations(slots, min(count, len(slots))):
        verdict = {"position": _is_placed(seen, item, chosen)}
        for name, words in VOCABULARY.items():
            asked = [getattr(shape, name) for shape in item.objects]
            verdict[name] = name in seen and all(
                value is None or seen[name][slot] == words.index(value)
                for value, slot in zip(asked, chosen)
            )
        agree = sum(verdict.get(name, True) for name in item.attributes)
        if (agree, verdict["shape"]) > most:
            best, most = verdict, (agree, verdict["shape"])
    best["background"] = seen["background"] == BACKGROUND.index(item.background)
    best["count"] = sum(seen["present"]) == count and not seen["stray"]
    return best


def _is_placed(seen: dict[str, Any], item: Facts, chosen: tuple[int, ...]) -> bool:
    """Return whether the relations in the facts hold between the chosen slots in every frame."""
    for (a, b), relation in zip(pairwise(chosen), item.relations):
        if not (seen["present"][a] and seen["present"][b]):
            return False
        for places in seen["place"]:
            (x, y), (other_x, other_y) = places[a], places[b]
            if relation_of(x - other_x, y - other_y) != relation:
                return False
    return True


def accuracy(predictions: Predictions, facts: list[Facts]) -> dict:
    """Return `{"prompt_accuracy": rate, "attributes": {name: rate}}`; each attribute is counted
    over the samples that have it."""
    right = score_samples(predictions, facts)
    attributes = {}
    for name in JUDGED:
        asked = torch.tensor([name in item.attributes for item in facts], dtype=torch.bool)
        if asked.any():
            attributes[name] = rate(right[name][asked])
    return {"prompt_accuracy": rate(right["all"]), "attributes": attributes}


def rate(right: Tensor) -> dict:
    """Return a share with its 95 % Wilson interval, ready for JSON."""
    correct, count = int(right.sum()), right.numel()
    low, high = wilson(correct, count)
    return {
        "value": correct / count if count else None,
        "low": low,
        "high": high,
        "correct": correct,
        "count": count,
    }


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the share `correct` of `count` (Wilson, 1927); (0, 1) if `count`
    is 0."""
    if count == 0:
        return 0.0, 1.0
    z = 1.96
    share, scale = correct / count, 1 + z * z / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
