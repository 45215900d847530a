"""Two experts on one base: whose turn it is, what times it sees, and that the other one rests."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from mmdit.adapters import (
    LoRAConfig,
    adapters,
    inject,
    lora_state,
    merge,
    remove,
)
from mmdit.commands.inspect_adapter import changes
from mmdit.config import ConfigError
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.mixture import MixedPlan
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig, SamplerConfig, build_objective
from mmdit.diffusion.expert_schedule import ExpertSchedule, FixedTimes
from mmdit.experiment.load import load_pipeline
from mmdit.experiment.turns import check_turns
from mmdit.interfaces import Boundary, TextTokens
from mmdit.interop.lora_formats import experts_in, load_lora
from mmdit.interop.wan_weights import load_dit
from mmdit.models import TreadConfig, VideoMMDiTConfig, build_model
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.nn.experts import Experts, shared_copy
from mmdit.rng import Draws
from mmdit.scripts import export, sample, train_t2v
from mmdit.training import checkpoint
from mmdit.training.distributed import World, process_group
from mmdit.training.ema import EMAConfig
from mmdit.training.learner import Learner
from mmdit.training.pipeline import SampleSettings
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState
from mmdit.training.trainer import Trainer
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, refused
from tests.helpers.wan_release import DIT, FLF2V, I2V, I2V_21, TI2V, random_dit
from tests.test_batches import listing
from tests.test_metrics import DOCUMENTED, records
from tests.test_trainer import SPEC, assert_same, batches, learner, run_ranks
from tests.test_wan_training import Shop as WanShop

NAMES = ("high", "low")
UNIFORM = build_objective("flow_matching")
LAWS = [
    (UNIFORM, lambda t: t),
    (
        build_objective(
            "flow_matching",
            flow_matching=FlowMatchingConfig(time="logit_normal", logit_mean=0.3, shift=3.0),
        ),
        lambda t: torch.special.ndtr(torch.logit(t / (3 - 2 * t)) - 0.3),
    ),
    (
        build_objective(
            "flow_matching", flow_matching=FlowMatchingConfig(shift=5.0, t_min=0.01, t_max=0.99)
        ),
        lambda t: (u := (t - 0.01) / 0.98) / (5 - 4 * u),
    ),
]


def plan(objective=UNIFORM, boundary=0.875, trained=NAMES, seed=0, **options):
    return ExpertSchedule(
        Boundary(boundary, objective.time_scale), objective, trained, seed, **options
    )


# ── whose turn ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("every", [*thorough(1), 7, *thorough(100)])
@pytest.mark.parametrize("trained", [("high",), ("low",), NAMES])
def test_the_turn_is_what_a_running_loop_would_count_from_any_resume(trained, every):
    position, left, counted = 0, every, []  # a loop with a state
    for _ in range(1000):
        counted.append(trained[position])
        left -= 1
        if not left:
            position, left = (position + 1) % len(trained), every
    for start in range(0, 1000, 37):  # a resume builds everything anew
        again = plan(trained=trained, switch_every=every)
        steps = range(start, min(start + 40, 1000))
        assert [again.active(step) for step in steps] == counted[start : start + 40]


def test_turns_in_step_with_the_data_are_refused():
    """Refuse that one expert never sees what the other is trained on: both are spread evenly."""
    video = VideoConfig(num_frames=2, image_fraction=0.5)
    alone = BatchPlan(listing((8, 4, 2, 2)), video, 4, seed=3)
    check_turns(plan(switch_every=2), alone, 100)
    check_turns(plan(switch_every=1), alone, 10)  # so few steps may fall so by chance
    check_turns(plan(routing="by_sigma"), alone, 100)
    check_turns(plan(trained=("low",), switch_every=1), alone, 100)
    with pytest.raises(ConfigError, match="all 50 steps on (single frames|clips) .* Take 2"):
        check_turns(plan(switch_every=1), alone, 100)
    sources = [BatchPlan(listing((8, 1, 2, 2)), VideoConfig(), 4, 3, name=name) for name in "ab"]
    mixed = MixedPlan(sources, [19, 1], 400)
    check_turns(plan(switch_every=11), mixed, 400)
    with pytest.raises(ConfigError, match="pictures of the source b .* Take 11"):
        check_turns(plan(switch_every=10), mixed, 400)


def test_by_sigma_visits_are_those_of_the_law():
    uniform = plan(routing="by_sigma", seed=3)
    visits = [uniform.active(step) for step in range(8000)]
    assert visits.count("high") / 8000 == pytest.approx(
        0.125, abs=4 * math.sqrt(0.125 * 0.875 / 8000)
    )
    assert visits[5000:5050] == [
        plan(routing="by_sigma", seed=3).active(step) for step in range(5000, 5050)
    ]
    assert visits[:50] != [plan(routing="by_sigma", seed=4).active(step) for step in range(50)]
    assert {plan(routing="by_sigma", trained=("high",)).active(step) for step in range(50)} == {
        "high"
    }
    clips = plan(
        build_objective("flow_matching", flow_matching=FlowMatchingConfig(shift_by_frames=True)),
        routing="by_sigma",
    )
    assert clips.mass("high", 1) == pytest.approx(0.125, abs=1e-6)
    assert clips.mass("high", 16) == pytest.approx(
        1 - 0.875 / (4 - 3 * 0.875), abs=1e-6
    )  # shifted by 4


# ── at which times ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("objective, law", LAWS)
@pytest.mark.parametrize("boundary", [0.9, 0.875, 0.3])
def test_times_follow_the_law_truncated_to_the_range(objective, law, boundary):
    own, draws = plan(objective, boundary), Draws.of(1, 2, 100_000)
    for name, (low, high) in (
        ("high", (boundary, objective.t_range[1])),
        ("low", (objective.t_range[0], boundary)),
    ):
        drawn = objective.draw_time(own.draws(draws, name, 1))
        told = (drawn * objective.time_scale).float()
        assert (own.boundary.is_high(told) == (name == "high")).all()
        assert (drawn.float() >= torch.tensor(low).float()).all() and (drawn <= high).all()
        ends = law(torch.tensor([low, high], dtype=torch.float64))
        values = ((law(drawn) - ends[0]) / (ends[1] - ends[0])).sort().values
        steps = torch.arange(100_001) / 100_000
        distance = torch.maximum(
            (values - steps[:-1]).abs().max(), (values - steps[1:]).abs().max()
        )
        assert distance * math.sqrt(100_000) < 1.63, "Kolmogorov-Smirnov, p > 0.01"
        assert own.mass(name) == pytest.approx((ends[1] - ends[0]).item(), abs=1e-6)
    other = own.draws(draws, "low", 1)
    assert torch.equal(other.normal("noise", 3), draws.normal("noise", 3)), (
        "all but the time is drawn as ever"
    )


def test_levels_of_ddpm_are_shared_out_too():
    objective = build_objective("ddpm", diffusion=DiffusionConfig(num_timesteps=100))
    own, draws = plan(objective, 0.5), Draws.of(0, 0, 20_000)
    levels = [
        set((objective.draw_time(own.draws(draws, name, 1)) * 100).round().int().tolist())
        for name in NAMES
    ]
    assert levels == [set(range(50, 101)), set(range(1, 50))]


def test_the_boundary_is_noisy_and_belongs_to_high():
    for scale in (1.0, 1000.0):
        t = torch.tensor([0.9 * scale, 0.9 * scale * (1 + 1e-6), 0.9 * scale * (1 - 1e-6)])
        assert Boundary(0.9, scale).is_high(t).tolist() == [True, True, False]
    whole = torch.tensor([900.0, 899.99])
    assert Boundary(0.8995, 1000.0).is_high(whole).tolist() == [True, True]
    assert Boundary(0.8995, 1000.0).is_high(whole, whole_times=True).tolist() == [True, False]
    with pytest.raises(ConfigError, match="no time to the expert 'high'"):
        plan(build_objective("flow_matching", flow_matching=FlowMatchingConfig(t_max=0.8)))


# ── the networks ──────────────────────────────────────────────────────────────────────────────────
def paired(dropout=0.0, trained=NAMES, wake=False, **options) -> Learner:
    base = learner(dropout)
    for weight in base.parameters():
        torch.nn.init.normal_(
            weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel())
        )
    own = plan(boundary=0.6, trained=trained, **options)
    model = Experts(base.model, shared_copy(base.model), own.boundary)
    result = Learner(model, base.text_encoder.requires_grad_(False), base.objective, SPEC, 0.3, own)
    for number, part in enumerate(result.parts().values()):
        inject(part, LoRAConfig(enabled=True, rank=2, dropout=dropout), number)
    for name, weight in model.named_parameters() if wake else ():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(weight, std=0.3)
    return result


def test_samples_find_their_expert_and_a_straddling_training_batch_is_refused():
    model = paired(wake=True).model
    x, text = (
        torch.randn(4, 1, 2, 4, 3),
        TextTokens(torch.randn(4, 3, 16), torch.ones(4, 3, dtype=torch.bool)),
    )
    t = torch.tensor([900.0, 600.0, 599.9, 10.0])
    high, low = (model.get_submodule(name)(x, t, text) for name in NAMES)
    assert not torch.allclose(high, low)
    with pytest.raises(ValueError, match="10 … 900.*high, low"):
        model.train()(x, t, text)
    torch.testing.assert_close(
        model.eval()(x, t, text), torch.cat([high[:2], low[2:]]), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(
        model.train()(x[:2], t[:2], text[:2]), model(x[:2], t[:2], text[:2], expert="high")
    )
    plain = learner().model
    assert {n.removeprefix("low.") for n in model.state_dict() if n.startswith("low.")} == {
        n for n in lora_state(model.low) if "alpha" not in n
    }
    assert {n for n in model.state_dict() if n.startswith("high.") and ".lora_" not in n} == {
        f"high.{n}" for n in plain.state_dict()
    }
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in plain.parameters()
    ) + sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n), "one base"


@torch.no_grad()
@pytest.mark.parametrize("times", [(900.0, 700.0), (900.0, 10.0), (10.0, 20.0)])
def test_together_both_are_called_whatever_the_times_are(times):
    """Processes that have a part of each network would wait for each other's parts else."""
    model = paired(wake=True).model.eval()
    x, words = torch.randn(2, 1, 2, 4, 3), torch.randn(2, 3, 16)
    text, calls = TextTokens(words, torch.ones(2, 3, dtype=torch.bool)), []
    expected = model(x, torch.tensor(times), text)
    for name in NAMES:
        network = model.get_submodule(name)
        network.register_forward_pre_hook(lambda _, inputs, name=name: calls.append(name))
    model.together = True
    torch.testing.assert_close(model(x, torch.tensor(times), text), expected)
    assert calls == ["high", "low"]


