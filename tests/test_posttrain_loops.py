"""The loops of post-training on a toy that learns in a second: exact replay, exact resume, rewards
that rise, rewards that mean nothing, and the command."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.posttrain.evaluation import Evaluator
from mmdit.posttrain.online import RATIO_OFF, online_epoch, step_terms
from mmdit.posttrain.posttrain_config import (
    DPOConfig,
    KLConfig,
    NFTConfig,
    RatioConfig,
    SRPOConfig,
    StorageConfig,
)
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.rewards import LatentNorm, Motion, Noise
from mmdit.posttrain.rollouts import Rollouts
from mmdit.posttrain.srpo import srpo_updates
from mmdit.posttrain.stop_rules import StopRules
from mmdit.posttrain.trajectory import Trajectory
from mmdit.scripts import posttrain
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder
from mmdit.training.checkpoint import latest, read_tensors
from mmdit.training.errors import RunError
from mmdit.training.learner import Learner
from mmdit.training.run_folder import ENDED_BY, RunFolder, RunState
from tests.drivers import show_posttrain
from tests.helpers.posttrain_shop import SRPO_WORDS, PosttrainShop, command
from tests.helpers.thorough import thorough
from tests.helpers.tiny import FOUR_STEPS, refused
from tests.helpers.toy_posttrain import Colour, Glass, Keep, RedOverBlue, pretrained, run, session
from tests.test_processes import drive

ROOT = Path(__file__).resolve().parents[1]
TWICE = {"updates_per_epoch": 2, "micro_batch": 128}
GRPO = {"algorithm": "grpo", "ratio": RatioConfig(clip=(-7e-3, 7e-3)), **TWICE}
CLIP = GRPO["ratio"]
EARLY = {
    "algorithm": "grpo",
    "ratio": CLIP,
    "rollout": {"sde_steps": (0, 1, 2)},
}  # one update an epoch: no ratio leaves 1
NFT = {"algorithm": "nft", "draws_per_sample": 2, **TWICE}
AWM = {
    "algorithm": "awm",
    "ema": 0.9,
    "draws_per_sample": 2,
    "ratio": RatioConfig(clip=(-1e-2, 1e-2)),
    **TWICE,
}
FEW = {"epochs": 30, "lr": 6e-4}  # in which a reward is learnt
SRPO = {"algorithm": "srpo", "prompts_per_epoch": 32, "micro_batch": 32, "lr": 1e-4}


def words(**changes) -> SRPOConfig:
    return SRPOConfig(
        **({"scorer": RedOverBlue(), "positive": ("red",), "negative": ("blue",)} | changes)
    )


# ── C2: replay ────────────────────────────────────────────────────────────────────────────────────
def transformer(checkpointing: bool) -> Learner:
    """The real network, awake."""
    from mmdit.diffusion import FlowMatching, FlowMatchingConfig

    torch.manual_seed(0)
    encoder = build_text_encoder(ByteLevelConfig(dim=16, depth=1, num_heads=2))
    config = VideoMMDiTConfig(
        dim=16, depth=2, num_heads=2, window_size=2, checkpointing=checkpointing
    )
    model = build_model(config, 3, 16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return Learner(model, encoder, FlowMatching(FlowMatchingConfig()), Glass.spec)


def stored_bytes(rollout) -> int:
    kept = (*rollout.trajectory.states.values(), *rollout.trajectory.means.values())
    return sum(x.numel() * x.element_size() for x in kept)


def first_update(folder, **changes):
    """Largest distance of a ratio from 1 before any update, gradients and bytes of the first
    micro-batch."""
    settings = {
        "ratio": RatioConfig(),
        "prompts_per_epoch": 4,
        "group_size": 2,
        "micro_batch": 8,
        "rewards": (Noise(),),
        "rollout": {"steps": 5},
        "evaluated": 4,
    }
    running = session(folder, algorithm="grpo", **(settings | changes))
    rollouts = running.rollouts.collect(0)
    worth, off = torch.linspace(-1, 1, 8), 0.0
    for rollout in rollouts:
        for loss, numbers in step_terms(running, rollout.to("cpu"), worth[rollout.indices]):
            loss.backward()
            off = max(off, numbers[RATIO_OFF].item())
    return (
        off,
        [p.grad.clone() for p in running.learner.model.parameters() if p.grad is not None],
        sum(map(stored_bytes, rollouts)),
    )


@pytest.mark.parametrize(
    "checkpointing, dtype",
    [(False, "fp32"), *thorough((False, "bf16"), (True, "fp32")), (True, "bf16")],
)
def test_every_ratio_is_one_before_the_first_update(tmp_path, dtype, checkpointing):
    model = transformer(checkpointing)
    few = {"model": model, "prompts_per_epoch": 2}
    for batch in (1, 4):
        off, gradients, _ = first_update(
            tmp_path, **few, storage=StorageConfig(dtype=dtype), micro_batch=batch
        )
        assert off == 0 and any(g.abs().sum() > 0 for g in gradients)
    if dtype == "fp32":
        rollout = {"steps": 5, "guidance": 2.0}
        assert first_update(tmp_path, **few, micro_batch=4, rollout=rollout)[0] == 0


@pytest.mark.thorough
def test_scoring_before_rounding_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Trajectory,
        "put",
        lambda self, place, x: (self.states.__setitem__(place, x.to(self.storage.dtype)), x)[1],
    )
    mean = RatioConfig(norm="mean")
    assert first_update(tmp_path, model=transformer(False), ratio=mean)[0] == 0
    assert (
        first_update(
            tmp_path, model=transformer(False), ratio=mean, storage=StorageConfig(dtype="bf16")
        )[0]
        > 1e-5
    )
    with pytest.raises(RunError, match="before the first update"):
        run(
            session(
                tmp_path,
                epochs=1,
                algorithm="grpo",
                storage=StorageConfig(dtype="bf16"),
                prompts_per_epoch=4,
                rewards=(Noise(),),
                micro_batch=64,
            )
        )


def test_storing_everything_or_offloading_changes_no_gradient(tmp_path):
    rollout = {"sde_steps": (1, 2, 6), "sde_pick": 2}
    _, least, few = first_update(tmp_path, rollout=rollout)
    storage = StorageConfig(positions="all", offload=False)
    _, other, many = first_update(tmp_path, rollout=rollout, storage=storage)
    assert all(torch.equal(a, b) for a, b in zip(least, other, strict=True)) and many > few
    running = session(tmp_path, algorithm="grpo", rollout=rollout)
    assert few == 8 * running.rollouts.storage(running.rollouts.noisy_steps(0)).bytes(48)


def test_the_kl_moves_the_policy_alone_and_is_not_in_the_policy_loss(tmp_path):
    """Away from the reference, with no advantage: all of the gradient is the KL's. Its spaces are
    those of the closed form."""

    def step_by_step(worth: float, **kl):
        running = session(
            tmp_path,
            algorithm="grpo",
            kl=KLConfig(**kl),
            prompts_per_epoch=4,
            group_size=2,
            micro_batch=8,
            rewards=(Noise(),),
        )
        shift = torch.Generator().manual_seed(0)
        for p in running.learner.model.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=shift)
        kept = {name: p.clone() for name, p in running.policy.reference.items()}
        rollout = running.rollouts.collect(0)[0]
        terms = list(step_terms(running, rollout, torch.full((8,), worth)))
        sum(loss for loss, _ in terms).backward()
        assert all(
            torch.equal(p, kept[name]) and not p.requires_grad
            for name, p in running.policy.reference.items()
        )
        size = sum(p.grad.abs().sum().item() for p in running.learner.model.parameters())
        return (
            size,
            [loss.item() * len(terms) for loss, _ in terms],
            [{k: v.item() for k, v in n.items()} for _, n in terms],
            running,
        )

    assert step_by_step(0.0)[0] == 0 < step_by_step(0.0, beta=0.5)[0]
    plain = [n["policy_loss"] for n in step_by_step(1.0)[2]]
    found = {}
    for space in ("v", "x", "exact"):
        _, losses, numbers, running = step_by_step(1.0, beta=0.5, space=space)
        assert [n["policy_loss"] for n in numbers] == plain
        assert losses == pytest.approx(
            [n["policy_loss"] + 0.5 * n["kl"] for n in numbers], rel=1e-5
        )
        found[space] = [n["kl"] for n in numbers]
    for index, (v, x, exact) in enumerate(zip(*found.values(), strict=True)):
        t, s = running.times[index : index + 2]
        g = 0.7 * (t / (1 - (running.times[1] if t == 1 else t))) ** 0.5
        assert exact == pytest.approx(
            (t - s) / 2 * (g * (1 - t) / (2 * t) + 1 / g) ** 2 * v, rel=1e-4
        )
        assert x == pytest.approx(2 * g * g * (t - s) * exact, rel=1e-4)


def test_the_samples_of_a_group_may_begin_alike_and_the_noisy_steps_are_drawn_anew_in_each_epoch(
    tmp_path,
):
    common = {
        "prompts_per_epoch": 4,
        "group_size": 2,
        "micro_batch": 8,
        "rewards": (Noise(),),
        "algorithm": "grpo",
    }
    for shared in (True, False):
        running = session(
            tmp_path,
            storage=StorageConfig(positions="all"),
            rollout={"shared_noise": shared},
            **common,
        )
        first, last = (
            running.rollouts.collect(0)[0].trajectory.get(place).reshape(4, 2, -1)
            for place in (0, 10)
        )
        assert torch.equal(first[:, 0], first[:, 1]) == shared and not torch.equal(
            first[0], first[1]
        )
        assert not torch.equal(last[:, 0], last[:, 1])
    running = session(tmp_path, rollout={"sde_steps": (0, 1, 2, 3), "sde_pick": 2}, **common)
    drawn = [running.rollouts.noisy_steps(epoch) for epoch in range(40)]
    assert {len(set(steps)) for steps in drawn} == {2} and len(set(drawn)) == 6, (
        "each of the six pairs"
    )


def test_gradients_are_clipped(tmp_path):
    """AdamW's first step has one size whatever the gradient: its moments tell."""
    sizes = []
    for clip in (0.5, 1.0):
        running = session(tmp_path, train={"grad_clip": clip})
        for p in running.learner.model.parameters():
            p.grad = torch.ones_like(p)
        assert running.update()["grad_norm"] > 10
        moments = [
            value
            for name, value in running.state.files()["optimizer"].items()
            if name.endswith("exp_avg")
        ]
        sizes.append(torch.cat([m.flatten() for m in moments]).norm().item())
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-4)


