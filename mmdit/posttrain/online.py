"""The loop of GRPO, GRPO-Guard, NFT, AWM and online DPO: roll out, reward, compare within groups,
update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmdit.interfaces import TextTokens
from mmdit.posttrain import dynamics, losses
from mmdit.posttrain.advantages import advantages
from mmdit.posttrain.session import Session
from mmdit.posttrain.trajectory import Rollout
from mmdit.rng import Draws
from mmdit.training.errors import RunError

Term = tuple[Tensor, dict[str, float | Tensor]]  # a loss of one micro-batch, and numbers to report


def online(session: Session) -> bool:
    config, updates = session.config, session.config.updates_per_epoch

    def epoch() -> dict[str, float]:
        number = session.state.step // updates
        rollouts, futures = session.collect(number)
        rewards = session.gather(futures, rollouts)
        prompts = session.epoch_prompts(number)
        advantage, report = advantages(
            rewards,
            session.pool.weights,
            prompts,
            config.advantage.mode,
            config.advantage.std,
            config.advantage.clip,
        )
        total = sum(session.pool.weights[name] * value for name, value in rewards.items())
        report |= {f"reward_{name}": value.mean().item() for name, value in rewards.items()}
        report |= {
            f"reward_{name}_std": value.std(correction=0).item() for name, value in rewards.items()
        }
        report["reward_seconds"], session.pool.seconds = session.pool.seconds, 0.0
        sums: dict[str, list[Tensor]] = {}
        share = len(rollouts) // updates
        for update in range(updates):
            for rollout in rollouts[update * share : (update + 1) * share]:
                local = rollout.to(session.device)  # this micro-batch alone is on the device
                worth = (
                    (total if config.algorithm == "dpo" else advantage)[rollout.indices]
                    .float()
                    .to(session.device)
                )
                for loss, numbers in terms(session, local, worth):
                    (loss / share).backward()
                    for name, value in {"loss": loss, **numbers}.items():
                        sums.setdefault(name, []).append(torch.as_tensor(value).detach().float())
                if update == 0:
                    report["replay"] = check_replay(session, sums)
            report |= session.apply()
        decay = config.nft
        keep = (
            min(decay.most, decay.rate * max(0, session.state.step - decay.flat))
            if config.algorithm == "nft"
            else 0.0
        )
        with torch.no_grad():
            for name, value in session.snapshot().items():
                session.old[name].lerp_(value, 1 - keep)
        return report | {name: torch.stack(values).mean().item() for name, values in sums.items()}

    return session.run(epoch, updates)


def check_replay(session: Session, sums: dict[str, list[Tensor]]) -> float:
    """How far from 1 a ratio is before the first update of an epoch: the policy is the one that
    sampled, so it must be none."""
    off = max((value.item() for value in sums.get("ratio_off", [])), default=0.0)
    if off > session.config.ratio.replay_tolerance:
        raise RunError(
            f"before the first update a ratio is {off:.2e} from 1 (posttrain.ratio.replay_tolerance"
            f" {session.config.ratio.replay_tolerance:.0e}): what is scored is not what was"
            " sampled. Use train.precision: fp32, no dropout, and the guidance of the rollout"
        )
    return off


def terms(session: Session, rollout: Rollout, worth: Tensor) -> Iterator[Term]:
    """Losses to be differentiated one after the other; their sum is the mean over the micro-batch.
    `worth (B,)`: advantages, or rewards for DPO."""
    if session.config.trains_steps:
        yield from step_terms(session, rollout, worth)
    elif session.config.algorithm == "dpo":
        best, worst = extremes(worth, rollout.groups)
        if len(best):
            clean, prompts, indices = rollout.clean, rollout.prompts[best], rollout.indices[best]
            yield from pair_terms(session, clean[best], clean[worst], prompts, indices)
    else:
        yield from sample_terms(session, rollout, worth)


def step_terms(session: Session, rollout: Rollout, advantage: Tensor) -> Iterator[Term]:
    """GRPO (2505.05470, eq. 5) and Guard: every stochastic step of a trajectory is an action."""
    config, trajectory = session.config, rollout.trajectory
    text, norm = session.text[rollout.prompts.to(session.device)], config.ratio.norm
    policy, base = session.velocity(text), session.velocity(text, session.reference)
    ratio_of = dynamics.guard_log_ratio if config.algorithm == "guard" else dynamics.log_ratio
    stored = trajectory.plan.extras["mean"]
    for index in stored:
        t, x, y = session.times[index], trajectory.get(index), trajectory.get(index + 1)
        step = dynamics.step(
            config.rollout.dynamics, config.rollout.noise_level, session.times, index
        )
        v = policy(x, t)
        mean, old = step.mean(x, v), trajectory.value("mean", index)
        log_ratio = ratio_of(y, old, mean, step.std, norm)
        loss = losses.clipped(log_ratio, advantage, *config.ratio.clip).mean()
        low, high = config.ratio.clip
        off = log_ratio.detach().expm1()
        numbers = {
            "clip_share": ((off < low) | (off > high)).float().mean(),
            "ratio_off": off.abs().max(),
            "log_ratio_std": log_ratio.detach().std(correction=0),
            "policy_loss": loss.detach(),
        }
        if config.kl.beta:
            with torch.no_grad():
                v_ref = base(x, t)
            apart = v - v_ref if config.kl.space == "v" else mean - step.mean(x, v_ref)
            gap = dynamics.mean_d(apart.square()).mean() / (
                2 * step.std**2 if config.kl.space == "exact" else 1
            )
            loss, numbers["kl"] = loss + config.kl.beta * gap, gap.detach()
        yield loss / len(stored), numbers


def noised(
    session: Session, clean: Tensor, indices: Tensor, number: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`(x, noise, sigma (B,))` of the `number`-th of `count` draws of this update."""
    draws = Draws(session.seed, session.state.step * count + number, indices.to(session.device))
    sigma = session.learner.objective.draw_time(draws, session.frames).float().clamp(1e-2, 1.0)
    if session.pair:
        sigma = session.pair.inside(sigma)
    noise = draws.normal("noise", *session.shape)
    return (1 - losses.wide(sigma, clean)) * clean + losses.wide(sigma, clean) * noise, noise, sigma


