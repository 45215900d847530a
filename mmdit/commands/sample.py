"""Drawing with a loaded model, batch by batch, perhaps again at a larger size by a second one:
see `mmdit.scripts.sample`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.adapters import merge
from mmdit.data.dataset.frames import PreprocessConfig, crop_box, load_first_frame, load_image
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.interop.lora_formats import experts_in, load_lora
from mmdit.interop.wan_pictures import size_of_aspect
from mmdit.interop.wan_weights import expert_in_name
from mmdit.training.expert_choice import experts_of
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.samples import SampleFolder, weights_digest

# noise levels at which refining is given the small samples, where --strength is left out
REDRAWN, TOLD = 0.5, 0.1


def lay_over(pipeline: Pipeline, lora: str | None, lora_low: str | None) -> None:
    """Merge LoRA files into the network, or into the experts of a pair."""
    experts = experts_of(pipeline)
    if lora_low and not experts:
        raise ValueError("--lora_low is given, but this model is no pair of experts")
    if lora and not experts:
        load_lora(pipeline.model, lora)
        merge(pipeline.model)
        return
    files = {"high": lora, "low": lora_low}
    named = experts_in(experts["high"], lora) if lora and not lora_low else set()
    if named:  # the file says itself which of the two its halves are for
        files = dict.fromkeys(named, lora)
    for name, other in (("high", "lora_low"), ("low", "lora")):
        file = files.get(name)
        if file:
            load_lora(experts[name], file, name)
            merge(experts[name])
            print(f"{file} is laid over the {name}-noise expert")
            if expert_in_name(file) not in (None, name):
                print(
                    f"  its name says that it is for the other expert: give it as --{other} if"
                    " it is"
                )


def first_frames(paths: list[str], size: tuple[int, int]) -> Tensor | None:
    """Return the given pictures cut to `size`, `(n, 3, height, width)`, and say what is lost of
    them; None without any."""
    for path in paths:
        source = load_image(path).size
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
    """Return the size of clips that begin with `picture`: its aspect at the area of `size`, unless
    a side is `given`."""
    model = pipeline.model
    if None not in given or (model.picture == "none" and not model.takes_first_frame):
        return size
    multiple = model.patch * pipeline.learner.spec.spatial
    area, aspect = size[0] * size[1], load_image(picture).size
    return size_of_aspect(aspect, area, multiple, given, closest=model.takes_first_frame)


@dataclass
class Drawing:
    """`size`: width, height and frames. `strength`: the noise level at which refining is given
    the small samples; None is the model's own. ValueError: the size or the settings cannot be
    drawn with."""

    pipeline: Pipeline
    size: tuple[int, int, int]
    settings: SampleSettings
    image: Tensor | None = None
    strength: float | None = None
    refiner: Pipeline | None = field(default=None, init=False)
    redrawn: SampleSettings | None = field(default=None, init=False)

    def __post_init__(self):
        self.written_size = self.size
        self.pipeline.check(*self.size, self.settings)

    def refine_with(self, refiner: Pipeline, config: ExperimentConfig) -> None:
        """Draw the samples again with a second model, at the size of its config. ValueError: not
        with this `strength`, or not of samples of this size."""
        self.written_size = (config.video.width, config.video.height, self.size[2])
        self.refiner, self.redrawn = refiner, SampleSettings.of(config.train)
        refiner.check(*self.written_size, self.redrawn, refines=True)
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
        """Return what decides the samples, besides prompts and numbers."""
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

    def fill(self, folder: SampleFolder, batch_size: int) -> None:
        """Draw what `folder` lacks, and write each batch as it comes."""
        left = list(folder.missing(batch_size))
        total = sum(len(prompts) for _, prompts in left)
        with tqdm(total=total, desc="sampling", unit="sample") as bar:
            for first, prompts in left:
                pixels = self.pipeline(
                    prompts, *self.size, self.settings, first, batch_size, image=self.image
                )
                if self.refiner is None:
                    folder.add(first, pixels)
                    bar.update(len(prompts))
                    continue
                for number, (clip, prompt) in enumerate(zip(pixels, prompts, strict=True), first):
                    folder.add(number, self._refined(clip[None], prompt, number))
                    bar.update()

    def _refined(self, clip: Tensor, prompt: str, number: int) -> Tensor:
        """Return the sample `clip (1, f, 3, h, w)` drawn again: one at a time, for at 720p a clip
        of 80 frames takes 0.9 GB."""
        assert self.refiner is not None and self.redrawn is not None, "refine_with was called"
        assert self.strength is not None
        width, height, _ = self.written_size
        return self.refiner.refine(
            clip, [prompt], width, height, self.strength, self.redrawn, number
        )
