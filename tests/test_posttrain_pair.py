"""Post-training of one of two experts: who serves which noise level in rollouts, scoring and
evaluation, and that a run which was stopped goes on as if it had not been."""

import os
import signal

import pytest
import torch
from torch import nn

from mmdit.adapters import LoRAConfig, inject
from mmdit.commands import posttrain as align
from mmdit.config import ConfigError
from mmdit.diffusion import FlowMatching, FlowMatchingConfig, guided
from mmdit.interfaces import Boundary, Denoiser, LatentSpec, TextEncoder, TextTokens
from mmdit.interop.wan_weights import load_dit
from mmdit.nn.experts import Experts
from mmdit.posttrain.advantages import advantages
from mmdit.posttrain.loop import post_train as run
from mmdit.posttrain.online import noised, online_epoch, sample_terms, terms
from mmdit.posttrain.posttrain_config import (
    DPOConfig,
    KLConfig,
    NFTConfig,
    PosttrainConfig,
    RatioConfig,
    RolloutConfig,
    SRPOConfig,
)
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.rewards import Brightness, LatentNorm
from mmdit.posttrain.session import Session
from mmdit.posttrain.trained_levels import TrainedLevels
from mmdit.scripts import posttrain
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.ema import EMAConfig
from mmdit.training.learner import Learner
from mmdit.training.parallel import shard
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState
from tests.helpers.thorough import thorough
from tests.helpers.tiny import refused
from tests.helpers.wan_release import DIT, make_release
from tests.test_posttrain_wan import RECIPES, TINY, random_expert

BOUNDARY = 0.7
ALGORITHMS = ("grpo", "guard", "nft", "awm", "dpo", "srpo")


class Ragged(TextEncoder):
    """Texts of one to five words, their padding zero, as a real encoder gives them."""

    dim = TINY.text_dim

    def forward(self, captions: list[str]) -> TextTokens:
        lengths = torch.tensor([1 + len(caption) % 5 for caption in captions])
        words = torch.stack(
            [
                torch.randn(5, self.dim, generator=torch.Generator().manual_seed(len(c)))
                for c in captions
            ]
        )
        valid = torch.arange(int(lengths.max())) < lengths[:, None]
        return TextTokens(torch.where(valid[..., None], words[:, : valid.shape[1]], 0.0), valid)


class Squash:
    """A tokenizer without weights: three channels, made pixels."""

    spec, fingerprint = LatentSpec(channels=16, spatial=8, temporal=4), "squash"

    def decode(self, latents):
        return latents[..., :3].sigmoid().movedim(-1, 2)


def pair_of(model, sibling, trained: str, boundary: float) -> Experts:
    high, low = (sibling, model) if trained == "low" else (model, sibling)
    return Experts(high, low, Boundary(boundary, 1000.0))


def frozen(session: Session) -> nn.Module:
    """Return the expert that is not trained."""
    parts = session.model.networks().values()
    (other,) = (part for part in parts if part is not session.learner.model)
    return other


