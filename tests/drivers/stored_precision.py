"""How far a frozen Wan transformer is from float32 in each type that it can be stored in: the
output, and the gradient of a LoRA on all its linear layers, as relative L2 distances.

    python -m tests.drivers.stored_precision [--dim 1536 --layers 4]

Weights are random, with the scale of trained ones; products are computed in float32, so that what
is seen is the storage alone. Last come the products themselves, over weights kept as float8: of
unpacked weights in bfloat16, and of 8-bit floats, which a CPU multiplies as the numbers that they
stand for.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from mmdit.adapters import LoRAConfig, inject
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.nn import kernels, products
from mmdit.nn.stored_weights import linear_layers, store

E4M3 = torch.float8_e4m3fn
TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


def of_whole_tensor(weight: Tensor) -> Tensor:
    """Return `weight` as float8 with one scale, as ComfyUI's fp8_scaled files have it."""
    scale = weight.abs().max() / torch.finfo(E4M3).max
    return (weight / scale).to(E4M3).float() * scale


def unscaled(weight: Tensor) -> Tensor:
    return weight.to(E4M3).float()


# what a matrix becomes, or the encoding that it is kept in
WAYS: dict[str, str | Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda weight: weight.bfloat16().float(),
    "int8, a scale for each row (model.dtype=int8)": "int8",
    "float8, a scale for each row (model.dtype=float8)": "float8",
    "float8, a scale for each matrix (fp8_scaled files)": of_whole_tensor,
    "float8 without a scale (fp8 files)": unscaled,
    "nf4, a scale for each 64 weights (model.dtype=nf4)": "nf4",
}


def answers(model: WanDiT, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output and all gradients of a LoRA, as vectors."""
    inject(model, LoRAConfig(enabled=True, rank=8, target_modules=TARGETS), 0)
    trained = []
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
        if name.endswith("lora_B"):
            generator = torch.Generator().manual_seed(len(trained))
            weight.data.normal_(0, 0.01, generator=generator)
        if weight.requires_grad:
            trained.append(weight)
    output = model(*inputs)
    output.square().mean().backward()
    return output.detach().flatten(), torch.cat([weight.grad.flatten() for weight in trained])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    sizes = dict(dim=args.dim, ffn_dim=6 * args.dim, num_heads=args.dim // 128)
    config = WanConfig(**sizes, num_layers=args.layers, in_dim=16, out_dim=16)

    def network() -> WanDiT:
        generator = torch.Generator().manual_seed(0)
        model = WanDiT(config)
        for weight in model.parameters():
            spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.02
            weight.data.normal_(0, spread, generator=generator)
        return model

    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, 3, 16, 16, generator=generator)
    text = torch.randn(1, 32, config.text_dim, generator=generator)
    inputs = noise, torch.tensor([700.0]), text
    exact = answers(network(), inputs)
    for name, way in WAYS.items():
        model = network()
        if isinstance(way, str):
            store(model.blocks, way)
        else:
            for layer in linear_layers(model.blocks.requires_grad_(False)):
                layer.weight.data.copy_(way(layer.weight))
        pairs = zip(answers(model, inputs), exact, strict=True)
        output, gradient = (distance(*pair) for pair in pairs)
        print(f"{name}: output {output:.4f}, gradient {gradient:.4f}", flush=True)
    kernels.can_encode = lambda x: x.dtype == torch.bfloat16
    products.FEW = 0
    for name, multiplies_codes in (("bfloat16", False), ("float8", True)):
        model = network()
        store(model.blocks, "float8", multiplies_codes)
        with torch.autocast("cpu", torch.bfloat16):
            pairs = zip(answers(model, inputs), exact, strict=True)
        output, gradient = (distance(*pair) for pair in pairs)
        print(f"products of {name}: output {output:.4f}, gradient {gradient:.4f}", flush=True)


if __name__ == "__main__":
    main()
