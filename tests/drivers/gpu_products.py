"""Milliseconds of the products of a block 1,152 wide for 32,768 tokens, in bfloat16 and in float8,
and of making its codes.

python -m tests.drivers.gpu_products        one GPU with float8 (H100, H200, Ada), 20 seconds
"""

import json

import torch

from benchmarks.model import timed
from mmdit.nn import kernels
from mmdit.nn.products import codes, multiply
from mmdit.training.step_report import matmul_rate

TOKENS = 32_768
PRODUCTS = {  # outputs, inputs; forward, and as the gradient of its input
    "queries, keys, values": (3456, 1152),
    "projection": (1152, 1152),
    "gate and up": (6144, 1152),
    "down": (1152, 3072),
    "gradient through queries, keys, values": (1152, 3456),
    "gradient through gate and up": (1152, 6144),
}


def main() -> None:
    device = torch.device("cuda")
    kernels.check_device(device)
    matmul_rate(device, torch.bfloat16, repeats=400)  # half a second: the clock of a long run
    for name, (outputs, inputs) in PRODUCTS.items():
        x, weight = (
            torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            for rows in (TOKENS, outputs)
        )
        coded = *codes(x), *codes(weight)
        work = {
            "bfloat16": lambda: x @ weight.t(),
            "float8": lambda: multiply(*coded),
            "codes": lambda: codes(x),
        }  # noqa: B023
        told = {kind: sorted(timed(do, device, 40))[20] for kind, do in work.items()}
        rate = {
            f"{kind}_tflops": round(2 * TOKENS * outputs * inputs / told[kind] / 1e9)
            for kind in ("bfloat16", "float8")
        }
        print(
            json.dumps(
                {"product": name, **{kind: round(ms, 4) for kind, ms in told.items()}, **rate}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
