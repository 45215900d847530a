"""Evaluation: what the policy draws for prompts that are always the same, and what rewards say of
it. Samples have fixed noise, the sampler of `train.sample_*`, and the weights as they are."""

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

BATCH = 256  # samples that are drawn at a time, and no more than posttrain.micro_batch


class Evaluator:
    """Scores the policy on evaluation prompts and remembers the best score. ConfigError: `train:`
    has sampling keys with which nothing can be drawn."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.pool = RewardPool(setup.config.evaluation_rewards, workers=0)
        self.settings = SampleSettings.of(setup.train)
        if setup.evaluated:
            self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Check the sampling keys. Let an encoder that keeps embeddings in files see every text
        that evaluation will ask for, so that it need not be loaded again."""
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
        """Return the policy as it is, of two experts with the frozen one, to sample with."""
        setup = self.setup
        parts = setup.learner, setup.tokenizer, setup.train.precision, setup.captions
        return Pipeline(*parts, whole=setup.model)

    @torch.no_grad()
    def draw(self, captions: list[str], first: int) -> tuple[Tensor, Tensor]:
        """Return the normalised latents of the samples `first` …, and the pixels decoded from
        them."""
        setup, pipeline = self.setup, self.pipeline()
        size = (setup.width, setup.height, setup.frames)
        raw = pipeline.latents(captions, *size, self.settings, first)
        pixels = setup.tokenizer.decode(raw).float()
        numbers = range(first, first + len(captions))
        return setup.learner.spec.normalize(raw), pipeline.finite(pixels, numbers, self.settings)

    def score(self, prompts: Prompts, first: int) -> dict[str, Tensor]:
        """Return what each reward says of the samples `first` …, one of each prompt, `(N,)`."""
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
        """Return a check sum of all that decides a score, but the weights."""
        setup = self.setup
        prompts = {name: some.captions for name, some in setup.evaluated.items()}
        size = (setup.width, setup.height, setup.frames)
        words = (prompts, size, setup.captions.trigger, asdict(self.settings))
        return sum_of([], *words, encode(self.pool.rewards))

    def continue_from(self, history: dict[str, Tensor]) -> list[str]:
        """Forget the best score of an earlier part of the run where that measured otherwise: the
        two cannot be compared. Return what to tell a person."""
        before = history.get("measure")
        if before is None or int(before) == self.measure() or "best" not in history:
            return []
        del history["best"]
        return ["evaluation measures another thing than before: the best score begins anew"]

    def is_best(self, values: dict[str, float]) -> bool:
        """Remember the weighted rewards on held-out prompts (on seen ones, without these) if they
        are the highest so far, and return whether they are above those of the start: rewards rise
        on training prompts long after pictures get worse."""
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
