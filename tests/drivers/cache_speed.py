"""How fast clips are cached, part by part, and how fast training reads them again: one JSON object.

    python -m tests.drivers.cache_speed          on a GPU, some 30 seconds and 4 GB of disk
    python -m tests.drivers.cache_speed --device cpu --frames 4 --clips 4 \\
        video.width=64 video.height=64 video.num_frames=4 video.frame_stride=1

facts, render, encode, copy: milliseconds a clip, each part alone, until the device has done it;
`asked`: until the CPU has asked it for all, after which it is free for the next. write: of a
portion of clips, with the threads that caching has; plain_write: the same bytes in files of one
piece; flush: until they are on the disk. overall: `cache_moving_shapes` from the first draw to the
last flush, with the milliseconds of a core that this process and those that help it took a clip;
error: of what it cached, against the same made clip by clip and waited for. load: the
cache into memory; batch_memory, batch_disk: milliseconds for a batch of 64 of the config's samples,
in this process alone.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from operator import sub
from pathlib import Path

import torch

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.stores import InMemory, OnDisk
from mmdit.data.cache.half_latents import HalfLatents
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.moving_shapes.latents import CHUNK_PIXELS, cache_moving_shapes
from mmdit.data.moving_shapes.prepare import Recipe
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.files import flush_file_system
from mmdit.pixels import to_unit
from mmdit.tokenizers import build_tokenizer
from mmdit.training.distributed import choose_device

ROOT = Path(__file__).resolve().parents[2]
BATCH = 64  # clips of a training step


class Clock:
    """Measures parts, in milliseconds a clip."""

    def __init__(self, device: torch.device, clips: int):
        self.device, self.clips, self.figures = device, clips, {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, name: str, work, times: int = 3):
        """Do the work once to warm up, then some times measured; return its result."""
        result = work()
        self.wait()
        begin = time.perf_counter()
        for _ in range(times):
            result = work()
        asked = time.perf_counter() - begin
        self.wait()
        whole = time.perf_counter() - begin
        milliseconds = [1e3 * seconds / times / self.clips for seconds in (whole, asked)]
        self.figures[name] = dict(zip(("ms", "asked"), (round(x, 3) for x in milliseconds)))
        return result


def measure_parts(clock: Clock, tokenizer, recipe: Recipe, device: torch.device) -> torch.Tensor:
    """Measure what is done before the writing; return the latents of a portion on the CPU."""
    indices = list(range(clock.clips))

    def describe():
        drawn = recipe.draw(indices)
        return drawn, [recipe.words(i, item) for i, item in zip(indices, drawn, strict=True)]

    facts, _ = clock("facts", describe)
    pixels = clock("render", lambda: recipe.render(facts, device))
    for chunk in (16, 64, 256):
        tokenizer._chunk_size = chunk
        name = f"encode, {chunk} frames at a time"
        latents = clock(name, lambda: tokenizer.encode(to_unit(pixels)))
    tokenizer._chunk_size = 64
    clock("copy, plain", lambda: latents.half().cpu())
    half, finite = clock("copy", lambda: HalfLatents(latents).wait())
    assert finite.all()
    return half


def measure_writing(half: torch.Tensor, manifest: CacheManifest, folder: Path) -> dict:
    """Measure the writing of 20 portions, with and without what makes items of them."""
    rounds = max(1, 160 // len(half))
    clips = rounds * len(half)
    begin = time.perf_counter()
    with CacheWriter(folder / "written", manifest) as writer:
        for number in range(rounds):
            ids = [f"{number}-{i}" for i in range(len(half))]
            writer.add_many(ids, half, ids)
        written = time.perf_counter() - begin
    whole = time.perf_counter() - begin
    (folder / "plain").mkdir()
    raw = half[0].numpy().tobytes()
    begin = time.perf_counter()
    for number in range(clips):
        (folder / f"plain/{number}").write_bytes(raw)
    plain = time.perf_counter() - begin
    flush_file_system(folder)
    flushed = time.perf_counter() - begin
    for name in ("written", "plain"):
        shutil.rmtree(folder / name)
    megabytes = clips * len(raw) / 1e6
    return {
        "write": {"ms": round(1e3 * written / clips, 2), "MB/s": round(megabytes / written)},
        "flush": {"s": round(whole - written, 2), "MB/s with it": round(megabytes / whole)},
        "plain_write": {
            "ms": round(1e3 * plain / clips, 2),
            "MB/s": round(megabytes / plain),
            "MB/s flushed": round(megabytes / flushed),
        },
    }


def measure_reading(folder: Path, config) -> dict:
    """Measure how a cache comes into memory, and batches from memory and from files."""
    cache, figures = open_cache(folder), {}
    begin = time.perf_counter()
    held = InMemory(cache, progress=False)
    seconds = time.perf_counter() - begin
    figures["load"] = {"s": round(seconds, 2), "GB/s": round(cache.nbytes / 1e9 / seconds, 2)}
    size = min(BATCH, len(cache))
    plan = BatchPlan(cache, config.video, size, seed=0)
    for name, store in (("batch_memory", held), ("batch_disk", OnDisk(cache))):
        plans = [plan.batch(step) for step in range(8)]
        store.gather(plans[0].grid, plans[0].items, plans[0].frames)
        begin = time.perf_counter()
        for planned in plans:
            latents = store.gather(planned.grid, planned.items, planned.frames)
        seconds = (time.perf_counter() - begin) / len(plans)
        figures[name] = {"ms": round(1e3 * seconds, 2), "MB": round(latents.nbytes / 1e6, 1)}
    return figures


def largest_error(folder: Path, tokenizer, recipe: Recipe, device: torch.device) -> float:
    """Compare clips of the cache with the same made alone and waited for; return the largest mean
    difference over the mean size, which is the rounding of other portions. SystemExit: it is
    more."""
    cache, errors = open_cache(folder), []
    for i in range(0, len(cache), max(1, len(cache) // 8)):
        with torch.inference_mode():
            pixels = recipe.render(recipe.draw([i]), device)
            alone = tokenizer.encode(to_unit(pixels))[0].cpu()
        errors.append(((cache.load(i) - alone).abs().mean() / alone.abs().mean()).item())
    if max(errors) > 0.02:
        raise SystemExit(f"what is cached is not what was drawn: {errors}")
    return max(errors)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs/t2v_vtp_256_smoke.yaml"))
    parser.add_argument("--frames", type=int, default=80)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where to write [a new folder here]")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    config = load_experiment_config(args.config, args.overrides)
    device = torch.device(choose_device(args.device))
    tokenizer = build_tokenizer(config.tokenizer, device)
    recipe = Recipe(config.video.width, config.video.height, args.frames)
    manifest = CacheManifest.of(tokenizer, config.video, config.bucketing, config.preprocess)
    pixels = CHUNK_PIXELS[device.type] // (recipe.width * recipe.height * recipe.frames)
    portion = max(1, min(pixels, args.clips))
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder or "."))
        folder, clock = Path(made), Clock(device, portion)
        with torch.inference_mode():
            half = measure_parts(clock, tokenizer, recipe, device)
        figures = clock.figures | measure_writing(half, manifest, folder)
        begin, cores_before = time.perf_counter(), os.times()
        cache_moving_shapes(tokenizer, folder / "cache", manifest, recipe, args.clips, device)
        seconds = time.perf_counter() - begin
        user, system, helpers_user, helpers_system, _ = map(sub, os.times(), cores_before)
        overall = {
            "s": round(seconds, 2),
            "clips/s": round(args.clips / seconds, 1),
            "this process, ms": round(1e3 * (user + system) / args.clips, 3),
            "helpers, ms": round(1e3 * (helpers_user + helpers_system) / args.clips, 3),
        }
        overall["error"] = largest_error(folder / "cache", tokenizer, recipe, device)
        figures |= {"overall": overall} | measure_reading(folder / "cache", config)
    shape = f"{recipe.width}x{recipe.height}x{recipe.frames}"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": card, "clip": shape, "portion": portion} | figures, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
