"""Write moving shapes to disk: pictures or folders of frames, and the metadata lines that caching
reads."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.dataset.workers import cores
from mmdit.data.moving_shapes.drawing import draw
from mmdit.data.moving_shapes.facts import (
    SPLITS,
    VARIANTS,
    Facts,
    check_canvas,
    check_choice,
)
from mmdit.data.moving_shapes.render import render
from mmdit.data.moving_shapes.sentences import caption, named_attributes
from mmdit.files import clean, open_atomically, read_text, replace_folder, write_atomically

DESCRIPTION = "moving_shapes.json"
METADATA = ("train_images.jsonl", "train_videos.jsonl")
CHUNK_FRAMES = 512  # frames in a worker's portion
FRAMES_PER_WORKER = 8192  # with fewer, a second process costs more than it saves


@dataclass(frozen=True)
class Recipe:
    """The settings on which sample `i` on disk depends. A folder holds samples of one recipe; their
    number is not part of it, so a folder can grow."""

    width: int
    height: int
    frames: int = 1
    seed: int = 0
    split: str = "train"
    variant: str = "one"
    complete_captions: bool = False  # also in the split for training
    version: int = field(init=False)

    def __post_init__(self):
        check_canvas(self.width, self.height)
        if self.frames < 1:
            raise ValueError(
                f"frames is {self.frames}; must be at least 1 (1: images, more: frame folders)"
            )
        check_choice("split", self.split, SPLITS)
        check_choice("variant", self.variant, VARIANTS)
        object.__setattr__(self, "version", VARIANTS[self.variant])

    @property
    def complete(self) -> bool:
        """Return whether captions state everything. Those for training leave out facts at random,
        unless complete ones are asked for."""
        return self.complete_captions or self.split != "train"

    def draw(self, indices: Iterable[int]) -> list[Facts]:
        """Return the facts of these samples."""
        return draw(
            self.seed,
            indices,
            video=self.frames > 1,
            width=self.width,
            height=self.height,
            split=self.split,
            variant=self.variant,
        )

    def render(self, facts: list[Facts], device: torch.device | str = "cpu") -> Tensor:
        """Return the pixels of samples, uint8 `(B, frames, 3, height, width)`."""
        return render(facts, self.width, self.height, self.frames, device)

    def words(self, index: int, facts: Facts) -> tuple[str, dict]:
        """Return the caption of sample `index`, and its facts in the form of a metadata line."""
        given = (facts, self.seed, index, self.complete)
        return caption(*given), facts.to_json() | {"named": sorted(named_attributes(*given))}


def prepare_samples(out_dir: str | Path, recipe: Recipe, count: int, workers: int = 0) -> Path:
    """Write samples 0 … count − 1; return the path of the metadata file, which is written last and
    at once.

    `frames == 1`: `images/<id>.png` and `train_images.jsonl`; more: `frames/<id>/0000.png …` and
    `train_videos.jsonl`. Paths in the metadata are relative to it. Finished samples of the same
    recipe are kept, so an interrupted run continues where it stopped. `workers`: the number of
    processes; 0 takes as many as pay off.
    """
    if count < 1:
        raise ValueError(f"count is {count}; must be at least 1")
    if workers < 0:
        raise ValueError(f"workers is {workers}; must be 0 (as many as pay off) or more")
    out_dir = Path(out_dir)
    claim(out_dir, recipe)
    clean(out_dir, out_dir / "images", out_dir / "frames")
    workers = workers or max(1, min(cores(), 8, count * recipe.frames // FRAMES_PER_WORKER))
    step = max(1, CHUNK_FRAMES // recipe.frames)
    chunks = [range(start, min(start + step, count)) for start in range(0, count, step)]
    records: list[dict] = []
    work = partial(_write_samples, out_dir, recipe)
    with tqdm(
        total=count, desc=f"moving shapes {recipe.width}x{recipe.height}", unit="sample"
    ) as bar:
        for part in map(work, chunks) if workers == 1 else _in_processes(work, chunks, workers):
            records += part
            bar.update(len(part))
    images, videos = METADATA
    path = out_dir / (images if recipe.frames == 1 else videos)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(path, "".join(lines))
    return path


def _in_processes(work, chunks: list[range], workers: int):
    # Forking is unsafe once torch has started threads. A fork server has none, and imports torch
    # once for all processes. Windows has no fork server.
    servers = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if servers else "spawn")
    if servers:
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(work, chunks)


def claim(out_dir: Path, recipe: Recipe, further: dict | None = None) -> None:
    """Record the recipe, and further settings that decide the samples, in a new folder. ValueError
    if the folder holds samples with other ones."""
    path = out_dir / DESCRIPTION
    wanted = asdict(recipe) | (further or {})
    if path.exists():
        try:
            stored = json.loads(read_text(path))
        except ValueError:
            stored = {}
        stored = stored if isinstance(stored, dict) else {}
        stored = {"complete_captions": False} | stored  # for folders older than this setting
        names = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
        if names:
            differences = ", ".join(
                f"{name} {stored.get(name)!r} there and {wanted.get(name)!r} now" for name in names
            )
            raise ValueError(
                f"{out_dir} holds moving shapes made otherwise: {differences}; choose another"
                " --out_dir or the same settings"
            )
    elif any((out_dir / name).exists() for name in ("images", "frames", *METADATA)):
        raise ValueError(
            f"{out_dir} holds samples but no {DESCRIPTION} that says how they were made; choose"
            " another --out_dir"
        )
    else:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted, indent=2) + "\n")


def _write_samples(out_dir: Path, recipe: Recipe, indices: range) -> list[dict]:
    """Write the missing pictures or clips of `indices`; return the metadata of all of them."""
    from PIL import Image

    video = recipe.frames > 1
    facts = recipe.draw(indices)
    names = [f"frames/{i:06d}" if video else f"images/{i:06d}.png" for i in indices]
    missing = [k for k, name in enumerate(names) if not (out_dir / name).exists()]
    pixels = recipe.render([facts[k] for k in missing])
    for k, clip in zip(missing, pixels.permute(0, 1, 3, 4, 2).numpy(), strict=True):
        target = out_dir / names[k]
        target.parent.mkdir(exist_ok=True)
        if video:
            with replace_folder(target) as unfinished:
                for f, frame in enumerate(clip):
                    Image.fromarray(frame).save(unfinished / f"{f:04d}.png", compress_level=1)
        else:
            with open_atomically(target) as file:
                Image.fromarray(clip[0]).save(file, format="PNG", compress_level=1)
    rows = []
    path_key = "frames_dir" if video else "image_path"
    for index, name, item in zip(indices, names, facts, strict=True):
        text, known = recipe.words(index, item)
        rows.append({"id": f"{index:06d}", path_key: name, "caption": text, "facts": known})
    return rows
