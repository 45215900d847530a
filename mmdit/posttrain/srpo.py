"""SRPO: ascend a differentiable, relative reward of words through one network call at a drawn noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.posttrain.direct_align import discount, inject, recover, relative_score
from mmdit.posttrain.session import Session
from mmdit.rng import Draws, generator


def srpo(session: Session) -> bool:
    """An update: prompts_per_epoch samples share one noise, one noise level and one pair of words; each goes through the
    branches. The denoise branch is left alone above `hinge`. The invert branch scores with swapped words and falls as training
    succeeds, so it ends when it lies `hinge` below where it began; it would never end otherwise."""
    config, settings = session.config, session.config.srpo
    scorer = settings.scorer
    begun = session.marks

    def update() -> dict[str, float | str]:
        step, size = session.state.step, session.world.size
        draw = torch.rand(1, dtype=torch.float64, generator=generator(session.seed, "sigma", step)).item()
        noisy, clear = settings.sigma_window
        landed = clear + (noisy - clear) * draw
        positive, negative = (words[step % len(words)] for words in (settings.positive, settings.negative))
        order = torch.randperm(len(session.prompts), generator=generator(session.seed, "epoch prompts", step))
        places = order[: config.prompts_per_epoch]
        own = places[session.world.rank :: size].split(config.micro_batch)
        numbers: dict[str, list[Tensor]] = {}
        for some in own:
            text = session.text[some.to(session.device)]
            draws = Draws(session.seed, step, torch.zeros_like(some, device=session.device))  # the same noise for all
            clean, noise = session.roll_out(session.velocity(text), draws).get(-1), draws.normal("rollout", *session.shape)
            captions = session.prompts.at(some.tolist()).captions
            for branch in settings.branches:
                sign = 1 if branch == "denoise" else -1
                entered = landed + sign * settings.step
                x = inject(clean, noise, entered)
                found = recover(x, session.velocity(text)(x, entered), noise, entered, landed)
                ends = settings.discount_denoise if sign > 0 else settings.discount_invert
                words = (positive, negative) if sign > 0 else (negative, positive)
                texts = [[f"{word}. {caption}" for caption in captions] for word in words]
                score = relative_score(scorer, session.decode(found), *texts, discount(ends, settings.sigma_window, landed))
                if branch == "invert" and "invert" not in begun:
                    begun["invert"] = score.detach().mean()
                wanted = score < settings.hinge if sign > 0 else score > begun["invert"] - settings.hinge
                ((-score * wanted).mean() * len(some) / (len(places) / size) / len(settings.branches)).backward()
                active = wanted.float().mean()
                seen = {f"score_{branch}": score.mean(), f"active_{branch}": active, "latent_std": found.std()}
                for name, value in seen.items():
                    numbers.setdefault(name, []).append(value.detach())
        report = {name: torch.stack(values).mean().item() for name, values in numbers.items()}
        begun.setdefault("std", torch.tensor(report["latent_std"]))
        report |= session.apply()
        if report["latent_std"] > settings.max_std_growth * begun["std"].item():
            report["stop"] = f"the latents' deviation grew to {report['latent_std']:.3g} from {begun['std'].item():.3g}"
        return report

    return session.run(update, 1)
