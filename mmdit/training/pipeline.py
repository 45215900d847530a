"""From captions to pixels: text encoder → sampler → tokenizer. Previews, `sample`, `evaluate` and
the quickstart all use it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.config import ConfigError
from mmdit.data.dataset.captions import CaptionsConfig, with_trigger
from mmdit.diffusion import (
    Callback,
    Denoise,
    SamplerConfig,
    Time,
    guided_by_expert,
    sample,
    sampling_times,
)
from mmdit.diffusion.tiling import Shape, Tiling, tiled
from mmdit.interfaces import Denoiser, TextTokens, Tokenizer
from mmdit.interop.wan_pictures import Pictures
from mmdit.rng import Draws
from mmdit.tokenizers.with_low_resolution import enlarged_latents
from mmdit.training.graphs.sampling_graphs import Calls
from mmdit.training.learner import Learner
from mmdit.training.low_resolution import noised
from mmdit.training.memory.shards import local
from mmdit.weights import is_finite

TILE_TOKENS = 1 << 17  # in the tiles that are denoised together


@dataclass(frozen=True)
class SampleSettings:
    """How to sample. `seed` and the number of a sample decide its noise, whatever the batch size.
    `cfg_scale_low`: guidance of the low-noise expert of a pair, None: as `cfg_scale`.
    `negative_prompt`: what guidance leads away from, in place of the empty prompt.
    """

    sampler: SamplerConfig = SamplerConfig()
    cfg_scale: float = 3.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    cfg_scale_low: float | None = None
    negative_prompt: str = ""

    def __post_init__(self):
        for name in ("cfg_scale", "cfg_scale_low"):
            scale = getattr(self, name)
            if scale is not None and not math.isfinite(scale):
                raise ConfigError(
                    name, f"is {scale}; must be a finite number; 1 is no guidance, 3 … 7 are usual"
                )
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                "cfg_interval",
                f"is {list(self.cfg_interval)}; must be two times from 0 (clean) to 1 (noise), the "
                "smaller first; [0, 1] is always",
            )

    @property
    def guides(self) -> bool:
        """Return whether guidance changes anything: at scale 1 there is none."""
        return {self.cfg_scale, self.cfg_scale_low} - {None} != {1.0}

    @staticmethod
    def of(train) -> SampleSettings:
        """Return the settings that the keys `train.sample_*` give."""
        return SampleSettings(
            train.sampler(),
            train.sample_cfg_scale,
            train.sample_cfg_interval,
            train.sample_seed,
            train.sample_cfg_scale_low,
            train.sample_negative_prompt,
        )


def numbered(first: int | Sequence[int], count: int) -> Sequence[int]:
    """Return the numbers of `count` samples: counted from `first`, or as `first` lists them."""
    return range(first, first + count) if isinstance(first, int) else first


def noise_of(
    numbers: Sequence[int],
    seeds: Sequence[int | None] | None,
    common: int,
    device: torch.device | str,
) -> Draws:
    """Return the draws of the samples `numbers` under the seed `common`. A sample with a seed of
    its own draws as number 0 under that seed, so that the seed gives the same noise wherever it is
    used."""
    places = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    if not seeds or all(seed is None for seed in seeds):
        return Draws(common, 0, places)
    shared = torch.tensor([seed is None for seed in seeds], device=device)
    each = tuple(common if seed is None else seed for seed in seeds)
    return Draws(each, 0, places * shared)


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put the modules into evaluation mode within the `with` block; afterwards each of their parts
    is in its former mode."""
    parts = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in parts.items():
            part.training = mode


