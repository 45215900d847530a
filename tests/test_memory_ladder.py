"""Frozen weights kept as 8-bit floats or away from the device compute what plain ones do; plans are
what a step really takes."""

import copy
import gc
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import nn

from mmdit.adapters import LoRAConfig, inject, merge
from mmdit.commands.plan_memory import ladder, memory_plan
from mmdit.commands.plan_memory.ladder import (
    changed,
    clip_bytes,
    fits,
    latent_shape,
    memory_options,
    plan_training,
    plans_until_fit,
    variant_sizes,
)
from mmdit.commands.plan_memory.memory_plan import (
    MemoryPlan,
    Meter,
    random_denoiser,
    stored_bytes,
)
from mmdit.config import ConfigError, apply_overrides, decode
from mmdit.experiment.build import build_learner
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.interfaces import Batch, LatentSpec
from mmdit.interop.wan_weights import load_denoiser
from mmdit.models.wan_denoiser import WanModelConfig
from mmdit.nn.encodings import ENCODINGS
from mmdit.nn.float8 import encode_rows
from mmdit.nn.stored_weights import StoredWeight, linear_layers, store
from mmdit.scripts import plan_memory
from mmdit.training.distributed import World
from mmdit.training.learner import Learner
from mmdit.training.memory import offload
from mmdit.training.memory.offload import Streamer, move_to_device, slot_bytes
from mmdit.training.step_report import ReportWindow
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState
from mmdit.training.trainer import Trainer
from tests.helpers.thorough import thorough
from tests.helpers.tiny import CONFIG, Workshop, refused
from tests.helpers.wan_release import (
    DIT,
    FLF2V,
    I2V,
    I2V_21,
    TI2V,
    config_text,
    make_release,
    random_dit,
)
from tests.test_wan_training import Shop

LORA = LoRAConfig(enabled=True, rank=2, alpha=4, target_modules=("q", "v", "ffn.0"))


# ── 8-bit floats ──────────────────────────────────────────────────────────────────────────────────
def test_each_row_is_kept_to_four_bits_of_its_own_scale():
    torch.manual_seed(0)
    weight = torch.randn(64, 96) * torch.logspace(-6, 6, 64)[:, None]
    weight[3] = 0
    codes, scale = encode_rows(weight)
    assert (
        codes.dtype == torch.float8_e4m3fn
        and scale.shape == (64, 1)
        and codes.nbytes == weight.nbytes // 4
    )
    back = codes.float() * scale
    assert torch.equal(back[3], weight[3]) and back.isfinite().all()
    assert (
        (back - weight)
        .abs()
        .le(torch.maximum(weight.abs() / 16, scale * 2**-10) * (1 + 1e-5))
        .all()
    )
    torch.testing.assert_close(
        back.abs().amax(1), weight.abs().amax(1), rtol=1e-6, atol=0
    )  # the largest survives
    assert (
        (back - weight).abs().max(1).values.gt(weight.abs().amax(1) / 1000)[weight.any(1)].all()
    )  # and 8 bits it is


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_products_and_gradients_are_those_of_the_unpacked_weight(encoding, autocast):
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24).requires_grad_(False) for _ in range(2)]
    stored = StoredWeight.encoded(layers[0].weight, ENCODINGS[encoding])
    layers[1].weight = nn.Parameter(stored.whole(), requires_grad=False)
    layers[1].bias = layers[0].bias
    layers[0].weight = nn.Parameter(stored, requires_grad=False)
    results, x = [], torch.randn(2, 5, 16)
    for layer in layers:
        model = nn.Sequential(layer)
        inject(model, LoRAConfig(enabled=True, rank=3, target_modules=("0",)), seed=1)
        nn.init.normal_(model[0].lora_B, generator=torch.Generator().manual_seed(2))
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(own * 1)  # of a leaf, autocast would keep one cast for both branches
        (y.float() * torch.linspace(-1, 1, 24)).sum().backward()
        results.append(
            [
                y.detach(),
                own.grad,
                model[0].lora_A.grad,
                model[0].lora_B.grad,
                merge(model)[0].weight.detach(),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][-1], layers[0].weight.whole())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_nothing_is_kept_for_the_backward_pass(encoding):
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    store(nn.Sequential(layer), encoding)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        F.linear(torch.randn(2, 64, requires_grad=True), layer.weight)
    assert saved == []


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_release_is_loaded_in_fewer_bits_and_trains_adapters_alone(tmp_path, encoding):
    release = make_release(tmp_path)
    model = load_denoiser(
        WanModelConfig(name_or_path=str(release), dtype=encoding), LatentSpec(4), 24
    )
    plain = load_denoiser(
        WanModelConfig(name_or_path=str(release), dtype="bfloat16"), LatentSpec(4), 24
    )
    kept = {name for name, weight in model.named_parameters() if isinstance(weight, StoredWeight)}
    assert kept == {
        name
        for name, weight in plain.blocks.named_parameters(prefix="blocks")
        if name.endswith("weight") and weight.ndim == 2
    }
    same = {
        name
        for name, weight in plain.named_parameters()
        if torch.equal(weight, model.get_parameter(name))
    }
    assert same == set(dict(plain.named_parameters())) - kept
    for name in kept:
        weight, wanted = model.get_parameter(name), plain.get_parameter(name)
        assert weight.encoding is ENCODINGS[encoding]
        again = StoredWeight.encoded(wanted, ENCODINGS[encoding])
        assert torch.equal(weight.whole(), again.whole())
    config = decode(
        ExperimentConfig,
        {
            "experiment_name": "x",
            "model": {"type": "wan", "name_or_path": str(release), "dtype": encoding},
            "tokenizer": {
                "type": "wan_vae",
                "name_or_path": str(release),
                "latent_f": 8,
                "latent_d": 4,
            },
        },
    )
    with pytest.raises(ConfigError, match=f"is {encoding}, but these weights are trained"):
        model.check_trainable(config)