def wan_pair(config):
    """Two networks with nothing in common, and what they may be told of four samples, by name."""
    networks = {}
    for seed, name in enumerate(NAMES):
        networks[name] = WanDenoiser(config)
        networks[name].load_state_dict(random_dit(config, seed).state_dict())
    x, words = torch.randn(4, 3, 4, 4, config.out_dim), torch.randn(4, 3, config.text_dim)
    text = TextTokens(words, torch.ones(4, 3, dtype=torch.bool))
    inputs = {"whole_times": True}
    if config.in_dim == config.out_dim == 48:
        inputs["given"] = 1
    if config.in_dim > config.out_dim:
        inputs["y"] = torch.randn(4, 3, 4, 4, config.in_dim - config.out_dim)
    if config.image_dim:
        inputs["clip"] = torch.randn(4, config.image_positions or 257, config.image_dim)
    return networks, (x, text), inputs


def own_pair():
    networks = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        networks[name] = build_model(
            VideoMMDiTConfig(dim=16, depth=2, num_heads=2, crop=True, size=None),
            3,
            16,
            TreadConfig(enabled=True, selection_rate=0.5, apply_to=(0, 2)),
        )
        for weight in networks[name].parameters():
            torch.nn.init.normal_(weight, std=0.2)
    text = TextTokens(torch.randn(4, 3, 16), torch.ones(4, 3, dtype=torch.bool))
    inputs = {
        "crop": torch.rand(4, 4),
        "keep": torch.tensor([0, 2, 5, 7]),
    }  # as many tokens as samples
    return networks, (torch.randn(4, 1, 2, 4, 3), text), inputs


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        own_pair,
        lambda: wan_pair(DIT),
        lambda: wan_pair(TI2V),
        lambda: wan_pair(I2V),
        lambda: wan_pair(I2V_21),
        lambda: wan_pair(FLF2V),
    ],
    ids=["own", "t2v", "ti2v", "i2v", "i2v 2.1", "flf2v"],
)
def test_in_evaluation_each_sample_is_told_what_is_its_own(make):
    """Every input that a network may get, a row for each sample or one for all: as if the samples
    came one by one."""
    torch.manual_seed(0)
    networks, (x, text), inputs = make()
    model = Experts(networks["high"], networks["low"], Boundary(0.5, 1000.0)).eval()
    t, whose = torch.tensor([900.0, 100.5, 500.0, 499.0]), ("high", "low", "high", "low")
    shared = {name: value[:1] if name in ("y", "clip") else value for name, value in inputs.items()}
    for told in (inputs, shared):
        alone = []
        for i, name in enumerate(whose):
            own = {
                key: value[i : i + 1] if key in ("y", "clip", "crop") and len(value) > 1 else value
                for key, value in told.items()
            }
            alone.append(networks[name](x[i : i + 1], t[i : i + 1], text[i : i + 1], **own))
        torch.testing.assert_close(
            model(x, t, text, **told), torch.cat(alone), rtol=1e-4, atol=1e-5
        )


