"""Choose the canvas on which each generated sample is drawn: its size, and which parts of it a
cache holds.

In a bucketed cache, a sample has one of the bucket sizes. If crops are shifted, the canvas is a
little longer than this size along one axis, so that a crop loses something, as with real pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import Size
from mmdit.data.dataset.frames import PreprocessConfig, boxes_of
from mmdit.data.moving_shapes.facts import VERSION
from mmdit.data.moving_shapes.prepare import Recipe
from mmdit.rng import uniform

# The most by which a canvas exceeds its size, as a share of that size's short side: more than half
# of even the smallest object stays visible. Sides are multiples of 16 pixels, and so is the excess,
# which is at least 16 pixels.
OVERHANG = 1 / 8
CELL = 16

Corner = tuple[int, int]  # left and top of a crop in its canvas


@dataclass(frozen=True)
class Canvases:
    """The settings on which the canvas of a sample depends, besides its number; everything drawn is
    a function of (version, seed, number)."""

    sizes: tuple[Size, ...]
    preprocess: PreprocessConfig
    seed: int

    @staticmethod
    def of(manifest: CacheManifest, preprocess: PreprocessConfig, recipe: Recipe) -> Canvases:
        """Return the canvases of a cache; unless it is bucketed, all samples have the recipe's
        size. ValueError if the manifest lists no sizes."""
        if not manifest.bucketed:
            return Canvases(((recipe.width, recipe.height),), preprocess, recipe.seed)
        if not manifest.sizes:
            raise ValueError(
                "bucketing.strategy is pixel_budget, which gives a source a size of its own, and"
                " generated samples have no source; set strategy: closest_ar with bucketing.buckets"
            )
        # the manifest has the order of the config, which must not matter
        return Canvases(tuple(sorted(manifest.sizes)), preprocess, recipe.seed)

    def size(self, index: int) -> Size:
        """Return the size of the items of sample `index`; all sizes are equally likely."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        return self.sizes[int(self._uniform("size", index) * len(self.sizes))]

    def canvas(self, index: int) -> Size:
        """Return the size at which sample `index` is drawn."""
        width, height = self.size(index)
        if self.preprocess.crop == "center":
            return width, height
        steps = max(1, int(OVERHANG * min(width, height)) // CELL)
        extra = CELL * (1 + int(self._uniform("overhang", index) * steps))
        if self._uniform("axis", index) < 0.5:
            return width + extra, height
        return width, height + extra

    def corners(self, index: int) -> dict[int, Corner]:
        """Return the corners (left, top) of the crops of sample `index` by their number, without
        crops that repeat an earlier one."""
        if self.preprocess.crop == "center":
            return {0: (0, 0)}
        canvas, size = self.canvas(index), self.size(index)
        boxes = boxes_of(canvas, size, self.preprocess, sample_id(index))
        corners: dict[int, Corner] = {}
        for crop, (left, top, _, _) in boxes.items():
            corner = (round(left), round(top))
            if corner not in corners.values():
                corners[crop] = corner
        return corners

    def item_ids(self, index: int) -> list[str]:
        """Return the ids of the items of sample `index`."""
        ids = self.preprocess.item_ids(sample_id(index))
        return [ids[crop] for crop in self.corners(index)]

    def sources(self, index: int) -> list[dict]:
        """Return the stored source of each of these items: the crop, in the form of a picture that
        was read; empty if the item shows the whole canvas."""
        canvas, (width, height) = self.canvas(index), self.size(index)
        if canvas == (width, height):
            return [{}]
        corners = self.corners(index)
        common = {"size": list(canvas), "crops": list(corners)}
        return [
            common | {"crop": [left, top, left + width, top + height]}
            for left, top in corners.values()
        ]

    def describe(self) -> dict:
        """Return the entries of `moving_shapes.json` about canvases that the manifest does not
        hold."""
        return {"overhang": OVERHANG} if self.preprocess.crop == "shifted" else {}

    def _uniform(self, purpose: str, index: int) -> float:
        return uniform("moving_shapes", purpose, VERSION, self.seed, index)


def sample_id(index: int) -> str:
    """Return the id of a sample in metadata and caches."""
    return f"{index:06d}"
