"""Weights that are kept in fewer bits, or in the CPU's memory, obey whatever is written to them, or
refuse."""

import copy

import pytest
import torch
from torch import nn

from mmdit.nn.encodings import ENCODINGS
from mmdit.nn.stored_weights import StoredWeight, store
from mmdit.training.memory.offload import Streamer
from tests.helpers.thorough import thorough

WRITES = {
    "add_": lambda w: w.add_(torch.ones(8, 8)),
    "+=": lambda w: w.__iadd__(1),
    "mul_": lambda w: w.mul_(2),
    "sub_": lambda w: w.sub_(1, alpha=0.5),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(0.25),
    "copy_": lambda w: w.copy_(torch.linspace(-1, 1, 64).view(8, 8)),
    "copy_ of one row": lambda w: w.copy_(torch.ones(8)),
    "clamp_": lambda w: w.clamp_(-0.1, 0.1),
    "addmm_": lambda w: w.addmm_(torch.ones(8, 2), torch.ones(2, 8)),
    "masked_fill_": lambda w: w.masked_fill_(torch.eye(8, dtype=torch.bool), 0),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([1]), 0),
    "foreach": lambda w: torch._foreach_mul_([w], 3.0),
    "out=": lambda w: torch.add(torch.ones(8, 8), 1, out=w),
    "lerp_": lambda w: w.lerp_(torch.ones(8, 8), 0.5),
    "data": lambda w: w.data.mul_(2),
    "detach": lambda w: w.detach().add_(1),
}
LOST = {
    "item": lambda w: w.__setitem__(0, 1.0),
    "row": lambda w: w[0].zero_(),
    "element": lambda w: w[0][1].fill_(3),
    "transpose": lambda w: w.T.mul_(2),
    "view": lambda w: w.view(-1).add_(1),
    "chunk": lambda w: w.chunk(2)[0].zero_(),
}


FORMS = [*ENCODINGS, "offloaded", *(f"{name} offloaded" for name in ENCODINGS)]
ROUNDING = {  # the largest error, as a share of the largest element
    "float8": 0.07,
    "int8": 0.005,
    "nf4": 0.16,  # half the distance of the two lowest numbers
    "offloaded": 0,
}


def layers(form: str) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)).requires_grad_(False)
    for name in ENCODINGS:
        if name in form:
            store(blocks, name)
    if "offloaded" in form:
        Streamer(list(blocks), torch.device("cpu"))
    return blocks


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_what_computes_from_then_on(form, name):
    blocks = layers(form)
    x = torch.eye(8)
    for block in blocks:
        block(x)  # both slots hold something
    weight = blocks[1][0].weight
    plain = weight.whole()
    WRITES[name](weight)
    WRITES[name](plain)
    assert isinstance(blocks[1][0].weight, StoredWeight)
    tolerance = ROUNDING[form.split()[0]] * plain.abs().max()
    assert (weight.whole() - plain).abs().max() <= tolerance
    for block in (*blocks, *reversed(blocks)):
        torch.testing.assert_close(block(x), x @ block[0].weight.whole().T + block[0].bias)


@torch.no_grad()
@pytest.mark.parametrize("form", ["float8", "nf4", "offloaded"])
@pytest.mark.parametrize("name", LOST)
def test_what_would_be_written_into_a_copy_is_refused(form, name):
    weight = layers(form)[1][0].weight
    before = weight.whole()
    with pytest.raises(RuntimeError, match="would be lost"):
        LOST[name](weight)
    assert torch.equal(weight.whole(), before)


@torch.no_grad()
@pytest.mark.parametrize("form", ["float8", "nf4 offloaded", "offloaded"])
def test_reading_parts_and_copies(form):
    weight = layers(form)[1][0].weight
    plain = weight.whole()
    assert (
        weight[2, 3].item() == plain[2, 3]
        and torch.equal(weight[0] + 0, plain[0])
        and torch.equal(weight.T @ plain, plain.T @ plain)
    )
    assert torch.equal(torch.stack([weight[1], weight[2]]), plain[1:3]) and "PartOfCopy" in repr(
        weight[0]
    )
    for other in (weight.clone(), copy.deepcopy(weight), weight.double()):
        other.zero_()
    assert torch.equal(weight.whole(), plain)


@pytest.mark.parametrize("name", ["int8", *thorough("float8", "nf4")])
def test_compiled_layers_compute_the_same(name):
    """Compare to the bit, with operators alone: nothing is fused."""
    layer = nn.Sequential(nn.Linear(72, 16))
    store(layer, name)
    results, x = [], torch.randn(3, 72)
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
