"""What post-training must not do in silence: learn from an earlier attempt's samples, lose updates
to a reward that fails, take more at a time than it was allowed, train nothing."""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from mmdit.commands import posttrain as posttrain_command
from mmdit.config import ConfigError
from mmdit.diffusion import FlowMatching
from mmdit.posttrain import losses, online, srpo
from mmdit.posttrain.dpo_offline import collect_pairs, offline_updates
from mmdit.posttrain.evaluation import Evaluator
from mmdit.posttrain.online import step_terms
from mmdit.posttrain.posttrain_config import (
    AdvantageConfig,
    DPOConfig,
    KLConfig,
    PosttrainConfig,
    RolloutConfig,
)
from mmdit.posttrain.prompt_lists import Prompts, read_prompt_list, written_prompts
from mmdit.posttrain.rewards import Brightness
from mmdit.posttrain.srpo import srpo_updates
from mmdit.scripts import posttrain
from mmdit.training import checkpoint
from mmdit.training.ema import EMA
from tests.helpers.posttrain_shop import PosttrainShop, command
from tests.helpers.thorough import thorough
from tests.helpers.tiny import refused
from tests.helpers.toy_posttrain import Bright, Keep, Net, pretrained, session
from tests.test_posttrain_loops import SRPO, words

BRIGHT = [f"posttrain.{name}=[{{type: brightness}}]" for name in ("rewards", "eval_rewards")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return PosttrainShop(tmp_path_factory.mktemp("posttrain_limits"))


# ── earlier attempts ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.thorough
@pytest.mark.parametrize("word", ["seed=3", "posttrain.rewards=[{type: brightness, weight: -1}]"])
def test_pairs_of_an_attempt_that_saved_nothing_are_taken_only_where_they_would_be_made_again(
    shop, word
):
    name = f"pairs_{word[:4]}"
    run = shop.folder / "runs" / name
    given = ["posttrain.algorithm=dpo", "posttrain.dpo={collect: 4, batch: 1}", BRIGHT[0]]

    def pairs(*more: str) -> bytes:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # as if it was killed before
        assert posttrain.main(command(shop, name, *given, *more)) == 0
        return (run / "pairs.safetensors").read_bytes()

    first = pairs()
    marked = run / "pairs.safetensors"
    begun = marked.stat().st_mtime_ns
    assert pairs() == first and marked.stat().st_mtime_ns == begun, "the same would be made"
    other = pairs(word)
    shutil.rmtree(run)
    assert pairs(word) == other != first


def test_the_best_of_an_earlier_attempt_is_not_taken_for_that_of_this_one(
    shop, monkeypatch, capsys
):
    run, scores = shop.folder / "runs/attempts", iter([0.1, 0.2, 0.3, 0.2, 0.1])
    monkeypatch.setattr(Evaluator, "evaluate", lambda _: {"held_out_brightness": next(scores)})
    given = [*BRIGHT, "posttrain.eval_every_epochs=1"]
    posttrain.main(command(shop, "attempts", *given, "train.max_steps=1"))
    assert checkpoint.complete(run / "best")
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    posttrain.main(command(shop, "attempts", *given))
    out = capsys.readouterr().out
    assert not (run / "best").exists() and "best on evaluation prompts" not in out
    (moved,) = run.glob("best.before-*")
    assert f"{run / 'best'} is of an earlier attempt: it is now {moved.name}" in out


def test_scores_of_another_measure_are_not_compared(shop, capsys):
    """With more prompts, or other rewards, a score is of another thing."""
    run, given = shop.folder / "runs/measures", [*BRIGHT, "posttrain.eval_every_epochs=1"]
    first = "train.max_steps=1"
    posttrain.main(command(shop, "measures", *given, first, "train.lr=0.001"))
    score = checkpoint.read_tensors(checkpoint.latest(run) / "marks.safetensors")["best"][0]
    capsys.readouterr()
    given += ["posttrain.eval_rewards=[{type: brightness, weight: -1}]", "--resume"]
    posttrain.main(command(shop, "measures", *given))
    assert "evaluation measures another thing than before" in capsys.readouterr().out
    best = checkpoint.read_tensors(checkpoint.latest(run) / "marks.safetensors")["best"]
    assert score > 0 > best[0] and best[1] == 2
    posttrain.main(command(shop, "measures", *given, "train.max_steps=3"))
    assert "evaluation measures" not in capsys.readouterr().out


def test_a_resume_says_which_settings_come_too_late_for_pairs_that_are_made():
    stored = {"lora": {"enabled": False}, "seed": 1, "train": {"lr": 0.1}}
    now = stored | {"seed": 2, "train": {"lr": 0.2}}

    def late(**dpo) -> list[bool]:
        settings = PosttrainConfig(algorithm="dpo", dpo=DPOConfig(**dpo))
        return [
            "are made already" in line for line in posttrain_command._changed(settings, stored, now)
        ]

    assert late() == [True, False], "the seed and the learning rate"
    assert not any(late(source="online") + late(pairs="mine.safetensors"))


def test_milestones_that_no_epoch_ends_at_are_refused(shop, capsys):
    every = ["train.save_every_steps=4", "train.keep_every_steps=4"]
    given = [*BRIGHT, *every, "posttrain.updates_per_epoch=3"]
    words = command(shop, "milestones", *given, "--dry-run")
    refused(capsys, posttrain.main, words, "train.keep_every_steps: is 4", "a multiple of", "(3)")


def test_a_resume_within_an_epoch_of_more_updates_is_refused(shop, capsys):
    """It would begin the epoch again, and go on beyond train.max_steps."""
    given = [BRIGHT[0], "posttrain.eval_prompts=0", "posttrain.micro_batch=1"]
    posttrain.main(command(shop, "within", *given, "train.max_steps=3"))
    given += ["posttrain.updates_per_epoch=2", "train.max_steps=6", "--resume"]
    words = command(shop, "within", *given)
    refused(capsys, posttrain.main, words, "posttrain.updates_per_epoch: is 2", "at update 3")
    posttrain.main([word for word in words if "updates_per_epoch" not in word])


# ── errors ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "error, message",
    [
        *thorough((ValueError("the scorer is gone"), "the scorer is gone")),
        (torch.OutOfMemoryError("no memory left"), "Reduce posttrain.micro_batch"),
    ],
)
def test_a_reward_that_fails_costs_no_update_before_it(shop, monkeypatch, capsys, error, message):
    """And what is saved goes on as the run that did not fail."""
    given, name = [BRIGHT[0], "posttrain.eval_prompts=0"], type(error).__name__
    posttrain.main(command(shop, f"whole_{name}", *given, "train.max_steps=4"))
    call, calls = Brightness.call, iter(range(1000))

    def fails(self, samples):
        if next(calls) == 7:  # the second half of the fourth epoch
            raise error
        return call(self, samples)

    monkeypatch.setattr(Brightness, "call", fails)
    given.append("train.max_steps=4")
    cut = [*given, "train.save_every_steps=100"]
    refused(capsys, posttrain.main, command(shop, f"cut_{name}", *cut), message)
    monkeypatch.setattr(Brightness, "call", call)
    run = shop.folder / "runs" / f"cut_{name}"
    assert checkpoint.latest(run).name == "step_00000003"
    (noted,) = (run / "failures").iterdir()
    assert json.loads(noted.read_text(encoding="utf-8"))["step"] == 3
    posttrain.main(command(shop, f"cut_{name}", *given, "--resume"))
    one, two = (
        checkpoint.read_tensors(
            checkpoint.latest(shop.folder / "runs" / f"{which}_{name}") / "model.safetensors"
        )
        for which in ("whole", "cut")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_error_within_an_update_saves_nothing(shop, monkeypatch, capsys):
    """Half of the weights have moved then."""
    calls = iter(range(1000))

    def fails(self, at):
        if next(calls) == 1:
            raise ValueError("half way")

    monkeypatch.setattr(EMA, "update", fails)
    given = command(shop, "half", BRIGHT[0], "posttrain.eval_prompts=0", "train.max_steps=4")
    refused(capsys, posttrain.main, [*given, "train.save_every_steps=100"], "half way")
    assert not checkpoint.complete(shop.folder / "runs/half")


@pytest.mark.parametrize("algorithm", ["grpo", "guard"])
def test_a_rollout_without_a_noisy_step_is_refused_where_noisy_steps_are_trained(algorithm):
    with pytest.raises(ConfigError, match=r"rollout\.steps: is 1, but .*nothing would be trained"):
        PosttrainConfig(algorithm=algorithm, rollout=RolloutConfig(steps=1))
    PosttrainConfig(algorithm=algorithm, rollout=RolloutConfig(steps=2))
    PosttrainConfig(algorithm="awm", rollout=RolloutConfig(steps=1))


# ── groups and prompts ────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("micro_batch", [*thorough(4), 16, *thorough(32)])
def test_prompts_of_the_same_words_are_groups_of_their_own(tmp_path, micro_batch):
    """However many go through the network together."""
    running = session(
        tmp_path,
        algorithm="dpo",
        dpo=DPOConfig(collect=8, batch=8),
        prompts_per_epoch=8,
        group_size=4,
        micro_batch=micro_batch,
    )
    running.prompts = Prompts(["class 0"] * 8)
    running.text = running.encode(running.prompts.captions)
    assert sorted(collect_pairs(running)["prompts"].tolist()) == list(range(8))


def test_a_prompt_that_stands_twice_is_held_out_wherever_it_stands(tmp_path):
    different = [f"prompt {i}" for i in range(24)]
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"caption": text} for text in [*different, *different]]))
    trained, evaluated = written_prompts(path, 100)
    held_out, seen = evaluated["held_out"].captions, evaluated["seen"].captions
    assert held_out == different[::8] and not set(held_out) & set(trained.captions)
    assert len(trained) == 42 and seen == [text for text in different if text not in held_out]
    path.write_text(json.dumps([{"caption": "one"}] * 40))
    trained, evaluated = written_prompts(path, 100)
    assert len(trained) == 40 and evaluated.keys() == {"seen"}