def test_fixed_times_keep_their_quantiles_when_they_are_cut():
    draws = FixedTimes(1, 2, torch.arange(4), torch.tensor([0.1, 0.4, 0.6, 0.9]))
    for rows in (slice(1, 3), torch.tensor([3, 0]), torch.tensor([True, False, False, True])):
        some = draws[rows]
        assert torch.equal(some.uniform("time"), draws.uniform("time")[rows])
        assert torch.equal(some.normal("time"), draws.normal("time")[rows])
        assert torch.equal(some.normal("noise", 3), draws.normal("noise", 3)[rows])


def test_a_pair_with_two_bases_fits_the_same_seam():
    """As Wan 2.2's: nothing shared, everything stored, adapters in each."""
    torch.manual_seed(0)
    config = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, freq_dim=8, text_dim=6)
    networks = {name: WanDiT(config) for name in NAMES}
    for weight in itertools.chain(*(network.parameters() for network in networks.values())):
        torch.nn.init.normal_(weight, std=0.2)
    model = Experts(networks["high"], networks["low"], Boundary(0.875, 1000.0)).eval()
    x, text = torch.randn(2, config.in_dim, 1, 4, 4), torch.randn(2, 5, 6)
    for t, name in ((875.0, "high"), (874.9, "low")):
        told = torch.full((2,), t)
        assert torch.equal(model(x, told, text), networks[name](x, told, text))
    assert len(model.state_dict()) == 2 * len(networks["high"].state_dict())
    for network in networks.values():
        inject(network, LoRAConfig(enabled=True, rank=2, target_modules=("cross_attn.k",)))
    assert {name.partition(".")[0] for name in adapters(model)} == set(NAMES)