class AnyMotion(Motion):
    limits = (0.0, 1e3)  # the toy's pixels have no bounds


@pytest.mark.slow
def test_motion_of_clips_is_learnt_from_the_least_that_must_be_stored(tmp_path):
    """Show 3: clips of the real network, two of four stochastic steps trained in an epoch."""
    frames, values = 5, 5 * 4 * 4 * 3
    clips = {
        "model": transformer(False),
        "frames": frames,
        "rollout": {"steps": 6, "sde_steps": (0, 1, 2, 3), "sde_pick": 2},
    }
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        least, everything = (
            first_update(
                tmp_path,
                rewards=(AnyMotion(),),
                storage=StorageConfig(positions=which, dtype=dtype),
                **clips,
            )
            for which in ("auto", "all")
        )
        assert least[0] == everything[0] == 0 and all(
            torch.equal(a, b) for a, b in zip(least[1], everything[1], strict=True)
        )
        steps = session(tmp_path, algorithm="grpo", **clips).rollouts.noisy_steps(0)
        places = len({place for step in steps for place in (step, step + 1)} | {6})
        assert least[2] == 8 * values * (size * places + 4 * len(steps)) and everything[
            2
        ] == 8 * values * (size * 7 + 4 * len(steps))
    run(
        session(
            tmp_path / "run",
            algorithm="grpo",
            rewards=(AnyMotion(),),
            eval_rewards=(AnyMotion(),),
            epochs=12,
            lr=3e-3,
            prompts_per_epoch=4,
            micro_batch=64,
            ratio=CLIP,
            train={"sample_num_steps": 6},
            **clips,
        )
    )
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["seen_motion"] > 1.1 * records[0]["seen_motion"]


