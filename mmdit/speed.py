"""How fast the model trains and samples: steps of the ordinary trainer on latents of noise, counted against the matmul rate.

Operations are those the model asks for (`train_flops`), whatever a kernel or checkpointing computes twice; the matmul rate is
that of an 8192³ product in bfloat16, measured beside each row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit.config import decode
from mmdit.diagnostics.families import by_family
from mmdit.experiment import ExperimentConfig, build_learner
from mmdit.interfaces import Batch
from mmdit.tokenizers import build_tokenizer
from mmdit.training.distributed import World
from mmdit.training.report import Window, matmul_rate
from mmdit.training.trainer import Trainer, TrainState

CAPTION = "a red ball moves slowly over a wide green field while a blue cube stands still"


class Bench:
    """A learner with random weights, its optimizer and one batch of noise on `device`; `shape`: (samples, frames, rows,
    columns) of latents with 64 channels."""

    def __init__(self, model: dict, shape: tuple[int, int, int, int], device: torch.device, compile: bool, **sections):
        samples, frames, rows, columns = shape
        raw = {
            "experiment_name": "speed", "video": {"width": 16 * columns, "height": 16 * rows, "num_frames": frames},
            "tokenizer": {"type": "dummy", "latent_d": 64}, "text_encoder": {"type": "hash", "dim": 512},
            "model": model, **sections,
        }  # fmt: skip
        self.config, self.device = decode(ExperimentConfig, raw), device
        tokenizer = build_tokenizer(self.config.tokenizer)
        self.learner = build_learner(self.config, tokenizer.spec).to(device)
        self.state = TrainState.create(self.learner, self.config.train, self.config.ema)
        self.trainer = Trainer(self.config.train, 0, self.state, None, World(device=device), Path("."), None)
        latents = torch.randn(samples, frames, rows, columns, 64, device=device, dtype=torch.float16)
        ids = [f"item{i}" for i in range(samples)]
        self.batch = Batch(latents, [CAPTION] * samples, ids, torch.arange(samples))
        self.window = Window(device)
        if compile:
            self.learner.compile_model()
        self.learner.train()

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.learner.model.parameters())

    def step(self) -> None:
        self.trainer.optimizer_step(self.learner, [self.batch], 1e-4, self.window)
        self.state.step += 1
        if self.state.ema:
            self.state.ema.update(self.state.step)


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls that follow each other as in a run: on a GPU by its own clock, without waits."""
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for _ in range(repeats):
            work()
            clock.append(time.perf_counter())
        return [(end - begin) * 1e3 for begin, end in pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def row(part: str, times: list[float], samples: int, flops: float, device: torch.device) -> dict:
    """What is said of every part: milliseconds (median, least, most), rate, share of the matmul rate, memory."""
    middle, rate = statistics.median(times), matmul_rate(device, torch.bfloat16)
    told = {"part": part, "ms": round(middle, 2), "ms_min": round(min(times), 2), "ms_max": round(max(times), 2),
            "per_s": round(samples / middle * 1e3, 2), "tflops": round(flops / middle / 1e9, 1)}  # fmt: skip
    if rate:
        told |= {"matmul_tflops": round(rate / 1e12, 1), "share": round(flops / (middle * 1e-3) / rate, 3),
                 "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}  # fmt: skip
    return told


def train(model: dict, shape: tuple[int, int, int, int], device: torch.device, compile: bool, repeats: int = 8,
          profile: bool = False, **sections) -> Iterator[dict]:  # fmt: skip
    """A row for the training step, with `profile` a second one: milliseconds of a step by family of kernels."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench = Bench(model, shape, device, compile, **sections)
    begin = time.perf_counter()
    timed(bench.step, device, 3)
    warm = time.perf_counter() - begin
    times = timed(bench.step, device, repeats)
    keep = bench.learner.model.draw_keep(*shape[2:], 0, 0)
    flops = shape[0] * bench.learner.train_flops(shape[1:], keep)
    facts = {"shape": list(shape), "parameters": bench.parameters, "compile": compile, "warm_up_s": round(warm, 1)}
    yield row("train", times, shape[0], flops, device) | facts
    if profile:
        yield {"part": "train profile", "shape": list(shape), **by_family(bench.step, device)}


def peer(build: Callable[[], nn.Module], inputs: Callable[[], tuple], samples: int, device: torch.device, compile: bool,
         repeats: int = 8) -> dict:  # fmt: skip
    """A training step of somebody else's denoiser `model(*inputs) → prediction`: bfloat16 autocast, mean square, fused AdamW;
    operations are counted by torch over one forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.cuda.reset_peak_memory_stats()
    model = build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    given = inputs()

    def loss(network: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(*given).float().square().mean()

    with FlopCounterMode(display=False) as counter:
        loss(model).backward()
    network = torch.compile(model) if compile else model

    def step() -> None:
        loss(network).backward()
        optimizer.step()
        optimizer.zero_grad()

    timed(step, device, 3)
    told = row("peer", timed(step, device, repeats), samples, counter.get_total_flops(), device)
    return told | {"parameters": sum(weight.numel() for weight in model.parameters()), "compile": compile}