def test_a_wan_pair_trains_in_one_run_and_is_sampled(tmp_path):
    """Bases frozen and not stored, an adapter file for each expert, each step in its times, both
    used in sampling."""
    shop = WanShop(tmp_path, pair=True)
    words = [
        "lora={enabled: true, rank: 2, alpha: 4, target_modules: [q, v, ffn.0]}",
        "train.lr=0.05",
        "train.max_steps=5",
        "train.save_every_steps=5",
        "ema.enabled=false",
        "experts={enabled: true, switch_every: 2}",
    ]
    run = shop.train("pair", *words)
    assert [(record["expert"], record["sigma_mean"] >= 0.875) for record in records(run)] == [
        (name, name == "high") for name in ("high", "high", "low", "low", "high")
    ]
    folder = checkpoint.latest(run)
    stored = checkpoint.read_tensors(folder / "model.safetensors")
    assert stored and all(".lora_" in name for name in stored if name.startswith("model."))
    files = {name: checkpoint.read_tensors(folder / f"lora_{name}.safetensors") for name in NAMES}
    assert all(
        any(value.any() for key, value in own.items() if key.endswith("lora_B"))
        for own in files.values()
    )
    pipeline = load_pipeline(run, "cpu")[0]
    for name, model in pipeline.model.networks().items():
        one = load_dit(shop.release, expert=name)
        load_lora(one, folder / f"lora_{name}.safetensors")
        weights = merge(one).state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-6)
    assert pipeline.model.boundary.time == 0.875
    assert torch.isfinite(
        pipeline(["a red star"], 32, 32, 5, SampleSettings(SamplerConfig(steps=3)))
    ).all()
    with pytest.raises(SystemExit):
        shop.train("odd", *words, "experts.boundary=0.8", "model.boundary=0.9")