# ── C5: learning, and not learning ────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "name, reward, keep, settings",
    [
        ("grpo", -0.20, 0.75, GRPO),
        *thorough(
            ("grpo, early steps", -0.22, 0.75, EARLY),
            ("guard", -0.18, 0.68, GRPO | {"algorithm": "guard"}),
        ),
        *thorough(
            ("nft", -0.12, 0.92, NFT | {"lr": 8e-4}),
            ("awm", -0.12, 0.90, AWM | {"lr": 8e-4}),
            ("dpo online", -0.22, 0.75, {"algorithm": "dpo", "dpo": DPOConfig(source="online")}),
            (
                "dpo offline",
                -0.22,
                0.90,
                {
                    "algorithm": "dpo",
                    "dpo": DPOConfig(collect=512, beta=20),
                    "kl": KLConfig(beta=0.03),
                    "prompts_per_epoch": 64,
                    "draws_per_sample": 2,
                    "epochs": 60,
                },
            ),
        ),
    ],
)
def test_the_reward_rises_and_the_pictures_stay(tmp_path, name, reward, keep, settings):
    last = run(session(tmp_path, **FEW | settings))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["seen_bright"] < -0.55 and records[0]["seen_keep"] > 0.93
    assert last["seen_bright"] > reward and last["seen_keep"] > keep and last["drift"] > 0
    if "dpo" in name:
        assert (
            records[1]["pair_loss"] == pytest.approx(0.6931, abs=1e-3)
            and last["implicit_accuracy"] >= 0.75
        )
    if name.startswith("grpo"):
        assert all(record["replay"] == 0 for record in records[1:])


@pytest.mark.parametrize(
    "settings",
    [
        EARLY,
        GRPO | {"algorithm": "guard"},
        NFT | {"lr": 8e-4},
        AWM | {"lr": 8e-4},
        {"algorithm": "dpo", "dpo": DPOConfig(source="online")},
    ],
    ids=("grpo, early steps", "guard", "nft", "awm", "dpo online"),
)
def test_the_reward_begins_to_rise(tmp_path, settings):
    last = run(session(tmp_path, evaluated=64, **FEW | {"epochs": 6} | settings))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert last["seen_bright"] > first["seen_bright"] + 0.03