def paired(
    folder,
    algorithm="grpo",
    trained="low",
    steps=4,
    train=None,
    lora=True,
    world=World(),
    cut=False,
    **changes,
) -> Session:
    """Return a session that trains one of two different experts, with adapters or without,
    captions of unequal length and an evaluation after each update. `cut`: both experts are, over
    the processes of `world`."""
    torch.manual_seed(0)
    networks = {name: random_expert(TINY, torch.float32, "cpu", False) for name in ("high", "low")}
    model = networks.pop(trained)
    (sibling,) = networks.values()
    sibling.requires_grad_(False).eval()
    if lora:
        targets = ("*.cross_attn.[kv]", "*.self_attn.q")
        inject(model, LoRAConfig(enabled=True, rank=2, alpha=2, target_modules=targets))
    between = (0.0, BOUNDARY) if trained == "low" else (BOUNDARY, 1.0)
    objective = FlowMatching(FlowMatchingConfig(between=between))
    learner = Learner(model, Ragged(), objective, Squash.spec)
    if cut:
        shard(learner, world, further=[sibling])
    trains_steps = algorithm in ("grpo", "guard")
    rollout = {"steps": 4, "shift": 2.0}  # noise levels 1, 0.857, 0.667, 0.4, 0
    if trains_steps:
        rollout["sde_steps"] = (2,) if trained == "low" else (0, 1)
    settings = {
        "algorithm": algorithm,
        "prompts_per_epoch": 2,
        "group_size": 2,
        "micro_batch": 4,
        "rewards": (Brightness(),),
        "eval_rewards": (Brightness(), LatentNorm()),
        "rollout": RolloutConfig(**rollout | changes.pop("rollout", {})),
        "ratio": RatioConfig(clip=(-0.1, 0.1)),
        "eval_every_epochs": 1,
        "async_rewards": False,
        "dpo": DPOConfig(collect=4, batch=1, source="offline"),
        "nft": NFTConfig(rate=0.1),
        "srpo": SRPOConfig(sigma_window=(0.6, 0.3) if trained == "low" else (0.95, 0.8)),
    }
    options = {
        "precision": "fp32",
        "lr": 0.01,
        "warmup_steps": 0,
        "max_steps": steps,
        "sample_num_steps": 4,
        "sample_shift": 2.0,
        "sample_solver": "euler",
        "sample_cfg_scale": 1.0,
        "weight_decay": 0.0,
        "save_every_steps": 1,
        "keep_last": 0,
    }
    options = TrainConfig(**options | (train or {}))
    state = TrainState.create(learner, options, EMAConfig(enabled=algorithm == "awm", decay=0.9))
    prompts = Prompts(["a", "a cat on a", "two of them, and", "a dog in"])

    def store(files, best):
        meta = checkpoint.Meta(state.step, {}, Squash.spec, "squash")
        if best:
            checkpoint.save(folder / "best", meta, {"model": files["model"]}, 1, world=world)
        else:
            checkpoint.save(folder, meta, files, 0, world=world)

    return Session(
        config=PosttrainConfig(**settings | changes),
        train=options,
        seed=0,
        state=state,
        tokenizer=Squash(),
        prompts=prompts,
        evaluated={"seen": prompts.at([0, 1, 2])},
        width=32,
        height=32,
        frames=1,
        run_dir=folder,
        save=store,
        model=pair_of(model, sibling, trained, BOUNDARY),
        world=world,
    )


def stored(folder, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = sorted(checkpoint.folder_of(folder, step).glob("*.safetensors"))
    return {
        f"{file.stem}/{name}": value
        for file in files
        for name, value in checkpoint.read_tensors(file).items()
    }


def assert_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "algorithm, trained",
    [
        ("nft", "low"),
        *thorough(*((name, "low") for name in ALGORITHMS if name != "nft")),
        *(pytest.param(name, "high", marks=pytest.mark.slow) for name in ALGORITHMS),
    ],
)
def test_a_resumed_run_is_the_run_although_it_has_not_evaluated_yet(tmp_path, algorithm, trained):
    assert run(paired(tmp_path / "straight", algorithm, trained, steps=2))
    assert run(paired(tmp_path / "cut", algorithm, trained, steps=1))
    again = paired(tmp_path / "cut", algorithm, trained, steps=2)
    again.restore(checkpoint.folder_of(tmp_path / "cut", 1))
    assert run(again)
    first, last = (stored(tmp_path / "straight", step) for step in (1, 2))
    assert_equal(last, stored(tmp_path / "cut", 2))
    assert any(not torch.equal(value, last[name]) for name, value in first.items())


def test_evaluation_leaves_every_part_in_the_mode_it_had(tmp_path):
    for trained in ("high", "low"):
        session = paired(tmp_path, trained=trained)
        parts = [*session.learner.modules(), *frozen(session).modules()]
        session.learner.text_encoder.train()
        before = [part.training for part in parts]
        session.evaluator.evaluate()
        assert [part.training for part in parts] == before


