"""Take LoRA steps of a whole expert of Wan A14B, and of TI2V-5B, within the memory of a small card:
blocks, and what recomputed blocks start from, in the memory of the CPU. A14B beside musubi-tuner,
whose source is given as `--peer`: its block swap, its LoRA, its checkpointing. A JSON line a case,
each in a process of its own; some 100 s a case on an H200.

    python -m tests.drivers.gpu_block_swap --gigabytes 24 --peer musubi-tuner/src
    python -m tests.drivers.gpu_block_swap --gigabytes 16 --only "ours, 5B"
    python -m tests.drivers.gpu_block_swap --only ours --tiny   # on a CPU, to see that it runs

A14B at 832x480 with 81 frames (32,760 tokens), 5B at 1280x704 with 121 (27,280 tokens), batch 1,
rank 32 on all linear layers of the blocks, random weights, 512 tokens of text, AdamW in float32 on
the adapters. `step_s`: the median after the first step; `gb` and `reserved_gb`: the most that
tensors took, and that torch held of the card, which the cap bounds; `host_gb`: the most that the
process had of the CPU's memory. `loss` is for a look: the two draw other numbers.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mmdit.commands.plan_memory.memory_plan import SIZES
from mmdit.nn import kernels
from tests.drivers.gpu_memory_plan import stepping, wan

RANK = 32
SENT = {"checkpointing": True, "offload_activations": True, "residual": "autocast"}
OURS = {
    "ours, 14B, bfloat16, 40 blocks away": ("14B", 40, {}),
    "ours, 14B, float8, 40 blocks away": ("14B", 40, {"dtype": "float8"}),
    "ours, 14B, float8, 20 blocks away": ("14B", 20, {"dtype": "float8"}),
    "ours, both 14B, bfloat16, 40 blocks away": ("14B", 40, {"pair": True, "boundary": 0.875}),
    "ours, 5B, bfloat16, 30 blocks away": ("5B", 30, {}),
    "ours, 5B, float8": ("5B", 0, {"dtype": "float8"}),
}
# Blocks away, whether the base is fp8_scaled, and its way of swapping blocks. With 39 of its 40
# blocks away musubi-tuner stops in the first backward pass, whose second block is then on the CPU.
PEERS = {
    "musubi-tuner, bfloat16, 38 blocks swapped": (38, False, {"use_pinned_memory": True}),
    "musubi-tuner, bfloat16, 38 blocks streamed": (
        38,
        False,
        {"use_pinned_memory": True, "h2d_only": True},
    ),
    "musubi-tuner, fp8_scaled, 38 blocks streamed": (
        38,
        True,
        {"use_pinned_memory": True, "h2d_only": True},
    ),
}


def ours(name: str, device: torch.device, tiny: bool) -> Callable[[], float]:
    """Return what takes a step by our trainer's own code, and returns its loss."""
    base, away, model = OURS[name]
    return stepping(wan(base, tiny, offload=away, **SENT, **model), device)[2]


def peers(name: str, device: torch.device, tiny: bool, source: Path) -> Callable[[], float]:
    """Return what takes a step of musubi-tuner's parts, as its trainer calls them."""
    sys.path.insert(0, str(source))
    # What else lies in this folder wants packages and a GPU.
    package = types.ModuleType("musubi_tuner.wan.modules")
    package.__path__ = [str(source / "musubi_tuner/wan/modules")]
    sys.modules[package.__name__] = package
    theirs = importlib.import_module("musubi_tuner.wan.modules.model")
    swapping = importlib.import_module("musubi_tuner.modules.custom_offloading_utils")
    networks = importlib.import_module("musubi_tuner.networks.lora_wan")
    (away, codes, ways), config = PEERS[name], SIZES["14B"]
    sizes = {key: getattr(config, key) for key in ("dim", "ffn_dim", "num_heads", "num_layers")}
    if tiny:
        sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 4}
    with torch.device("meta"):
        model = theirs.WanModel(model_version="2.2", attn_mode="torch", **sizes)
    head = sizes["dim"] // sizes["num_heads"]
    part = 2 * (head // 6)
    widths = (head - 2 * part, part, part)
    model.freqs = torch.cat([theirs.rope_params(1024, width) for width in widths], 1)
    # Its times are computed under an autocast to float32, which a CPU does not have.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    if codes:
        state = model.fp8_optimization(model.state_dict(), device, move_to_device=True)
        model.load_state_dict(state, strict=True, assign=True)
        model.requires_grad_(False)
    model.set_time_embedding_v2_1(True)  # one embedding for all tokens: 4 GB less
    model.enable_gradient_checkpointing(True)
    if device.type == "cuda":
        options = swapping.BlockSwapConfig(device, supports_backward=True, **ways)
        model.enable_block_swap(min(away, sizes["num_layers"] - 1), options)
        model.move_to_device_except_swap_blocks(device)
    network = networks.create_arch_network(1.0, RANK, RANK, None, [], model)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    network.to(device).train().requires_grad_(True)
    model.train()
    if device.type == "cuda":
        model.prepare_block_swap_before_forward()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    grid = (3, 4, 8) if tiny else (21, 60, 104)
    x = torch.randn(1, 16, *grid, device=device, dtype=dtype, requires_grad=True)
    text = [torch.randn(512, 4096, device=device, dtype=dtype, requires_grad=True)]
    time_ = torch.tensor([417.0], device=device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            output = torch.stack(model(x, time_, text, seq_len=grid[0] * grid[1] * grid[2] // 4))
        loss = (output.float() - x.detach()).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measured(name: str, gigabytes: float, steps: int, tiny: bool, source: Path | None) -> dict:
    """Return the figures of a case. The cap holds from the first step on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        kernels.check_device(device)
    begin = time.perf_counter()
    step = ours(name, device, tiny) if name in OURS else peers(name, device, tiny, source)
    result: dict = {"case": name, "cap_gb": gigabytes}
    wait: Callable[[], object] = lambda: None
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
        wait = torch.cuda.synchronize
    result["start_s"], seconds = round(time.perf_counter() - begin, 1), []
    for _ in range(steps):
        wait()
        begin = time.perf_counter()
        result["loss"] = step()
        wait()
        seconds.append(time.perf_counter() - begin)
        print(f"{name}: a step of {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    result |= {"step_s": round(statistics.median(seconds[1:]), 3), "first_s": round(seconds[0], 3)}
    if device.type == "cuda":
        result["gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    result["host_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=24.0, help="of the card, 1e9 bytes each")
    parser.add_argument("--peer", type=Path, help="folder with musubi_tuner")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", default="", help="cases whose name begins with it")
    parser.add_argument("--case", help="measure this one, here")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.case:
        found = measured(args.case, args.gigabytes, args.steps, args.tiny, args.peer)
        print(json.dumps(found), flush=True)
        return 0
    names = [*OURS, *(PEERS if args.peer else [])]
    # Without it fp8_scaled runs out in pieces of 11 GB that are free.
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    failed = 0
    for name in (name for name in names if name.startswith(args.only)):
        words = [sys.executable, "-m", "tests.drivers.gpu_block_swap", *sys.argv[1:]]
        run = subprocess.run(
            [*words, "--case", name], capture_output=True, text=True, check=False, env=environment
        )
        lines = run.stdout.splitlines() if run.returncode == 0 else run.stderr.splitlines()
        failed += run.returncode != 0
        print(lines[-1] if lines else f"{name}: exit status {run.returncode}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