@pytest.mark.slow
def test_a_colour_is_learnt_and_a_small_beta_of_nft_trades_pictures_for_it(tmp_path):
    ends = {
        name: run(
            session(
                tmp_path / name,
                model=pretrained(1500),
                rewards=(Colour(),),
                eval_rewards=(Colour(), Keep()),
                **settings,
            )
        )
        for name, settings in (
            ("grpo", GRPO),
            ("guard", GRPO | {"algorithm": "guard"}),
            ("nft", NFT),
            ("bold", NFT | {"nft": NFTConfig(beta=0.1)}),
        )
    }
    first = json.loads((tmp_path / "nft" / "metrics.jsonl").read_text().splitlines()[0])
    for name, left, keep in (
        ("grpo", 0.06, 0.68),
        ("guard", 0.06, 0.64),
        ("nft", 0.13, 0.92),
    ):  # of 0.19 with centred patterns
        assert (
            ends[name]["seen_colour"] > left / 0.19 * first["seen_colour"]
            and ends[name]["seen_keep"] > keep
        ), name
    assert (
        ends["bold"]["seen_colour"] > ends["nft"]["seen_colour"]
        and ends["bold"]["seen_keep"] < ends["nft"]["seen_keep"] - 0.1
    )


@pytest.mark.slow
def test_kl_holds_the_policy_and_a_wider_clip_lets_it_go(tmp_path):
    held = [
        run(
            session(
                tmp_path / f"kl{beta}",
                epochs=30,
                algorithm="grpo",
                ratio=CLIP,
                kl=KLConfig(beta=beta),
                rollout={"sde_steps": (0, 2)},
            )
        )
        for beta in (0.0, 0.3, 10.0)
    ]
    assert held[0]["seen_bright"] > held[1]["seen_bright"] > held[2]["seen_bright"]
    assert held[0]["seen_keep"] < held[1]["seen_keep"] < held[2]["seen_keep"]
    assert held[0]["drift"] > held[1]["drift"] > held[2]["drift"] and held[2]["kl"] > 0
    clips = [
        run(
            session(
                tmp_path / f"clip{high}",
                epochs=20,
                algorithm="grpo",
                ratio=RatioConfig(clip=(-high, high)),
                updates_per_epoch=4,
                micro_batch=64,
                rollout={"sde_steps": (0, 2)},
            )
        )
        for high in (7e-5, 7e-4, 7e-3)
    ]
    assert clips[0]["clip_share"] > clips[1]["clip_share"] > clips[2]["clip_share"] == 0
    assert clips[0]["seen_keep"] > clips[1]["seen_keep"] > clips[2]["seen_keep"]


@pytest.mark.parametrize(
    "settings, drift",
    [
        pytest.param(EARLY, 0.3, marks=pytest.mark.slow),
        pytest.param(
            {"algorithm": "dpo", "dpo": DPOConfig(source="online")}, 0.08, marks=pytest.mark.slow
        ),
        pytest.param(NFT, 0.05, marks=pytest.mark.slow),
        pytest.param(AWM, 0.05, marks=pytest.mark.slow),
    ],
    ids=lambda s: s["algorithm"] if isinstance(s, dict) else "",
)
def test_a_reward_of_noise_moves_nothing_much(tmp_path, settings, drift):
    """As they are where a reward is learnt, without a KL."""
    for seed in range(5):
        last = run(session(tmp_path / str(seed), rewards=(Noise(),), seed=seed, **settings))
        assert abs(last["seen_bright"] + 0.589) < 0.12 and last["drift"] < drift


@pytest.mark.slow
def test_a_little_kl_costs_no_reward_and_keeps_what_noise_would_move(tmp_path):
    """What the configs of GRPO rest on."""
    settings = GRPO | {"epochs": 60, "rollout": {"sde_steps": (0, 1, 2, 3), "shared_noise": True}}
    ends = {
        (beta, reward): run(
            session(
                tmp_path / f"{beta}{reward}",
                kl=KLConfig(beta=beta),
                **settings | ({"rewards": (Noise(),)} if reward else {}),
            )
        )
        for beta in (0.0, 0.03)
        for reward in (0, 1)
    }
    assert (
        ends[0.03, 0]["seen_bright"] > ends[0.0, 0]["seen_bright"] - 0.03
        and ends[0.03, 0]["seen_keep"] > ends[0.0, 0]["seen_keep"] + 0.08
    )
    assert ends[0.03, 1]["drift"] < ends[0.0, 1]["drift"] / 5


def test_what_is_reported_of_ratios_is_of_all_samples(tmp_path):
    """Report it alike for any micro-batches: the deviation of one sample alone would be 0, and a
    mean of largest distances is smaller than the largest of all."""
    reported, farthest = [], []
    for size in (1, 4):
        few = {"prompts_per_epoch": 2, "group_size": 4, "micro_batch": size, "evaluated": 4}
        running = session(tmp_path, algorithm="grpo", updates_per_epoch=2, **few)
        values = online_epoch(running)
        reported.append(values["log_ratio_std"])
        farthest.append(values["ratio_off"])
    assert reported[0] > 0 and reported[0] == pytest.approx(reported[1], rel=1e-3)
    assert farthest[0] > 1e-3 and farthest[0] == pytest.approx(farthest[1], rel=1e-3)


