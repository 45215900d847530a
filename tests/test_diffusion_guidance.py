"""Guidance: one doubled call, the same in every prediction, and only where it is asked for."""

import pytest
import torch

from mmdit.diffusion import DiffusionConfig, build_objective, guided
from mmdit.interfaces import TextTokens

TEXT = TextTokens(torch.tensor([[[2.0]], [[5.0]]]), torch.tensor([[True], [True]]))
X = torch.randn(2, 1, 2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KINDS = {
    "velocity": build_objective("flow_matching"),
    "eps": build_objective("ddpm", DiffusionConfig(prediction_type="eps")),
    "v": build_objective("ddpm", DiffusionConfig(prediction_type="v")),
    "x0": build_objective("ddpm", DiffusionConfig(prediction_type="x0")),
}


class Network:
    """Depends on x, on t and on each sample's own valid text. Counts its calls and their batch
    sizes."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, t, text):
        self.sizes.append(len(x))
        word = (text.embeddings * text.valid[..., None]).sum((1, 2))
        return torch.tanh(x + (word + t / 1000).reshape(-1, 1, 1, 1, 1).to(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, -1.0])
def test_guiding_x0_is_guiding_the_prediction(kind, scale):
    """x0 is affine in any prediction at fixed x_t, and the weights scale and 1 - scale sum to
    one."""
    objective, network, t = KINDS[kind], Network(), 0.6
    told = torch.full((2,), 600.0)
    with_text, without = network(X, told, TEXT), network(X, told, TEXT.null())
    expected = objective.path.to_clean(kind, without + scale * (with_text - without), X, t)
    for time in (t, torch.tensor(t), torch.tensor([t, t])):
        assert torch.allclose(guided(objective, network, TEXT, scale)(X, time), expected, atol=1e-6)


@pytest.mark.parametrize("scale, sizes", [(1.0, [2]), (0.0, [2]), (3.0, [4])])
def test_one_network_call_and_doubled_only_when_needed(scale, sizes):
    network = Network()
    guided(KINDS["velocity"], network, TEXT, scale)(X, 0.5)
    assert network.sizes == sizes


def test_scale_one_is_the_plain_denoiser_exactly():
    objective = KINDS["v"]
    assert torch.equal(
        guided(objective, Network(), TEXT, 1.0)(X, 0.5), objective.denoiser(Network(), TEXT)(X, 0.5)
    )


def test_outside_the_interval_text_is_followed_unguided():
    objective, network = KINDS["velocity"], Network()
    inside, plain, limited = (
        guided(objective, network, TEXT, 3.0),
        objective.denoiser(network, TEXT),
        guided(objective, network, TEXT, 3.0, (0.2, 0.7)),
    )
    network.sizes.clear()
    assert torch.equal(limited(X, 0.1), plain(X, 0.1)) and torch.equal(
        limited(X, 0.9), plain(X, 0.9)
    )
    assert network.sizes == [2] * 4
    assert torch.equal(limited(X, 0.7), inside(X, 0.7)) and torch.equal(
        limited(X, 0.2), inside(X, 0.2)
    )
    assert not torch.allclose(inside(X, 0.5), plain(X, 0.5))
    t = torch.tensor([0.1, 0.5])  # each sample its own time
    assert torch.allclose(limited(X, t), torch.cat([plain(X, t)[:1], inside(X, t)[1:]]))
    for dtype in (torch.float32, torch.float64):  # both ends are inside
        ends = torch.tensor([0.2, 0.7], dtype=dtype)
        assert torch.allclose(limited(X, ends), inside(X, ends))


def test_unconditional_scale_outside_its_interval_is_conditional():
    objective, network = KINDS["velocity"], Network()
    limited = guided(objective, network, TEXT, 0.0, (0.2, 0.7))
    assert torch.equal(limited(X, 0.9), objective.denoiser(network, TEXT)(X, 0.9))
    assert torch.equal(limited(X, 0.5), objective.denoiser(network, TEXT.null())(X, 0.5))


@pytest.mark.parametrize("interval", [(0.7, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_an_impossible_interval_is_refused(interval):
    with pytest.raises(ValueError, match="guidance interval"):
        guided(KINDS["v"], Network(), TEXT, 2.0, interval)