# ── training ──────────────────────────────────────────────────────────────────────────────────────
def trained(
    folder,
    steps=8,
    world=World(),
    resume_at=None,
    look=None,
    model=None,
    update_every=1,
    **options,
):
    config = TrainConfig(
        **{
            "precision": "fp32",
            "batch_size": 8,
            "lr": 3e-3,
            "warmup_steps": 2,
            "max_steps": steps,
            "log_every_steps": 1,
            "save_every_steps": 1,
            "keep_last": 0,
            "weight_decay": 0.1,
            **options,
        }
    )
    average = EMAConfig(decay=0.9, update_every=update_every)
    state = TrainState.create(model or paired(dropout=0.2, switch_every=2), config, average)
    if resume_at is not None:
        state.restore(checkpoint.folder_of(folder, resume_at))

    def save(state):
        if look:
            look(state)
        meta = checkpoint.Meta(state.step, {}, SPEC, "test")
        checkpoint.save(folder, meta, state.files(), 0, world=world, notes=state.notes())

    Trainer(config, 5, state, batches(world.rank, world.size), world, folder, save).run()
    return state


def test_the_average_follows_both_experts_whatever_their_turns_are(tmp_path):
    """Updates at every second step, turns of one: all of them come after steps of one expert."""
    seen = []
    model = paired(switch_every=1)
    trained(
        tmp_path,
        8,
        look=lambda state: seen.append({n: v.clone() for n, v in state.ema.shadow.items()}),
        model=model,
        update_every=2,
    )
    for step in range(3, 8):
        moved = {
            n.split(".")[1] for n in seen[0] if not torch.equal(seen[step][n], seen[step - 1][n])
        }
        assert moved == (set(NAMES) if step % 2 else set())  # seen[1] is of two steps


@pytest.mark.parametrize("routing", [*thorough("block"), "by_sigma"])
def test_the_resting_expert_is_left_alone_bit_for_bit(tmp_path, routing):
    """Parameters, optimizer state, averages and signs; the base never moves; each expert learns."""
    seen = []

    def look(state):
        seen.append(
            {
                f"{kind}/{name}": tensor.detach().clone()
                for kind, own in state.files().items()
                for name, tensor in own.items()
            }
        )

    model = paired(switch_every=2, routing=routing)
    start = {f"model/{name}": value.clone() for name, value in model.stored_state().items()}
    state = trained(tmp_path, 12, look=look, model=model)
    turns = [model.experts.active(step, 2) for step in range(12)]
    assert {"high", "low"} == set(turns)
    for step, turn in enumerate(turns):
        before, after = seen[step - 1] if step else start, seen[step]
        moved = {
            name
            for name in after
            if name not in before or not torch.equal(after[name], before[name])
        }
        if not step:
            moved -= {name for name in after if name.startswith(("signs/", "ema/"))}
        prefixes = tuple(f"{kind}/model.{turn}." for kind in ("model", "optimizer", "ema")) + (
            f"signs/{turn}::",
        )
        assert moved and all(name.startswith(prefixes) for name in moved), (
            step,
            turn,
            sorted(moved)[:3],
        )
        assert all(".lora_" in name for name in moved if not name.startswith("signs/"))
    counted = {
        name: {
            int(value)
            for key, value in seen[-1].items()
            if key.startswith(f"optimizer/model.{name}.") and key.endswith("::step")
        }
        for name in NAMES
    }
    assert counted == {name: {turns.count(name)} for name in NAMES}
    assert {name: course.steps for name, course in state.monitor.histories.items()} == {
        name: turns.count(name) for name in NAMES
    }
    assert all(
        records(tmp_path)[-1][f"gradient_stability_{name}"] is not None
        for name in NAMES
        if turns.count(name) > 1
    )
    for record, turn in zip(records(tmp_path), turns):
        assert record["expert"] == turn and (record["sigma_mean"] >= 0.6) == (turn == "high")
        assert (
            record["loss"] == pytest.approx(record[f"loss_{turn}"])
            and record["loss_low" if turn == "high" else "loss_high"] is None
        )
        assert (
            set(DOCUMENTED)
            | {f"{name}_{turn}" for name in ("loss_ema_10", "loss_slope", "gradient_stability")}
            <= record.keys()
        )


