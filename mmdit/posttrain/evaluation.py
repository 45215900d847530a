"""Evaluation: rewards of samples that the policy draws for a fixed list of prompts. The noise is
fixed, the sampler is that of `train.sample_*`, and the weights are the present ones, not their
average."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from mmdit.config import ConfigError, encode
from mmdit.diffusion import guided
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.rewards import RewardPool, Samples
from mmdit.posttrain.setup import Setup
from mmdit.rng import Draws
from mmdit.training.origin import sum_of
from mmdit.training.pipeline import Pipeline, SampleSettings

BATCH = 256  # the most samples drawn at a time, besides posttrain.micro_batch


class Evaluator:
    """Scores the policy on evaluation prompts and remembers the best score. ConfigError: the
    sampling keys in `train:` cannot be used to draw anything."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.pool = RewardPool(setup.config.evaluation_rewards, workers=0)
        self.settings = SampleSettings.of(setup.train)
        if setup.evaluated:
            self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Check the sampling keys. If the text encoder keeps embeddings in files, encode every text
        that evaluation needs now, so that the encoder need not be loaded again."""
        setup, learner = self.setup, self.setup.learner
        if learner.text_encoder.keeps_files:
            captions = [c for prompts in setup.evaluated.values() for c in prompts.captions]
            setup.encode(captions)
            learner.text_encoder([setup.train.sample_negative_prompt])
        try:
            self.pipeline().check(setup.width, setup.height, setup.frames, self.settings)
            interval = self.settings.cfg_interval
            guided(learner.objective, learner.model, setup.text, 1.0, interval)
        except ValueError as error:
            raise ConfigError(
                "train", f"has sample_ keys that evaluation cannot draw with: {error}"
            ) from None

    def pipeline(self) -> Pipeline:
        """Return a pipeline that samples from the present policy; with two experts, together with
        the frozen one."""
        setup = self.setup
        parts = setup.learner, setup.tokenizer, setup.train.precision, setup.captions
        return Pipeline(*parts, whole=setup.model)

    @torch.no_grad()
    def draw(self, captions: list[str], first: int) -> tuple[Tensor, Tensor]:
        """Return the normalised latents of the samples from number `first` on, one for each
        caption, and the pixels decoded from them."""
        setup, pipeline = self.setup, self.pipeline()
        size = (setup.width, setup.height, setup.frames)
        raw = pipeline.latents(captions, *size, self.settings, first)
        pixels = setup.tokenizer.decode(raw).float()
        numbers = range(first, first + len(captions))
        return setup.learner.spec.normalize(raw), pipeline.finite(pixels, numbers, self.settings)

    def score(self, prompts: Prompts, first: int) -> dict[str, Tensor]:
        """Return the values `(N,)` of each reward for one sample of each prompt, numbered from
        `first` on."""
        latents, pixels = self.draw(prompts.captions, first)
        samples = Samples(
            captions=prompts.captions,
            latents=latents,
            groups=torch.arange(len(prompts)),
            draws=Draws(self.setup.seed, -2, torch.arange(first, first + len(prompts))),
            pixels=pixels,
            facts=prompts.facts,
        )
        return self.pool.score(samples)

    def evaluate(self) -> dict[str, float]:
        """Return the mean of each evaluation reward, as `seen_…` and `held_out_…`."""
        values, first, most = {}, 0, min(BATCH, self.setup.config.micro_batch)
        for title, prompts in self.setup.evaluated.items():
            places = range(len(prompts))
            parts = []
            for start in places[::most]:
                some = prompts.at(list(places[start : start + most]))
                parts.append(self.score(some, first + start))
            for name in self.pool.weights:
                values[f"{title}_{name}"] = torch.cat([part[name] for part in parts]).mean().item()
            first += len(prompts)
        return values

    def measure(self) -> int:
        """Return a check sum of all that determines a score, except the weights."""
        setup = self.setup
        prompts = {name: some.captions for name, some in setup.evaluated.items()}
        size = (setup.width, setup.height, setup.frames)
        words = (prompts, size, setup.captions.trigger, asdict(self.settings))
        return sum_of([], *words, encode(self.pool.rewards))

    def continue_from(self, history: dict[str, Tensor]) -> list[str]:
        """Forget the best score of an earlier part of the run if it was measured in another way:
        the two cannot be compared. Return lines to print about that."""
        before = history.get("measure")
        if before is None or int(before) == self.measure() or "best" not in history:
            return []
        del history["best"]
        return ["evaluation measures another thing than before: the best score begins anew"]

    def is_best(self, values: dict[str, float]) -> bool:
        """Return whether this evaluation has the best score so far, and a better one than the
        start. The score is the weighted sum of the rewards on held-out prompts (on seen ones, if
        there are no others): on training prompts, rewards rise long after pictures have begun to
        get worse. A best score is remembered in `history`."""
        setup = self.setup
        if not setup.evaluated:
            return False
        title = "held_out" if "held_out" in setup.evaluated else "seen"
        score = sum(
            weight * values[f"{title}_{name}"] for name, weight in self.pool.weights.items()
        )
        starts = "best" not in setup.history
        if not setup.world.any(starts or score > setup.history["best"][0].item()):
            return False
        setup.history["measure"] = torch.tensor(self.measure())
        setup.history["best"] = torch.tensor([score, setup.state.step], dtype=torch.float64)
        return not starts
