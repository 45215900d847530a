"""The pages about data: the existing caches, the content of one, and the reports about data, memory
and adapters."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mmdit.data.batches.data_report import cropped, skipped
from mmdit.data.cache.latent_cache import LatentCache, open_cache
from mmdit.data.dataset.captions import all_captions, length_report
from mmdit.files import expanded, real_path
from mmdit.ui.job_files import Job
from mmdit.ui.job_pages import pictures_of, rows_of, skipped_of
from mmdit.ui.job_requests import Workplace
from mmdit.ui.templating import Templates

DEPTH, MOST_ENTRIES, MOST_CACHES, MOST_ITEMS = 3, 2000, 100, 50
REPORT = "inspect-cache"  # it decodes samples, and says how training will use a cache


class DataPages:
    """The pages `/data`, with caches and reports, and `/cache?path=…`, for one cache."""

    def __init__(self, place: Workplace, templates: Templates):
        self.place, self.templates = place, templates

    def routes(self) -> list[BaseRoute]:
        """Return the addresses of these pages."""
        return [Route("/data", self.overview), Route("/cache", self.cache)]

    def overview(self, request: Request) -> Response:
        """Show the caches in the allowed folders, and the reports."""
        abouts, store = self.place.named(reports=True), self.place.store
        caches = (path for folder in self.place.allowed.folders for path in find_caches(folder))
        return self.templates.page(
            request,
            "data.html",
            abouts=abouts,
            rows=rows_of(store, [job for job in store.jobs() if job.command in abouts]),
            caches=list(dict.fromkeys(map(from_here, itertools.islice(caches, MOST_CACHES)))),
        )

    def cache(self, request: Request) -> Response:
        """Show the content of a cache: sizes, crops, captions, and which items were left out, with
        reasons."""
        try:
            path = self.place.allowed.check(request.query_params.get("path", "").strip())
            facts = cache_facts(open_cache(path))
        except (ValueError, OSError) as error:
            return self.templates.problem(request, str(error), 404)
        store = self.place.store
        jobs = [job for job in store.jobs() if names(job, path)]
        reports = [job for job in jobs if job.command == REPORT]
        return self.templates.page(
            request,
            "cache.html",
            path=from_here(path),
            facts=facts,
            left_out=skipped_of(path),
            rows=rows_of(store, jobs),
            report=reports[-1] if reports else None,
            log=store.log(reports[-1].id) if reports else "",
            pictures=pictures_of(reports[-1]) if reports else [],
        )


def find_caches(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the latent caches in a folder and its subfolders, down to `depth`; the inside of a
    cache is not searched."""
    if os.path.isfile(folder / "manifest.json"):
        yield folder
        return
    try:
        with os.scandir(folder) as entries:
            seen = list(itertools.islice(entries, MOST_ENTRIES if depth else 0))
    except OSError:
        return
    for entry in sorted(seen, key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from find_caches(Path(entry.path), depth - 1)


def from_here(path: Path) -> str:
    """Return a path as a user in the working directory would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def names(job: Job, path: Path) -> bool:
    """Return whether an option in the command of a job names this folder."""
    values = [word.partition("=")[2] for word in job.words if word.startswith("--")]
    real = real_path(path)
    return any(real_path(expanded(value)) == real for value in values if value)


def cache_facts(cache: LatentCache) -> dict:
    """Return the content of a cache: a row for each size (width, height) and number of frames, the
    crops, how many items were left out for each reason, lengths of captions, and some items."""
    shapes = Counter(map(tuple, cache.shapes.tolist()))
    groups = Counter()
    for shape, count in shapes.items():
        groups[(*cache.manifest.size_of(shape), shape[0])] += count
    captions = [all_captions(*pair) for pair in zip(cache.captions, cache.facts, strict=True)]
    return {
        "items": len(cache),
        "gigabytes": cache.nbytes / 1e9,
        "tokenizer": cache.manifest.tokenizer_name,
        "made_from": cache.manifest.source,
        "groups": sorted(groups.items()),
        "crops": cropped(cache),
        "reasons": skipped(Path(cache.folder))["reasons"],
        "captions": length_report(captions),
        "examples": list(zip(cache.ids, captions, strict=True))[:MOST_ITEMS],
    }
