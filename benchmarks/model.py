"""The parts of `mmdit.scripts.benchmark`: each yields rows of figures. A new part is a function and
its name in PARTS.

Training and sampling are those of the ordinary trainer and pipeline, on latents of noise.
Operations are those the model asks for (`train_flops`), whatever a kernel or checkpointing computes
twice; the matmul rate is that of an 8192³ product in bfloat16, measured beside each row. Under
torchrun `train` alone is measured, on a GPU a process: rates are of all, the rest of the main one,
with which the others keep step."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data as data_speed
from benchmarks.families import by_family
from mmdit.commands.plan_memory.memory_plan import SIZES, random_denoiser
from mmdit.config import decode
from mmdit.diffusion import SamplerConfig
from mmdit.experiment.build import build_learner, build_network
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.interfaces import Batch, Denoiser, LatentSpec
from mmdit.tokenizers import VTPTokenizerConfig, build_tokenizer
from mmdit.training.distributed import World
from mmdit.training.parallel import shard, wrap
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.step_report import ReportWindow, matmul_rate
from mmdit.training.train_state import TrainState
from mmdit.training.trainer import Trainer

# matrix products, about half a second: a GPU keeps its first clock for some milliseconds only
LONG = 400
Shape = tuple[int, int, int, int]  # samples, frames, rows, columns of latents
# The pixels of a cell, channels, and a clip: 81 frames of 832x480, and 121 frames of 1280x704.
WAN: dict[str, tuple[int, int, Shape]] = {
    "1.3B": (8, 16, (1, 21, 60, 104)),
    "5B": (16, 48, (1, 31, 44, 80)),
}
CAPTION = "a red ball moves slowly over a wide green field while a blue cube stands still"


class Bench:
    """Holds a learner with random weights, its optimizer and one batch of noise, as a run does.

    `shape` is (samples, frames, rows, columns) of the latents of this process. `sections` replace
    those of a Video MMDiT on 64 channels; `network` makes the denoiser."""

    def __init__(
        self,
        shape: Shape,
        world: World,
        compile: bool,
        network: Callable[..., Denoiser] = build_network,
        **sections,
    ):
        samples, frames, rows, columns = shape
        raw = {
            "experiment_name": "speed",
            "video": {"width": 16 * columns, "height": 16 * rows, "num_frames": frames},
            "tokenizer": {"type": "dummy", "latent_d": 64},
            "text_encoder": {"type": "hash", "dim": 512},
            **sections,
        }
        self.config, device = decode(ExperimentConfig, raw), world.device
        tokenizer = self.config.tokenizer
        spec = LatentSpec(tokenizer.latent_d, tokenizer.latent_f, temporal=tokenizer.temporal)
        self.learner = build_learner(self.config, spec, network)
        if self.config.parallel.type == "fsdp" and world.size > 1:
            shard(self.learner, world, self.config.parallel)
        self.learner.to(device)
        self.state = TrainState.create(self.learner, self.config.train, self.config.ema)
        self.trainer = Trainer(self.config.train, 0, self.state, None, world, Path("."), None)
        latents = torch.randn(*shape, tokenizer.latent_d).half()
        ids = [f"item{i}" for i in range(samples)]
        indices = torch.arange(samples) + samples * world.rank
        batch = Batch(latents, [CAPTION] * samples, ids, indices)
        # pinned, as the loader gives it
        self.batch = batch.pin_memory() if device.type == "cuda" else batch
        self.window = ReportWindow(device)
        if compile:
            self.learner.compile_model()
        if self.config.train.replays:
            self.learner.replay_model()
        self.wrapped = wrap(self.learner, world, self.config.parallel)
        self.learner.train()

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.learner.model.parameters())

    def step(self) -> None:
        self.trainer.optimizer_step(self.wrapped, [self.batch], 1e-4, self.window)
        self.state.step += 1
        if self.state.ema:
            self.state.ema.update(self.state.step)


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the milliseconds of each of `repeats` calls that follow each other as in a run; on a
    GPU its own clock measures them, without waits."""
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


