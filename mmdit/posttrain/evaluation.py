"""What a policy draws for prompts that are always the same, and what rewards say of it: of fixed
noise, with the sampler of `train.sample_*`, by the weights as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.diffusion import guided
from mmdit.posttrain.rewards import Samples
from mmdit.rng import Draws
from mmdit.text_encoders import keeps_files
from mmdit.training.learner import Learner
from mmdit.training.pipeline import Pipeline, SampleSettings

if TYPE_CHECKING:
    from mmdit.posttrain.session import Session

BATCH = 256  # samples that are drawn at a time


def check(session: Session) -> None:
    """Raise now what the first evaluation would raise: noise levels and guidance that cannot be."""
    settings, objective = SampleSettings.of(session.train), session.learner.objective
    try:
        pipeline(session).check(session.width, session.height, session.frames, settings)
        guided(objective, session.learner.model, session.text, 1.0, settings.cfg_interval)
    except ValueError as error:
        raise ConfigError(
            "train", f"has sample_ keys that evaluation cannot draw with: {error}"
        ) from None


def encode(session: Session) -> None:
    """Let an encoder that keeps embeddings in files see all that evaluation will ask: it need not
    be loaded again."""
    captions = [caption for prompts in session.evaluated.values() for caption in prompts.captions]
    if captions and keeps_files(session.learner.text_encoder):
        session.learner.text_encoder([*captions, session.train.sample_negative_prompt])


def pipeline(session: Session) -> Pipeline:
    """The policy as it is, to sample with; of a pair with its sibling."""
    learner, pair = session.learner, session.pair
    result = Pipeline(learner, session.tokenizer, session.train.precision)
    if pair:  # a pipeline has the noisier expert in its learner
        result.boundary = pair.boundary
        if pair.trains_high:
            result.low = pair.sibling
        else:
            result.low = learner.model
            result.learner = Learner(
                pair.sibling, learner.text_encoder, learner.objective, learner.spec
            )
    return result


@torch.no_grad()
def draw(session: Session, captions: list[str], first: int) -> tuple[Tensor, Tensor]:
    """Normalised latents of samples `first` …, and the pixels decoded from them."""
    settings, source, latents, pixels = SampleSettings.of(session.train), pipeline(session), [], []
    for start in range(0, len(captions), BATCH):
        some = captions[start : start + BATCH]
        raw = source.latents(
            some, session.width, session.height, session.frames, settings, first + start
        )
        latents.append(session.learner.spec.normalize(raw))
        decoded = session.tokenizer.decode(raw).float()
        pixels.append(source.finite(decoded, first + start, settings))
    return torch.cat(latents), torch.cat(pixels)


@torch.no_grad()
def evaluate(session: Session) -> dict[str, float]:
    """Means of the evaluation rewards by the name of the prompts and of the reward."""
    values, first = {}, 0
    for title, prompts in session.evaluated.items():
        latents, pixels = draw(session, prompts.captions, first)
        draws = Draws(session.seed, -2, torch.arange(first, first + len(prompts)))
        samples = Samples(
            captions=prompts.captions,
            latents=latents,
            groups=torch.arange(len(prompts)),
            draws=draws,
            pixels=pixels,
            facts=prompts.facts,
        )
        values |= {
            f"{title}_{name}": value.mean().item()
            for name, value in session.judge.score(samples).items()
        }
        first += len(prompts)
    return values
