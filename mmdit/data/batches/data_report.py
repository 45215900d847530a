"""Report, before a training starts, what it will make of a cache: which items are used, cropped,
repeated and left out, and why."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.cache.latent_cache import LatentCache
from mmdit.data.dataset.captions import all_captions, length_report
from mmdit.data.dataset.clips import usable_frames
from mmdit.data.dataset.colours import NOTES
from mmdit.data.dataset.frames import PreprocessConfig, crop_of
from mmdit.data.dataset.problems import Skip, by_problem
from mmdit.data.dataset.records import Record
from mmdit.data.dataset.stamps import compare_stamp
from mmdit.files import objects_in, read_text

EXAMPLES = 5


def cache_report(cache: LatentCache, plan: BatchPlan, max_steps: int) -> dict:
    """Return the report as JSON-able values; `report_text` puts it into words. `fill`: the share of
    the places in a group's batches that do not repeat an item of the batch. Sizes are (width,
    height) in pixels; shares are from 0 to 1; lists of examples begin with the worst.
    """
    spatial = cache.manifest.spec.spatial
    groups = []
    for row in plan.table():
        rows, columns = row.pop("grid")
        fill = 1 - row["repeats"] / plan.global_batch
        groups.append({"size": [columns * spatial, rows * spatial], **row, "fill": round(fill, 4)})
    places = sum(row["items"] for row in groups)  # of an epoch
    crops = cropped(cache)  # of pictures; generated items have no crop
    repeats = sum(row["items"] * row["repeats"] / plan.global_batch for row in groups)
    return {
        "cache": str(cache.folder),
        "made_from": cache.manifest.source,
        "items": len(cache),
        "gigabytes": round(cache.nbytes / 1e9, 3),
        "global_batch": plan.global_batch,
        "groups": groups,
        "repeated": {"places": round(repeats), "share_of_an_epoch": round(repeats / places, 4)},
        "epochs": _epochs(plan, max_steps),
        "left_out": _left_out(cache, plan),
        "held_out": len(plan.held_out),
        "frames": _frames(cache, plan),
        "cropped": crops,
        "notes": Counter(note for source in cache.sources for note in _notes(source)),
        "older": cache.manifest.older(cache.folder) if crops["items"] else "",
        "skipped_when_cached": skipped(Path(cache.folder)),
        "captions": length_report(
            [all_captions(*pair) for pair in zip(cache.captions, cache.facts, strict=True)]
        ),
    }


def _epochs(plan: BatchPlan, max_steps: int) -> dict:
    image_steps = sum(map(plan.is_image_step, range(max_steps)))
    streams = (
        ("clips", plan.clips, max_steps - image_steps),
        ("images", plan.images, image_steps),
    )
    return {
        name: {
            "steps_an_epoch": round(stream.epoch_steps, 3),
            "steps": steps,
            "epochs": round(steps / stream.epoch_steps, 3),
        }
        for name, stream, steps in streams
        if stream
    }


def _left_out(cache: LatentCache, plan: BatchPlan) -> dict:
    clips = [
        {"id": cache.ids[i], "frames": int(cache.shapes[i, 0])} for i in plan.excluded.tolist()
    ]
    clips.sort(key=lambda row: (row["frames"], row["id"]))
    return {"items": len(clips), "why": plan.left_out(), "examples": clips[:EXAMPLES]}


def _frames(cache: LatentCache, plan: BatchPlan) -> dict:
    counts = cache.shapes[:, 0]
    ordered = counts.sort().values.tolist()
    used = Counter(usable_frames(counts, plan.video).tolist())
    return {
        "shortest": ordered[0],
        "median": ordered[len(ordered) // 2],
        "longest": ordered[-1],
        "items_by_frames_used": {str(number): used[number] for number in sorted(used) if number},
        "not_moved_by_jitter": plan.unmoved(),
    }


def cropped(cache: LatentCache) -> dict:
    """Return statistics of the crops that are stored with the items; items that were generated
    straight into the cache have none."""
    rows: list[dict] = []
    enlarged = 0
    for id, source, shape in zip(cache.ids, cache.sources, cache.shapes.tolist(), strict=True):
        known = crop_of(source)
        if known is None:
            continue
        size, (left, top, right, bottom) = known
        width, height = cache.manifest.size_of(shape)
        kept = round((right - left) * (bottom - top) / math.prod(size), 4)
        rows.append({"id": id, "size": list(size), "kept": kept})
        if width > right - left + 0.5 or height > bottom - top + 0.5:
            enlarged += 1
    if not rows:
        return {"items": 0}
    rows.sort(key=lambda row: (row["kept"], row["id"]))
    shares = [row["kept"] for row in rows]
    return {
        "items": len(rows),
        "mean_kept": round(sum(shares) / len(shares), 4),
        "least_kept": shares[0],
        "items_below_80_percent": sum(share < 0.8 for share in shares),
        "enlarged": enlarged,
        "examples": rows[:EXAMPLES],
    }


def _notes(source: dict) -> list[str]:
    notes = source.get("notes")
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def skipped(folder: Path) -> dict:
    """Return how many items caching skipped, for which reasons, and some examples. Lines that
    caching did not write are ignored."""
    skips = []
    for path in sorted(folder.glob("skipped*.jsonl")):
        for row in objects_in(read_text(path, "replace")):
            with contextlib.suppress(TypeError, LookupError):
                skips.append(Skip.from_json(row))
    return {
        "items": len(skips),
        "reasons": {problem: len(group) for problem, group in by_problem(skips).items()},
        "examples": [skip.to_json() for skip in skips[:EXAMPLES]],
    }


def compared_with(
    cache: LatentCache, records: list[Record], preprocess: PreprocessConfig, fps: float
) -> dict:
    """Compare the items of a cache with the lines of a metadata file; return the number of
    mismatches of each kind, with examples. `fps`: the rate of clips that the config asks for; 0 for
    pictures."""
    captions = dict(zip(cache.ids, map(all_captions, cache.captions, cache.facts), strict=True))
    expected: dict[str, list[str]] = {}
    missing, changed = [], []
    places = {id: number for number, id in enumerate(cache.ids)}
    for record in records:
        ids = preprocess.item_ids(record.id)
        expected |= dict.fromkeys(ids, all_captions(record.caption, record.facts))
        if ids[0] not in captions:
            missing.append(record.id)
            continue
        stored = cache.sources[places[ids[0]]].get("stamp")
        if stored is not None and compare_stamp(record.source, stored, fps)[0] == "changed":
            changed.append(record.id)
    common = [id for id in captions if id in expected]
    lists = {
        "not_in_file": [id for id in captions if id not in expected],
        "not_cached": missing,
        "other_source": changed,
        "other_caption": [id for id in common if captions[id] != expected[id]],
    }
    return {name: {"items": len(ids), "examples": ids[:EXAMPLES]} for name, ids in lists.items()}


MEANINGS = {
    "not_in_file": (
        "items of the cache are not in this file (for example {}): they are trained, too; --prune"
        " of the caching command removes them"
    ),
    "not_cached": (
        "records of the file are not in the cache (for example {}): they are not trained; run the"
        " caching command"
    ),
    "other_source": (
        "records have another picture or clip than when they were cached (for example {}): run the"
        " caching command again"
    ),
    "other_caption": (
        "items have another caption than their line (for example {}): run the caching command again"
    ),
}


def report_text(report: dict) -> str:
    """Return the report of `cache_report` in words."""
    lines = [f"{report['cache']}: {report['items']} items, {report['gigabytes']} GB"]
    if report["made_from"]:
        lines.append(f"made from {report['made_from']}")
    shown = {"clips": "clips", "images": "single frames of clips"}
    if all(row["frames"] == 1 for row in report["groups"]) and "images" not in report["epochs"]:
        shown["clips"] = "pictures"
    for row in report["groups"]:
        size = "{}x{}".format(*row["size"])
        frames = f", {row['frames']} frames" if row["frames"] > 1 else ""
        lines.append(
            f"  {shown[row['steps']]} {size}{frames}: {row['items']} items,"
            f" {row['batches']:g} batches of {report['global_batch']} an epoch, {row['fill']:.1%}"
            " filled without repetition"
        )
    for name, row in report["epochs"].items():
        lines.append(
            f"  {shown[name]}: {row['steps']} steps are {row['epochs']:g} epochs of"
            f" {row['steps_an_epoch']:g} steps"
        )
    if report["held_out"]:
        lines.append(f"held out for validation: {report['held_out']} items")
    frames, crops, captions = report["frames"], report["cropped"], report["captions"]
    lines.append("frames: {shortest} to {longest}, median {median}".format(**frames))
    if still := frames["not_moved_by_jitter"]:
        lines.append(
            f"temporal_jitter moves no frame of {still} clips: their frames lie less than 3 apart"
        )
    if crops["items"]:
        lines.append(
            f"pixels kept: {crops['mean_kept']:.1%} on average, {crops['least_kept']:.1%} at least;"
            f" below 80 %: {crops['items_below_80_percent']}; enlarged: {crops['enlarged']}"
        )
        for row in crops["examples"]:
            size = "{}x{}".format(*row["size"])
            lines.append(f"  {row['id']} {size}: {row['kept']:.1%} kept")
    lines.append(
        "captions: {captions}, {empty} of them empty, {items_with_several} items have several;"
        " words: median {words[median]}, 95 % at most {words[p95]}, longest"
        " {words[longest]}".format(**captions)
    )
    if report["left_out"]["items"]:
        lines.append(report["left_out"]["why"])
    for note, count in report["notes"].items():
        if note in NOTES:
            lines.append(f"{count} items {NOTES[note]}")
    if report["older"]:
        lines.append(report["older"])
    for reason, count in report["skipped_when_cached"]["reasons"].items():
        lines.append(f"skipped when cached: {count} {reason}")
    for name, row in report.get("metadata", {}).items():
        if row["items"]:
            lines.append(f"{row['items']} {MEANINGS[name].format(row['examples'][0])}")
    if "sheet" in report:
        lines.append(f"contact sheet: {report['sheet']}")
    return "\n".join(lines)