# ── offloading ────────────────────────────────────────────────────────────────────────────────────
def adapted(config=replace(DIT, num_layers=5), checkpointing=False, encoding=None):
    model = random_dit(config)
    model.checkpointing = checkpointing
    if encoding:
        store(model.blocks, encoding)
    inject(model, LORA, seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(weight, generator=generator)
    return model.train()


@cache
def passes_of_plain(autocast, **options):
    return passes(adapted(**options), autocast)


def passes(model, autocast):
    generator = torch.Generator().manual_seed(2)
    x, text = (
        torch.randn(1, 4, 3, 4, 4, generator=generator),
        torch.randn(1, 5, 24, generator=generator),
    )
    results = []
    for time in (300.0, 800.0):  # twice: the second begins where the first ended
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x, torch.tensor([time]), text)
        y.square().mean().backward()
        results += [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
    return results


@pytest.mark.parametrize("checkpointing", [*thorough(False), True])
@pytest.mark.parametrize(
    "encoding, autocast",
    [(None, False), (None, True), ("float8", True), ("int8", True), ("nf4", False), ("nf4", True)],
)
@pytest.mark.parametrize("blocks", [2, *thorough(1, 5)])
def test_offloaded_blocks_compute_the_same_bits(blocks, encoding, autocast, checkpointing):
    options = {"checkpointing": checkpointing, "encoding": encoding}
    moved = adapted(**options)
    streamer = Streamer(list(moved.blocks[:blocks]), torch.device("cpu"))
    expected = passes_of_plain(autocast, **options)
    for a, b in zip(expected, passes(moved, autocast), strict=True):
        assert torch.equal(a, b)
    assert len(streamer.pinned) == blocks
    home, slots, _ = slot_bytes(moved.blocks[:blocks])
    assert home == sum(map(len, streamer.pinned)) and slots == sum(
        map(len, streamer.slots)
    ) <= 2 * max(map(len, streamer.pinned))


def test_the_next_block_is_fetched_before_it_is_asked_for_there_and_back():
    model = adapted()
    streamer, told = Streamer(list(model.blocks), torch.device("cpu")), []
    copy = streamer._copy
    streamer._copy = lambda number, slot: (told.append((streamer.last, number)), copy(number, slot))
    passes(model, False)
    assert told[:2] == [(0, 0), (0, 1)]  # the first block alone is waited for
    there, back = [(n, n + 1) for n in (1, 2, 3)], [(n, n - 1) for n in (3, 2, 1)]
    assert told[2:] == there + back + there + back  # at the ends two blocks are there already


def test_whole_weights_are_copies_that_no_fetch_changes():
    model = adapted()
    expected = {name: weight.clone() for name, weight in model.named_parameters()}
    Streamer(list(model.blocks), torch.device("cpu"))
    state = {name: weight.detach() + 0 for name, weight in model.state_dict().items()}
    passes(model, False)
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    model.blocks[0].ffn[2].weight.copy_(torch.ones(24, 32))  # as a checkpoint is restored
    assert torch.equal(model.blocks[0].ffn[2].weight + 0, torch.ones(24, 32))


def tiny(*words, text=None):
    raw = yaml.safe_load((text or CONFIG).format(folder="none"))
    return decode(ExperimentConfig, apply_overrides(raw, ["train.compile=false", *words]))


def test_on_a_cpu_a_warning_says_that_nothing_is_offloaded():
    config = tiny("lora.enabled=true", "train.init_from=x")
    learner = build_learner(config, LatentSpec(8, 16))
    with pytest.warns(UserWarning, match="offload_blocks is 2, but training runs on the cpu"):
        move_to_device(learner, 2, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        move_to_device(learner, 0, torch.device("cpu"))
    assert not any(isinstance(weight, StoredWeight) for weight in learner.parameters())


@pytest.mark.thorough
def test_runs_on_offloaded_blocks_write_the_same_checkpoints_and_go_on(tmp_path, monkeypatch):
    shop = Workshop(tmp_path)
    base = shop.train("base")
    words = ["lora.enabled=true", f"train.init_from={base}", "model.depth=2"]
    shop.train("plain", *words)
    monkeypatch.setattr(
        "mmdit.experiment.run.move_to_device",
        lambda learner, _, device: Streamer(list(learner.model.blocks), device),
    )
    shop.train("moved", *words, "train.max_steps=2")
    shop.train("moved", *words, "--resume")
    plain, moved = (
        load_file(tmp_path / f"runs/{name}/checkpoints/step_00000003/model.safetensors")
        for name in ("plain", "moved")
    )
    assert plain.keys() == moved.keys() and all(
        torch.equal(plain[name], moved[name]) for name in plain
    )


@pytest.mark.thorough
def test_a_run_on_a_base_of_fewer_bits_is_resumed_and_sampled(tmp_path):
    shop = Shop(tmp_path)
    words = [
        "lora={enabled: true, rank: 2, alpha: 4, target_modules: [q]}",
        "model.dtype=nf4",
        "train.precision=bf16",
    ]
    whole = shop.train("whole", *words)
    run = shop.train("parted", *words, "train.max_steps=2")
    shop.train("parted", *words, "--resume")
    file = "checkpoints/step_00000003/model.safetensors"
    once, twice = load_file(whole / file), load_file(run / file)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    with pytest.raises(SystemExit):  # the frozen weights are no longer those of the run
        shop.train("parted", *words, "model.dtype=int8", "train.max_steps=4", "--resume")
    assert all("lora_" in name for name in twice)
    network = load_pipeline(run, "cpu")[0].learner.model
    kinds = {
        name.rpartition(".")[0]: type(weight) is StoredWeight
        for name, weight in network.blocks[0].named_parameters()
        if "weight" in name
    }
    assert (
        not kinds["cross_attn.q"] and kinds["self_attn.q"] and kinds["ffn.0"]
    )  # merged ones are plain


def test_what_cannot_be_offloaded_is_said(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        offload, "Streamer", lambda blocks, device: Streamer(blocks, torch.device("cpu"))
    )
    learner = build_learner(tiny("lora.enabled=true", "train.init_from=x"), LatentSpec(8, 16))
    with pytest.raises(ConfigError, match="is 3, but the model has 2 blocks"):
        move_to_device(learner, 3, cuda)
    with pytest.raises(ConfigError, match="but block 0 has no frozen linear layer"):
        move_to_device(build_learner(tiny(), LatentSpec(8, 16)), 1, cuda)
    twins = build_learner(
        tiny("lora.enabled=true", "train.init_from=x", "experts.enabled=true"), LatentSpec(8, 16)
    )
    with pytest.raises(ConfigError, match="two experts share these blocks"):
        move_to_device(twins, 1, cuda)
    with pytest.raises(ConfigError, match="compile: true"):
        tiny("train.offload_blocks=1", "train.compile=true")
    auto = "train.compile=auto"
    assert not tiny("train.offload_blocks=1", auto).train.compiles("cuda") and tiny(
        auto
    ).train.compiles("cuda")


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────
def case(name, tmp_path, *words):
    """A config, what builds its learner, and the sizes of its Wan transformer."""
    if name == "wan":
        raw = apply_overrides(
            yaml.safe_load(config_text(tmp_path, tmp_path, 16, 48)),
            [
                "train.compile=false",
                "video={width: 256, height: 256, num_frames: 9}",
                "text_encoder={type: hash, dim: 24, max_length: 6}",
                "model.dtype=bfloat16",
                "train.precision=bf16",
                (
                    "lora={enabled: true, rank: 2, alpha: 4, target_modules: ['*.self_attn.q', v,"
                    " ffn.0]}"
                ),
                *words,
            ],
        )
        config, sizes = decode(ExperimentConfig, raw), TI2V
    else:
        config, sizes = (
            tiny(
                "video={width: 192, height: 128, num_frames: 3}",
                "train.precision=bf16",
                "train.batch_size=2",
                *words,
            ),
            None,
        )
    shape = latent_shape(config)
    spec = LatentSpec(shape[-1], 16, temporal=config.tokenizer.temporal)
    if sizes is None:
        return config, lambda: build_learner(config, spec), sizes

    def network(run, *_):
        return random_denoiser(sizes, run.model)

    return config, lambda: build_learner(config, spec, network), sizes


CASES = [
    ("wan", "model.checkpointing=true"),
    ("mmdit",),
]
MORE_CASES = [
    ("wan", "model.dtype=nf4"),
    ("wan",),
    ("wan", "model.dtype=float8"),
    ("wan", "model.dtype=float32"),
    ("wan", "model.first_frame=1"),
    ("mmdit", "model.checkpointing=true", "train.optimizer=muon"),
    ("mmdit", "train.precision=pure_bf16", "ema.enabled=false"),
    (
        "mmdit",
        "lora.enabled=true",
        "train.init_from=x",
        "tread.enabled=true",
        "tread.apply_to=[0, 2]",
        "model.window_size=8",
    ),
]


@pytest.mark.parametrize(
    "words", [*CASES, *thorough(*((words,) for words in MORE_CASES))], ids=" ".join
)
def test_a_plan_is_what_a_step_takes(words, tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory_plan.importlib.util, "find_spec", lambda name: None
    )  # plain operations, as a CPU has them
    config, build, sizes = case(words[0], tmp_path, *words[1:])
    found = plan_training(config, sizes)
    assert "Fake" not in str(
        memory_plan.wan.rotary_tables(3, 2, 2, 12, torch.device("cpu"))
    )  # nothing fake is left behind
    monkeypatch.setattr(
        F,
        "rms_norm",
        lambda x, shape, weight=None, eps=None: memory_plan._FusedNorm.apply(x, weight),
    )
    learner = build().train()
    if config.train.precision == "pure_bf16":
        memory_plan.to_bfloat16(learner)
    shape = latent_shape(config)
    captions = [" ".join(f"w{i}" for i in range(config.text_encoder.max_length))] * shape[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.autocast):
        learner.text_encoder(captions)
    own = {
        p.untyped_storage()._cdata for p in learner.parameters() if not isinstance(p, StoredWeight)
    }
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    state = TrainState.create(learner, config.train, config.ema)
    batch = Batch(torch.zeros(shape).half(), captions, ["a"] * shape[0], torch.arange(shape[0]))
    trainer = Trainer(config.train, 0, state, None, World(), tmp_path, None)
    gradients = {}
    for p in learner.parameters():
        if p.requires_grad:
            p.register_hook(lambda gradient, p=p: gradients.__setitem__(p, gradient.nbytes))
    gc.collect()
    with Meter() as meter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.optimizer_step(learner, [batch], 1e-3, ReportWindow(torch.device("cpu")))
        trainer.optimizer_step(learner, [batch], 1e-3, ReportWindow(torch.device("cpu")))
    assert found.weights == sum(map(stored_bytes, learner.parameters()))
    assert found.gradients == sum(gradients.values())
    assert found.ema == sum(
        tensor.nbytes for tensor in (state.ema.shadow.values() if state.ema else ())
    )
    moments = sum(
        value.nbytes
        for own in state.optimizer.state.values()
        for name, value in own.items()
        if name != "step"
    )
    signs = (
        sum(
            tensor.nbytes for name, tensor in state.signs.tensors().items() if name.endswith("bits")
        )
        if state.signs
        else 0
    )
    assert abs(found.optimizer - moments - signs) <= 1
    if not config.model.checkpointing:  # what is recomputed is saved, too, but later
        assert found.activations == pytest.approx(sum(kept.values()), rel=0.02)
    tables = memory_plan.MATRIX_LIBRARY + found.weights + found.ema
    assert found.total - tables == pytest.approx(meter.peak, rel=0.1)


@pytest.mark.slow
def test_a_plan_counts_the_gradients_that_a_graph_is_compared_with(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Learner, "compile_model", lambda learner, backend: None
    )  # what takes time, and adds nothing here
    config, _, sizes = case("mmdit", tmp_path, "train.compile=true")
    found, without = (
        plan_training(config, sizes),
        plan_training(replace(config, train=replace(config.train, replays=False)), sizes),
    )
    assert found.total - without.total == 2 * found.gradients > 0
    monkeypatch.setattr(memory_plan, "SMALL", 0)
    assert plan_training(config, sizes) == without


def row_bytes(encoding: str, columns: int) -> int:
    """Return the bytes of a row of codes and its scales of 4 bytes."""
    if encoding == "nf4":
        return columns // 2 + 4 * -(-columns // 64)
    return columns + 4


@pytest.mark.thorough
def test_checkpointing_fewer_bits_and_offloading_each_save_what_they_promise(tmp_path):
    words = ["video={width: 128, height: 128, num_frames: 9}"]
    config, _, sizes = case("wan", tmp_path, *words)
    sizes = replace(sizes, num_layers=3)
    alone = plan_training(config, sizes)
    less = plan_training(case("wan", tmp_path, *words, "model.checkpointing=true")[0], sizes)
    assert (
        less.activations < alone.activations / 2
        and less.weights == alone.weights
        and less.total < alone.total
    )
    sends = ("model.checkpointing=true", "model.offload_activations=true")
    sent = plan_training(case("wan", tmp_path, *words, *sends)[0], sizes)
    stream = math.prod(latent_shape(config)[:4]) // 4 * sizes.dim * 4
    # of three blocks' inputs two have not left
    assert less.activations - sent.activations == stream and sent.total <= less.total
    locked = lambda size: 2 ** math.ceil(math.log2(size))
    assert sent.host == 3 * locked(stream)  # alone, for nobody knows how many will come
    learner = case("wan", tmp_path)[1]().model.blocks[0]
    matrices = [layer.weight for layer in learner.modules() if isinstance(layer, nn.Linear)]
    fewer = {}
    for encoding in ENCODINGS:
        plan = plan_training(case("wan", tmp_path, *words, f"model.dtype={encoding}")[0], sizes)
        saved = sum(w.nbytes - len(w) * row_bytes(encoding, w.shape[1]) for w in matrices)
        assert alone.weights - plan.weights == 3 * saved
        assert plan.activations == alone.activations
        fewer[encoding] = plan
    assert fewer["nf4"].weights < fewer["float8"].weights == fewer["int8"].weights
    away = plan_training(case("wan", tmp_path, *words, "train.offload_blocks=3")[0], sizes)
    block = slot_bytes([learner])[0]
    assert (
        away.host == slot_bytes([learner] * 3)[2] == min(3 * locked(block), locked(3 * block))
        and alone.weights - away.weights == block
        and alone.total - away.total == block
    )
    store(learner, "int8")
    block = slot_bytes([learner])[0]
    words += ["model.dtype=int8", "train.offload_blocks=3"]
    away = plan_training(case("wan", tmp_path, *words)[0], sizes)
    codes = sum(stored_bytes(layer.weight) for layer in linear_layers(learner))
    assert away.host == slot_bytes([learner] * 3)[2]
    assert fewer["int8"].weights - away.weights == 3 * block - 2 * block >= codes


def test_what_waits_on_the_cpu_is_counted_there(tmp_path):
    small = "video={width: 64, height: 64, num_frames: 5}"
    sends = ("model.checkpointing=true", "model.offload_activations=true")
    config, build, sizes = case("wan", tmp_path, small, *sends, "train.offload_blocks=2")
    plan = plan_training(config, replace(sizes, num_layers=2))
    block, _, locked = slot_bytes([build().model.blocks[0]])
    stream = math.prod(latent_shape(config)[:4]) // 4 * sizes.dim * 4
    powers = [2 ** math.ceil(math.log2(size)) for size in (block, stream)]
    assert locked == powers[0] and plan.host == 2 * sum(powers)


def test_pairs_count_both_bases_or_share_one():
    words = ("model.depth=1", "lora.enabled=true", "train.init_from=x")
    config, pair = tiny(*words), tiny(*words, "experts.enabled=true", "experts.train=both")
    learner, alone, both = (
        build_learner(pair, LatentSpec(8, 16)),
        plan_training(config),
        plan_training(pair),
    )
    assert (
        both.weights == sum(p.nbytes for p in learner.parameters())
        and both.weights - alone.weights == alone.gradients
    )
    assert both.optimizer == 2 * alone.optimizer and both.activations == alone.activations


AWAY = ["model.offload_activations=true", "train.offload_blocks=2"]


@pytest.mark.slow
def test_what_continues_pictures_is_planned_with_them(tmp_path, capsys, monkeypatch):
    """I2V, FLF2V and pairs, from their releases and before these are there; CLIP's encoder
    counts."""
    monkeypatch.setattr("mmdit.commands.plan_memory.ladder.CLIP_BLOCKS", 2)
    lora = [
        "lora={enabled: true, rank: 2, target_modules: [q]}",
        "train.compile=false",
        "text_encoder={type: hash, dim: 24, max_length: 6}",
    ]
    totals = {}
    for name, config, picture, words in (
        ("t2v", DIT, "none", []),
        ("pair", DIT, "none", ["experts={enabled: true}"]),
        ("t2v away", DIT, "none", ["model.expert=high", *AWAY]),
        ("pair away", DIT, "none", ["experts={enabled: true}", *AWAY]),
        ("i2v", I2V, "first", ["model.expert=high"]),
        ("i2v pair", I2V, "first", ["experts={enabled: true}"]),
        ("i2v 2.1", I2V_21, "first", []),
        ("flf2v", FLF2V, "first_last", []),
    ):
        folder = tmp_path / name.replace(" ", "_")
        release = make_release(folder, config, pair="pair" in name or bool(words))
        (folder / "wan.yaml").write_text(config_text(release, tmp_path))
        # overrides stand before flags, too
        assert (
            plan_memory.main(
                [
                    f"tokenizer.picture={picture}",
                    *words,
                    *lora,
                    "--config",
                    str(folder / "wan.yaml"),
                    "--json",
                ]
            )
            == 0
        )
        totals[name] = json.loads(capsys.readouterr().out)
    assert (
        totals["i2v 2.1"]["weights"] - totals["i2v"]["weights"]
        > clip_bytes(I2V_21)
        > 2 * 2 * 12 * 80**2
    )
    assert (
        1.9 < totals["pair"]["weights"] / totals["t2v"]["weights"] < 2.3
        and totals["i2v pair"]["weights"] > totals["i2v"]["weights"]
    )
    assert totals["flf2v"]["weights"] > totals["i2v 2.1"]["weights"]
    one, both = totals["t2v away"], totals["pair away"]
    # the weights of both wait on the CPU, and the activations of the one that computes
    weights = one["host"] - one["host_activations"]
    assert weights > 0 and both["host"] - one["host"] == weights < one["host"]


def test_a_variant_is_what_the_config_makes_of_it(tmp_path):
    for picture, words, in_dim, image in (
        ("none", [], 16, 0),
        ("first", [], 36, 1280),
        ("first_last", [], 36, 1280),
        ("first", ["model.expert=low"], 36, 0),
        ("first", ["experts={enabled: true}", "lora.enabled=true"], 36, 0),
    ):
        raw = apply_overrides(
            yaml.safe_load(config_text(tmp_path, tmp_path, 8, 16)),
            [f"tokenizer.picture={picture}", *words],
        )
        sizes = variant_sizes(decode(ExperimentConfig, raw), "14B")
        assert (sizes.in_dim, sizes.image_dim, sizes.image_positions) == (
            in_dim,
            image,
            514 * (picture == "first_last"),
        )
    assert (
        0.6e9 < clip_bytes(memory_plan.SIZES["I2V-14B"]) / 2 < 0.65e9
        and clip_bytes(memory_plan.SIZES["14B"]) == 0
    )


def test_savings_are_tried_one_after_another_until_one_fits(tmp_path, capsys, monkeypatch):
    """With plans of 1 GB a sample in place of computed ones."""
    planned = lambda config, *_: MemoryPlan(10**9 * config.train.batch_size, 0, 0, 0, 0, 0)
    monkeypatch.setattr(ladder, "plan_training", planned)
    words = ["--config", str(Workshop(tmp_path).config), "train.batch_size=4"]
    ends = {
        "5": "fits as configured",
        "4": "fits train.batch_size=2 train.grad_accum_steps=2",
        "1.2": "fits train.batch_size=1 train.grad_accum_steps=4",
        "0.5": "does not fit",
    }
    for gpu_gb, end in ends.items():
        assert plan_memory.main([*words, "--gpu_gb", gpu_gb]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert end in lines[-1] and "4.000 GB  as configured" in lines[0]
    assert "model.checkpointing=true" in lines[-2], "everything was tried"


def test_what_fits_has_the_largest_micro_batch_that_does(monkeypatch):
    """With plans of 1 GB a sample, and 0.1 where blocks are recomputed."""

    def planned(config, *_):
        sample = 10**8 if config.model.checkpointing else 10**9
        return MemoryPlan(sample * config.train.batch_size, 0, 0, 0, 0, 0)

    monkeypatch.setattr(ladder, "plan_training", planned)
    config = tiny("train.batch_size=12", "train.grad_accum_steps=2")
    for gpu_gb, batch, checkpointing in ((7, 6, False), (2, 1, False), (0.5, 4, True)):
        words, plan = list(plans_until_fit(config, gpu_gb))[-1]
        chosen = changed(config, words)
        assert chosen.train.batch_size == batch and fits(plan, gpu_gb)
        assert chosen.train.batch_size * chosen.train.grad_accum_steps == 24
        assert chosen.model.checkpointing == checkpointing
    only = [(), ("model.checkpointing=true",)]  # of a config that takes no single samples
    monkeypatch.setattr(ladder, "memory_options", lambda *_: only)
    assert [words for words, _ in plans_until_fit(config, 3)] == only


@pytest.mark.thorough
def test_the_ladder_is_climbed_until_it_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ladder, "plan_training", cache(plan_training))
    file = tmp_path / "wan.yaml"
    make_release(tmp_path / "release", replace(TI2V, num_layers=1))
    file.write_text(config_text(tmp_path / "release", tmp_path, 16, 48))
    words = [
        "--config",
        str(file),
        "train.compile=false",
        "text_encoder.cache_dir=none",
        "lora={enabled: true, target_modules: [k]}",
        "video={width: 1024, height: 1024, num_frames: 81}",
    ]
    assert plan_memory.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == sum(
        value for name, value in told.items() if name not in ("total", "host", "overrides")
    )
    assert plan_memory.main([*words, "--gpu_gb", str(0.8 * told["total"] / 1e9)]) == 0
    out = capsys.readouterr().out
    assert "as configured" in out and "fits train.batch_size=1 train.grad_accum_steps=2\n" in out
    assert plan_memory.main([*words, "--gpu_gb", "0.01"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "does not fit" in out[-1] and out[-2].endswith(
        " model.dtype=float8 model.checkpointing=true model.offload_activations=true"
        " train.offload_blocks=1"
    )
    refused(
        capsys,
        plan_memory.main,
        [*words, "model.name_or_path=absent"],
        "absent does not exist",
        "--variant 1.3B",
    )


@pytest.mark.slow
def test_compiled_blocks_keep_less(monkeypatch):
    def woken():
        raise AssertionError("a plan must not touch the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as on a machine that has one
    monkeypatch.setattr(torch.cuda, "_lazy_init", woken)
    words = ("video={width: 256, height: 256, num_frames: 3}", "train.precision=bf16")
    alone, compiled = plan_training(tiny(*words)), plan_training(tiny(*words, "train.compile=true"))
    assert 0.5 < compiled.activations / alone.activations < 0.9 and compiled.total < alone.total
    assert (
        compiled.weights == alone.weights and plan_training(tiny(*words)) == alone
    )  # nothing is left behind


@pytest.mark.parametrize("encoding", ["int8", *thorough("float8", "nf4")])
def test_compiled_products_with_codes_meet_nothing_real(encoding):
    """A plan's tensors have no memory; one of the process's own would stop it."""
    with memory_plan.without_memory():
        layer = nn.Sequential(nn.Linear(64, 32))
        store(layer, encoding)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
        x = torch.empty(2, 64, requires_grad=True)
        compiled(x).sum().backward()
        assert x.grad.shape == x.shape
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_blocks_over_codes_are_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainConfig, "compiles", lambda config, device: True)
    words = ("video={width: 32, height: 32, num_frames: 5}", "model.dtype=nf4")
    config, _, sizes = case("wan", tmp_path, *words)
    learner = case("wan", tmp_path, *words)[1]()
    assert plan_training(config, sizes).weights == sum(map(stored_bytes, learner.parameters()))


@cache
def plan_of(*words):
    return plan_training(tiny(*words))


@pytest.mark.thorough
def test_gradients_of_the_first_micro_batch_are_there_in_the_second():
    # making the graph of the update would be the peak of so small a network
    launched = ("model.depth=1", "train.replays=false")
    once = plan_of(*launched)
    twice = plan_training(tiny(*launched, "train.grad_accum_steps=2"))
    assert twice.total - once.total > 0.5 * once.gradients and twice.activations == once.activations


PICTURES = {
    "experiment_name": "speed",
    "video": {"width": 256, "height": 256},
    "tokenizer": {"type": "dummy", "latent_d": 64},
    "text_encoder": {"type": "hash", "dim": 512},
    "model": {"dim": 768, "depth": 12, "num_heads": 12},
    "train": {"compile": False, "batch_size": 64},
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "words, measured",  # GB on one H200, as docs/speed.md has them
    [
        ((), 12.60),
        (("model.checkpointing=true",), 5.74),
        (("model.checkpointing=true", "train.replays=false"), 4.36),
    ],
)
def test_plans_lie_near_what_an_h200_took(words, measured):
    config = decode(ExperimentConfig, apply_overrides(copy.deepcopy(PICTURES), list(words)))
    total = plan_training(config).total
    assert total / 1e9 == pytest.approx(measured, rel=0.03)


@pytest.mark.thorough
def test_making_the_graph_of_the_update_needs_all_that_it_changes_twice_more():
    small, plain = "model.depth=1", "train.replays=false"
    replayed, launched = plan_training(tiny(small)), plan_of(small, plain)
    more = 2 * (launched.weights + launched.optimizer)
    assert replayed.total - launched.total > more / 2
    small = (small, "train.offload_optimizer=true")
    # then only the graphs of steps keep something: gradients, and twice that while they are made
    replayed, launched = plan_training(tiny(*small)), plan_training(tiny(*small, plain))
    assert 1 <= (replayed.total - launched.total) / launched.gradients <= 2


def test_rungs_leave_out_what_is_chosen_already():
    config = tiny("train.precision=pure_bf16", "model.checkpointing=true")
    sent = "model.offload_activations=true"
    assert list(memory_options(config, 2)) == [
        (),
        *[
            ("train.batch_size=1", "train.grad_accum_steps=4", *more)
            for more in ((), (sent,), (sent, "train.offload_optimizer=true"))
        ],
    ]


ADAPTED = ["lora={enabled: true}", "train.init_from=base"]


@pytest.mark.parametrize(
    "words, refused",
    [
        (["train.optimizer=muon"], {"train.precision=pure_bf16", "train.offload_optimizer=true"}),
        (["train.betas=[0.9, 0.999]"], {"train.precision=pure_bf16"}),
        (["parallel.type=fsdp"], {"train.offload_optimizer=true"}),
        ([*ADAPTED, "train.compile=true"], {"train.offload_blocks=2"}),
        ([*ADAPTED, "experts={enabled: true}"], {"train.offload_blocks=2"}),
    ],
)
def test_rungs_are_configs_that_can_be_trained(words, refused):
    config = tiny(*words)
    options = list(memory_options(config, 2))
    assert all(changed(config, option) for option in options)
    assert "model.checkpointing=true" in options[-1] and refused.isdisjoint(options[-1])


@pytest.mark.slow
def test_a_process_that_has_compiled_nothing_plans():
    """Parts of torch are there only once something imports them."""
    command = [sys.executable, "-m", "mmdit.scripts.plan_memory", "--config"]
    planned = subprocess.run(
        [*command, "configs/quickstart.yaml"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0 and "total" in planned.stdout, planned.stderr