def sample_terms(session: Session, rollout: Rollout, advantage: Tensor) -> Iterator[Term]:
    """NFT and AWM: clean samples, noised anew; what solver made them does not matter."""
    config, clean, count = session.config, rollout.clean, session.config.draws_per_sample
    text = session.text[rollout.prompts.to(session.device)]
    for number in range(count):
        x, noise, sigma = noised(session, clean, rollout.indices, number, count)
        v = session.velocity(text)(x, sigma)
        with torch.no_grad():
            v_old = session.velocity(text, session.old)(x, sigma)
        numbers: dict[str, Tensor] = {}
        if config.algorithm == "nft":
            most = config.advantage.clip
            share = losses.positive_share(advantage, most)
            loss = (
                most
                * losses.nft(
                    v, v_old, x, clean, sigma, share, config.nft.beta, config.nft.weighted
                ).mean()
            )
        else:
            error, old = losses.matching(v, clean, noise), losses.matching(v_old, clean, noise)
            log_ratio = losses.awm_log_ratio(error, old, sigma, config.awm.weighting)
            loss = losses.clipped(log_ratio, advantage, *config.ratio.clip).mean()
            numbers["log_ratio_std"] = log_ratio.detach().std(correction=0)
            if config.awm.ema_kl:
                with torch.no_grad():
                    slow = session.velocity(text, session.averaged())(x, sigma)
                numbers["ema_kl"] = gap = dynamics.mean_d((v - slow).square()).mean()
                loss = loss + config.awm.ema_kl * gap
        if config.kl.beta:
            with torch.no_grad():
                v_ref = session.velocity(text, session.reference)(x, sigma)
            numbers["kl"] = gap = dynamics.mean_d((v - v_ref).square()).mean()
            loss = loss + config.kl.beta * gap
        yield loss / count, numbers


def extremes(reward: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the best and the worst sample of each group; none of a group where all are
    equal."""
    best, worst = [], []
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        values = reward[rows.to(reward.device)].cpu()
        if values.max() > values.min():
            best.append(rows[values.argmax()])
            worst.append(rows[values.argmin()])
    return (
        (torch.stack(best), torch.stack(worst)) if best else (torch.empty(0, dtype=torch.long),) * 2
    )


def pair_terms(
    session: Session, win: Tensor, lose: Tensor, prompts: Tensor, indices: Tensor
) -> Iterator[Term]:
    """DPO: both of a pair at the same noise level with the same noise."""
    config, count = session.config, session.config.draws_per_sample
    text = session.text[prompts.to(session.device)]
    both = TextTokens.cat([text, text])
    for number in range(count):
        x_win, noise, sigma = noised(session, win, indices, number, count)
        x = torch.cat([x_win, noised(session, lose, indices, number, count)[0]])
        clean, noise, sigma = (
            torch.cat([win, lose]),
            torch.cat([noise, noise]),
            torch.cat([sigma, sigma]),
        )
        v = session.velocity(both)(x, sigma)
        with torch.no_grad():
            v_ref = session.velocity(both, session.reference)(x, sigma)
        error, base = (losses.matching(field, clean, noise).chunk(2) for field in (v, v_ref))
        margin = losses.dpo_margin(error[0], base[0], error[1], base[1], config.dpo.beta)
        loss = losses.dpo(error[0], base[0], error[1], base[1], config.dpo.beta).mean().float()
        numbers = {
            "pair_loss": loss,
            "margin": margin.mean(),
            "error_win": error[0].mean(),
            "error_lose": error[1].mean(),
        }
        if config.kl.beta:
            numbers["kl"] = gap = dynamics.mean_d((v - v_ref).square()).mean()
            loss = loss + config.kl.beta * gap
        yield (
            loss / count,
            {
                "implicit_accuracy": (margin > 0).float().mean(),
                **{k: v.detach() for k, v in numbers.items()},
            },
        )
