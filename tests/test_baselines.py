"""The plain networks to compare with compute what their papers say, learn, and go through the
product's own training, sampling and scoring."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig, build_objective
from mmdit.interfaces import TextTokens
from mmdit.rng import Draws
from tests.drivers.gpu_baselines import NETWORKS
from tests.helpers.plain_dit import Attention, PlainDiTConfig
from tests.helpers.plain_latte import PlainLatteConfig
from tests.helpers.thorough import thorough_unless

ROOT = Path(__file__).resolve().parents[1]
each_network = pytest.mark.parametrize("config", NETWORKS, ids=lambda kind: kind.__name__)


def make(config, awake: bool = True):
    torch.manual_seed(0)
    model = NETWORKS[config](config(dim=32, depth=4, num_heads=2), 4, 6)
    for weight in model.parameters() if awake else ():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def texts(count: int = 2) -> TextTokens:
    generator = torch.Generator().manual_seed(1)
    valid = torch.tensor([[True, True, True], [True, False, False]])[:count]
    return TextTokens(torch.randn(count, 3, 6, generator=generator), valid)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def reference(model, x, t, text):
    """Compute a network token by token, with loops in place of layouts."""
    f, r, c = x.shape[1:4]
    dim, heads = model.config.dim, model.config.num_heads
    rate = lambda i, width: 10_000 ** -(2 * i / width)  # noqa: E731

    def sine(place, width):
        angles = torch.tensor([place * rate(i, width) for i in range(width // 2)])
        return torch.cat([angles.sin(), angles.cos()])

    def attend(layer, query, keys):
        q, k, v = layer.q(query), layer.k(keys), layer.v(keys)
        parts = []
        for head in torch.arange(dim).chunk(heads):
            weights = (k[:, head] @ q[head] / len(head) ** 0.5).softmax(0)
            parts.append(weights @ v[:, head])
        return layer.proj(torch.cat(parts))

    def norm(h):
        return (h - h.mean()) / (h.var(correction=0) + 1e-6).sqrt()

    outputs = []
    for clip, time, words, valid in zip(x, t, text.embeddings, text.valid):
        condition = F.silu(model.time(time[None])[0])
        context = torch.stack([model.null, *model.caption(words[valid])])
        places = [(i, j, k) for i in range(f) for j in range(r) for k in range(c)]
        h = {}
        for i, j, k in places:
            where = torch.cat([sine(j, dim // 2), sine(k, dim // 2)])
            h[i, j, k] = model.input(clip[i, j, k]) + where + (sine(i, dim) if f > 1 else 0)
        for index, block in enumerate(model.blocks):
            a, b, gate, d, e, last = block.adaln(condition).chunk(6)
            seen = {place: norm(h[place]) * (1 + b) + a for place in places}
            for place in places:
                near = places
                if isinstance(model.config, PlainLatteConfig) and index % 2:
                    near = [other for other in places if other[1:] == place[1:]]
                elif isinstance(model.config, PlainLatteConfig):
                    near = [other for other in places if other[0] == place[0]]
                keys = torch.stack([seen[other] for other in near])
                h[place] = h[place] + gate * attend(block.attention, seen[place], keys)
                if block.cross is not None:
                    h[place] = h[place] + attend(block.cross, h[place], context)
                hidden = F.gelu(block.up(norm(h[place]) * (1 + e) + d), approximate="tanh")
                h[place] = h[place] + last * block.down(hidden)
        shift, scale = model.final_adaln(condition).chunk(2)
        rows = [model.output(norm(h[place]) * (1 + scale) + shift) for place in places]
        outputs.append(torch.stack(rows).reshape(f, r, c, -1))
    return torch.stack(outputs)


@each_network
@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_a_plain_network_computes_what_loops_over_its_tokens_compute(config, frames):
    model, x, t = make(config), noise(2, frames, 2, 3, 4), torch.tensor([900.0, 300.0])
    expected = reference(model, x, t, texts())
    torch.testing.assert_close(model(x, t, texts()), expected, rtol=1e-4, atol=1e-4)
    padded = model(x, t, texts().pad(7))
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-4)
    dropped = texts().null()
    torch.testing.assert_close(
        model(x, t, dropped), reference(model, x, t, dropped), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_its_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context, valid = noise(2, 5, 32), noise(2, 3, 32), texts().valid
    expected, _ = theirs(x, context, context, key_padding_mask=~valid)
    torch.testing.assert_close(ours(x, context, valid), expected)


@each_network
def test_a_plain_network_begins_at_zero_and_every_weight_is_trained(config):
    x, t = noise(2, 2, 2, 2, 4), torch.tensor([900.0, 300.0])
    assert not make(config, awake=False)(x, t, texts()).any()
    model = make(config)
    (model(x, t, texts()).square().mean() + model(x, t, texts().null()).square().mean()).backward()
    still = [n for n, weight in model.named_parameters() if not weight.grad.any()]
    assert [n for n in still if not n.endswith("k.bias")] == [], "softmax knows no common shift"


def test_a_plain_network_counts_its_operations():
    model = make(PlainDiTConfig)
    tokens, text, dim = 12, 4, 32
    layers = 2 * dim * 4 + 4 * (4 * dim**2 + 8 * dim**2 + 2 * dim**2)
    per_text = 6 * dim + dim**2 + 4 * 2 * dim**2
    once = 256 * dim + dim**2 + 4 * 6 * dim**2 + 2 * dim**2
    attention = 4 * tokens * dim * (tokens + text)
    expected = 6 * (tokens * layers + text * per_text + once) + 2 * 6 * attention
    assert model.train_flops((2, 2, 3), text - 1) == expected
    latte = make(PlainLatteConfig).train_flops((2, 2, 3), text - 1)
    assert latte < expected


@pytest.mark.parametrize("config", thorough_unless(lambda kind: kind is PlainDiTConfig, NETWORKS))
def test_a_plain_network_learns_what_it_is_shown(config):
    """Two captions at one noise and one time: the text alone tells which clip lies under it."""
    model = make(config, awake=False)
    objective = build_objective("flow_matching", DiffusionConfig(), FlowMatchingConfig())
    draws, clean, text = (
        Draws(0, 0, torch.zeros(2, dtype=torch.int64)),
        noise(2, 2, 2, 2, 4),
        texts(),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = objective.loss(model, clean, text, draws).per_sample.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