@pytest.mark.parametrize("algorithm", ["grpo", *thorough("srpo")])
def test_a_run_that_is_asked_to_stop_has_the_checkpoint_of_one_that_is_not(
    tmp_path, algorithm, monkeypatch
):
    often = {"eval_every_epochs": 2}
    assert run(paired(tmp_path / "straight", algorithm, **often))
    session, apply = paired(tmp_path / "asked", algorithm, **often), Session.update

    def asked_in_the_third(updates):
        if session.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return apply(updates)

    monkeypatch.setattr(Session, "update", asked_in_the_third)
    assert not run(session) and session.state.step == 3
    assert_equal(stored(tmp_path / "straight", 3), stored(tmp_path / "asked", 3))
    again = paired(tmp_path / "asked", algorithm, **often)
    again.restore(checkpoint.folder_of(tmp_path / "asked", 3))
    assert run(again)
    assert_equal(stored(tmp_path / "straight", 4), stored(tmp_path / "asked", 4))
    if (tmp_path / "straight/best").exists() or (tmp_path / "asked/best").exists():
        kept = [checkpoint.latest(tmp_path / name / "best") for name in ("straight", "asked")]
        assert kept[0].name == kept[1].name
        assert_equal(*(checkpoint.read_tensors(folder / "model.safetensors") for folder in kept))


@pytest.mark.parametrize(
    "algorithm, rule, wider",
    [
        *thorough(("grpo", {"max_drift": 1e-9}, {"max_drift": 1e9})),
        ("srpo", {"srpo": SRPOConfig(sigma_window=(0.6, 0.3), max_std_growth=1e-3)}, {}),
    ],
)
def test_a_run_that_a_stop_rule_ended_has_ended(tmp_path, algorithm, rule, wider, capsys):
    assert run(paired(tmp_path, algorithm, **rule))
    (end,) = checkpoint.complete(tmp_path)
    before = stored(tmp_path, 1)
    for _ in range(2):
        again = paired(tmp_path, algorithm, **rule)
        again.restore(end)
        capsys.readouterr()
        assert run(again) and again.state.step == 1
        assert (
            "nothing is trained, for a stop rule ended this run at update 1"
            in capsys.readouterr().out
        )
    assert checkpoint.complete(tmp_path) == [end]
    assert_equal(before, stored(tmp_path, 1))
    more = paired(tmp_path, algorithm, **wider)
    more.restore(end)
    assert run(more) and more.state.step == 4


# ── who serves which noise level ──────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("trained", ["high", "low"])
def test_rollouts_scores_and_evaluation_ask_each_expert_at_its_own_levels(
    tmp_path, trained, monkeypatch
):
    session, asked = paired(tmp_path, trained=trained), {"trained": [], "sibling": []}
    for name, network in (("trained", session.learner.model), ("sibling", frozen(session))):
        inner = network.forward
        monkeypatch.setattr(
            network,
            "forward",
            lambda x, t, *rest, name=name, inner=inner, **more: (
                asked[name].extend(t.tolist()),
                inner(x, t, *rest, **more),
            )[1],
        )
    mine, others = ("sibling", "trained") if trained == "low" else ("trained", "sibling")
    for work in (lambda: session.rollouts.collect(0), session.evaluator.evaluate):
        asked["trained"].clear(), asked["sibling"].clear()
        work()
        assert asked[mine] and asked[others]
        assert min(asked[mine]) >= 1000 * BOUNDARY > max(asked[others])


@pytest.mark.parametrize("trained", ["high", "low"])
def test_evaluation_draws_what_both_experts_draw_together(tmp_path, trained):
    session = paired(tmp_path, trained=trained)
    for name, weight in session.learner.model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(weight, std=0.1)
    source = session.evaluator.pipeline()
    assert source.model is session.model and source.model.boundary.time == BOUNDARY
    assert session.model.networks()[trained] is session.learner.model
    latents, pixels = session.evaluator.draw(session.prompts.captions[:2], 0)
    torch.testing.assert_close(
        session.tokenizer.decode(session.learner.spec.denormalize(latents)), pixels
    )
    values = session.evaluator.evaluate()
    latents, pixels = session.evaluator.draw(session.evaluated["seen"].captions, 0)
    rms = latents.flatten(1).square().mean(1).sqrt()
    assert values["seen_latent_norm"] == pytest.approx(
        torch.exp(-(rms - 1).square()).mean().item(), rel=1e-5
    ), "latents, not pixels"
    assert values["seen_brightness"] == pytest.approx(pixels.mean().item(), rel=1e-5)