# ── C6: SRPO ──────────────────────────────────────────────────────────────────────────────────────
def test_micro_batches_of_srpo_add_up_to_the_mean(tmp_path):
    """AdamW would hide a wrong sum, but the norm that is clipped would be another one."""

    spreads = []

    def norm(size: int, prompts: int = 32, alike: bool = False) -> float:
        settings = SRPO | {"srpo": words(), "micro_batch": size, "prompts_per_epoch": prompts}
        running = session(tmp_path, **settings)
        if alike:  # all samples share their noise, too: then they are one sample
            running.prompts = Prompts(["class 1"] * len(running.prompts))
            running.text = running.encode(running.prompts.captions)
        values = srpo_updates(running)()
        spreads.append(values["latent_std"])
        return values["grad_norm"]

    assert norm(2) == pytest.approx(norm(32), rel=1e-3)
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-5)  # a stop rule compares it
    assert norm(32, alike=True) == pytest.approx(norm(8, 8, alike=True), rel=1e-3)


@pytest.mark.parametrize(
    "branches", [*thorough((("denoise",),)), ("denoise", "invert")], ids=" ".join
)
def test_srpo_follows_its_words(tmp_path, branches):
    for pair in (("red", "blue"), ("blue", "red")):
        srpo = words(positive=pair[:1], negative=pair[1:], branches=branches)
        last = run(session(tmp_path / pair[0], epochs=20, srpo=srpo, **SRPO))
        assert last["seen_keep"] > 0.7 and last["score_denoise"] > 0.6, "each in its own direction"
        assert "score_invert" not in last or last["score_invert"] < -0.6


@pytest.mark.thorough
def test_srpo_comes_to_rest(tmp_path):
    for branches in (("denoise",), ("denoise", "invert")):
        folder = tmp_path / str(len(branches))
        long = run(session(folder, epochs=70, srpo=words(branches=branches), **SRPO))
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        early = next(record for record in records if record["step"] == 40)
        assert (
            abs(long["score_denoise"] - early["score_denoise"]) < 0.05 and long["seen_keep"] > 0.7
        )
        assert (
            long["active_denoise"] == 0 == long.get("active_invert", 0)
            and long["latent_std"] < 1.5 * 0.56
        )


def test_growth_and_drift_stop_srpo(tmp_path, capsys):
    last = run(session(tmp_path / "growth", epochs=50, srpo=words(max_std_growth=1.001), **SRPO))
    assert last["step"] < 50 and "deviation grew" in last[ENDED_BY]
    (tmp_path / "growth/config.yaml").write_text("train: {max_steps: 50}")
    state = RunFolder(tmp_path, "growth").state(last, set())
    assert state == RunState("finished", last[ENDED_BY])
    assert RunFolder(tmp_path, "growth").state({"step": last["step"]}, set()).word == "stopped"
    assert "deviation grew" in capsys.readouterr().out
    last = run(session(tmp_path / "drift", epochs=50, srpo=words(), max_drift=1e-3, **SRPO))
    assert last["step"] < 50 and "max_drift" in capsys.readouterr().out


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "settings",
    [
        *thorough({"algorithm": "grpo", "updates_per_epoch": 2, "micro_batch": 128}),
        {
            "algorithm": "guard",
            "updates_per_epoch": 2,
            "micro_batch": 128,
            "rollout": {"sde_steps": (0, 1, 2), "sde_pick": 1},
        },
        *thorough({"algorithm": "nft", "nft": NFTConfig(rate=0.1)}),
        {"algorithm": "awm", "ema": 0.9},
        {"algorithm": "dpo", "dpo": DPOConfig(collect=32, batch=16)},
        *thorough({"algorithm": "dpo", "dpo": DPOConfig(source="online")}),
        {"srpo": words(), **SRPO},
    ],
    ids=lambda s: s.get("algorithm"),
)
def test_four_epochs_are_two_and_two_bit_for_bit(tmp_path, settings):
    settings = settings | {"evaluated": 4}
    run(session(tmp_path / "straight", epochs=4, **settings))
    run(session(tmp_path / "cut", epochs=2, **settings))
    again = session(tmp_path / "cut", epochs=4, **settings)
    again.restore(latest(tmp_path / "cut"))
    run(again)
    ends = [latest(tmp_path / name) for name in ("straight", "cut")]
    for file in (
        "model",
        "optimizer",
        *(["old"] if settings["algorithm"] in ("nft", "awm") else []),
    ):
        one, two = (read_tensors(end / f"{file}.safetensors") for end in ends)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    drop = ("seconds", "reward_seconds")
    logs = [
        [
            {
                k: v
                for k, v in json.loads(line).items()
                if k not in drop and not k.startswith("seen")
            }
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "cut")
    ]
    assert logs[0] == logs[1]


# ── the command ───────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return PosttrainShop(tmp_path_factory.mktemp("posttrain"))


