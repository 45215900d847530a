"""How fast data moves: decoding and caching of pictures, cached items to the training loop.

Everything is made in a scratch folder: pictures as cameras give them in size and grain, latents of
noise.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.caching import Caching
from mmdit.data.cache.caching_report import CacheReport
from mmdit.data.cache.decoding import decoded
from mmdit.data.cache.latent_cache import LatentCache, open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.packing import pack_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.records import Record
from mmdit.interfaces import LatentSpec, Tokenizer
from mmdit.tokenizers.vtp import import_vtp

SOURCE = (1024, 768)
VIDEO = VideoConfig(256, 256)


def make_pictures(folder: Path, count: int, workers: int) -> list[Record]:
    """Make `count` JPEG files of 1024x768 (about 200 kB), coloured gradients under photographic
    grain, and return their records."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        paths = list(pool.map(partial(_picture, folder), range(count), chunksize=16))
    return [
        Record(f"picture{number:06d}", path, f"picture {number}")
        for number, path in enumerate(paths)
    ]


def _picture(folder: Path, number: int) -> str:
    path = folder / f"{number:06d}.jpg"
    if not path.exists():
        random = np.random.default_rng(number)
        smooth = Image.fromarray(random.integers(0, 255, (6, 8, 3), np.uint8)).resize(
            SOURCE, Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 6, (*SOURCE[::-1], 1))
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(
            path, quality=90
        )
    return str(path)


# Width, blocks and heads of both the encoder and the decoder.
VTP_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def make_vtp(folder: Path, size: str) -> Path:
    """Make a checkpoint of the shape of a released VTP with random weights, which is as fast as the
    real one, and return its folder."""
    if not (folder / "config.json").exists():
        code = import_vtp()
        width, depth, heads = VTP_SIZES[size]
        shape = {}
        for side in ("vision", "decoder"):
            shape |= {
                f"{side}_embed_dim": width,
                f"{side}_depth": depth,
                f"{side}_num_heads": heads,
            }
        code.VTPModel(code.VTPConfig(train_clip=False, **shape)).save_pretrained(folder)
    return folder


def caching_speed(
    tokenizer: Tokenizer,
    folder: Path,
    device: torch.device,
    workers: int,
    count: int,
    batch_size: int,
    rounds: int = 2,
    jpeg_decoder: Literal["pillow", "torchvision"] = "pillow",
) -> Iterator[dict]:
    """Yield the pictures a second from files to cached items, and of decoding alone by the same
    workers, with this decoder.

    The two alternate and the best of each counts, for other work on the machine only slows."""
    records = make_pictures(folder / "pictures", count, max(1, workers))
    manifest = CacheManifest.of(tokenizer, VIDEO)
    preprocess = PreprocessConfig(jpeg_decoder=jpeg_decoder)

    def cache(part: list[Record], name: str, num_workers: int) -> CacheReport:
        return Caching(
            part,
            "image",
            tokenizer,
            folder / jpeg_decoder / name,
            VIDEO,
            preprocess=preprocess,
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=False,
        ).run()

    cache(records[: 2 * batch_size], "warm", 0)
    rates: dict[str, list[float]] = {"decode": [], "cache": []}
    for number in range(rounds):
        begin = time.perf_counter()
        for _ in decoded(records, "image", manifest, preprocess, VIDEO, workers, device):
            pass
        rates["decode"].append(count / (time.perf_counter() - begin))
        report = cache(records, f"cache{number}", workers)
        assert report.written == count, report.text()
        rates["cache"].append(count / report.seconds)
    decode, whole = (max(rates[name]) for name in ("decode", "cache"))
    yield {
        "part": "cache",
        "decoder": jpeg_decoder,
        "pictures": count,
        "source": list(SOURCE),
        "workers": workers,
        "decode_per_s": round(decode, 1),
        "cache_per_s": round(whole, 1),
        "ratio": round(whole / decode, 3),
        "rounds": {name: np.round(several, 1).tolist() for name, several in rates.items()},
    }


def make_cache(folder: Path, count: int, channels: int = 64) -> LatentCache:
    """Make a cache of `count` items of noise, each a 256x256 picture (16x16 cells), and open it."""
    spec = LatentSpec(channels)
    manifest = CacheManifest("noise", "noise", spec, ((256, 256),), False)
    if not (folder / "index.jsonl").exists():
        latents = torch.randn(256, 1, 16, 16, channels).half()
        with CacheWriter(folder, manifest) as writer:
            for first in range(0, count, 256):
                ids = [f"item{number:07d}" for number in range(first, min(first + 256, count))]
                writer.add_many(
                    ids, latents[: len(ids)], [f"a picture of {id} on a table" for id in ids]
                )
    return open_cache(folder)


def loading_speed(
    folder: Path, count: int, workers: int, batch_size: int = 256, seconds: float = 4.0
) -> Iterator[dict]:
    """Yield the cached items a second that `LatentBatches.iterate` gives once warm: from memory,
    from files and from a packed cache."""
    begin = time.perf_counter()
    cache = make_cache(folder / "items", count)
    made = time.perf_counter() - begin
    yield {
        "part": "loader",
        "from": "writing the cache",
        "items": count,
        "items_per_s": round(count / made, 1),
    }
    pack_cache(folder / "items", folder / "packed")
    packed = open_cache(folder / "packed")
    for name, source, in_memory in (
        ("memory", cache, True),
        ("files", cache, False),
        ("packed", packed, False),
    ):
        batches = LatentBatches(
            source,
            BatchPlan(source, VIDEO, batch_size, 0),
            in_memory=in_memory,
            num_workers=workers,
        )
        steps = batches.iterate()
        # an epoch: every file has been read once, the workers run
        for _ in range(count // batch_size + 2 * workers):
            next(steps)
        begin, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < seconds:
            done += sum(len(batch.latents) for batch in next(steps))
        steps.close()
        yield {
            "part": "loader",
            "from": name,
            "workers": workers,
            "batch_size": batch_size,
            "items": count,
            "megabytes": round(source.nbytes / 1e6),
            "items_per_s": round(done / spent, 1),
            "cpus": len(os.sched_getaffinity(0)),
        }