@dataclass
class Pipeline:
    """A learner in evaluation and a tokenizer. `execution_device`: where samples are computed, if
    not where the learner is (`sampling_offload`). `captions`: prompts get its trigger word, as
    captions do in training. `whole`: the network that draws, if the learner has only a part of it,
    one of two experts. `tile`: latent frames, rows and columns of a tile; larger samples are drawn
    in overlapping tiles. `checkpoint`: the folder or file that the weights came from, and `step`:
    its step; None for a release.
    """

    learner: Learner
    tokenizer: Tokenizer
    precision: str = "fp32"
    captions: CaptionsConfig = CaptionsConfig()
    whole: Denoiser | None = None
    execution_device: torch.device | None = None
    tile: Shape | None = None
    checkpoint: Path | None = None
    step: int | None = None

    @property
    def model(self) -> Denoiser:
        """Return the network that draws: `whole`, if there is one, or the learner's."""
        return self.learner.model if self.whole is None else self.whole

    @property
    def device(self) -> torch.device:
        """Return the device on which samples are computed."""
        return self.execution_device or next(self.learner.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """Return the context in which networks compute in the precision of the run."""
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.precision != "fp32")

    @cached_property
    def pictures(self) -> Pictures:
        first, *_ = self.model.networks().values()  # both experts of a pair get the same
        return Pictures(first, self.tokenizer, self.device)

    def networks(self) -> dict[str, nn.Module]:
        """Return every network that takes part in drawing, by the name that messages use."""
        titles = {"": "model", "high": "model", "low": "model (low noise)"}
        result: dict[str, nn.Module] = {
            titles[name]: network for name, network in self.model.networks().items()
        }
        result["text_encoder"] = self.learner.text_encoder
        for name, value in vars(self.tokenizer).items():
            if isinstance(value, nn.Module):
                result[f"tokenizer.{name.lstrip('_')}"] = value
        return result

    def check(
        self,
        width: int,
        height: int,
        frames: int,
        settings: SampleSettings,
        refines: bool = False,
    ) -> None:
        """Raise ValueError for a size or a sampler with which nothing can be drawn, before drawing.
        `refines`: small clips are redrawn."""
        spec, objective, sampler = self.learner.spec, self.learner.objective, settings.sampler
        if self.model.conditioning != "none" and not refines:
            raise ValueError(
                "this model redraws small clips (model.conditioning: low_resolution) and draws none"
                " itself: name it with --refine, beside a --checkpoint that does"
            )
        if settings.cfg_scale_low is not None and len(self.model.networks()) == 1:
            raise ValueError(
                f"guidance of the low-noise expert is {settings.cfg_scale_low} (--guidance_low, or"
                " train.sample_cfg_scale_low), but this model is no pair of experts: leave it out"
            )
        spec.grid(width, height, self.model.patch)
        shift = sampler.shift * objective.clip_shift(spec.frames(frames))
        sampling_times(objective, sampler.steps, shift, grid=sampler.grid)

    def finite(self, values: Tensor, numbers: Sequence[int], settings: SampleSettings) -> Tensor:
        """Return `values (B, …)` of the samples `numbers`. ValueError names samples that are not
        finite: their pictures would be black."""
        if is_finite(values):
            return values
        wrong = [number for number, sample in zip(numbers, values) if not is_finite(sample)]
        named = ", ".join(map(str, wrong[:8])) + (" …" if len(wrong) > 8 else "")
        culprit = self._not_finite()
        if culprit:
            raise ValueError(
                f"sample {named}: not finite, for the weights hold nan or infinity (first: "
                f"{culprit}); take an earlier "
                "checkpoint, or look at the adapter that was laid over the model"
            )
        raise ValueError(
            f"sample {named}: not finite, though all weights are: numbers overflowed at guidance "
            f"{settings.cfg_scale} "
            f"in {settings.sampler.steps} steps of {settings.sampler.solver}; lower the guidance, "
            "or take more steps"
        )

    def _not_finite(self) -> str | None:
        """Return the name of the first weight that is not finite, or None; of sharded weights, this
        process's parts are searched."""
        for part, network in self.networks().items():
            for name, value in network.state_dict().items():
                if value.is_floating_point() and not is_finite(local(value)):
                    return f"{part}.{name}"
        return None

    @torch.no_grad()
    def latents(
        self,
        captions: list[str],
        width: int,
        height: int,
        frames: int,
        settings: SampleSettings,
        first: int | Sequence[int] = 0,
        guess: tuple[Tensor, float] | None = None,
        image: Tensor | None = None,
        small: tuple[Tensor, float] | None = None,
        seeds: Sequence[int | None] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return raw latents `(B, F, h, w, C)`. Sample `i` of the call draws the noise of picture
        `first + i`, or of the number that `first` lists for it. `guess`: raw latents to start from,
        and the time to which they are noised. `image (3, H, W)`: the first frame of every clip;
        `(2, 3, H, W)`: also the last. `small`: for a model with a condition, the raw latents of the
        small clips, enlarged, and the level to which they are noised. `seeds`: a seed, or None, for
        each sample; a sample with a seed of its own draws the noise of that seed's first picture.
        `callback`: see `diffusion.sample`."""
        learner, device = self.learner, self.device
        rows, columns = learner.spec.grid(width, height, self.model.patch)
        numbers = numbered(first, len(captions))
        draws = noise_of(numbers, seeds, settings.seed, device)
        # The guess may have been drawn from the noise of the same number, which is not added again.
        purpose = "sample" if guess is None else "redraw"
        noise = draws.normal(
            purpose, learner.spec.frames(frames), rows, columns, learner.spec.channels
        )
        pictures = None if image is None else image.reshape(-1, *image.shape[-3:]).to(device)
        self.pictures.check(0 if pictures is None else len(pictures), frames)
        with evaluating(learner, self.model), Calls() as calls, self.autocast(), learner.eager():
            text = learner.text_encoder(
                [with_trigger(caption, self.captions) for caption in captions]
            )
            if settings.negative_prompt:
                negative = learner.text_encoder([settings.negative_prompt])
                text = replace(text, empty=negative.embeddings[0, negative.valid[0]])
            inputs: dict[str, Any] = {}
            if small is not None:
                level = torch.full((len(captions),), small[1], device=device)
                inputs = noised(learner.spec.normalize(small[0].to(device)), level, draws)
            denoise = self._denoiser(text, settings, pictures, frames, calls, inputs)
            if self.tile is not None:
                tiling = Tiling.fit((noise.shape[1], rows, columns), self.tile)
                if len(tiling.corners) > 1:
                    denoise = self._in_tiles(tiling, text, settings, calls, inputs)
            start = (learner.spec.normalize(guess[0].to(device)), guess[1]) if guess else None
            clean = sample(
                denoise, noise, learner.objective, settings.sampler, draws, callback, start
            )
        self.finite(clean, numbers, settings)
        return learner.spec.denormalize(clean)

    def _denoiser(
        self,
        text: TextTokens,
        settings: SampleSettings,
        pictures: Tensor | None,
        frames: int,
        calls: Calls,
        further: dict[str, Any],
    ) -> Denoise:
        """Return the denoiser: the network with `further` inputs and guidance (two experts, each at
        its times), which keeps a given first frame unchanged."""
        inputs, first = self.pictures.given(pictures, frames)
        inputs |= further
        sampling = self.model.sampling_inputs(settings.sampler.grid)
        networks: dict[str, Any] = {**self.model.networks()}
        if self.execution_device is None:  # otherwise weights come and go between calls
            networks = {name: partial(calls, network) for name, network in networks.items()}
        if self.learner.sharded and len(networks) > 1:  # only its call gathers
            networks = {name: partial(self.model, expert=name) for name in networks}
        low = settings.cfg_scale if settings.cfg_scale_low is None else settings.cfg_scale_low
        ask = guided_by_expert(
            self.learner.objective,
            {name: partial(network, **inputs, **sampling) for name, network in networks.items()},
            partial(self.model.expert_at, **sampling),
            text,
            {"": settings.cfg_scale, "high": settings.cfg_scale, "low": low},
            settings.cfg_interval,
        )
        if first is None:
            return ask

        def denoise(x: Tensor, t: Time) -> Tensor:
            given = first.to(x.dtype).expand(len(x), *first.shape[1:])
            return torch.cat([given, ask(torch.cat([given, x[:, 1:]], 1), t)[:, 1:]], 1)

        return denoise

    def _in_tiles(
        self,
        tiling: Tiling,
        text: TextTokens,
        settings: SampleSettings,
        calls: Calls,
        inputs: dict[str, Any],
    ) -> Denoise:
        """Return a denoiser that calls the network tile by tile, with the place of each tile, on as
        many tiles at a time as have TILE_TOKENS tokens."""
        count, samples = len(tiling.corners), len(text)
        rows = torch.arange(samples, device=self.device).repeat_interleave(count)
        of_tiles = {"place": tiling.places(self.device).repeat(samples, 1)}
        if inputs:
            of_tiles["small"] = tiling.cut(inputs["small"])
            of_tiles["small_t"] = inputs["small_t"][rows]
        together = max(1, TILE_TOKENS // math.prod(tiling.tile))
        groups = []
        for numbers in torch.arange(len(rows), device=self.device).split(together):
            some = {name: value[numbers] for name, value in of_tiles.items()}
            captions = text[rows[numbers]]
            ask = self._denoiser(captions, settings, None, tiling.tile[0], calls, some)
            groups.append((numbers, ask))
        return tiled(tiling, groups)

    def pixels(self, latents: Tensor, numbers: Sequence[int], settings: SampleSettings) -> Tensor:
        """Return the pixels of raw latents on the CPU. ValueError if they are not finite."""
        return self.finite(self.tokenizer.decode(latents).float().cpu(), numbers, settings)

    @torch.no_grad()
    def __call__(
        self,
        captions: list[str],
        width: int,
        height: int,
        frames: int = 1,
        settings: SampleSettings = SampleSettings(),
        first: int | Sequence[int] = 0,
        batch_size: int = 64,
        done: Callable[[int], object] | None = None,
        image: Tensor | None = None,
        seeds: Sequence[int | None] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return pixels in [0, 1] `(B, F, 3, H, W)` on the CPU, drawn `batch_size` captions at a
        time. `done(number of captions)` is called after each batch. `first`, `seeds` and
        `callback`: see `latents`."""
        parts, numbers = [], numbered(first, len(captions))
        for start in range(0, len(captions), batch_size):
            batch = slice(start, start + batch_size)
            some = captions[batch]
            latents = self.latents(
                some,
                width,
                height,
                frames,
                settings,
                numbers[batch],
                image=image,
                seeds=seeds and seeds[batch],
                callback=callback,
            )
            parts.append(self.pixels(latents, numbers[batch], settings))
            if done:
                done(len(some))
        return torch.cat(parts)

    @torch.no_grad()
    def refine(
        self,
        pixels: Tensor,
        captions: list[str],
        width: int,
        height: int,
        strength: float,
        settings: SampleSettings = SampleSettings(),
        first: int = 0,
        seeds: Sequence[int | None] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return super-resolved clips `(B, F, 3, height, width)`, computed one at a time. The
        latents of `pixels (B, F, 3, H, W)`, enlarged to `width × height`, are noised to `strength`.
        A model with a condition gets them as its condition and draws from noise; any other denoises
        them (SDEdit). The content of the small clip stays; detail below that noise level is drawn
        anew. `callback`: see `latents`.
        """
        parts = []
        given = "small" if self.model.conditioning == "low_resolution" else "guess"
        for i, (clip, caption) in enumerate(zip(pixels, captions)):
            enlarged = enlarged_latents(self.tokenizer, clip[None].to(self.device), width, height)
            how: dict[str, Any] = {given: (enlarged, strength), "callback": callback}
            if seeds:
                how["seeds"] = [seeds[i]]
            latents = self.latents([caption], width, height, len(clip), settings, first + i, **how)
            parts.append(self.pixels(latents, [first + i], settings))
        return torch.cat(parts)
