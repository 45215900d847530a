"""GRPO, GRPO-Guard, NFT, AWM and online DPO: roll out, reward, compare within groups, update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmdit.interfaces import TextTokens
from mmdit.posttrain import dynamics, losses
from mmdit.posttrain.advantages import advantages
from mmdit.posttrain.means import LARGEST, Means, moments
from mmdit.posttrain.session import Session
from mmdit.posttrain.trajectory import Rollout
from mmdit.rng import Draws
from mmdit.training.errors import RunError

# The loss of one micro-batch, and numbers to report.
Term = tuple[Tensor, dict[str, Tensor]]
RATIO_OFF = f"ratio_off{LARGEST}"  # the distance of a ratio from 1


def online_epoch(session: Session) -> dict[str, float]:
    """Train on the rollouts of one epoch and return numbers to report."""
    config, updates, pool = session.config, session.config.updates_per_epoch, session.rollouts.pool
    epoch = session.state.step // updates
    rollouts = session.rollouts.collect(epoch)
    rewards = session.rollouts.gather_rewards(rollouts)
    prompts, compared = session.rollouts.epoch_prompts(epoch), config.advantage
    worth, report = advantages(
        rewards, pool.weights, prompts, compared.mode, compared.std, compared.clip
    )
    if config.algorithm == "dpo":
        worth = pool.total(rewards)
    report |= {f"reward_{name}": value.mean().item() for name, value in rewards.items()}
    report |= {
        f"reward_{name}_std": value.std(correction=0).item() for name, value in rewards.items()
    }
    report["reward_seconds"], pool.seconds = pool.seconds, 0.0
    worth, means = worth.float(), Means()
    samples, count = len(worth) // updates, len(rollouts) // updates
    for update in range(updates):
        whole = update * samples + torch.arange(samples)
        for rollout in rollouts[update * count : (update + 1) * count]:
            share = share_of(session, worth, prompts, rollout.indices, whole)
            rollout = rollout.to(session.device)  # only this micro-batch is on the device
            values, parts = worth[rollout.indices].to(session.device), []
            for loss, more in terms(session, rollout, values):
                (loss / share).backward()
                parts.append(loss.detach())
                means.add(more, 1 / share)
            if parts:
                means.add({"loss": torch.stack(parts).sum()}, 1 / share)
        if update == 0:
            report["replay"] = check_replay(session, means.values.get(RATIO_OFF, []))
        report |= session.update()
    session.policy.renew_old(share_of_old(session))
    return report | means.over(session.world)


def share_of(
    session: Session, worth: Tensor, prompts: Tensor, part: Tensor, whole: Tensor
) -> float:
    """Return the divisor of a micro-batch's mean loss with which the losses of an update add up to
    its mean, averaged over processes. The mean is over samples, or with DPO over pairs, of which a
    micro-batch may have any number. `part` and `whole`: the places in the epoch of the micro-batch
    and of the update."""
    part_size, whole_size = len(part), len(whole)
    if session.config.algorithm == "dpo":
        part_size, whole_size = (
            len(extremes(worth[rows], prompts[rows])[0]) for rows in (part, whole)
        )
    return whole_size / max(1, session.world.size * part_size)


def share_of_old(session: Session) -> float:
    """Return the share of the slow copy that stays after this epoch. With NFT it grows; otherwise
    it is 0."""
    if session.config.algorithm != "nft":
        return 0.0
    nft = session.config.nft
    return min(nft.most, nft.rate * max(0, session.state.step - nft.flat))


def check_replay(session: Session, offs: list[Tensor]) -> float:
    """Return the largest distance from 1 of a ratio on any process before the first update of an
    epoch. RunError if it is larger than rounding explains: the policy is still the one that
    sampled, so ratios must be 1."""
    local = max((value.item() for value in offs), default=0.0)
    off = max(session.world.gather(local))
    tolerance = session.config.ratio.replay_tolerance
    if off > tolerance:
        raise RunError(
            f"before the first update a ratio is {off:.2e} from 1 (posttrain.ratio.replay_tolerance"
            f" {tolerance:.0e}): what is scored is not what was sampled. Use train.precision: fp32,"
            " no dropout, and the guidance of the rollout"
        )
    return off


def terms(session: Session, rollout: Rollout, worth: Tensor) -> Iterator[Term]:
    """Yield losses to be differentiated one after the other; their sum is the mean over the
    micro-batch. `worth (B,)`: advantages, or for DPO rewards."""
    if session.config.trains_steps:
        yield from step_terms(session, rollout, worth)
    elif session.config.algorithm == "dpo":
        best, worst = extremes(worth, rollout.prompts)
        has_pairs = len(best) > 0
        together = session.learner.sharded and session.world.any(has_pairs)
        if has_pairs:
            clean, prompts, indices = rollout.clean, rollout.prompts[best], rollout.indices[best]
            yield from pair_terms(session, clean[best], clean[worst], prompts, indices)
        elif together:
            compute_along(session, rollout)
    else:
        yield from sample_terms(session, rollout, worth)


def step_terms(session: Session, rollout: Rollout, advantage: Tensor) -> Iterator[Term]:
    """Yield the losses of GRPO (2505.05470, eq. 5) and Guard, one for each noisy step of the
    trajectory: these steps are the actions."""
    config, policy, trajectory = session.config, session.policy, rollout.trajectory
    text, (low, high) = session.text[rollout.prompts.to(session.device)], config.ratio.clip
    velocity, reference = policy.velocity(text), policy.velocity(text, policy.reference)
    ratio_of = dynamics.guard_log_ratio if config.algorithm == "guard" else dynamics.log_ratio
    noisy = trajectory.storage.trained
    for index in noisy:
        t, x, y = session.times[index], trajectory.get(index), trajectory.get(index + 1)
        step = dynamics.step(
            config.rollout.dynamics, config.rollout.noise_level, session.times, index
        )
        v = velocity(x, t)
        mean, old = step.mean(x, v), trajectory.means[index]
        log_ratio = ratio_of(y, old, mean, step.std, config.ratio.norm)
        loss = losses.clipped(log_ratio, advantage, low, high).mean()
        off = log_ratio.detach().expm1()
        numbers = {
            "clip_share": ((off < low) | (off > high)).float().mean(),
            RATIO_OFF: off.abs().max(),
            "policy_loss": loss.detach(),
            **moments("log_ratio", log_ratio),
        }
        if config.kl.beta:
            v_reference = reference(x, t)
            gap = v - v_reference if config.kl.space == "v" else mean - step.mean(x, v_reference)
            kl = dynamics.mean_d(gap.square()).mean()
            if config.kl.space == "exact":
                kl = kl / (2 * step.std**2)
            loss, numbers["kl"] = loss + config.kl.beta * kl, kl.detach()
        yield loss / len(noisy), numbers


def noised(
    session: Session, clean: Tensor, indices: Tensor, number: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(x, noise, sigma (B,))`: the samples at newly drawn noise levels, in draw `number` of
    the `count` draws of this update."""
    draws = Draws(session.seed, session.state.step * count + number, indices.to(session.device))
    sigma = session.learner.objective.draw_time(draws, session.shape[0]).float().clamp(1e-2, 1.0)
    sigma = session.levels.inside(sigma)
    noise, level = draws.normal("noise", *session.shape), losses.wide(sigma, clean)
    return (1 - level) * clean + level * noise, noise, sigma


