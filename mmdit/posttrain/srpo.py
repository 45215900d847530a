"""SRPO: ascend a differentiable, relative reward of words through one network call at a drawn noise
level."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.data.cache.latent_cache import LatentCache, open_cache
from mmdit.interfaces import TextTokens
from mmdit.posttrain.direct_align import discount, inject, recover, relative_score
from mmdit.posttrain.session import Session
from mmdit.rng import Draws, generator


def srpo(session: Session) -> bool:
    """An update: prompts_per_epoch samples share one noise, one noise level and one pair of words;
    each goes through the branches. The denoise branch is left alone above `hinge`. The invert
    branch scores with swapped words and falls as training succeeds, so it ends when it lies `hinge`
    below where it began; it would never end otherwise."""
    config, settings = session.config, session.config.srpo
    scorer = settings.scorer
    begun, cache = session.marks, real_latents(session) if settings.latents else None

    def update() -> dict[str, float]:
        step, size = session.state.step, session.world.size
        draw = torch.rand(
            1, dtype=torch.float64, generator=generator(session.seed, "sigma", step)
        ).item()
        noisy, clear = settings.sigma_window
        landed = clear + (noisy - clear) * draw
        positive, negative = (
            words[step % len(words)] for words in (settings.positive, settings.negative)
        )
        order = torch.randperm(
            len(cache or session.prompts), generator=generator(session.seed, "epoch prompts", step)
        )
        places = order[: config.prompts_per_epoch]
        own = places[session.world.rank :: size].split(config.micro_batch)
        numbers: dict[str, list[Tensor]] = {}
        for some in own:
            draws = Draws(
                session.seed, step, torch.zeros_like(some, device=session.device)
            )  # the same noise for all
            noise = draws.normal("rollout", *session.shape)
            if cache:
                text, captions, clean = real(session, cache, some.tolist())
            else:
                text, captions = (
                    session.text[some.to(session.device)],
                    session.prompts.at(some.tolist()).captions,
                )
                clean = session.roll_out(session.velocity(text), draws).get(-1)
            for branch in settings.branches:
                sign = 1 if branch == "denoise" else -1
                entered = landed + sign * settings.step
                x = inject(clean, noise, entered)
                found = recover(x, session.velocity(text)(x, entered), noise, entered, landed)
                ends = settings.discount_denoise if sign > 0 else settings.discount_invert
                words = (positive, negative) if sign > 0 else (negative, positive)
                texts = [[f"{word}. {caption}" for caption in captions] for word in words]
                score = relative_score(
                    scorer,
                    session.decode(found),
                    *texts,
                    discount(ends, settings.sigma_window, landed),
                )
                if branch == "invert" and "invert" not in begun:
                    begun["invert"] = score.detach().mean()
                    session.world.sum_(begun["invert"])
                    begun["invert"] /= size
                wanted = (
                    score < settings.hinge if sign > 0 else score > begun["invert"] - settings.hinge
                )
                (
                    (-score * wanted).mean()
                    * len(some)
                    / (len(places) / size)
                    / len(settings.branches)
                ).backward()
                active = wanted.float().mean()
                seen = {
                    f"score_{branch}": score.mean(),
                    f"active_{branch}": active,
                    "latent_std": found.std(),
                }
                for name, value in seen.items():
                    numbers.setdefault(name, []).append(value.detach())
        means = torch.stack([torch.stack(values).mean() for values in numbers.values()])
        session.world.sum_(means)
        report = dict(zip(numbers, (means / size).tolist()))
        begun["latent_std"] = torch.tensor(report["latent_std"])
        begun.setdefault("std", begun["latent_std"].clone())
        return report | session.apply()

    return session.run(update, 1)


def real_latents(session: Session) -> LatentCache:
    """The cache `srpo.latents`. ConfigError: it is of another tokenizer or size, or has too few
    items."""
    path, wanted = session.config.srpo.latents, session.shape
    try:
        cache = open_cache(path)
    except (OSError, ValueError) as error:
        raise ConfigError("posttrain.srpo.latents", f"is {path!r}: {error}") from None
    fits = (cache.shapes[:, 0] >= wanted[0]) & (
        cache.shapes[:, 1:] == torch.tensor(wanted[1:])
    ).all(1)
    if (
        cache.manifest.spec != session.learner.spec
        or not fits.all()
        or len(cache) < session.config.prompts_per_epoch
    ):
        raise ConfigError(
            "posttrain.srpo.latents",
            f"is {path!r}: {len(cache)} items, the first {cache.shapes[0].tolist()}; must hold"
            f" {session.config.prompts_per_epoch} or more, all {list(wanted)}, of this tokenizer",
        )
    return cache


@torch.no_grad()
def real(
    session: Session, cache: LatentCache, places: list[int]
) -> tuple[TextTokens, list[str], Tensor]:
    """Text, captions and normalised latents of items of the cache; of longer clips the
    beginning."""
    captions = [cache.captions[i] for i in places]
    latents = torch.stack([cache.load(i, 0, session.shape[0]) for i in places]).to(session.device)
    return (
        session.learner.text_encoder(captions).to(session.device),
        captions,
        session.learner.spec.normalize(latents),
    )
