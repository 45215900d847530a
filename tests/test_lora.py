"""LoRA: an adapter starts as nothing, ends as a weight, and travels without its base."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdit import config as config_module
from mmdit.adapters import (
    LoRAConfig,
    LoRALinear,
    adapters,
    coverage,
    inject,
    is_adapter,
    merge,
    remove,
    select,
)
from mmdit.config import ConfigError
from mmdit.interfaces import Denoiser
from mmdit.interop import lora_writing
from mmdit.interop.lora_formats import save_lora
from tests.helpers import warm


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, context):
        weights = (self.q(x) @ self.k(context).transpose(-1, -2)).softmax(-1)
        return self.proj(weights @ self.v(context))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.cross, self.spatial = Attention(dim), Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, context):
        x = x + self.spatial(self.norm(x), self.norm(x))
        x = x + self.cross(self.norm(x), context)
        return x + self.mlp(self.norm(x))


class Model(Denoiser):
    def __init__(self, dim=12, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, dim)

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return self.head(x)


def make(dim=12, seed=0):
    torch.manual_seed(seed)
    return Model(dim)


def adapted(seed=0, trained=True, **keys):
    model = make(seed=seed)
    inject(model, LoRAConfig(enabled=True, **{"rank": 3, "alpha": 6.0, **keys}))
    if trained:
        torch.manual_seed(100 + seed)
        for layer in adapters(model).values():
            nn.init.normal_(layer.lora_B, std=0.3)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 5, 12, generator=generator), torch.randn(2, 4, 12, generator=generator)


def base_state(model):
    return {name: value for name, value in model.state_dict().items() if not is_adapter(name)}


def count(model):
    return sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ── the layer ─────────────────────────────────────────────────────────────────────────────────────
def test_a_fresh_adapter_changes_no_bit(inputs):
    before = make()(*inputs)
    model = adapted(trained=False)
    assert torch.equal(model(*inputs), before)
    assert all(
        (layer.lora_A != 0).any() for layer in adapters(model).values()
    )  # else B could never learn


def test_the_layer_computes_the_equation():
    torch.manual_seed(0)
    base = nn.Linear(7, 5).double()
    layer = LoRALinear(base, rank=2, alpha=3.0, dropout=0.0).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 7, dtype=torch.float64)
    expected = x @ (base.weight + 3.0 / 2 * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank, alpha", [(1, 1.0), (3, 6.0), (4, 1.0), (2, 32.0)])
def test_merging_keeps_the_outputs_and_leaves_plain_layers(inputs, rank, alpha):
    model = adapted(rank=rank, alpha=alpha)
    for layer in adapters(model).values():
        assert distance(layer.merged()(inputs[0]), layer(inputs[0])) < 1e-6
    model.double()  # a stack of layers amplifies rounding
    inputs = [x.double() for x in inputs]
    before, plain = model(*inputs), make().double()(*inputs)
    assert distance(before, plain) > 1e-2
    merged = merge(model)
    assert merged is model and not adapters(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert distance(model(*inputs), before) < 1e-10
    assert model.state_dict().keys() == make().state_dict().keys()


def test_removing_gives_the_base_back(inputs):
    model = adapted()
    assert not torch.equal(model(*inputs), make()(*inputs))
    assert remove(model) is model and not adapters(model)
    assert (
        torch.equal(model(*inputs), make()(*inputs))
        and model.state_dict().keys() == make().state_dict().keys()
    )


def test_first_step_moves_b_then_a(inputs):
    model = adapted(trained=False)
    model(*inputs).square().mean().backward()
    layer = model.blocks[0].cross.k
    assert layer.lora_B.grad.abs().max() > 0 and layer.lora_A.grad.abs().max() == 0
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    model.zero_grad()
    model(*inputs).square().mean().backward()
    assert layer.lora_A.grad.abs().max() > 0


def test_dropout_acts_on_the_update_only_and_only_in_training(inputs):
    model = adapted(dropout=0.5)
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))
    assert torch.equal(model(*inputs), adapted().eval()(*inputs))
    layer = model.train().blocks[0].cross.q
    nn.init.zeros_(layer.lora_B)
    x = inputs[0]
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_half_precision_base_keeps_a_float32_adapter():
    base = nn.Linear(8, 8).bfloat16()
    layer = LoRALinear(base, rank=2, alpha=2.0, dropout=0.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 8).bfloat16()
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.grad.dtype == torch.float32
    merged = layer.merged()
    assert merged.weight.dtype == torch.bfloat16
    torch.testing.assert_close(merged(x), y, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert LoRALinear(nn.Linear(8, 8), 2, 2.0, 0.0)(x.float()).dtype == torch.bfloat16


def test_the_initial_adapter_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    few, many = adapted(trained=False, target_modules=("cross.k",)), adapted(trained=False)
    torch.manual_seed(2)
    again = adapted(trained=False)
    a = many.blocks[1].cross.k.lora_A
    assert torch.equal(few.blocks[1].cross.k.lora_A, a) and torch.equal(
        again.blocks[1].cross.k.lora_A, a
    )
    assert not torch.equal(many.blocks[0].cross.k.lora_A, a)
    other = make()
    inject(other, LoRAConfig(enabled=True, rank=3), seed=1)
    assert not torch.equal(other.blocks[1].cross.k.lora_A, a)
    assert a.abs().max() <= 12**-0.5 and a.std() > 0.4 * 12**-0.5


# ── choosing layers ───────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "patterns, number, sample",
    [
        (("q",), 4, "blocks.1.spatial.q"),
        (("q", "k", "v", "proj"), 16, "blocks.0.cross.proj"),
        (("cross.k",), 2, "blocks.0.cross.k"),
        (("blocks.*.cross.[kv]",), 4, "blocks.1.cross.v"),
        (("blocks.0.*",), 10, "blocks.0.mlp.2"),
        (("mlp.0", "head"), 3, "head"),
        (("q", "cross.q"), 4, "blocks.0.cross.q"),
    ],
)
def test_patterns_choose_by_suffix_or_by_glob(patterns, number, sample):
    model = make()
    names = inject(model, LoRAConfig(enabled=True, rank=2, target_modules=patterns))
    assert len(names) == len(set(names)) == number and sample in names
    assert list(adapters(model)) == names  # what is reported is what was injected
    assert count(model) == sum(
        2 * (m.in_features + m.out_features) for m in adapters(model).values()
    )


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("cros.k", ["'cros.k'", "near names", "cross.k"]),
        ("ead", ["head"]),  # no partial words
        ("cross", ["Attention", "q", "proj"]),
        ("norm", ["LayerNorm"]),
        ("layers.*.q", ["blocks.*.cross.q ×2"]),
        ("*.Q", ["'*.Q'"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, words):
    with pytest.raises(ValueError) as error:
        inject(make(), LoRAConfig(enabled=True, target_modules=("q", pattern)))
    assert all(word in str(error.value) for word in words), error.value


def test_a_refused_injection_leaves_the_model_alone():
    model = make()
    with pytest.raises(ValueError):
        inject(model, LoRAConfig(enabled=True, target_modules=("q", "nothing")))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_second_injection_says_to_merge():
    model = adapted(target_modules=("q",))
    with pytest.raises(ValueError, match="merge it first"):
        inject(model, LoRAConfig(enabled=True, target_modules=("q",)))
    assert len(inject(model, LoRAConfig(enabled=True, target_modules=("k",)))) == 4


def test_a_layer_whose_forward_is_not_called_is_no_target():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert select(model, LoRAConfig(target_modules=("*",))) == [
        "fc"
    ]  # MultiheadAttention reads out_proj.weight itself


def test_a_shared_layer_stays_shared():
    model = nn.Module()
    model.first, model.second = nn.Module(), nn.Module()
    model.first.q = model.second.q = model.second.k = nn.Linear(4, 4)
    inject(model, LoRAConfig(enabled=True, rank=1, target_modules=("q",)))
    assert model.first.q is model.second.q is model.second.k and isinstance(
        model.first.q, LoRALinear
    )
    assert len(base_state(model)) == 6
    alone = nn.ModuleDict({"first": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    inject(alone, LoRAConfig(enabled=True, rank=1, target_modules=("q",)))
    assert torch.equal(alone["first"]["q"].lora_A, model.first.q.lora_A)  # drawn for its first name
    nn.init.ones_(model.first.q.lora_B)
    merge(model)
    assert model.first.q is model.second.q is model.second.k and type(model.first.q) is nn.Linear


def test_merging_does_not_touch_what_the_weight_is_tied_to():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    inject(model, LoRAConfig(enabled=True, rank=1, target_modules=("head",)))
    nn.init.ones_(model["head"].lora_B)
    embedding = model["embedding"].weight.clone()
    merge(model)
    assert torch.equal(model["embedding"].weight, embedding) and not torch.equal(
        model["head"].weight, embedding
    )


def test_train_lora_only_freezes_the_rest():
    model = adapted(target_modules=("cross.k",))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{block}.cross.k.{part}" for block in (0, 1) for part in ("lora_A", "lora_B")
    ]
    assert all(p.requires_grad for p in adapted(train_lora_only=False).parameters())


def test_disabled_does_nothing():
    model = make()
    assert (
        inject(model, LoRAConfig()) == []
        and not adapters(model)
        and all(p.requires_grad for p in model.parameters())
    )


def test_the_coverage_table_counts_everything():
    model = adapted(target_modules=("cross.[kv]", "blocks.*.cross.[kv]", "head")[1:])
    text = coverage(model)
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["blocks.*.cross.k"].split()[-3:] == ["2", "288", "144"]
    assert rows["head"].split()[-3:] == ["1", "144", "72"]
    assert rows["total"].split()[-3:] == ["5", "720", str(count(model))]
    whole = sum(p.numel() for p in model.parameters())
    assert f"trainable: {count(model):,} of {whole:,}" in text
    assert "total" in coverage(make())  # also without any


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────
def test_base_checkpoints_load_strictly_in_both_directions(inputs):
    base = make(seed=7)
    model = adapted()
    model.load_state_dict(base.state_dict(), strict=True)
    expected = copy.deepcopy(base)
    inject(expected, LoRAConfig(enabled=True, rank=3, alpha=6.0))
    own = {name: value for name, value in adapted().state_dict().items() if is_adapter(name)}
    expected.load_state_dict(expected.state_dict() | own)
    assert torch.equal(model(*inputs), expected(*inputs))  # the base was taken, the adapter kept

    plain = make(seed=8)
    plain.load_state_dict(base_state(model), strict=True)
    assert torch.equal(plain(*inputs), base(*inputs))
    assert base_state(model).keys() == base.state_dict().keys()


def test_a_whole_checkpoint_restores_base_and_adapter(inputs):
    model = adapted(seed=1)
    other = adapted(seed=2)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(*inputs), model(*inputs))


def test_strict_loading_still_finds_real_gaps():
    state = make().state_dict()
    del state["blocks.0.cross.q.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.cross\.q\.weight"):
        adapted().load_state_dict(state)
    state = adapted().state_dict()
    del state["blocks.0.cross.q.lora_B"]  # half an adapter
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.cross\.q\.lora_B"):
        adapted().load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make().load_state_dict(adapted().state_dict())


def test_a_new_process_gets_the_same_outputs(inputs, tmp_path):
    model = adapted()
    save_lora(model, tmp_path / "lora.safetensors", "kohya")
    torch.save({"base": base_state(model), "inputs": inputs}, tmp_path / "base.pt")
    script = """