@pytest.mark.parametrize("algorithm", ["grpo", *thorough("guard", "nft", "awm", "srpo"), "dpo"])
def test_the_command_trains_resumes_and_its_result_draws(shop, algorithm, capsys):
    from mmdit.experiment.load import load_pipeline

    extra = [f"posttrain.algorithm={algorithm}"]
    extra += {"dpo": ["posttrain.dpo={collect: 4, batch: 1}"], "srpo": SRPO_WORDS}.get(
        algorithm, []
    )
    assert posttrain.main(command(shop, algorithm, *extra, "--dry-run")) == 0
    told = capsys.readouterr().out
    assert "noise levels" in told and not (shop.folder / "runs" / algorithm).exists()
    assert ("pairs: best and worst of 4 prompts" in told) == (algorithm == "dpo")
    if algorithm == "grpo":
        # 3 steps, 2 stochastic: positions 0 … 3 and 2 means of 48 latent values in float32
        assert (
            "2 prompts × 2 = 4 samples" in told and f"{(4 + 2) * 48 * 4:,} bytes a sample" in told
        )
    assert posttrain.main(command(shop, algorithm, *extra)) == 0
    assert posttrain.main(command(shop, algorithm, *extra, "--resume", "train.max_steps=3")) == 0
    assert "update 3/3" in capsys.readouterr().out
    pipeline, config = load_pipeline(shop.folder / "runs" / algorithm, "cpu")
    assert (
        config.posttrain.algorithm == algorithm
        and pipeline(["a red star"], 48, 32, 1, FOUR_STEPS).isfinite().all()
    )


def test_the_best_on_held_out_prompts_is_kept_apart(shop, monkeypatch, capsys):
    """Not the last, not the one of the highest reward on seen prompts; a resumed run goes on to
    compare with it."""
    from mmdit.experiment.load import load_pipeline

    scores = iter([0.2, 0.1, 0.6, 0.4])
    monkeypatch.setattr(
        Evaluator,
        "evaluate",
        lambda evaluator: {
            "seen_brightness": 0.1 * evaluator.setup.state.step,
            "held_out_brightness": next(scores),
        },
    )
    words = [f"posttrain.{name}=[{{type: brightness}}]" for name in ("rewards", "eval_rewards")]
    words += ["posttrain.eval_every_epochs=1", "train.save_every_steps=1", "train.keep_last=0"]
    posttrain.main(command(shop, "best", *words))
    posttrain.main(command(shop, "best", *words, "--resume", "train.max_steps=3"))
    run = shop.folder / "runs" / "best"
    assert f"of update 2: {run / 'best'}" in capsys.readouterr().out.splitlines()[-1]
    kept, same = latest(run / "best"), run / "checkpoints" / "step_00000002"
    assert kept.name == same.name and not (kept / "optimizer.safetensors").exists()
    assert (same / "ema.safetensors").exists() and not (kept / "ema.safetensors").exists(), (
        "those that were scored"
    )
    one, two = (read_tensors(folder / "model.safetensors") for folder in (kept, same))
    assert all(torch.equal(one[key], two[key]) for key in two)
    pipeline, _ = load_pipeline(run / "best", "cpu")
    assert pipeline(["a red star"], 48, 32, 1, FOUR_STEPS).isfinite().all()


def test_srpo_takes_real_latents_in_place_of_rollouts(shop, capsys, monkeypatch):
    extra = [*SRPO_WORDS, f"posttrain.srpo.latents={shop.cache('pictures')}"]
    monkeypatch.setattr(Rollouts, "sample", None)
    monkeypatch.setattr(StopRules, "drift", lambda rules: 0.0)
    assert posttrain.main(command(shop, "real", *extra)) == 0
    last = json.loads((shop.folder / "runs/real/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["grad_norm"] > 0
    refused(
        capsys,
        posttrain.main,
        command(shop, "small", *extra, "video.width=32"),
        "posttrain.srpo.latents",
        "must hold 2 or more",
    )
    refused(
        capsys,
        posttrain.main,
        command(shop, "none", *SRPO_WORDS, "posttrain.srpo.latents=nowhere"),
        "posttrain.srpo.latents",
        "nowhere",
    )


def test_srpo_refuses_latents_of_another_tokenizer_of_the_same_shape(shop, capsys):
    other = shop.folder / "of_another"
    shutil.copytree(shop.cache("pictures"), other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "another"}))
    words = [*SRPO_WORDS, f"posttrain.srpo.latents={other}"]
    refused(capsys, posttrain.main, command(shop, "other", *words), "of this tokenizer")


def test_adapters_alone_are_trained_when_asked(shop):
    words = [
        "lora.enabled=true",
        "lora.rank=2",
        "ema.enabled=false",
        "posttrain.rewards=[{type: brightness}]",
    ]
    posttrain.main(command(shop, "lora", *words))
    ours, base = (
        read_tensors(latest(shop.folder / "runs" / name) / f"{file}.safetensors")
        for name, file in (("lora", "model"), ("base", "ema"))
    )
    assert all(torch.equal(ours[name], value) for name, value in base.items())
    assert any(value.abs().sum() > 0 for name, value in ours.items() if name.endswith("lora_B"))