def test_each_expert_has_its_own_guidance(tmp_path):
    for trained, level, own in (
        ("low", 0.5, True),
        ("low", 0.9, False),
        ("high", 0.9, True),
        ("high", 0.5, False),
    ):
        session = paired(tmp_path, trained=trained, rollout={"guidance": 4.0, "guidance_low": 2.0})
        text, x = session.text[torch.tensor([0, 1])], torch.randn(2, *session.shape)
        network = session.learner.model if own else frozen(session)
        scale = 4.0 if level > BOUNDARY else 2.0
        with torch.no_grad():
            clean = guided(session.learner.objective, network, text, scale)(x, level)
            torch.testing.assert_close(session.policy.velocity(text)(x, level), (x - clean) / level)
    session = paired(tmp_path, trained="low", rollout={"guidance": 3.0})
    same = paired(tmp_path, trained="low", rollout={"guidance": 3.0, "guidance_low": 3.0})
    with torch.no_grad():
        assert torch.equal(
            session.policy.velocity(text)(x, 0.5), same.policy.velocity(text)(x, 0.5)
        )


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.7, 0.8745])
def test_a_level_is_the_expert_s_that_drew_it_however_it_is_rounded(boundary):
    """Times are drawn in float64 and asked for in float32: one that rounding takes to the boundary
    stays with its expert."""
    exact = torch.tensor(boundary, dtype=torch.float64)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    pair = Experts(Denoiser(), Denoiser(), Boundary(boundary, 1000.0))
    objective = FlowMatching(FlowMatchingConfig())
    low, high = (TrainedLevels(pair, name, objective) for name in ("low", "high"))
    below, above = torch.nextafter(exact, zero), torch.nextafter(exact, one)
    drawn = low.inside(torch.stack([below, 0.5 * exact]).float())
    assert (
        all(low.contains(level) and not high.contains(level) for level in drawn.tolist())
        and drawn[1] == (0.5 * exact).float()
    )
    drawn = high.inside(torch.stack([exact, above, one]).float())
    assert all(high.contains(level) and not low.contains(level) for level in drawn.tolist())
    assert low.contains(low.inside(below.float()[None])) and high.contains(boundary)
    with pytest.raises(ValueError, match="both sides"):
        low.contains(torch.tensor([0.1, 1.0]))


@pytest.mark.parametrize(
    "expert, boundary, most",
    [("high", 0.95, 1.0), ("low", 0.2, 1.0), ("low", 0.7, 1.0), ("", 0, 0.6)],
)
def test_the_drift_is_measured_at_levels_that_the_trained_network_has_learnt(
    expert, boundary, most
):
    """None of the usual three is served by the high-noise expert above 0.9: its first epoch ended
    with a division by zero."""
    pair = Experts(Denoiser(), Denoiser(), Boundary(boundary, 1000.0)) if expert else Denoiser()
    objective = FlowMatching(FlowMatchingConfig(t_max=most))
    levels = TrainedLevels(pair, expert, objective)
    probes = levels.probes((0.9, 0.6, 0.3))
    clean, noisy = levels.between
    assert probes and all(levels.contains(t) and clean <= t <= noisy <= most for t in probes)


def test_a_window_of_levels_that_were_never_learnt_is_refused():
    """The network would be asked at its nearest time, for states of another."""
    config = PosttrainConfig(algorithm="srpo")
    for most in (1.0, 0.98, 0.9):
        objective = FlowMatching(FlowMatchingConfig(t_max=most))
        levels = TrainedLevels(Denoiser(), "", objective)
        if most >= 0.98:
            levels.check(config, [])
            continue
        with pytest.raises(ConfigError, match=r"sigma_window: .*from 0 to 0.9 alone"):
            levels.check(config, [])