@pytest.mark.thorough
def test_every_resume_is_exact_before_and_after_a_switch(tmp_path):
    whole = trained(tmp_path)
    for at in (1, 2, 3, 5):  # until 2 the low expert has no state
        resumed = trained(tmp_path, resume_at=at)
        assert_same(whole, resumed)
        assert resumed.monitor.histories == whole.monitor.histories
        for name, tensor in whole.signs.tensors().items():
            assert torch.equal(tensor, resumed.signs.tensors()[name])


@pytest.mark.slow
def test_two_processes_give_the_same_weights_although_one_expert_rests(tmp_path):
    single = trained(tmp_path / "1", model=paired(switch_every=2))
    run_ranks(tmp_path / "2", 2, __file__)
    stored = checkpoint.read_tensors(checkpoint.folder_of(tmp_path / "2", 8) / "model.safetensors")
    for name, value in single.learner.stored_state().items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-5)
    signs = (
        records(tmp_path / "1")[-1]["gradient_stability"],
        records(tmp_path / "2")[-1]["gradient_stability"],
    )
    assert signs[0] == pytest.approx(signs[1], abs=0.01)


# ── from a config to pictures ─────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("experts"))
    shop.base = shop.train("base", "train.max_steps=8")
    shop.words = [
        f"train.init_from={shop.base}",
        "lora.enabled=true",
        "lora.rank=2",
        "lora.alpha=4",
        "train.lr=0.05",
        "train.max_steps=8",
        "train.save_every_steps=4",
        "train.cfg_dropout_prob=0",
        "ema.enabled=false",
    ]
    return shop


def draw(learner, t):
    """What the model says at one noise level."""
    text = learner.text_encoder(["a red star", "a blue ring"])
    x = Draws.of(0, 0, 2).normal("x", 1, 2, 3, 8)
    with torch.no_grad():
        return learner.model(x, torch.full((2,), 1000.0 * t), text)