def test_prompts_come_from_files_too(shop, capsys):
    rows = [f"a red circle {i}" for i in range(16)]
    (shop.folder / "p.json").write_text(json.dumps([{"caption": row} for row in rows]))
    (shop.folder / "p.yaml").write_text("prompts:\n" + "".join(f"- {row}\n" for row in rows))
    rewards = [
        "posttrain.rewards=[{type: brightness}]",
        "posttrain.eval_rewards=[{type: brightness}]",
    ]
    for suffix in ("json", "yaml"):
        posttrain.main(
            command(shop, f"file_{suffix}", f"posttrain.prompts={shop.folder}/p.{suffix}", *rewards)
        )
        assert "14 prompts" in capsys.readouterr().out
    refused(
        capsys,
        posttrain.main,
        command(shop, "no_facts", f"posttrain.prompts={shop.folder}/p.json"),
        "posttrain.rewards[1]: is prompt_accuracy, which needs the facts",
    )
    refused(
        capsys,
        posttrain.main,
        command(shop, "bad", f"posttrain.prompts={shop.folder}/none.json"),
        "posttrain.prompts",
        "must be",
    )


def test_own_prompts_are_judged_by_the_rewards_themselves(shop, capsys):
    (shop.folder / "own.yaml").write_text(
        "prompts:\n" + "".join(f"- a red circle {i}\n" for i in range(20))
    )
    own = [
        f"posttrain.prompts={shop.folder}/own.yaml",
        "posttrain.rewards=[{type: brightness, name: light}, {type: brightness_rank}]",
    ]
    posttrain.main(command(shop, "own", *own))
    first = json.loads((shop.folder / "runs/own/metrics.jsonl").read_text().splitlines()[0])
    assert {name for name in first if name.startswith(("seen", "held"))} == {
        "seen_light",
        "held_out_light",
    }
    posttrain.main(command(shop, "unjudged", *own, "posttrain.eval_prompts=0"))
    assert not any(
        name.startswith("seen")
        for name in json.loads(
            (shop.folder / "runs/unjudged/metrics.jsonl").read_text().splitlines()[0]
        )
    )
    srpo = [*SRPO_WORDS, own[0]]  # whose rewards are never asked
    assert posttrain.main(command(shop, "own_srpo", *srpo, "--dry-run")) == 0
    capsys.readouterr()


def test_a_dry_run_tells_what_the_run_would_stumble_over(shop, capsys):
    (shop.folder / "few.yaml").write_text("prompts: [a red circle, a blue star]")
    own = f"posttrain.prompts={shop.folder}/few.yaml"
    light = "posttrain.rewards=[{type: brightness}]"
    posttrain.main(command(shop, "there", light))
    offline = "posttrain.algorithm=dpo"
    given = [offline, *SRPO_WORDS[1:], "posttrain.prompts_per_epoch=16"]
    for words, *parts in (
        ([own], "posttrain.rewards[1]", "facts", "moving_shapes"),
        (
            [own, light, "posttrain.eval_rewards=[{type: prompt_accuracy}]"],
            "posttrain.eval_rewards[0]",
            "facts",
        ),
        (
            ["posttrain.eval_rewards=[{type: brightness_rank}]"],
            "posttrain.eval_rewards[0]",
            "draws one of each",
        ),
        (["posttrain.eval_prompts=-1"], "posttrain.eval_prompts"),
        (["train.sample_cfg_interval=[0.8, 0.2]"], "interval"),
        (["posttrain.rollout.guidance_low=3"], "posttrain.rollout.guidance_low", "no pair"),
        ([*given, "posttrain.dpo.pairs=nowhere.safetensors"], "posttrain.dpo.pairs", "nowhere"),
        (
            [offline, "posttrain.dpo={collect: 2, batch: 3}"],
            "posttrain.dpo.batch",
            "at most the 2 pairs",
        ),
        (["model.freeze=true", "lora.enabled=false"], "no parameter is trainable"),
        (["--resume"], "--resume", "no whole checkpoint"),
    ):
        refused(capsys, posttrain.main, [*command(shop, "dry", *words), "--dry-run"], *parts)
    refused(
        capsys, posttrain.main, command(shop, "there", light, "--dry-run"), "already holds a run"
    )
    assert not (shop.folder / "runs/dry").exists()
    posttrain.main(command(shop, "there", light, "--resume", "--dry-run", "train.lr=0.5"))
    told = capsys.readouterr().out
    assert "at update 2" in told and "train.lr" in told
    posttrain.main(command(shop, "there", light, "--resume"))
    assert "nothing left to do: train.max_steps is 2" in capsys.readouterr().out


