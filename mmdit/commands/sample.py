"""Draw with a loaded model, batch by batch, and perhaps redraw at a larger size with a second one:
see `mmdit.scripts.sample`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import mmdit
from mmdit.adapters import merge
from mmdit.data.dataset.frames import PreprocessConfig, crop_box, load_first_frame, load_image
from mmdit.diffusion.samplers import Callback
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.files import held_folder, with_tilde
from mmdit.interop.lora_formats import experts_in, load_lora
from mmdit.interop.wan_pictures import size_of_aspect
from mmdit.interop.wan_release import published_shift, variant_of
from mmdit.interop.wan_weights import note_of_name
from mmdit.shipped import find
from mmdit.training.distributed import World, place_in_job, process_group
from mmdit.training.expert_choice import experts_of
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.requests import Request, read_request
from mmdit.training.samples import SampleFolder, check_writable, weights_digest

# default of --strength: for a second model without, and for one with an input for the small samples
REDRAWN, TOLD = 0.5, 0.1
# seconds after which a batch also shows its sampling steps
PATIENCE = 5


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other, before anything is loaded."""
    if not args.checkpoint:
        raise ValueError("no model: give --checkpoint, a run, a checkpoint, an export or a release")
    if args.interactive and (args.prompts or args.prompts_file):
        raise ValueError(
            "--interactive reads prompts from the keyboard; leave out --prompts and --prompts_file"
        )
    if args.interactive and args.first:
        raise ValueError(
            f"--first is {args.first}, but --interactive numbers its samples after those that are"
            " in --out; leave it out"
        )
    if not 0 <= args.first < 1 << 62:
        raise ValueError(f"--first is {args.first}, must be from 0 to below 2 to the 62nd")
    if args.lora_strength is not None and not (args.lora or args.lora_low):
        raise ValueError(f"--lora_strength is {args.lora_strength}, but --lora names no file")
    check_writable(args.out, folder=True)
    if args.strength is not None and not args.refine:
        raise ValueError(
            f"--strength is {args.strength}, but nothing is drawn again: name the second"
            " checkpoint with --refine, or leave it out"
        )
    if args.strength is not None and not 0 < args.strength <= 1:
        raise ValueError(
            f"--strength is {args.strength}, must be above 0 (nothing is drawn anew) "
            "and at most 1 (everything is)"
        )
    for name in ("lora", "lora_low", "refine"):
        path = getattr(args, name)
        if path and not find(path).exists():
            raise ValueError(f"--{name} is {path}, which does not exist")
    for path in args.image or []:
        opened(path)


def refines_averaged(args: argparse.Namespace) -> bool:
    """Return whether the second model draws with its averaged weights: exports and releases have no
    others."""
    return not args.raw_weights or find(args.refine).is_file() or bool(variant_of(args.refine))