@pytest.mark.thorough
def test_from_a_config_to_files_and_pictures(shop):
    """Each expert's file on the plain base gives what the pair gives on its side of the boundary;
    combined files, exports and the checkpoint agree; sampling goes through both."""
    run = shop.train("pair", *shop.words, "experts={enabled: true, boundary: 0.6, switch_every: 2}")
    folder = checkpoint.latest(run)
    pair = load_pipeline(run, "cpu")[0].learner
    files = {name: folder / f"lora_{name}.safetensors" for name in NAMES}
    told = {}
    both = changes(str(run), None, None)
    for name, t in (("high", 0.8), ("low", 0.2)):
        assert [change.delta for change in changes(str(run), None, name)] == [
            c.delta for c in both if c.layer.startswith(name)
        ]
        one = load_pipeline(shop.base, "cpu")[0].learner
        plain = draw(one, t)
        load_lora(one.model, files[name])
        told[name] = draw(one, 0.8), draw(one, 0.2)
        torch.testing.assert_close(draw(pair, t), draw(one, t), rtol=1e-4, atol=1e-5)
        assert (draw(pair, t) - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no pair of experts"):
        changes(str(shop.base), None, "low")
    assert (told["high"][0] - told["low"][0]).abs().max() > 1e-3
    export.main(
        [
            "--checkpoint",
            str(run),
            "--out",
            str(shop.folder / "pair.safetensors"),
            "--dtype",
            "fp32",
        ]
    )
    again = load_pipeline(shop.folder / "pair.safetensors", "cpu")[0].learner
    combined = load_pipeline(run, "cpu", lora=False)[0].learner
    assert torch.equal(draw(combined, 0.2), draw(load_pipeline(shop.base, "cpu")[0].learner, 0.2))
    load_lora(combined.model, folder / "lora.safetensors")
    for t in (0.9, 0.6, 0.5, 0.1):
        assert torch.equal(draw(again, t), draw(pair, t))
        torch.testing.assert_close(draw(combined, t), draw(pair, t), rtol=1e-4, atol=1e-5)
    assert (
        sample.main(
            [
                "--checkpoint",
                str(run),
                "--device",
                "cpu",
                "--steps",
                "4",
                "--prompts",
                "a red star",
                "--out",
                str(shop.folder / "s"),
            ]
        )
        == 0
    )
    resumed = shop.train(
        "pair",
        *shop.words,
        "experts={enabled: true, boundary: 0.6, switch_every: 2}",
        "train.max_steps=10",
        "--resume",
    )
    assert records(resumed)[-1]["expert"] == "high" and len(records(resumed)) == 10


def test_an_expert_that_is_not_trained_is_the_base(shop):
    run = shop.train(
        "high_only", *shop.words, "experts={enabled: true, boundary: 0.6, train: high}"
    )
    assert not (checkpoint.latest(run) / "lora_low.safetensors").exists()
    pair, base = (load_pipeline(path, "cpu")[0].learner for path in (run, shop.base))
    assert torch.equal(draw(pair, 0.3), draw(base, 0.3)) and not torch.equal(
        draw(pair, 0.7), draw(base, 0.7)
    )
    assert {record["expert"] for record in records(run)} == {"high"}


def test_of_our_own_pairs_export_writes_both_or_the_one_that_is_asked_for(shop, tmp_path, capsys):
    run = shop.train(
        "to_export",
        *shop.words,
        "experts={enabled: true, boundary: 0.6, switch_every: 1}",
        "train.max_steps=2",
    )
    export.main(
        ["--checkpoint", str(run), "--lora", "comfy", "--out", str(tmp_path / "both.safetensors")]
    )
    assert "both experts, their names under high. and low." in capsys.readouterr().out
    both = checkpoint.read_tensors(tmp_path / "both.safetensors")
    assert {name.removeprefix("diffusion_model.").partition(".")[0] for name in both} == set(NAMES)
    export.main(
        [
            "--checkpoint",
            str(run),
            "--lora",
            "comfy",
            "--out",
            str(tmp_path / "low.safetensors"),
            "--expert",
            "low",
        ]
    )
    low = checkpoint.read_tensors(tmp_path / "low.safetensors")
    assert low and all(
        torch.equal(value, both[name.replace("diffusion_model.", "diffusion_model.low.")])
        for name, value in low.items()
    )
    pair = load_pipeline(run, "cpu", lora=None)[0].model.networks()
    for layout in ("comfy", "kohya", "peft", "diffusers"):
        file = tmp_path / f"{layout}.safetensors"
        export.main(["--checkpoint", str(run), "--lora", layout, "--out", str(file)])
        one = load_pipeline(shop.base, "cpu")[0].model
        assert experts_in(one, file) == set(NAMES)
        for name, expert in pair.items():
            remove(one)
            load_lora(one, file, name)
            read = adapters(one)
            for place, layer in adapters(expert).items():
                assert torch.allclose(read.pop(place).delta(), layer.delta(), atol=1e-7)
            assert not read
    words = ["--checkpoint", shop.base, "--lora", file, "--prompts", "a", "--out", tmp_path / "s"]
    refused(capsys, sample.main, words, "LoRAs of two experts", "this model has one network")
    card = (tmp_path / "kohya.md").read_text(encoding="utf-8")
    assert "the adapters of two experts" in card and "mmdit sample" not in card
    refused(
        capsys,
        export.main,
        [
            "--checkpoint",
            shop.base,
            "--lora",
            "comfy",
            "--expert",
            "low",
            "--out",
            tmp_path / "x.safetensors",
        ],
        "no pair of experts",
    )
    words = [word for word in shop.words if not word.startswith("train.init_from")]
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("odd", *words, f"train.init_from={run}"),
        "train.init_from",
        "a run of two experts",
    )


