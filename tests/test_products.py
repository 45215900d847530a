"""Products of 8-bit floats: what they round, what they leave exact, and where they serve."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdit.adapters import LoRAConfig, inject
from mmdit.config import ConfigError
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.interfaces import LatentSpec, TextTokens
from mmdit.interop.wan_weights import load_denoiser
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.nn import kernels, products
from mmdit.nn.products import Float8Linear, codes, joinable, joined, multiply
from mmdit.nn.stored_weights import store
from mmdit.training.memory.offload import Streamer
from tests.helpers.wan_release import config_text, make_release

SIZE = {"dim": 96, "depth": 2, "num_heads": 2, "window_size": 4}


@pytest.fixture
def serving(monkeypatch):
    """As on a GPU with such products: on this CPU codes are multiplied as the numbers they stand
    for."""
    monkeypatch.setattr(kernels, "can_encode", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(products, "FEW", 0)


def apart_from(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_codes_keep_the_largest_of_a_row_and_three_bits_of_the_rest():
    x = (
        torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-20, 20, 50)[:, None]
    )
    x[7] = 0
    found, scale = codes(x)
    assert (
        found.dtype == torch.float8_e4m3fn
        and scale.shape == (50, 1)
        and scale.dtype == torch.float32
    )
    back = found.float() * scale
    assert back[7].eq(0).all() and scale[7] > 0
    torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)
    least = x.abs().amax(1, keepdim=True) / 448 * 2**-6  # below it codes lie evenly, 2 ** -9 apart
    assert ((back - x).abs() <= (x.abs().maximum(least) * 2**-4) * (1 + 1e-5)).all()


def test_columns_multiply_before_the_rounding():
    x, factors = (
        torch.randn(5, 16, generator=torch.Generator().manual_seed(0)),
        torch.linspace(0.1, 3, 16),
    )
    for a, b in zip(codes(x, factors), codes(x * factors), strict=True):
        assert torch.equal(a.float(), b.float())


def test_a_product_rounds_its_output_and_the_gradient_of_its_input_and_not_that_of_its_weight(
    serving,
):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 40, width, generator=generator).bfloat16() for width in (64, 96))
    layer = Float8Linear(64, 96, bias=False)
    with torch.no_grad():
        layer.weight.mul_(
            torch.logspace(-1, 1, 96)[:, None]
        )  # rows far apart: a scale of all would lose the small ones
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(grad)
    exact = x.detach().float().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    expected = F.linear(exact, weight)
    expected.backward(grad.float())
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert (
        0.01 < apart_from(y.float(), expected) < 0.04
        and 0.01 < apart_from(x.grad.float(), exact.grad) < 0.04
    )
    rows = ((y.float() - expected).norm(dim=(0, 1)) / expected.norm(dim=(0, 1))).max()
    assert rows < 0.06, "each row of the weight has a scale of its own"
    assert apart_from(layer.weight.grad, weight.grad) < 3e-3
    assert torch.equal(
        layer.weight.grad, (grad.flatten(0, 1).t() @ x.detach().flatten(0, 1)).float()
    )


@pytest.mark.parametrize("apart", [False, True])
def test_weights_side_by_side_are_the_same_products(apart):
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(12, width, bias=False) for width in (5, 7)]
    x = torch.randn(2, 3, 12, generator=generator, requires_grad=True)
    grad = torch.randn(2, 3, 12, generator=generator)
    for own in (torch.cat([layer(x) for layer in layers], -1), joined(x, *layers, apart=apart)):
        own.backward(grad)
    parts = [x.grad, *(layer.weight.grad for layer in layers)]  # twice the same
    for part, value in zip(
        parts,
        (
            grad @ torch.cat([layer.weight for layer in layers]),
            *(g.flatten(0, 1).t() @ x.flatten(0, 1) for g in grad.split((5, 7), -1)),
        ),
        strict=True,
    ):
        torch.testing.assert_close(part, 2 * value)


@pytest.mark.parametrize("apart", [False, True])
def test_side_by_side_in_float8_too(serving, apart, monkeypatch):
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    layers = [Float8Linear(32, 48, bias=False), Float8Linear(32, 16, bias=False)]
    y = joined(x, *layers, apart=apart)
    assert torch.equal(y, torch.cat([layer(x) for layer in layers], -1)), (
        "rows of the weights have their own scales"
    )
    y.backward(torch.ones_like(y))
    assert (
        apart_from(x.grad.float(), sum(layer.weight.sum(0) for layer in layers).expand(30, 32))
        < 0.05
    )
    for layer in layers:
        assert torch.equal(
            layer.weight.grad, (torch.ones(len(layer.weight), 30).bfloat16() @ x.detach()).float()
        )
    frozen = Float8Linear(32, 16, bias=False).requires_grad_(False)
    joined(x.detach().requires_grad_(), frozen).sum().backward()
    assert (
        frozen.weight.grad is None
        and not joinable(x, frozen, nn.Identity())
        and joinable(x, frozen, nn.Linear(2, 2))
    )
    monkeypatch.setattr(products, "FEW", 31)
    assert not joinable(x, frozen, frozen)


def test_scales_of_a_product_belong_to_rows():
    a, b = torch.randn(6, 32), torch.randn(16, 32)
    (one, scale_one), (two, scale_two) = codes(a), codes(b)
    torch.testing.assert_close(
        multiply(one, scale_one, two, scale_two).float(),
        (one.float() * scale_one) @ (two.float() * scale_two).t(),
        rtol=1e-2,
        atol=1e-2,
    )


def models():
    """The same weights, gates open, with products of either kind."""
    both = []
    for kind in ("autocast", "float8"):
        torch.manual_seed(0)
        model = build_model(VideoMMDiTConfig(**SIZE, products=kind), 4, 8)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn(weight.shape))
        both.append(model)
    return both


def inputs():
    generator = torch.Generator().manual_seed(1)
    text = TextTokens(
        torch.randn(2, 5, 8, generator=generator), torch.arange(5) < torch.tensor([[5], [3]])
    )
    return torch.randn(2, 3, 4, 8, 4, generator=generator), torch.tensor([100.0, 900.0]), text


def test_a_model_trains_with_them_near_autocast_and_does_all_else_as_without(serving):
    plain, coded = models()
    assert {name: w.tolist() for name, w in plain.state_dict().items()} == {
        name: w.tolist() for name, w in coded.state_dict().items()
    }
    results = {}
    for name, model in (("plain", plain), ("coded", coded)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*inputs()).float().square().mean()
        loss.backward()
        results[name] = (
            loss.item(),
            {key: w.grad for key, w in model.named_parameters() if w.grad is not None},
        )
    assert results["plain"][0] != results["coded"][0] == pytest.approx(results["plain"][0], rel=0.1)
    assert results["plain"][1].keys() == results["coded"][1].keys()
    matrix = "blocks.0.spatial.proj.weight"
    assert apart_from(results["coded"][1][matrix], results["plain"][1][matrix]) < 0.2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(coded.eval()(*inputs()), plain.eval()(*inputs()))
    with torch.no_grad():  # nor in float32
        assert torch.equal(coded.train()(*inputs()), plain(*inputs()))


def test_few_rows_are_left_alone(serving, monkeypatch):
    monkeypatch.setattr(products, "FEW", 10)
    layer, x = Float8Linear(16, 16, bias=False), torch.randn(10, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x[:9]), F.linear(x[:9], layer.weight)) and not torch.equal(
            layer(x), F.linear(x, layer.weight)
        )


def test_products_compile_without_breaks(serving):
    _, coded = models()
    exact = coded(*inputs())
    coded.blocks[1].mlp.compile(fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < apart_from(coded(*inputs()).float(), exact) < 0.2
    torch._dynamo.reset()


@pytest.mark.thorough
def test_blocks_compile_without_breaks(serving, opaque_einops):
    """And what is special in them is recorded with its gradients, too, which takes longer."""
    _, coded = models()
    exact = coded(*inputs())
    coded.blocks[0].compile(fullgraph=True, backend="eager")
    coded.blocks[1].mlp.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = coded(*inputs())
    assert 0 < apart_from(found.float(), exact) < 0.2
    found.float().sum().backward()
    torch._dynamo.reset()


def test_where_no_gpu_has_them_the_model_says_so_once():
    _, coded = models()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        for _ in range(2):
            coded(*inputs())
    assert [str(w.message) for w in heard] == [
        "model.products is float8, but no kernels of it serve on cpu: autocast's are used"
    ]


# ── of frozen weights ─────────────────────────────────────────────────────────────────────────────
def frozen_layers(multiplies_codes: bool, offloaded: bool) -> nn.Sequential:
    """Return two blocks of one layer, kept as float8, with a LoRA over each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64)) for _ in range(2)))
    store(model, "float8", multiplies_codes)
    inject(model, LoRAConfig(enabled=True, rank=2, target_modules=("0",)), seed=1)
    for block in model:
        nn.init.normal_(block[0].lora_B, std=0.1, generator=torch.Generator().manual_seed(2))
    if offloaded:
        Streamer(list(model), torch.device("cpu"))
    return model


