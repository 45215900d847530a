"""Measure a step of tokenizer pre-training, launched and replayed as CUDA graphs; print one JSON
object.

    python -m tests.drivers.gpu_tokenizer [--config VTP/configs/vtp_tiny_f16d64_semantic.yaml]
    python -m tests.drivers.gpu_tokenizer --tiny   # on a CPU, which replays nothing: does it work?

`milliseconds`: a step's, of forty after the graphs were made. `kernels`: how many of them the GPU
works, of three steps. `different`: weights that differ from those of the first run after eighty
steps, once with blocks compiled and once with deterministic kernels. The exit code is 1 if nothing
was replayed, or if more weights differ than between two runs that are launched.
"""

import argparse
import json
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from mmdit.config import load
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_trainer import TokenizerTrainer

SIZES = ["images.sizes=[[64,64,1.0],[128,128,0.5]]"]
PROFILED = 3  # steps; each launches thousands of kernels, and a profile takes long to sum up
SMALL = ["images.shape_pool=2048", "images.texture_pool=2048"]
TINY = ["images.patches_per_step=64", "images.shape_pool=16", "images.texture_pool=16"]


def trained(config: PretrainConfig, device: torch.device, replays: bool, steps: int) -> dict:
    """Return the time of a step, and the weights after `steps`."""
    trainer = TokenizerTrainer(config, device)
    if device.type == "cuda" and config.train.compile:
        trainer.learner.compile()
    if replays:
        trainer.replay()
    trainer.prepare()
    half = steps // 2
    for _ in range(half):
        trainer.advance()
    wait(device)
    begin = time.perf_counter()
    for _ in range(half):
        trainer.advance()
    wait(device)
    seconds = time.perf_counter() - begin
    weights = {name: value.clone() for name, value in trainer.learner.state_dict().items()}
    watched = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[watched]) as profiled:
        for _ in range(PROFILED):
            trainer.advance()
        wait(device)
    busy = sum(event.self_device_time_total for event in profiled.key_averages())
    graphs = trainer.replays.calls.made.values() if trainer.replays else []
    return {
        "milliseconds": round(seconds / half * 1e3, 1),
        "kernels": round(busy / PROFILED / 1e3, 1),
        "graphs": sum(graph is not None for graph in graphs),
        "weights": weights,
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="VTP/configs/vtp_tiny_f16d64_semantic.yaml")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device, steps = torch.device("cpu" if args.tiny else "cuda"), 4 if args.tiny else 80
    torch.set_float32_matmul_precision("high")
    words = [*SIZES, *(TINY if args.tiny else SMALL), "train.max_steps=1000"]
    result, good = {}, True
    for way, compiled in (("compiled", True), ("deterministic", False)):
        torch.use_deterministic_algorithms(not compiled, warn_only=True)
        config = load(PretrainConfig, args.config, [*words, f"train.compile={compiled}"])
        rows: dict[str, dict] = {}
        first: dict[str, torch.Tensor] = {}
        for name in ("launched", "again", "replayed"):
            row = trained(config, device, name == "replayed", steps)
            weights = row.pop("weights")
            first = first or weights
            different = [key for key, value in first.items() if not value.equal(weights[key])]
            rows[name] = row | {"different": len(different)}
            print(way, name, rows[name], file=sys.stderr, flush=True)
        result[way] = rows
        good &= rows["replayed"]["graphs"] > 0
        good &= rows["replayed"]["different"] <= rows["again"]["different"]
    print(json.dumps(result))
    return 0 if good or args.tiny else 1


if __name__ == "__main__":
    raise SystemExit(main())