def test_what_a_file_of_prompts_says_besides_is_refused_and_half_a_letter_too(tmp_path):
    (tmp_path / "p.yaml").write_text("prompts: [a]\nnegative: ugly\n")
    with pytest.raises(ConfigError, match="beside prompts it holds negative"):
        read_prompt_list(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_text("prompts: [a, on]\n")
    with pytest.raises(ConfigError, match=r"prompt 1 is True, must be text \(in quotes\)"):
        read_prompt_list(tmp_path / "p.yaml")
    (tmp_path / "p.json").write_text('[{"caption": "a"}, {"caption": "b \\ud83d"}]')
    with pytest.raises(ConfigError, match="prompt 1 holds half a surrogate pair"):
        read_prompt_list(tmp_path / "p.json")


# ── micro-batches ─────────────────────────────────────────────────────────────────────────────────
def test_no_more_samples_go_through_the_network_than_a_micro_batch(tmp_path, monkeypatch):
    """Hold in updates on stored pairs and in evaluation, which are the same for any of its sizes.
    (AdamW would hide a wrong sum, but the norm that is clipped would be another one.)"""
    forward, sizes = Net.forward, []
    monkeypatch.setattr(
        Net, "forward", lambda self, x, *rest: sizes.append(len(x)) or forward(self, x, *rest)
    )
    reports, evaluations = [], []
    for micro_batch in (8, 6, 256):
        running = session(
            tmp_path / str(micro_batch),
            algorithm="dpo",
            dpo=DPOConfig(collect=24, batch=12),
            draws_per_sample=2,
            prompts_per_epoch=12,
            group_size=2,
            micro_batch=min(micro_batch, 24),
        )
        running.evaluated = {"seen": Prompts([f"class {i % 4}" for i in range(20)])}
        update = offline_updates(running)
        sizes.clear()
        evaluations.append(running.evaluator.evaluate())
        reports.append(update())
        assert max(sizes) <= micro_batch and (micro_batch < 256 or max(sizes) == 24)
    for first, second in ((0, 1), (0, 2)):
        assert reports[first] == pytest.approx(reports[second], rel=1e-3, abs=1e-6)
        assert evaluations[first] == pytest.approx(evaluations[second], rel=1e-4)


def test_the_invert_branch_of_srpo_began_where_all_samples_did(tmp_path):
    begun = []
    for micro_batch in (1, 8, 32):
        running = session(tmp_path, **SRPO | {"srpo": words(), "micro_batch": micro_batch})
        report = srpo_updates(running)()
        begun.append(running.history["invert"].item())
        assert begun[-1] == pytest.approx(report["score_invert"])
    assert begun[0] == pytest.approx(begun[1], rel=1e-4) == pytest.approx(begun[2], rel=1e-4)


# ── sums ──────────────────────────────────────────────────────────────────────────────────────────
def test_the_losses_of_an_update_are_means_over_its_noisy_steps(tmp_path):
    """AdamW would hide another factor; clipping by norm would not."""
    common = {"algorithm": "grpo", "prompts_per_epoch": 2, "group_size": 2, "micro_batch": 4}
    running = session(tmp_path, **common, kl=KLConfig(beta=0.5))
    (rollout,) = running.rollouts.collect(0)
    worth = torch.tensor([1.0, -1.0, 0.5, -0.5])[rollout.indices]
    with torch.no_grad():  # a policy that has moved
        for parameter in running.learner.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    losses, parts = zip(*step_terms(running, rollout, worth))
    each = [part["policy_loss"] + 0.5 * part["kl"] for part in parts]
    assert len(each) == 9 and sum(losses).item() == pytest.approx(sum(each).item() / 9, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["nft", "awm", "dpo"])
def test_the_losses_of_an_update_are_means_over_its_draws(tmp_path, monkeypatch, algorithm):
    """Of draws that are all the same, three give what one does."""
    draw, sums = online.noised, []
    monkeypatch.setattr(
        online, "noised", lambda running, clean, places, *_: draw(running, clean, places, 0, 1)
    )
    for draws in (1, 3):
        running = session(
            tmp_path,
            algorithm=algorithm,
            ema=0.9,
            draws_per_sample=draws,
            prompts_per_epoch=2,
            group_size=2,
            micro_batch=4,
            kl=KLConfig(beta=0.5),
            dpo=DPOConfig(source="online"),
        )
        (rollout,) = running.rollouts.collect(0)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in running.learner.model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        worth = torch.tensor([1.0, -1.0, 0.5, -0.5])[rollout.indices]
        sums.append(sum(loss.item() for loss, _ in online.terms(running, rollout, worth)))
    assert sums[0] != 0 and sums[1] == pytest.approx(sums[0], rel=1e-5)


def test_the_best_is_of_the_weighted_rewards_and_above_what_was(tmp_path):
    running = session(tmp_path, eval_rewards=(Keep(weight=2.0), Bright(weight=-1.0)))
    found = []
    for keep, bright in ((0.5, 0.5), (0.6, 0.9), (0.5, 0.3), (0.5, 0.3), (0.4, 0.0)):
        found.append(running.evaluator.is_best({"seen_keep": keep, "seen_bright": bright}))
        running.state.step += 1
    # 0.5 is the start, then 0.3, 0.7, the same again, and 0.8
    assert found == [False, False, True, False, True]
    assert running.history["best"].tolist() == pytest.approx([0.8, 4])


def test_branches_of_srpo_enter_from_both_sides_with_words_in_turn(tmp_path, monkeypatch):
    calls, recover, score = [], srpo.recover, srpo.relative_score

    def recovered(x, velocity, noise, entered, landed):
        calls.append([entered > landed, abs(entered - landed)])
        return recover(x, velocity, noise, entered, landed)

    def scored(scorer, pixels, first, second, share):
        calls[-1] += [first[0].partition(".")[0], second[0].partition(".")[0]]
        return score(scorer, pixels, first, second, share)

    monkeypatch.setattr(srpo, "recover", recovered)
    monkeypatch.setattr(srpo, "relative_score", scored)
    several = words(positive=("red", "warm"), negative=("blue", "cold", "dark"))
    running = session(tmp_path, **SRPO | {"srpo": several})
    update = srpo_updates(running)
    for _ in range(3):
        update()
    width = pytest.approx(several.step)
    pairs = [("red", "blue"), ("warm", "cold"), ("red", "dark")]
    expected = [
        side for one, two in pairs for side in ([True, width, one, two], [False, width, two, one])
    ]
    assert calls == expected


def test_advantages_of_nft_count_by_their_largest(tmp_path, monkeypatch):
    """So that kl.beta and the clipped norm mean the same whatever posttrain.advantage.clip is."""
    monkeypatch.setattr(losses, "nft", lambda v, *_: v.flatten(1).sum(1) * 0 + 1)
    for most in (2.0, 5.0):
        running = session(
            tmp_path,
            algorithm="nft",
            prompts_per_epoch=2,
            group_size=2,
            micro_batch=4,
            advantage=AdvantageConfig(clip=most),
        )
        (rollout,) = running.rollouts.collect(0)
        ((loss, _),) = online.terms(running, rollout, torch.zeros(4))
        assert loss.item() == pytest.approx(most)


class Halves(Bright):
    """Brightness for every other prompt; the others' groups have equal rewards, and no pair."""

    def call(self, samples):
        ends = [int(caption.split()[-1]) % 2 for caption in samples.captions]
        return super().call(samples) * torch.tensor(ends)


def test_an_update_of_dpo_is_the_mean_over_its_pairs_in_micro_batches_of_any_size(tmp_path):
    common = {"algorithm": "dpo", "dpo": DPOConfig(source="online"), "rewards": (Halves(),)}
    common |= {"prompts_per_epoch": 8, "group_size": 4, "evaluated": 1}
    reports = []
    for micro_batch in (4, 8, 32):
        running = session(tmp_path, **common, micro_batch=micro_batch)
        reports.append(online.online_epoch(running))
    whole = reports.pop()
    assert 0 < whole["zero_std_share"] < 1 and whole["grad_norm"] > 1
    names = ("grad_norm", "loss", "pair_loss", "error_win", "error_lose")
    for report in reports:
        assert [report[name] for name in names] == pytest.approx(
            [whole[name] for name in names], rel=1e-4
        )


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_the_loss_that_is_reported_is_that_of_the_mean_update(tmp_path, micro_batch):
    """Not a share of it, however many noisy steps, draws and micro-batches it is made of."""
    common = {"prompts_per_epoch": 2, "group_size": 2, "micro_batch": micro_batch}
    grpo = session(tmp_path, algorithm="grpo", **common, kl=KLConfig(beta=0.5))
    with torch.no_grad():  # the policy is not the reference
        for parameter in grpo.learner.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    report = online.online_epoch(grpo)
    assert report["kl"] > 0
    expected = report["policy_loss"] + 0.5 * report["kl"]
    assert report["loss"] == pytest.approx(expected, rel=1e-5)
    dpo = {"algorithm": "dpo", "dpo": DPOConfig(source="online"), "draws_per_sample": 3}
    report = online.online_epoch(session(tmp_path, **dpo, **common))
    assert report["loss"] == pytest.approx(report["pair_loss"]) == pytest.approx(math.log(2))


def test_noise_levels_of_clips_are_drawn_for_their_latent_frames(tmp_path, monkeypatch):
    """Compare with training; a tokenizer that compresses time gives fewer than pixels have."""
    asked, draw = [], FlowMatching.draw_time
    monkeypatch.setattr(
        FlowMatching, "draw_time", lambda *args: asked.append(args[2]) or draw(*args)
    )
    model = copy.deepcopy(pretrained())
    model.spec = replace(model.spec, temporal=4)
    running = session(tmp_path, algorithm="nft", model=model, frames=9)
    clean = torch.zeros(2, *running.shape)
    online.noised(running, clean, torch.arange(2), 0, 1)
    assert asked == [3] == [clean.shape[1]]


def test_rollouts_of_clips_have_the_shift_that_the_model_has_for_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(FlowMatching, "clip_shift", lambda _, frames: 1.0 + frames)
    picture, clip = (
        session(tmp_path, frames=frames, rollout={"steps": 4, "shift": 3.0}) for frames in (1, 3)
    )
    for running, shift in ((picture, 3.0 * 2), (clip, 3.0 * 4)):
        even = torch.linspace(1, 0, 5, dtype=torch.float64)
        expected = shift * even / (1 + (shift - 1) * even)
        assert running.times == pytest.approx(expected.tolist())