def passes(model: Iterable[nn.Module], checkpointed: bool = False) -> list[torch.Tensor]:
    """Return the output, the gradient of the input and those of the adapters."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 30, 64, generator=generator).bfloat16().requires_grad_()
    y = x
    with torch.autocast("cpu", torch.bfloat16):
        for block in model:
            y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
    y.float().square().sum().backward()
    adapters = [w for block in model for w in block.parameters() if w.requires_grad]
    return [y.detach(), x.grad, *(weight.grad.clone() for weight in adapters)]


def test_frozen_codes_take_part_in_products_as_they_are(serving):
    """Compare with the definition: codes of each row of x, and of the gradient times the scales of
    the weight, times the kept codes."""
    layer = frozen_layers(True, False)[0][0]
    weight, bias = layer.weight, layer.bias.bfloat16()
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    y = F.linear(x, weight, bias)
    expected = multiply(*codes(x.detach()), weight.codes, weight.scale) + bias
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    code, scale = codes(gradient, weight.scale.flatten())
    wanted = (code.float() * scale) @ weight.codes.float()
    torch.testing.assert_close(x.grad, wanted.bfloat16())


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_lora_on_frozen_codes_trains_near_the_one_on_unpacked_weights(serving, offloaded):
    coded, plain = (passes(frozen_layers(words, offloaded)) for words in (True, False))
    for a, b in zip(coded, plain, strict=True):
        assert 0 < apart_from(a.float(), b.float()) < 0.06
    again = passes(frozen_layers(True, offloaded), checkpointed=True)
    assert all(torch.equal(a, b) for a, b in zip(coded, again, strict=True))
    whole = passes(frozen_layers(True, False))
    assert all(torch.equal(a, b) for a, b in zip(coded, whole, strict=True))


def test_frozen_codes_are_unpacked_where_nothing_trains_or_rows_are_few(serving, monkeypatch):
    x = torch.randn(10, 64).bfloat16()
    coded, plain = (frozen_layers(multiplies, False) for multiplies in (True, False))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(coded(x), plain(x))
        assert not torch.equal(coded(x), plain(x))
        monkeypatch.setattr(products, "FEW", 11)
        assert torch.equal(coded(x), plain(x))
        monkeypatch.setattr(products, "FEW", 0)
    assert torch.equal(coded(x.float()), plain(x.float()))


def test_frozen_codes_compile_without_breaks(serving):
    layer = frozen_layers(True, False)[0]
    results = [passes([layer])]
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results.append(passes([compiled]))
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


FROZEN = ["lora={enabled: true, target_modules: [q]}", "model.products=float8"]


@pytest.mark.parametrize(
    "words, refused",
    [
        (["model.dtype=float8", "train.precision=bf16"], ""),
        (["model.dtype=nf4", "train.precision=bf16"], "but model.dtype is nf4"),
        (["model.dtype=float8", "train.precision=fp32"], "with train.precision bf16"),
        (["model.dtype=float8", "posttrain={algorithm: grpo}"], "and without posttrain"),
    ],
)
def test_products_of_a_frozen_base_need_its_codes(tmp_path, words, refused):
    release = make_release(tmp_path)
    (tmp_path / "wan.yaml").write_text(config_text(release, tmp_path))
    if refused:
        with pytest.raises(ConfigError, match=f"model.products: is float8, .*{refused}"):
            load_experiment_config(tmp_path / "wan.yaml", [*FROZEN, *words])
        return
    config = load_experiment_config(tmp_path / "wan.yaml", [*FROZEN, *words])
    with pytest.raises(ConfigError, match="multiples of 16, but those of the blocks are 24 and 32"):
        load_denoiser(config.model, LatentSpec(4), 24)


@pytest.mark.parametrize(
    "words",
    [
        ["train.precision=fp32"],
        ["lora.enabled=true", "train.init_from=x"],
        ["posttrain={algorithm: grpo}", "train.init_from=x"],
    ],
)
def test_what_would_ignore_them_is_refused(words):
    path, own = (
        Path(__file__).parents[1] / "configs/moving_shapes_t2i_128.yaml",
        ["model.products=float8"],
    )
    load_experiment_config(path, own)
    with pytest.raises(ConfigError, match="model.products"):
        load_experiment_config(path, [*own, *words])


@pytest.mark.parametrize(
    "change, widths",
    [
        ({"dim": 24, "num_heads": 2}, "dim is 24 and the MLP 64 wide"),
        ({"dim": 64, "num_heads": 2}, "dim is 64 and the MLP 168 wide"),
        (
            {"dim": 32, "num_heads": 2, "mlp": "gelu", "mlp_ratio": 3.2},
            "dim is 32 and the MLP 102 wide",
        ),
    ],
)
def test_odd_widths_are_refused(change, widths):
    VideoMMDiTConfig(**change)
    with pytest.raises(ConfigError, match=f"products: is float8, .* multiples of 16, but {widths}"):
        VideoMMDiTConfig(**change, products="float8")