def test_levels_of_an_update_are_the_trained_expert_s(tmp_path, monkeypatch):
    for trained in ("low", "high"):
        session = paired(tmp_path, "nft", trained)
        end = BOUNDARY * (1 - 1e-16) if trained == "low" else BOUNDARY
        monkeypatch.setattr(
            session.learner.objective,
            "draw_time",
            lambda draws, frames, end=end: torch.full((2,), end, dtype=torch.float64),
        )
        x, _, sigma = noised(session, torch.zeros(2, *session.shape), torch.arange(2), 0, 1)
        assert all(session.levels.contains(level) for level in sigma.tolist())
        session.policy.velocity(session.text[:2])(x, sigma)


# ── slow copies ───────────────────────────────────────────────────────────────────────────────────
def test_nft_compares_with_its_slow_copy_and_the_copy_follows_slowly(tmp_path):
    session = paired(tmp_path, "nft")
    start = {name: value.clone() for name, value in session.policy.old.items()}
    online_epoch(session)
    policy = session.policy.snapshot()
    assert any(not torch.equal(policy[name], start[name]) for name in policy)
    for name, value in session.policy.old.items():
        torch.testing.assert_close(value, 0.1 * start[name] + 0.9 * policy[name])
    rollout = session.rollouts.collect(1)[0]
    worth = torch.ones(len(rollout.prompts))

    def loss() -> float:
        return sum(term.item() for term, _ in sample_terms(session, rollout, worth))

    found = loss()
    session.policy.old = {name: value + 0.5 for name, value in session.policy.old.items()}
    assert loss() != pytest.approx(found, rel=1e-5), "the old velocity is the copy's"
    session.policy.old = session.policy.snapshot()
    assert loss() != pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("algorithm", ["grpo", "nft", "awm", "dpo"])
def test_what_is_held_near_or_compared_with_is_the_copy_and_not_the_policy(tmp_path, algorithm):
    """The reference of a KL and of DPO, and AWM's average: another copy is another loss."""
    changes = {} if algorithm == "dpo" else {"kl": KLConfig(beta=1.0)}
    session = paired(tmp_path, algorithm, **changes, dpo=DPOConfig(source="online", beta=1.0))
    rollout = session.rollouts.collect(0)[0]
    worth = torch.linspace(-1, 1, len(rollout.prompts))

    def loss() -> float:
        return sum(term.item() for term, _ in terms(session, rollout, worth))

    def moved(copy: dict) -> dict:
        return {name: value + 0.3 for name, value in copy.items()}

    found, session.policy.reference = loss(), moved(session.policy.reference)
    assert loss() != pytest.approx(found, rel=1e-6)
    session.policy.reference = session.policy.snapshot()
    assert loss() == pytest.approx(found, rel=1e-6)
    if algorithm == "awm":
        session.state.ema.shadow = moved(session.state.ema.shadow)
        assert loss() != pytest.approx(found, rel=1e-6)


def test_nft_may_roll_out_its_slow_copy(tmp_path):
    drawn = {}
    for policy in ("current", "old"):
        session = paired(tmp_path, "nft", rollout={"policy": policy})
        session.policy.old = {name: value + 0.3 for name, value in session.policy.old.items()}
        drawn[policy] = session.rollouts.collect(0)[0].clean
    session = paired(tmp_path, "nft")
    for weight in session.learner.model.parameters():
        if weight.requires_grad:
            weight.data += 0.3
    assert not torch.equal(drawn["current"], drawn["old"]) and torch.equal(
        drawn["old"], session.rollouts.collect(0)[0].clean
    )


def test_awm_s_old_policy_is_that_of_the_epoch_s_beginning_and_its_average_is_not(tmp_path):
    session = paired(tmp_path, "awm")
    run(session)
    policy = session.policy.snapshot()
    assert all(torch.equal(session.policy.old[name], value) for name, value in policy.items())
    assert any(
        not torch.equal(session.policy.averaged()[name], value) for name, value in policy.items()
    )
    assert any(
        not torch.equal(session.policy.reference[name], value) for name, value in policy.items()
    )


