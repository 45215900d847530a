"""What a training step of a Wan transformer computes, keeps and leaves out: recomputation, the
stream's type, compiled blocks."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition as PARTITION

from mmdit.adapters import LoRAConfig, adapters, inject
from mmdit.models.wan_denoiser import WanModelConfig
from tests.test_wan import TINY, VARIANTS, error, random_model

WORDS = ("cross_attn.k", "cross_attn.v")
X, TEXT, T = (
    torch.randn(2, 16, 2, 4, 6),
    torch.randn(2, 7, TINY.text_dim),
    torch.tensor([3.0, 990.0]),
)


def adapted(config=TINY, targets=WORDS):
    model = random_model(config).bfloat16().train()
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(model.stored_dtype(name, torch.bfloat16))
    inject(model, LoRAConfig(enabled=True, rank=2, alpha=4.0, target_modules=targets), seed=1)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_()
    return model


def step(model, t=T, x=X, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, t, TEXT, **more)
    output.float().square().mean().backward()
    return output.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def count_runs(model) -> list[int]:
    runs = [0] * len(model.blocks)
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    return runs


def test_adapters_alone_have_gradients_and_the_backward_pass_stops_where_the_first_one_is():
    model, seen = adapted(), {}
    for i, block in enumerate(model.blocks):
        for name in ("self_attn", "cross_attn"):
            part = getattr(block, name)
            part.register_forward_hook(
                lambda part, inputs, output, key=(i, name): seen.update({key: output.requires_grad})
            )
    _, gradients = step(model)
    assert gradients and set(gradients) == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    assert seen == {
        (0, "self_attn"): False,
        (0, "cross_attn"): True,
        (1, "self_attn"): True,
        (1, "cross_attn"): True,
    }


def test_every_nth_block_is_recomputed_with_the_same_gradients():
    model = adapted()
    runs = count_runs(model)
    output, plain = step(model)
    assert runs == [1, 1]
    for every, expected in ((1, [3, 3]), (2, [5, 4])):
        model.checkpointing, model.checkpoint_every = True, every
        again, gradients = step(model)
        assert runs == expected and torch.equal(again, output)
        assert all(torch.equal(gradients[name], value) for name, value in plain.items())
    with pytest.raises(ValueError, match="checkpoint_every: is 0"):
        WanModelConfig(name_or_path="x", checkpoint_every=0)


@torch.no_grad()
def test_a_stream_in_bfloat16_is_half_as_large_and_close():
    model, seen = adapted(), {}
    model.blocks[1].register_forward_pre_hook(
        lambda block, inputs: seen.update(dtype=inputs[0].dtype)
    )
    results = {}
    for residual, dtype in (("float32", torch.float32), ("autocast", torch.bfloat16)):
        model.residual = residual
        with torch.autocast("cpu", torch.bfloat16):
            results[residual] = model(X, T, TEXT)
        assert seen["dtype"] == dtype
    assert 0 < error(results["autocast"], results["float32"]) < 1e-2
    exact = random_model(TINY)
    expected = exact(X, T, TEXT)
    exact.residual = "autocast"  # nothing is rounded where nothing is cast
    assert torch.equal(exact(X, T, TEXT), expected)


@pytest.mark.thorough
def test_a_block_compiles_without_breaks_and_gives_the_same_when_it_is_recomputed(opaque_einops):
    config = replace(
        VARIANTS["flf2v"], num_layers=1
    )  # its block does what those of all variants do
    model = adapted(config, (*WORDS, "*.self_attn.q"))
    more = {"y": torch.randn(2, 20, 2, 4, 6), "clip": torch.randn(2, 514, config.image_dim)}
    times = (
        T,
        torch.where(torch.arange(12) < 6, 0.0, T[:, None]),
    )  # of samples, and of tokens with a first frame given
    plain = [step(model, t, **more) for t in times]
    model.checkpointing = True
    # its gradients are recorded once, which takes as long as all else
    for t, backend, (output, gradients) in zip(times, ("aot_eager", "eager"), plain, strict=True):
        torch._dynamo.reset()
        model.blocks[0].compile(backend=backend, dynamic=False, fullgraph=True)
        again, other = step(model, t, **more)
        assert error(again, output) < 1e-3
        assert all(
            error(other[name], value) < 0.05
            for name, value in gradients.items()
            if value.norm() > 1e-4
        )


@pytest.mark.thorough
def test_a_compiled_block_keeps_products_and_attention_for_its_backward_pass():
    model, passes = adapted(), []

    def looked_at(graph, inputs):
        kinds = [
            node.target.overloadpacket.__name__
            for node in graph.graph.nodes
            if hasattr(node.target, "overloadpacket")
        ]
        passes.append(
            {
                "attention": sum(
                    kind.startswith("_scaled_dot_product") and "backward" not in kind
                    for kind in kinds
                ),
                "products": sum(kind in ("mm", "addmm") for kind in kinds),
                "norms": kinds.count("rsqrt"),
            }
        )
        return make_boxed_func(graph.forward)

    model.blocks[1].compile(
        backend=aot_autograd(fw_compiler=looked_at, partition_fn=PARTITION),
        dynamic=False,
        fullgraph=True,
    )
    expected = step(adapted())
    output, gradients = step(model)
    assert error(output, expected[0]) < 1e-3 and all(
        error(gradients[name], value) < 0.05 for name, value in expected[1].items()
    )
    forward, backward = passes
    linear = 10 + 2 * 2  # of self- and cross-attention and the MLP; the LoRA's two pairs
    assert forward["attention"] == 2 and forward["products"] == linear
    back = (
        10 - 2 + 2 * 3
    )  # no gradient to the text: k and v have theirs through A, B and a second product of B
    assert (
        backward["attention"] == 0
        and backward["products"] == back
        and backward["norms"] == forward["norms"] == 4
    ), (forward, backward)


@torch.no_grad()
@pytest.mark.parametrize("residual", ["float32", "autocast"])
def test_the_stream_lies_in_memory_in_the_order_of_its_shape(residual):
    model, seen = adapted(), []
    model.residual = residual
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        model(X, T, TEXT)
    assert seen == [True] * len(model.blocks)