def row(
    part: str, times: list[float], samples: int, flops: float, device: torch.device, gpus: int = 1
) -> dict:
    """Return the figures that every part reports: the milliseconds of a call (median, least, most)
    and the samples a second on all `gpus`. For one GPU, which does `samples` and `flops` in a call,
    it adds GFLOP, TFLOP/s, the share of the matmul rate, and peak memory in GB."""
    middle, rate = statistics.median(times), matmul_rate(device, torch.bfloat16, repeats=LONG)
    figures = {
        "part": part,
        "ms": round(middle, 2),
        "ms_min": round(min(times), 2),
        "ms_max": round(max(times), 2),
        "per_s": round(gpus * samples / middle * 1e3, 2),
        "gflop": round(flops / 1e9, 3),
        "tflops": round(flops / middle / 1e9, 1),
    }
    if rate:
        figures |= {
            "matmul_tflops": round(rate / 1e12, 1),
            "share": round(flops / (middle * 1e-3) / rate, 3),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
    return figures


def fresh_peak(device: torch.device) -> None:
    gc.collect()  # an earlier learner and its optimizer know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read(pairs: list[str]) -> dict:
    """Return what `KEY=VALUE` words of the command line say."""
    return dict(yaml.safe_load(pair.replace("=", ": ", 1)).popitem() for pair in pairs)


def settings(args: Namespace) -> dict:
    """Return the sections of a config that the command line sets."""
    routed = {"tread": {"enabled": True, "selection_rate": args.tread}} if args.tread else {}
    return {
        "model": read(args.model),
        "parallel": read(args.parallel),
        "train": read(args.train),
        **routed,
    }


def train(args: Namespace, world: World, folder: Path) -> Iterator[dict]:
    """Yield the figures of a training step for each shape; with `--profile` also the milliseconds
    of a step by family of kernels."""
    for shape in args.shapes:
        fresh_peak(world.device)
        yield from _steps(
            "train", Bench(shape, world, args.compile, **settings(args)), shape, args, world
        )


def wan(args: Namespace, world: World, folder: Path) -> Iterator[dict]:
    """Yield the figures of a training step of adapters, one clip a step, on a Wan transformer of a
    released size with random weights."""
    cell, channels, shape = WAN[args.wan]
    _, frames, rows, columns = shape
    sections = {
        "video": {
            "width": cell * columns,
            "height": cell * rows,
            "num_frames": 4 * (frames - 1) + 1,
        },
        "tokenizer": {
            "type": "wan_vae",
            "name_or_path": "none",
            "latent_f": cell,
            "latent_d": channels,
        },
        "text_encoder": {"type": "hash", "dim": 4096, "max_length": 512},
        "ema": {"enabled": False},
        "model": {
            "type": "wan",
            "name_or_path": args.wan,
            "dtype": "bfloat16",
            "boundary": 0.875,
            **read(args.wan_model),
        },
        "lora": {
            "enabled": True,
            "rank": 16,
            "alpha": 16,
            "target_modules": ["cross_attn.k", "cross_attn.v"],
            **read(args.lora),
        },
    }
    fresh_peak(world.device)
    network = lambda run, *_: random_denoiser(SIZES[args.wan], run.model, world.device)  # noqa: E731
    yield from _steps(
        "wan", Bench(shape, world, args.compile, network, **sections), shape, args, world
    )


def _steps(part: str, bench: Bench, shape: Shape, args: Namespace, world: World) -> Iterator[dict]:
    device = world.device
    begin = time.perf_counter()
    bench.step()
    if device.type == "cuda":
        # what steps take and what their graphs keep, not what loading or compiling took
        torch.cuda.reset_peak_memory_stats()
    # DDP waits for the GPU in its first ten steps, to time itself
    timed(bench.step, device, 3 if world.size == 1 else 11)
    warm = time.perf_counter() - begin
    times = timed(bench.step, device, args.repeats)
    keep = bench.learner.model.draw_keep(*shape[2:], 0, 0)
    flops = shape[0] * bench.learner.train_flops(shape[1:], keep)
    figures = row(part, times, shape[0], flops, device, world.size)
    if device.type == "cuda":
        # between steps: weights, moments, averages
        figures["rest_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        # returns as soon as all is queued; where that takes as long as `ms`, the CPU is the limit
        bench.step()
        figures["cpu_ms"] = round((time.perf_counter() - begin) * 1e3, 1)
    yield figures | {
        "gpus": world.size,
        "shape": list(shape),
        "tokens": math.prod(shape[1:]),
        "clips_per_day": round(world.size * shape[0] / statistics.median(times) * 86_400_000),
        "parameters": bench.parameters,
        "compile": args.compile,
        "warm_up_s": round(warm, 1),
    }
    if args.profile:
        yield {"part": f"{part} profile", "shape": list(shape), **by_family(bench.step, device)}


def sample(args: Namespace, world: World, folder: Path) -> Iterator[dict]:
    """Yield for each shape the figures of sampling latents by `--steps` guided steps, which call
    the network twice each."""
    for shape in args.shapes:
        yield _sample(shape, args, world)


def _sample(shape: Shape, args: Namespace, world: World) -> dict:
    device = world.device
    fresh_peak(device)
    bench = Bench(shape, world, False, ema={"enabled": False}, **settings(args))
    pipeline = Pipeline(bench.learner, build_tokenizer(bench.config.tokenizer), "bf16")
    video = bench.config.video

    def draw(steps: int) -> None:
        chosen = SampleSettings(SamplerConfig("euler", steps), cfg_scale=3.0)
        pipeline.latents([CAPTION] * shape[0], video.width, video.height, shape[1], chosen)

    draw(2)
    times = timed(lambda: draw(args.steps), device, 2)
    forward = bench.learner.train_flops(shape[1:], None) / 3  # a third of a training step
    flops = 2 * args.steps * shape[0] * forward
    figures = row("sample", times, shape[0], flops, device)
    return figures | {"shape": list(shape), "steps": args.steps, "parameters": bench.parameters}


def peers(args: Namespace, world: World, folder: Path) -> Iterator[dict]:
    """Yield the figures of SiT-XL/2 on 128 pictures and of Latte-XL/2 on 8 clips of 16 frames.

    A picture or frame has 256 tokens. The code comes from clones in `--peers`. Latte calls an older
    name of torch's fused attention, so that its attention is replaced by the current one."""
    device = world.device
    folder = Path(args.peers or "")
    sources = {"SiT": folder / "SiT/models.py", "Latte": folder / "Latte/models/latte.py"}
    for path in sources.values():
        if not args.peers or not path.is_file():
            raise ValueError(
                f"{path} is not there; clone willisma/SiT and Vchitect/Latte into one folder, name"
                " it with --peers"
            )
    for name, path in sources.items():
        fresh_peak(device)
        spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        if name == "SiT":
            model = code.SiT_XL_2(input_size=32)
            latents = torch.randn(128, 4, 32, 32, device=device)
            more = [torch.zeros(128, dtype=torch.long, device=device)]
        else:
            code.Attention.forward = _sdpa
            model = code.Latte_XL_2(input_size=32, num_frames=16)
            latents = torch.randn(8, 16, 4, 32, 32, device=device)
            more = []
        times = torch.rand(len(latents), device=device)
        yield peer(model, (latents, times, *more), args, device) | {"peer": name}
        del model


def _sdpa(self, x: Tensor) -> Tensor:
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def peer(model: nn.Module, inputs: tuple, args: Namespace, device: torch.device) -> dict:
    """Return the figures of a training step of somebody else's denoiser, `model(*inputs) →
    prediction`.

    The step uses bfloat16 autocast, the mean square as loss, and fused AdamW. Torch counts the
    operations of one forward and backward pass."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def loss(network: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(*inputs).float().square().mean()

    with FlopCounterMode(display=False) as counter:
        loss(model).backward()
    network = torch.compile(model) if args.compile else model

    def step() -> None:
        loss(network).backward()
        optimizer.step()
        optimizer.zero_grad()

    timed(step, device, 4)
    figures = row(
        "peer", timed(step, device, args.repeats), len(inputs[0]), counter.get_total_flops(), device
    )
    return figures | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "compile": args.compile,
    }


def tokenizer_of(args: Namespace, device: torch.device, folder: Path, compile: bool):
    path, name = VTPTokenizerConfig.name_or_path, "vtp_tiny"
    if args.vtp:
        path, name = data_speed.make_vtp(folder / f"vtp_{args.vtp}", args.vtp), f"VTP-{args.vtp}"
    config = VTPTokenizerConfig(name_or_path=str(path), chunk_size=args.batch_size, compile=compile)
    return build_tokenizer(config, device), name


def cache(args: Namespace, world: World, folder: Path) -> Iterator[dict]:
    """Yield the pictures a second from JPEG files to cached latents, and of decoding alone by the
    same workers."""
    tokenizer, name = tokenizer_of(args, world.device, folder, args.compile)
    batch = min(args.batch_size, 64)
    on_gpu = world.device.type == "cuda" and importlib.util.find_spec("torchvision")
    for decoder in ("pillow", "torchvision") if on_gpu else ("pillow",):
        for figures in data_speed.caching_speed(
            tokenizer,
            folder,
            world.device,
            args.workers,
            args.pictures,
            batch,
            jpeg_decoder=decoder,
        ):
            yield figures | {"tokenizer": name}


def encode(args: Namespace, world: World, folder: Path) -> Iterator[dict]:
    """Yield the pictures of 256x256 a second through the tokenizer alone, from pixels on the device
    to latents, and back, measured for `--seconds` each. Torch counts the operations."""
    device, shape, flops = world.device, (args.batch_size, 1, 3, 256, 256), {}
    for compile in (False, True) if args.compile else (False,):
        tokenizer, name = tokenizer_of(args, device, folder, compile)
        ways = (("encode", tokenizer.encode), ("decode", tokenizer.decode))
        for way, work in ways[:1] if compile else ways:  # compiled are the encoder's blocks
            fresh_peak(device)
            with torch.inference_mode():
                given = torch.rand(shape, device=device)
                given = tokenizer.encode(given) if way == "decode" else given
                if not compile:  # torch does not look into what is compiled
                    with FlopCounterMode(display=False) as counter:
                        work(given)
                    flops[way] = counter.get_total_flops()
                once = min(timed(lambda: work(given), device, 3))  # noqa: B023
                times = timed(lambda: work(given), device, max(3, round(1e3 * args.seconds / once)))  # noqa: B023
            figures = row(way, times, args.batch_size, flops[way], device)
            figures["images_per_s"] = figures.pop("per_s")
            yield figures | {
                "shape": list(shape),
                "tokenizer": name,
                "parameters": sum(weight.numel() for weight in tokenizer.network.parameters()),
                "compile": compile,
            }


def loader(args: Namespace, world: World, folder: Path) -> Iterator[dict]:
    """Yield the cached 256x256 items a second that reach the training loop."""
    yield from data_speed.loading_speed(folder, args.items, args.workers, seconds=args.seconds)


PARTS: dict[str, Callable[[Namespace, World, Path], Iterator[dict]]] = {
    "cache": cache,
    "encode": encode,
    "loader": loader,
    "train": train,
    "sample": sample,
    "wan": wan,
    "peers": peers,
}
