"""Report on the records of one caching run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mmdit.data.dataset.colours import NOTES
from mmdit.data.dataset.problems import Damaged, Skip, by_problem


@dataclass
class CacheReport:
    """Counts over the records of one run. Records have one item in the cache, or several: one for
    each crop."""

    records: int = 0
    already: int = 0  # records that an earlier run finished
    recaptioned: int = 0  # of those, with a new caption
    renewed: int = 0  # of those, moved or with other file times, but with the same bytes
    old_stamps: int = 0  # of those, unchanged as far as the notes of an older version can tell
    gone: list[str] = field(default_factory=list)  # of those, records whose source no longer exists
    replaced: list[str] = field(default_factory=list)  # records whose ids another file had
    removed: int = 0  # items removed because their source was replaced or is unusable
    damaged: dict[str, Damaged] = field(default_factory=dict)  # id → why it could not be read
    strangers: list[str] = field(default_factory=list)  # items that belong to no record
    pruned: int = 0  # of those, removed
    too_short: str = ""  # a sentence about clips that give no sample
    written: int = 0  # items
    same_crops: int = 0  # crops not written because they repeat another one of their picture
    empty_captions: int = 0
    animated: int = 0  # items from an animated picture
    notes: Counter = field(default_factory=Counter)  # items by key of `colours.NOTES`
    older: str = ""  # a sentence about a cache begun with another version of decoding
    other_rates: str = ""  # a sentence about folders of frames taken at another rate
    precision: str = ""  # a sentence about a cache that does not note the precision of its latents
    skipped: list[Skip] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # items in the cache (with one process)
    seconds: float = 0.0
    interrupted: bool = False

    def text(self) -> str:
        """Return the report for people."""
        already = f"{self.already} records already there"
        if self.recaptioned:
            already += f" ({self.recaptioned} got their new caption)"
        if self.renewed:
            already += f" ({self.renewed} moved or touched, with the same bytes)"
        lines = [
            f"{self.records} records: {self.written} items written in {self.seconds:.1f} s,"
            f" {already}, {len(self.skipped)} skipped,"
            f" {self.empty_captions} empty captions (trained as unconditional, or as trigger or"
            " prefix)"
        ]
        if self.same_crops:
            lines.append(
                f"{self.same_crops} crops not written: without an overhang they would repeat"
                " another crop"
            )
        if self.animated:
            lines.append(
                f"{self.animated} items from animated pictures: their first frame is used "
                "(named as video_path, they are clips)"
            )
        lines += [f"{count} items {NOTES[note]}" for note, count in self.notes.items()]
        if self.older:
            lines.append(self.older)
        lines += filter(None, (self.precision, self.other_rates))
        if self.old_stamps:
            lines.append(
                f"{self.old_stamps} records have notes of an older version, which knew only sizes:"
                " a source that was exchanged before now for another of equal size was not"
                " noticed; from now on it will be"
            )
        if self.gone:
            lines.append(
                f"{len(self.gone)} records keep what was cached of them, their files are gone (for"
                f" example {self.gone[0]})"
            )
        if self.replaced:
            lines.append(
                f"{len(self.replaced)} records have the ids of items that were made from other"
                f" files (for example {self.replaced[0]}), and replace them: data sets that share"
                " ids need a cache each"
            )
        if self.removed:
            lines.append(
                f"{self.removed} items taken out of the cache: their sources are others now, or"
                " unusable"
            )
        if self.damaged:
            id, error = next(iter(self.damaged.items()))
            lines.append(
                f"{len(self.damaged)} damaged items counted as not there (for example {id}:"
                f" {error})"
            )
        if self.strangers:
            remedy = "taken out"
            if not self.pruned:
                remedy = "they are trained, too; --prune removes them"
            lines.append(
                f"{len(self.strangers)} items of the cache are not in this file (for example"
                f" {self.strangers[0]}): {remedy}"
            )
        if self.too_short:
            lines.append(self.too_short)
        for skips in by_problem(self.skipped).values():
            first = skips[0]
            place = ", ".join(filter(None, (first.id, first.place)))
            lines.append(f"  skipped {len(skips)}, for example: {first.reason} ({place})")
        for size, count in sorted(self.sizes.items()):
            lines.append(f"  {size}: {count} items in the cache")
        return "\n".join(lines)