@contextmanager
def all_processes(args: argparse.Namespace) -> Iterator[World]:
    """Join the processes of torchrun, which then draw each clip together; without torchrun, this
    process draws alone."""
    _, size = place_in_job()
    if size == 1:
        yield World()
        return
    if args.interactive:
        raise ValueError(
            f"--interactive reads one keyboard, but {size} processes draw; leave it out, or start"
            " the command without torchrun"
        )
    with process_group(args.device, context_parallel=size) as world:
        yield world


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Hold the folder of samples until the block ends. Every process must call this. ValueError if
    another command is drawing into the folder: one of the two would lose its samples.json."""
    refusal = (
        f"another process is drawing into {folder}: wait until it has ended, or choose another"
        " --out"
    )
    with ExitStack() as stack:
        world.share(lambda: stack.enter_context(held_folder(folder, refusal)))
        yield


def command_line(words: list[str], request: Request | None = None, first: int = 0) -> str:
    """Return the command in a form that can be typed again, without `--out` and `--replace`: a
    sample is the same file wherever it is written. For a `request` that came from the keyboard or
    from a file, return the command that draws it alone, as the sample with the number `first`."""
    kept = without(words, {"--out": 1, "--replace": 0})
    if request is not None:
        flags = {name: f"{value}" for name, value in request.overrides.items()}
        replaced = {"--interactive": 0, "--prompts": None, "--prompts_file": 1, "--first": 1}
        replaced |= {f"--{name}": 1 for name in flags}
        if request.guidance is not None:  # it holds for both experts
            replaced["--guidance_low"] = 1
        kept = without(kept, replaced)
        if first:
            flags["first"] = f"{first}"
        flags["prompts"] = request.prompt
        kept += [f"--{name}={value}" for name, value in flags.items()]
    return shlex.join(with_tilde(["mmdit", "sample", *kept]))


@contextmanager
def shown_steps(settings: SampleSettings, world: World) -> Iterator[Callback]:
    """Yield a callback that shows the finished sampling steps of a batch, if the batch takes long:
    a clip of many frames takes minutes on a CPU."""
    hidden, steps = not world.is_main, settings.sampler.steps
    with tqdm(
        total=steps, desc="a batch", unit="step", leave=False, delay=PATIENCE, disable=hidden
    ) as bar:

        def callback(done: int, t: float, x: Tensor, clean: Tensor) -> None:
            bar.update(done - bar.n)

        yield callback


def without(words: list[str], options: Mapping[str, int | None]) -> list[str]:
    """Return the words of a command without `options`, each given with its number of values; None:
    all words up to the next option."""
    kept, left = [], list(words)
    while left:
        word = left.pop(0)
        name, equals, _ = word.partition("=")
        if name not in options:
            kept.append(word)
            continue
        count = options[name]
        if count is None:
            places = (i for i, other in enumerate(left) if other.startswith("--"))
            count = next(places, len(left))
        elif equals:
            count = 0
        left = left[count:]
    return kept


def lay_over(
    pipeline: Pipeline, lora: str | None, lora_low: str | None, strength: float = 1.0
) -> None:
    """Merge LoRA files into the network, or into the experts of a pair. `strength`: see `merge`."""
    experts = experts_of(pipeline)
    if lora_low and not experts:
        raise ValueError("--lora_low is given, but this model is no pair of experts")
    if lora and not experts:
        load_lora(pipeline.model, lora)
        merge(pipeline.model, strength)
        return
    files = {"high": lora, "low": lora_low}
    named = experts_in(experts["high"], lora) if lora and not lora_low else set()
    if named:  # the file says for which expert each of its parts is
        files = dict.fromkeys(named, lora)
    for name, other in (("high", "lora_low"), ("low", "lora")):
        file = files.get(name)
        if file:
            load_lora(experts[name], file, name)
            merge(experts[name], strength)
            print(f"{file} is laid over the {name}-noise expert")
            if note := note_of_name(file, name):
                print(f"{note}: give it as --{other} if it is")


def opened(path: str) -> Image.Image:
    """Return a picture that the command line names. ValueError names a file that cannot be used."""
    try:
        return load_image(path)
    except (ValueError, OSError) as error:
        why = "it does not exist" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"--image {path}: {why}") from None


def first_frames(paths: list[str], size: tuple[int, int]) -> Tensor | None:
    """Return the given pictures cropped to `size`, `(n, 3, height, width)`, and print how much of
    each is cut off; None if there are none."""
    for path in paths:
        source = opened(path).size
        left, top, right, bottom = crop_box(source, size, PreprocessConfig(), "")
        lost = 1 - (right - left) * (bottom - top) / (source[0] * source[1])
        if lost > 0.01:
            print(
                f"{path} ({source[0]}x{source[1]}): {lost:.0%} is cut off for {size[0]}x{size[1]}"
            )
    pictures = [load_first_frame(path, size) for path in paths]
    return torch.stack(pictures) if pictures else None


def size_for(
    pipeline: Pipeline, picture: str, size: tuple[int, int], given: tuple[int | None, int | None]
) -> tuple[int, int]:
    """Return the size of clips that begin with `picture`: its aspect ratio with the area of `size`;
    sides that are `given` stay."""
    model = pipeline.model
    if None not in given or (model.picture == "none" and not model.takes_first_frame):
        return size
    multiple = model.patch * pipeline.learner.spec.spatial
    area, aspect = size[0] * size[1], opened(picture).size
    return size_of_aspect(aspect, area, multiple, given, closest=model.takes_first_frame)


@dataclass
class Drawing:
    """Draws the samples of a command.

    `size`: width, height and frames. `strength`: the noise level at which refining is given the
    small samples; None takes the default for the model. `words`: those of the command, which files
    record; `alone`: each file records the command that draws it alone. `world`: the processes that
    draw each sample together, of which the main one writes. ValueError if the size or the settings
    cannot be used.
    """

    pipeline: Pipeline
    size: tuple[int, int, int]
    settings: SampleSettings
    image: Tensor | None = None
    strength: float | None = None
    words: list[str] = field(default_factory=list)
    alone: bool = False
    world: World = World()
    refiner: Pipeline | None = field(default=None, init=False)
    redrawn: SampleSettings | None = field(default=None, init=False)

    def __post_init__(self):
        self.written_size = self.size
        self.pipeline.check(*self.size, self.settings)
        self.pipeline.model.share_clips(self.world.context)

    def refine_with(
        self, refiner: Pipeline, config: ExperimentConfig, negative: str | None = None
    ) -> None:
        """Redraw the samples with a second model, at the size and with the settings of its config,
        but with the seed and the `negative` prompt of the command. ValueError if it cannot redraw
        at this `strength`, or samples of this size."""
        self.written_size = (config.video.width, config.video.height, self.size[2])
        settings = replace(SampleSettings.of(config.train), seed=self.settings.seed)
        if negative is not None:
            settings = replace(settings, negative_prompt=negative)
        self.refiner, self.redrawn = refiner, settings
        refiner.check(*self.written_size, self.redrawn, refines=True)
        refiner.model.share_clips(self.world.context)
        conditioned = config.model.conditioning == "low_resolution"
        if self.strength is None:
            self.strength = TOLD if conditioned else REDRAWN
        if conditioned and self.strength > config.model.augmentation:
            raise ValueError(
                f"--strength is {self.strength}, but the refiner was given small clips noised to at"
                f" most {config.model.augmentation} (model.augmentation); lower it"
            )
        small = config.tokenizer.low_resolution
        if conditioned and small not in (None, self.size[:2]):
            raise ValueError(
                "the samples are {}x{}, but the refiner was trained to redraw clips of {}x{}; set"
                " --width and --height".format(*self.size[:2], *small)
            )

    def story(self) -> dict:
        """Return everything that determines the samples, besides prompts and numbers."""
        networks, more = self.pipeline.networks(), {}
        if self.refiner:
            again = self.refiner.networks()
            networks |= {f"refiner.{name}": network for name, network in again.items()}
            more = {
                "strength": self.strength,
                "drawn_size": list(self.size),
                "refine_settings": asdict(self.redrawn),
            }
        return more | {
            "size": list(self.written_size),
            "settings": asdict(self.settings),
            "torch": torch.__version__,
            "precision": self.pipeline.precision,
            "weights": weights_digest(networks, self.image),
        }

    def settings_of(self, requests: Mapping[int, Request]) -> list[SampleSettings]:
        """Return the settings with which requests are drawn, followed by those with which they are
        redrawn, if they are."""
        drawn = [request.settings(self.settings) for request in requests.values()]
        return [*drawn, self.redrawn] if drawn and self.redrawn else drawn

    def check(self, requests: Mapping[int, Request]) -> None:
        """Raise ValueError for requests whose size or settings cannot be drawn, before any is
        drawn."""
        for number, request in requests.items():
            fixed = "--image" if self.image is not None else "--refine" if self.refiner else None
            if fixed and (request.width or request.height):
                raise ValueError(
                    f"prompt {number} has a size of its own, which {fixed} decides for all; leave "
                    "out its width and height"
                )
            if request.negative and not any(
                settings.guides for settings in self.settings_of({number: request})
            ):
                raise ValueError(
                    f"prompt {number} has a negative prompt, {request.negative!r}, but its guidance"
                    " is 1, which looks at the prompt alone: give it a guidance above 1, or leave"
                    " the negative prompt out"
                )
            try:
                settings = request.settings(self.settings)
                self.pipeline.check(*request.size(self.size), settings)
            except ValueError as error:
                if not request.overrides:
                    raise
                raise ValueError(f"prompt {number} ({request.overrides}): {error}") from None

    def facts(self, number: int, request: Request, story: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata of a sample's file: what was asked for, and everything that
        determines it. Its `number` and `seed` key the noise."""
        seeded = request.seed is not None
        settings = asdict(request.settings(self.settings))
        settings["seed"] = request.seed if seeded else settings["seed"]
        size = request.size(self.size)
        written = size if self.refiner is None else (*self.written_size[:2], size[2])
        rest = {name: with_tilde(value) for name, value in story.items()}
        return {
            **rest,
            "prompt": request.prompt,
            "seed": settings["seed"],
            "number": 0 if seeded else number,
            "size": list(written),
            "settings": settings,
            "mmdit": mmdit.__version__,
            "command": self._command(request, 0 if seeded else number),
        }

    def _command(self, request: Request, number: int) -> str:
        return command_line(self.words, *((request, number) if self.alone else ()))

    def open_folder(
        self, args: argparse.Namespace, story: dict, requests: dict[int, Request], fps: int
    ) -> SampleFolder:
        """Return the folder of the samples, and print what is kept in it and what is replaced."""
        size, path = self.written_size, Path(args.out)
        folder = self.world.share(
            lambda: SampleFolder(path, story, requests, size, fps, args.columns, args.replace)
        )
        for line in folder.said:
            self.world.print(line)
        return folder

    def fill(self, folder: SampleFolder, batch_size: int) -> None:
        """Draw the samples that `folder` lacks, and write each batch when it is done."""
        left = list(folder.missing(batch_size))
        total, hidden = sum(len(numbers) for numbers in left), not self.world.is_main
        with tqdm(total=total, desc="sampling", unit="sample", disable=hidden) as bar:
            for numbers in left:
                for done in self.draw(folder, numbers):
                    bar.update(done)

    def finish(self, folder: SampleFolder) -> None:
        """Write grid.png with the samples in `folder`, and print that."""
        if self.world.is_main and folder.files:
            count, sheet = len(folder.finish()), folder.folder / "grid.png"
            print(f"wrote {count} samples and {sheet}{folder.grid_note}")

    def draw(self, folder: SampleFolder, numbers: list[int]) -> Iterator[int]:
        """Draw and write requests that can share a batch; yield the number of samples each time
        that some are written."""
        requests = [folder.requests[number] for number in numbers]
        facts = [self.facts(*pair, folder.story) for pair in zip(numbers, requests, strict=True)]
        prompts = [request.prompt for request in requests]
        seeds = [request.seed for request in requests]
        settings = requests[0].settings(self.settings)
        with shown_steps(settings, self.world) as callback:
            pixels = self.pipeline(
                prompts,
                *requests[0].size(self.size),
                settings,
                numbers,
                len(numbers),
                image=self.image,
                seeds=seeds,
                callback=callback,
            )
        if self.refiner is None:
            self._write(folder, numbers, pixels, facts)
            yield len(numbers)
            return
        for i, (number, request) in enumerate(zip(numbers, requests, strict=True)):
            refined = self._refined(pixels[i : i + 1], request, number)
            self._write(folder, [number], refined, [facts[i]])
            yield 1

    def _write(
        self, folder: SampleFolder, numbers: list[int], pixels: Tensor, facts: list[dict]
    ) -> None:
        if self.world.is_main:
            folder.add(numbers, pixels, facts)

    def _refined(self, clip: Tensor, request: Request, number: int) -> Tensor:
        """Return the sample `clip (1, f, 3, h, w)` redrawn. Samples are redrawn one at a time: at
        720p, a clip of 80 frames takes 0.9 GB."""
        assert self.refiner is not None and self.redrawn is not None, "refine_with was called"
        assert self.strength is not None
        width, height, _ = self.written_size
        settings = self.redrawn
        if request.negative is not None:
            settings = replace(settings, negative_prompt=request.negative)
        how = (width, height, self.strength, settings, number, [request.seed])
        with shown_steps(self.redrawn, self.world) as callback:
            return self.refiner.refine(clip, [request.prompt], *how, callback)

    def converse(self, folder: SampleFolder, lines: Iterable[str]) -> None:
        """Draw a sample for each of `lines`, which are prompts or JSON objects. Without a seed in
        the line, the seed is that of the command plus the sample's number. A line that cannot be
        drawn is reported and skipped."""
        for line in lines:
            if not line.strip():
                continue
            try:
                request = read_request(line.strip(), "this line")
                number = folder.next_number()
                if request.seed is None:
                    request = replace(request, seed=self.settings.seed + number)
                self.check({number: request})
                folder.requests[number] = request
                for _ in self.draw(folder, [number]):
                    print(
                        f"{folder.folder / folder.files[number]}, seed {request.seed}", flush=True
                    )
            except ValueError as error:
                print(f"error: {error}", flush=True)


def with_published_shift(
    settings: SampleSettings, args: argparse.Namespace, width: int, height: int
) -> SampleSettings:
    """Return `settings` with the time shift of a release whose shift depends on the size, unless
    the command sets a shift."""
    shift = published_shift(args.checkpoint, width, height)
    chosen = args.shift is not None or any("sample_shift" in word for word in args.overrides)
    if chosen or not shift:
        return settings
    return replace(settings, sampler=replace(settings.sampler, shift=shift))


def whole_story(args: argparse.Namespace, drawing: Drawing) -> dict[str, Any]:
    """Return everything that determines the samples of a command, besides prompts and numbers."""
    story = {"checkpoint": args.checkpoint}
    for name in ("image", "lora", "lora_low", "lora_strength", "refine"):
        if getattr(args, name) not in (None, ""):
            story[name] = getattr(args, name)
    rest = {"raw_weights": args.raw_weights, "overrides": args.overrides}
    return story | drawing.story() | rest