def test_pairs_are_made_by_the_first_model_even_when_they_are_made_late(tmp_path):
    run(paired(tmp_path / "a", "dpo", steps=1))
    first = checkpoint.read_tensors(tmp_path / "a/pairs.safetensors")
    (tmp_path / "a/pairs.safetensors").unlink()
    again = paired(tmp_path / "a", "dpo", steps=2)
    again.restore(checkpoint.folder_of(tmp_path / "a", 1))
    run(again)
    assert_equal(first, checkpoint.read_tensors(tmp_path / "a/pairs.safetensors"))


# ── the command ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_command_trains_the_expert_that_is_named_and_freezes_the_other(
    tmp_path, expert, monkeypatch
):
    from dataclasses import replace

    release = make_release(tmp_path / "release", replace(DIT, in_dim=16, out_dim=16), pair=True)
    sessions = []
    monkeypatch.chdir(RECIPES[0].parents[2])
    monkeypatch.setattr(align, "post_train", lambda session: sessions.append(session) or True)
    words = [
        f"{section}.name_or_path={release}" for section in ("tokenizer", "text_encoder", "model")
    ]
    words += [
        f"model.expert={expert}",
        "video.width=64",
        "video.height=32",
        "text_encoder.cache_dir=''",
        f"output_dir={tmp_path}",
        "posttrain.rewards=[{type: brightness}]",
        "posttrain.eval_rewards=[{type: brightness}]",
        "model.dtype=float32",
    ]
    assert (
        posttrain.main(["--config", "configs/posttrain/wan_awm.yaml", "--device", "cpu", *words])
        == 0
    )
    (session,) = sessions
    assert session.levels.expert == expert and session.config.rollout.guidance_low == 3.0
    networks = {
        expert: session.learner.model,
        "low" if expert == "high" else "high": frozen(session),
    }
    for name, network in networks.items():
        released = load_dit(release, expert=name).state_dict()
        own = network.state_dict()
        assert all(torch.equal(own[key], value) for key, value in released.items())
    assert not any(weight.requires_grad for weight in frozen(session).parameters())


def test_models_that_continue_pictures_are_refused_for_what_they_are(tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    release = make_release(tmp_path / "release", replace(DIT, in_dim=36, out_dim=16), pair=True)
    monkeypatch.chdir(RECIPES[0].parents[2])
    words = [
        f"{section}.name_or_path={release}" for section in ("tokenizer", "text_encoder", "model")
    ]
    words += [
        "video.width=64",
        "video.height=32",
        "text_encoder.cache_dir=''",
        f"output_dir={tmp_path}",
        "model.boundary=null",
        "posttrain.rewards=[{type: brightness}]",
        "posttrain.eval_rewards=null",
    ]
    given = ["--config", "configs/posttrain/wan_awm.yaml", "--device", "cpu", "--dry-run", *words]
    refused(
        capsys,
        posttrain.main,
        given,
        "model.name_or_path: is I2V",
        "post-train a T2V or TI2V model",
    )
    refused(
        capsys,
        posttrain.main,
        [*given, "tokenizer.picture=first"],
        "tokenizer.picture: is first",
        "no pictures",
    )


def test_differences_of_rounding_are_no_reason_to_learn():
    groups = torch.tensor([0, 0, 1, 1])
    for weight in (1.0, 1e-3):
        for std in ("global", "group"):
            noise = {"a": torch.tensor([0.2, 0.20001, 0.5, 0.50001], dtype=torch.float64)}
            value, report = advantages(noise, {"a": weight}, groups, "sum", std)
            assert (value == 0).all() and report["zero_std_share"] == 1
            real = {"a": torch.tensor([0.2, 0.21, 0.5, 0.51], dtype=torch.float64)}
            assert advantages(real, {"a": weight}, groups, "sum", "group")[
                0
            ].abs() == pytest.approx(torch.ones(4))
