"""Sampling on a GPU: plain steps, prepared text, and CUDA graphs, in time and memory, and whether
they give the same bits.

    python -m tests.drivers.gpu_sampling        a JSON line a case, about 80 s on an H200

`apart`: the largest absolute difference from plain steps, which must be 0. `gib`: allocated and
reserved, at most and after the call. A case that fails says so; the others go on. Exit code 1 if
any failed or differs.
"""

import argparse
import json
import sys
import time
import warnings
from contextlib import contextmanager

import torch

from benchmarks.model import CAPTION, Bench, fresh_peak, row, timed
from mmdit.diffusion import SamplerConfig
from mmdit.interfaces import Boundary
from mmdit.nn.experts import Experts, shared_copy
from mmdit.tokenizers import build_tokenizer
from mmdit.training.distributed import World
from mmdit.training.graphs import sampling_graphs as calls
from mmdit.training.pipeline import Pipeline, SampleSettings

WAYS = ("plain", "prepared", "graphs")
METERS = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")


@contextmanager
def way(name: str):
    call, able = calls.Calls.__call__, calls._able
    if name == "plain":
        calls.Calls.__call__ = lambda self, model, *inputs: model(*inputs)
    calls._able = name == "graphs"
    try:
        yield
    finally:
        calls.Calls.__call__, calls._able = call, able


class Case:
    def __init__(self, device: torch.device, shape: tuple, model: dict, precision: str = "bf16"):
        self.device, self.shape = device, shape
        bench = Bench(shape, World(device=device), False, ema={"enabled": False}, model=model)
        self.learner = bench.learner
        with torch.no_grad():
            for (
                weight
            ) in self.learner.model.parameters():  # what starts at zero would hide differences
                weight.add_(0.02 * torch.randn_like(weight))
        self.pipeline = Pipeline(self.learner, build_tokenizer(bench.config.tokenizer), precision)

    def draw(self, steps: int, solver: str = "euler", **settings) -> torch.Tensor:
        samples, frames, rows, columns = self.shape
        chosen = SampleSettings(SamplerConfig(solver, steps), **{"cfg_scale": 3.0, **settings})
        return self.pipeline.latents([CAPTION] * samples, 16 * columns, 16 * rows, frames, chosen)


def compared(drawn: dict[str, torch.Tensor]) -> dict:
    apart = {name: (drawn[name] - drawn["plain"]).abs().max().item() for name in WAYS[1:]}
    return {
        "apart": apart,
        "mean_size": round(drawn["plain"].abs().mean().item(), 3),
        "ok": not any(apart.values()),
    }


def speed(device: torch.device, shape: tuple, model: dict, steps: int) -> dict:
    case, drawn, told = (
        Case(device, shape, model),
        {},
        {"shape": shape, "model": model, "steps": steps},
    )
    words = case.learner.text_encoder([CAPTION]).valid.shape[1]
    flops = (
        2 * steps * shape[0] * case.learner.model.train_flops(shape[1:], words) / 3
    )  # forward is a third; guidance doubles
    for name in WAYS:
        with way(name):
            case.draw(3)  # kernels, tables
            fresh_peak(device)
            times = timed(
                lambda: drawn.update({name: case.draw(steps)}), device, 2 if shape[0] > 1 else 3
            )
            gib = [
                round(getattr(torch.cuda, meter)() / 2**30, 2)
                for meter in METERS
                if device.type == "cuda"
            ]
            told[name] = row(name, times, shape[0], flops, device) | {
                "gib": gib,
                "replayed": calls._able,
            }
    return told | compared(drawn)


def same(
    device: torch.device,
    shape: tuple,
    model: dict,
    precision: str = "bf16",
    kind: str = "",
    **settings,
) -> dict:
    case, drawn = Case(device, shape, model, precision), {}
    network = case.learner.model
    if kind == "pair":  # that differ in one layer
        low = shared_copy(network)
        low.blocks[0].cross.k.weight = torch.nn.Parameter(
            -network.blocks[0].cross.k.weight.detach()
        )
        case.learner.model = Experts(network, low, Boundary(0.5, 1000.0))
    if kind == "waits":  # cannot be captured: told once, and drawn all the same
        network.time.forward = lambda t, embed=network.time.forward: (
            embed(t) * (1 + 0 * t[0].item())
        )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for name in WAYS:
            with way(name):
                drawn[name], replayed = case.draw(6, **settings), calls._able
    told = {
        "kind": kind,
        "model": model,
        "precision": precision,
        **settings,
        "heard": [str(line.message) for line in heard],
    }
    told |= compared(drawn)
    return told | {"ok": told["ok"] and (device.type == "cpu" or replayed == (kind != "waits"))}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--tiny", action="store_true", help="on a CPU, to see that the script works"
    )
    tiny = parser.parse_args().tiny
    device = torch.device("cpu" if tiny else "cuda")
    sizes = ((32, 2, 1), (32, 2, 1)) if tiny else ((384, 12, 6), (1152, 25, 18))
    small, large = (dict(zip(("dim", "depth", "num_heads"), size)) for size in sizes)
    few, clips = ((1, 2, 4, 4), (2, 2, 4, 4)) if tiny else ((2, 4, 16, 16), (8, 16, 16, 16))
    cases = [
        (speed, shape, model, 3 if tiny else 20, {})
        for model in (small, large)
        for shape in ((1, 1, 16, 16), clips)
    ]
    cases += [
        (same, few, small | more, {"precision": precision})
        for more in ({}, {"crop": True})
        for precision in ("bf16", "fp32")
    ]
    rest = ({"solver": "heun", "cfg_interval": (0.3, 0.7)}, {"kind": "pair"}, {"kind": "waits"})
    cases, failed = cases + [(same, few, small, more) for more in rest], False
    for function, *inputs, more in cases:
        begin = time.perf_counter()
        try:
            told = function(device, *inputs, **more)
        except Exception as error:  # the other cases are independent of it
            told = {
                "case": [function.__name__, *inputs, more],
                "ok": False,
                "error": f"{type(error).__name__}: {error}"[:600],
            }
        failed |= not told["ok"]
        print(json.dumps(told | {"seconds": round(time.perf_counter() - begin, 1)}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