import sys, torch
from mmdit.interop.lora_formats import load_lora
from tests.test_lora import make
folder = sys.argv[1]
saved = torch.load(folder + "/base.pt", weights_only=True)
model = make(seed=9)
model.load_state_dict(saved["base"])
load_lora(model, folder + "/lora.safetensors")
torch.save(model(*saved["inputs"]), folder + "/out.pt")
"""
    warm.run("-c", script, tmp_path).check_returncode()
    torch.testing.assert_close(
        torch.load(tmp_path / "out.pt", weights_only=True), model(*inputs), rtol=1e-6, atol=1e-6
    )


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, pieces, flush):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(lora_writing, "write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        save_lora(adapted(), tmp_path / "lora.safetensors", "comfy")
    assert not list(tmp_path.iterdir())


# ── under other machinery ─────────────────────────────────────────────────────────────────────────
def test_it_compiles_without_a_break(inputs):
    model = adapted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_ddp_trains_the_adapter_and_nothing_else(inputs, tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = adapted(trained=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            parallel(*inputs).square().mean().backward()
            optimizer.step()
    finally:
        dist.destroy_process_group()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if name.endswith(("lora_A", "lora_B"))}


def test_an_adapter_learns_a_new_map_on_a_frozen_base():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    target = copy.deepcopy(model)
    with torch.no_grad():
        target[2].weight += 0.5 * torch.randn(8, 2) @ torch.randn(2, 32)
    inject(model, LoRAConfig(enabled=True, rank=2, alpha=2.0, target_modules=("2",)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    x = torch.randn(256, 8)
    losses = []
    for _ in range(300):
        loss = (model(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.parametrize(
    "keys, path",
    [
        ({"rank": 0}, "lora.rank"),
        ({"alpha": 0}, "lora.alpha"),
        ({"alpha": float("inf")}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"target_modules": []}, "lora.target_modules"),
        ({"target_modules": [""]}, "lora.target_modules"),
        ({"ranks": 4}, "lora.ranks"),
    ],
)
def test_bad_settings_name_the_key(keys, path):
    with pytest.raises(ConfigError) as error:
        config_module.decode(LoRAConfig, keys, "lora")
    assert error.value.path == path
