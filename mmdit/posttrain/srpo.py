"""SRPO: raise a differentiable, relative score of words by its gradient through one network call at
a drawn noise level."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from mmdit.config import ConfigError
from mmdit.data.cache.latent_cache import LatentCache, open_cache
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.interfaces import TextTokens
from mmdit.posttrain.direct_align import add_noise, discount, recover, relative_score
from mmdit.posttrain.session import Session
from mmdit.rng import Draws, generator


def srpo_updates(session: Session) -> Callable[[], dict[str, float]]:
    """Return a function that makes one update: prompts_per_epoch samples share one noise, one noise
    level and one pair of words, and each goes through all branches.

    The denoise branch does not train samples that score above `hinge`. The invert branch scores
    with swapped words, so its score falls as training succeeds, without a natural end; it stops for
    samples that score more than `hinge` below the mean of the first update.
    """
    config, settings, world = session.config, session.config.srpo, session.world
    cache = real_latents(session) if settings.latents else None

    def update() -> dict[str, float]:
        step, history = session.state.step, session.history
        draw = torch.rand(1, dtype=torch.float64, generator=generator(session.seed, "sigma", step))
        noisy, clear = settings.sigma_window
        landed = clear + (noisy - clear) * draw.item()
        words = [some[step % len(some)] for some in (settings.positive, settings.negative)]
        order = torch.randperm(
            len(cache or session.prompts), generator=generator(session.seed, "epoch prompts", step)
        )
        places = order[: config.prompts_per_epoch]
        per_rank = len(places) / world.size
        numbers: dict[str, list[Tensor]] = defaultdict(list)
        for rows in places[world.rank :: world.size].split(config.micro_batch):
            # all samples get the same noise
            draws = Draws(session.seed, step, torch.zeros_like(rows, device=session.device))
            text, captions, clean = beginnings(session, cache, rows, draws)
            noise = draws.normal("rollout", *session.shape)
            for branch in settings.branches:
                denoises = branch == "denoise"
                entered = landed + settings.step if denoises else landed - settings.step
                x = add_noise(clean, noise, entered)
                velocity = session.policy.velocity(text)(x, entered)
                recovered = recover(x, velocity, noise, entered, landed)
                first, second = words if denoises else reversed(words)
                texts = [f"{first}. {c}" for c in captions], [f"{second}. {c}" for c in captions]
                ends = settings.discount_denoise if denoises else settings.discount_invert
                score = relative_score(
                    settings.scorer,
                    session.rollouts.decode(recovered),
                    *texts,
                    discount(ends, settings.sigma_window, landed),
                )
                ascends = score < settings.hinge
                if not denoises:
                    begun = history.get("invert", torch.tensor(-torch.inf))
                    ascends = score > begun.to(score) - settings.hinge
                loss = (-score * ascends).mean() * len(rows) / per_rank / len(settings.branches)
                loss.backward()
                numbers[f"score_{branch}"].append(score.detach().float())
                numbers[f"active_{branch}"].append(ascends.float())
                numbers["latent_std"].append(recovered.detach().flatten(1).std(1))
        means = torch.stack([torch.cat(values).mean() for values in numbers.values()])
        world.sum_(means)
        report = dict(zip(numbers, (means / world.size).tolist()))
        history["latent_std"] = torch.tensor(report["latent_std"])
        history.setdefault("std", history["latent_std"].clone())
        if "score_invert" in report:
            history.setdefault("invert", torch.tensor(report["score_invert"]))
        return report | session.update()

    return update


def beginnings(
    session: Session, cache: LatentCache | None, rows: Tensor, draws: Draws
) -> tuple[TextTokens, list[str], Tensor]:
    """Return text, captions and clean normalised latents of the given rows: from the cache (the
    beginning of longer clips), or drawn by the policy for prompts."""
    if cache:
        captions = [cache.captions[i] for i in rows.tolist()]
        text = session.encode(captions)
        raw = torch.stack([cache.load(i, 0, session.shape[0]) for i in rows.tolist()])
        return text, captions, session.learner.spec.normalize(raw.to(session.device))
    text = session.text[rows.to(session.device)]
    clean = session.rollouts.sample(session.policy.velocity(text), draws).clean
    return text, session.prompts.at(rows.tolist()).captions, clean


def real_latents(session: Session) -> LatentCache:
    """Return the opened cache `srpo.latents`. ConfigError if it is of another tokenizer or size, or
    has too few items."""
    path, wanted = session.config.srpo.latents, session.shape
    least = session.config.prompts_per_epoch
    assert path is not None, "asked for where it is named"
    try:
        cache = open_cache(path)
    except (OSError, ValueError) as error:
        raise ConfigError("posttrain.srpo.latents", f"is {path!r}: {error}") from None
    frames, cells = cache.shapes[:, 0], cache.shapes[:, 1:]
    fits = (frames >= wanted[0]) & (cells == torch.tensor(wanted[1:])).all(1)
    same_tokenizer = cache.manifest.tokenizer == session.tokenizer.fingerprint
    if not (same_tokenizer and fits.all() and len(cache) >= least):
        raise ConfigError(
            "posttrain.srpo.latents",
            f"is {path!r}: {len(cache)} items, the first {cache.shapes[0].tolist()}; must hold"
            f" {least} or more, all {list(wanted)}, of this tokenizer",
        )
    together = cache.manifest.joined or wanted[0]
    if together < wanted[0]:
        raise ConfigError(
            "posttrain.srpo.latents",
            f"is {path!r}, whose clips were encoded {together} latent frames at a time, and"
            f" {wanted[0]} of them are no clip: cache with the video.num_frames of this run",
        )
    return cache


def check_pace(cache: LatentCache, video: VideoConfig) -> None:
    """Raise ConfigError for a cache of real clips that move at another speed than `video` says:
    their first frames are taken as they lie in the cache."""
    if video.num_frames == 1:
        return
    plan = cache.manifest.clip_plan
    names = ("frame_stride", "shrink_video_to_frames") if plan else ()
    pairs = [(name, plan[name], getattr(video, name)) for name in names]
    pairs += [("fps", rate, video.fps) for rate in sorted(cache.rates)]
    for name, there, here in pairs:
        if there != here:
            raise ConfigError(
                "posttrain.srpo.latents",
                f"is {str(cache.folder)!r}, whose clips have {name} {there}, and video.{name} is"
                f" {here}: they move at another pace than the model's; cache with the settings of"
                " this run",
            )