def test_a_pair_that_knows_crops_is_validated(shop):
    base = shop.train("cropped", "model.crop=true", "train.max_steps=2")
    words = [word for word in shop.words if not word.startswith("train.init_from")]
    run = shop.train(
        "cropped_pair",
        *words,
        f"train.init_from={base}",
        "model.crop=true",
        "experts={enabled: true, boundary: 0.5}",
        "train.val_every_steps=2",
        "train.val_share=0.4",
        "train.max_steps=2",
    )
    assert 0 < records(run)[-1]["val_loss"] < 100


@pytest.mark.thorough
def test_each_expert_has_its_own_phases(shop):
    """Windows, steps and alphas by expert; both start from the adapters of a single run."""
    words = [word for word in shop.words if not word.startswith("train.init_from")]
    single = shop.train("single", *shop.words)
    phases = (
        "[{name: a, alpha: 8, low: 6, min_steps: 10, exit: steps}, {name: b, alpha: 14, low: 7}]"
    )
    run = shop.train(
        "phases",
        *words,
        f"train.init_from={single}",
        "experts={enabled: true, boundary: 0.6, switch_every: 15}",
        f"alpha_schedule={{enabled: true, phases: {phases}}}",
        "train.max_steps=26",
        "train.lr=1e-30",
        "train.val_every_steps=13",
        "train.val_share=0.3",
    )
    history = checkpoint.read_notes(checkpoint.latest(run))["alpha_schedule"]["history"]
    assert [
        (move["step"], move["expert"], move["alpha_from"], move["alpha_to"]) for move in history
    ] == [(10, "high", 8, 14)]
    last = records(run)[-1]
    assert (
        last["linear_alpha_high"],
        last["linear_alpha_low"],
        last["phase_high"],
        last["phase_low"],
    ) == (14, 6, "b", "a")
    assert (
        last["steps_in_phase_high"],
        last["steps_in_phase_low"],
        last["phase_idx"],
        last["val_loss"] > 0,
    ) == (5, 11, 0, True)
    pair, one = (load_pipeline(path, "cpu")[0].learner for path in (run, single))
    for t in (0.9, 0.2):
        torch.testing.assert_close(draw(pair, t), draw(one, t), rtol=1e-3, atol=1e-4)


def test_sections_are_refused_with_a_remedy(shop, capsys):
    for words, parts in (
        (["experts.enabled=true"], ["experts.enabled", "but lora.enabled is false"]),
        (
            ["experts.enabled=true", "lora.enabled=true", "lora.train_lora_only=false"],
            ["experts.enabled", "common base"],
        ),
        (["experts={enabled: true, train: none}"], ["experts.train", "'both'"]),
        (["experts={enabled: true, boundary: 1.5}"], ["experts.boundary", "between 0"]),
        (["experts={enabled: true, switch_every: 0}"], ["experts.switch_every", "at least 1"]),
        (
            [
                "experts.enabled=true",
                "lora.enabled=true",
                "parallel.type=fsdp",
                f"train.init_from={shop.base}",
            ],
            ["experts.enabled", "use ddp"],
        ),
        (
            [
                "experts.enabled=true",
                "lora.enabled=true",
                "flow_matching.t_max=0.5",
                f"train.init_from={shop.base}",
            ],
            ["experts.boundary", "'high'"],
        ),
    ):
        refused(capsys, train_t2v.main, shop.train_words("bad", *words), *parts)


if __name__ == "__main__":  # one rank of `run_ranks`
    with process_group("cpu") as world:
        trained(Path(sys.argv[1]), world=world, model=paired(switch_every=2))
