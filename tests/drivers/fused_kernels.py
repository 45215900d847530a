"""The fused kernels against the plain path: outputs and all gradients of whole models, and
gradients of attention to text by one program and by several. Prints a JSON line a case.

TRITON_INTERPRET=1 python -m tests.drivers.fused_kernels on a CPU, float32 python -m
tests.drivers.fused_kernels --device cuda on a GPU: float32, and bfloat16 products python -m
tests.drivers.fused_kernels --device cuda --compile the same, launched by compiled blocks as in
training
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.interfaces import TextTokens
from mmdit.models.routing import TreadConfig
from mmdit.models.video_mmdit import VideoMMDiT, VideoMMDiTConfig
from mmdit.nn import kernels, products

CASES = {  # frames, rows, columns, window, text tokens, more of the model
    "a picture": (1, 4, 8, 4, 17, {}),
    "a padded clip": (2, 3, 5, 3, 5, {}),
    "frames as a set, no norm of queries and keys": (
        2,
        4,
        4,
        4,
        6,
        {"temporal_position": False, "qk_norm": False},
    ),
    "one frame more than a tile of 64 holds": (65, 2, 2, 2, 6, {}),
    "products of float8": (
        2,
        4,
        8,
        4,
        6,
        {"products": "float8"},
    ),  # on a GPU, in bfloat16: some 0.3 from exact, by their rounding
    "whole frames, with padding, larger than a tile": (2, 11, 13, 5, 6, {"spatial": ("frame",)}),
    "windows larger than a tile, no norm of queries and keys": (
        1,
        12,
        24,
        12,
        6,
        {"spatial": ("window", "shifted"), "qk_norm": False},
    ),
    "more frames than a tile holds": (130, 1, 2, 2, 6, {}),
    "routed": (2, 4, 8, 4, 6, {"tread": TreadConfig(enabled=True, apply_to=(1, 3))}),
    "a small clip, in one block": (2, 2, 3, 2, 3, {"dim": 32, "depth": 1, "num_heads": 1}),
}


def run(
    case: tuple, device: torch.device, autocast: bool, fuse: bool, compile: bool = False
) -> dict[str, torch.Tensor]:
    frames, rows, columns, window, words, more = case
    torch.manual_seed(0)
    more = dict(more)
    tread = more.pop("tread", None)
    sizes = {"dim": 96, "depth": 3 if tread else 2, "num_heads": 3, "window_size": window}
    model = VideoMMDiT(VideoMMDiTConfig(**sizes | more), 4, 8, tread).to(device)
    with torch.no_grad():
        for weight in model.parameters():  # gates open, gains apart from one
            weight.add_(0.1 * torch.randn(weight.shape).to(device))
    x = torch.randn(2, frames, rows, columns, 4).to(device).requires_grad_()
    valid = torch.arange(words) < torch.tensor([[words], [3]])
    text = TextTokens(torch.randn(2, words, 8).to(device), valid.to(device))
    keep = model.draw_keep(rows, columns, 0, 1)
    for block in model.blocks if compile else ():
        block.compile(dynamic=False)
    serve, kernels.can_run = kernels.can_run, lambda x: fuse
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            t = torch.tensor([100.0, 900.0], device=device)
            out = model(x, t, text, keep)
            assert compile or torch.equal(model(x, t, model.prepare(text), keep), out), (
                "keys and values made beforehand"
            )
        (out.float() * torch.randn(out.shape).to(device)).sum().backward()
    finally:
        kernels.can_run = serve
    gradients = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    return {"output": out.detach(), "input": x.grad, **gradients}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference of two tensors of one name, relative to the size of `b`'s."""
    return max((a[key] - b[key]).norm().item() / (b[key].norm().item() + 1e-12) for key in b)


def attention_to_text(queries: int, device: torch.device) -> float:
    """Return how far the gradients of the kernel are from those of plain attention."""
    valid = torch.arange(5, device=device) < torch.tensor([[3], [5]], device=device)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, length, 64, generator=generator) for length in (queries, 5, 5)]

    def gradients(attend) -> dict[str, Tensor]:
        q, k, v = (leaf.to(device, copy=True).requires_grad_() for leaf in leaves)
        attend(q, k, v).square().sum().backward()
        return {"q": q.grad, "k": k.grad, "v": v.grad}

    def plain(*tensors: Tensor) -> Tensor:
        heads = [x.unflatten(-1, (2, 32)).transpose(1, 2) for x in tensors]
        attended = F.scaled_dot_product_attention(*heads, valid[:, None, None])
        return attended.transpose(1, 2).flatten(2)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention.text_attention(q, k, v, valid, [], 2)

    return distance(gradients(fused), gradients(plain))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    args = parser.parse_args(words)
    device = torch.device(args.device)
    if device.type == "cpu":
        assert kernels.INTERPRETED, "set TRITON_INTERPRET=1: Triton compiles for GPUs only"
    products.FEW = 0
    kernels.check_device(device)
    # so that a program has several tokens of these small clips
    kernels.residual.LAYOUTS = {512: (4, 4, 3, 4)}
    for queries in (70, 300):  # of one program and of two
        row = {"case": f"{queries} queries to text"}
        print(json.dumps(row | {"fused_to_plain": attention_to_text(queries, device)}), flush=True)
    for name, case in (list(CASES.items())[number] for number in args.cases):
        for autocast in (False, True)[: 1 + (device.type == "cuda")]:
            plain, fused = (
                run(case, device, autocast, False),
                run(case, device, autocast, True, args.compile),
            )
            exact = run(case, device, False, False)
            rows = {
                "case": name,
                "autocast": autocast,
                "fused_to_plain": distance(fused, plain),
                "fused_to_exact": distance(fused, exact),
                "plain_to_exact": distance(plain, exact),
            }
            assert plain.keys() == fused.keys()
            print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