def sample_terms(session: Session, rollout: Rollout, advantage: Tensor) -> Iterator[Term]:
    """Yield the losses of NFT and AWM: clean samples are noised anew, whichever solver made
    them."""
    config, policy, clean = session.config, session.policy, rollout.clean
    text, count = session.text[rollout.prompts.to(session.device)], config.draws_per_sample
    for number in range(count):
        x, noise, sigma = noised(session, clean, rollout.indices, number, count)
        v = policy.velocity(text)(x, sigma)
        v_old = policy.velocity(text, policy.old)(x, sigma)
        numbers: dict[str, Tensor] = {}
        if config.algorithm == "nft":
            nft, most = config.nft, config.advantage.clip
            share = losses.positive_share(advantage, most)
            each = losses.nft(v, v_old, x, clean, sigma, share, nft.beta, nft.weighted)
            loss = most * each.mean()
        else:
            error, old = losses.matching(v, clean, noise), losses.matching(v_old, clean, noise)
            log_ratio = losses.awm_log_ratio(error, old, sigma, config.awm.weighting)
            loss = losses.clipped(log_ratio, advantage, *config.ratio.clip).mean()
            numbers |= moments("log_ratio", log_ratio)
            if config.awm.ema_kl:
                v_averaged = policy.velocity(text, policy.averaged())(x, sigma)
                numbers["ema_kl"] = gap = dynamics.mean_d((v - v_averaged).square()).mean()
                loss = loss + config.awm.ema_kl * gap
        if config.kl.beta:
            v_reference = policy.velocity(text, policy.reference)(x, sigma)
            numbers["kl"] = gap = dynamics.mean_d((v - v_reference).square()).mean()
            loss = loss + config.kl.beta * gap
        yield loss / count, numbers


def extremes(reward: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of the best and of the worst sample of each group, leaving out groups whose
    rewards are all equal."""
    best, worst = [], []
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0].tolist()
        values = reward[rows].cpu()
        if values.max() > values.min():
            best.append(rows[values.argmax()])
            worst.append(rows[values.argmin()])
    return torch.tensor(best, dtype=torch.long), torch.tensor(worst, dtype=torch.long)


def compute_along(session: Session, rollout: Rollout) -> None:
    """Make the same network calls as `pair_terms`, with gradients of 0, in a process that has no
    pair: sharded weights are gathered from all processes for each call, so that all must call."""
    row = torch.zeros(1, dtype=torch.long)
    clean, prompts, indices = rollout.clean[row], rollout.prompts[row], rollout.indices[row]
    for loss, _ in pair_terms(session, clean, clean, prompts, indices):
        (0 * loss).backward()


def pair_terms(
    session: Session, win: Tensor, lose: Tensor, prompts: Tensor, indices: Tensor
) -> Iterator[Term]:
    """Yield the losses of DPO. Both samples of a pair get the same noise level and the same
    noise."""
    config, policy, count = session.config, session.policy, session.config.draws_per_sample
    text = session.text[prompts.to(session.device)]
    both, clean = TextTokens.cat([text, text]), torch.cat([win, lose])
    for number in range(count):
        drawn = [noised(session, latents, indices, number, count) for latents in (win, lose)]
        x, noise, sigma = (torch.cat(parts) for parts in zip(*drawn))
        v = policy.velocity(both)(x, sigma)
        v_reference = policy.velocity(both, policy.reference)(x, sigma)
        error, base = (losses.matching(field, clean, noise).chunk(2) for field in (v, v_reference))
        margin = losses.dpo_margin(error[0], base[0], error[1], base[1], config.dpo.beta)
        loss = losses.dpo(margin).mean().float()
        numbers = {
            "implicit_accuracy": (margin > 0).float().mean(),
            "pair_loss": loss,
            "margin": margin.mean(),
            "error_win": error[0].mean(),
            "error_lose": error[1].mean(),
        }
        if config.kl.beta:
            numbers["kl"] = gap = dynamics.mean_d((v - v_reference).square()).mean()
            loss = loss + config.kl.beta * gap
        yield loss / count, numbers