def test_mistakes_are_told_before_anything_runs(shop, capsys):
    for word, *parts in (
        ("posttrain.micro_batch=3", "posttrain.micro_batch", "must divide"),
        ("posttrain.group_size=1", "posttrain.group_size"),
        (
            "posttrain={algorithm: dpo, prompts_per_epoch: 4, group_size: 4, micro_batch: 2}",
            "posttrain.micro_batch",
            "whole groups",
        ),
        ("posttrain={algorithm: srpo, kl: {beta: 0.1}}", "posttrain.kl.beta", "no effect in srpo"),
        (
            "posttrain={algorithm: srpo, srpo: {scorer: {type: clip, path: x, weight: 2}}}",
            "posttrain.srpo.scorer",
            "remove them",
        ),
        ("posttrain={algorithm: nft, kl: {space: exact}}", "posttrain.kl.space", "must be v"),
        ("posttrain.draws_per_sample=2", "posttrain.draws_per_sample", "no effect in grpo"),
        (
            "posttrain={algorithm: dpo, updates_per_epoch: 2}",
            "posttrain.updates_per_epoch",
            "without epochs",
        ),
        ("posttrain.advantage={mode: gdpo, std: group}", "posttrain.advantage.std", "gdpo"),
        ("posttrain.rewards=[{type: brightness_rank, batch: 2}]", "batch", "groupwise"),
        ("posttrain.rollout={dynamics: ode}", "posttrain.rollout.dynamics", "flow_sde"),
        (
            "posttrain.rollout={steps: 3, sde_steps: [2]}",
            "posttrain.rollout.sde_steps",
            "last step",
        ),
        ("posttrain.srpo={sigma_window: [0.99, 0.5]}", "sigma_window"),
        ("posttrain.rewards=[{type: hps, path: x}]", "weights"),
        ("posttrain.rewards=[{type: clip, path: nowhere}]", "config.json"),
        ("posttrain.rewards=[{type: aesthetics}]", "brightness", "pickscore"),
        ("train.objective=ddpm", "train.objective", "linear path"),
        ("train.init_from=null", "train.init_from"),
    ):
        refused(capsys, posttrain.main, command(shop, "mistake", word), *parts)
    assert not (shop.folder / "runs" / "mistake").exists()


def test_latents_can_be_rewarded_without_a_decoder(tmp_path, monkeypatch):
    running = session(tmp_path, epochs=1, algorithm="grpo", rewards=(LatentNorm(),))
    monkeypatch.setattr(running.tokenizer, "decode", None)
    for rollout in running.rollouts.collect(0):
        assert 0 < rollout.rewards.result()["latent_norm"].min() <= 1
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        *thorough((("posttrain.micro_batch=1", "posttrain.updates_per_epoch=2"),)),
        pytest.param(
            ("posttrain.algorithm=dpo", "posttrain.dpo={collect: 4, batch: 2, beta: 5}"),
            marks=pytest.mark.slow,
        ),
        pytest.param((*SRPO_WORDS, "posttrain.micro_batch=1"), marks=pytest.mark.slow),
    ],
    ids=("grpo", "dpo", "srpo"),
)
def test_two_processes_are_one(shop, words, request):
    """Each update takes the same samples, and their mean, however many processes share it."""
    name = request.node.callspec.id
    words = [*words, "train.max_steps=4", "ema.enabled=false"]
    posttrain.main(command(shop, f"alone_{name}", *words))
    together = command(shop, f"together_{name}", *words)
    drive("ranks_of_command", "2", "mmdit.scripts.posttrain", *together, seconds=200)
    one, two = (
        read_tensors(latest(shop.folder / "runs" / name) / "model.safetensors")
        for name in (f"alone_{name}", f"together_{name}")
    )
    start = read_tensors(latest(shop.folder / "runs" / "base") / "ema.safetensors")
    assert any(not torch.equal(one[name], start[name]) for name in start)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    alone, shared = (
        (shop.folder / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for run in (f"alone_{name}", f"together_{name}")
    )
    for row, other in zip(map(json.loads, alone), map(json.loads, shared), strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"timestamp", "wall_s", "run_id", "seconds", "reward_seconds"}:
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key


@pytest.mark.slow
def test_the_show_runs_small(tmp_path, monkeypatch):
    """The command of the figures in the README, from the cache to the curves."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "VTP"))))
    monkeypatch.chdir(ROOT)
    model = [
        "model.size=null",
        "model.dim=16",
        "model.depth=2",
        "model.num_heads=2",
        "text_encoder.dim=16",
        "text_encoder.num_heads=2",
    ]
    train = [
        "train.batch_size=8",
        "train.precision=fp32",
        "train.sample_num_steps=2",
        "train.max_steps=2",
    ]
    small = [
        "prompts_per_epoch=2",
        "group_size=4",
        "micro_batch=4",
        "eval_prompts=4",
        "prompt_count=16",
    ]
    report = show_posttrain.main(
        [
            "--out",
            str(tmp_path / "show"),
            "--seconds",
            "200",
            "--device",
            "cpu",
            "--count",
            "8",
            "--steps",
            "2",
            "--every",
            "1",
            "--judged",
            "4",
            "--runs",
            "null_nft",
            "nft",
            "--overrides",
            *model,
            *train,
            *(f"posttrain.{word}" for word in small),
        ]
    )
    assert report.keys() == {"null_nft", "nft"} and all(
        row["last"]["step"] == 2 and row["replay_most"] == 0 for row in report.values()
    )
    assert {"summary.json", "curves.png", "nft.png", "nft.jsonl", "null_nft.jsonl"} <= {
        path.name for path in (tmp_path / "show").iterdir()
    }
