"""Planned against measured memory on one GPU of 140 GB, for full-size networks with random weights:
a JSON line a case, some 4 minutes.

    python -m tests.drivers.gpu_memory_plan [--only 5B] [--compiled] [--tiny]

Each case is two optimizer steps by the trainer's own step code: Wan 1.3B (32,760 tokens) and 5B
(27,280 tokens) with LoRA, batch 1, with and without checkpointing, the options for 5B,
and the Video MMDiT in full and with LoRA. Without checkpointing 5B does not fit: it is cut to some
of its blocks there. `step_s`: the second step. Plans are made meanwhile, by further processes. Exit
code 1 if a ratio of planned to measured is off by more than a tenth. --compiled: three cases with
compiled blocks instead, some 2 minutes. --tiny: small shapes, plans alone without a GPU.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from mmdit.commands.plan_memory.ladder import latent_shape, plan_training
from mmdit.commands.plan_memory.memory_plan import SIZES, random_denoiser
from mmdit.config import decode
from mmdit.experiment.build import build_learner
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.interfaces import Batch, LatentSpec
from mmdit.nn import kernels
from mmdit.training.distributed import World
from mmdit.training.memory.offload import move_to_device
from mmdit.training.step_report import ReportWindow
from mmdit.training.train_state import TrainState
from mmdit.training.trainer import Trainer

LORA = {"enabled": True, "rank": 32, "alpha": 32}
WAN_LORA = LORA | {
    "target_modules": ["*.self_attn.[qkvo]", "*.cross_attn.[qkvo]", "ffn.0", "ffn.2"]
}
VIDEO = {
    "1.3B": (832, 480, 81, 8, 16),
    "5B": (1280, 704, 121, 16, 48),
    "14B": (832, 480, 81, 8, 16),
}  # width, height, frames, cell, channels
TINY = {"1.3B": (64, 32, 5, 8, 16), "5B": (64, 64, 5, 16, 48), "14B": (64, 32, 5, 8, 16)}


def wan(
    variant: str,
    tiny: bool,
    blocks: int | None = None,
    offload: int = 0,
    pair: bool = False,
    **model,
) -> tuple[dict, dict]:
    width, height, frames, cell, channels = (TINY if tiny else VIDEO)[variant]
    sizes = {"num_layers": 4} if tiny else {"num_layers": blocks} if blocks else {}
    sizes |= {"dim": 256, "ffn_dim": 512, "num_heads": 2} if tiny else {}
    return {
        "video": {"width": width, "height": height, "num_frames": frames},
        "tokenizer": {
            "type": "wan_vae",
            "name_or_path": "none",
            "latent_f": cell,
            "latent_d": channels,
        },
        "text_encoder": {"type": "hash", "dim": 4096, "max_length": 512},
        "model": {"type": "wan", "name_or_path": variant, "dtype": "bfloat16"} | model,
        "lora": WAN_LORA,
        "experts": {"enabled": True, "train": "both"} if pair else {},
        "ema": {"enabled": False},
        "train": {"offload_blocks": min(offload, 4) if tiny else offload},
    }, sizes


def mmdit(tiny: bool, batch: int, lora: bool = False, **model) -> tuple[dict, dict]:
    return {
        "video": {"width": 448, "height": 256, "num_frames": 2 if tiny else 32},
        "tokenizer": {"type": "dummy", "latent_d": 64},
        "model": ({"dim": 64, "depth": 2, "num_heads": 2} if tiny else {"size": "L"}) | model,
        "train": {"batch_size": 1 if tiny else batch} | ({"init_from": "none"} if lora else {}),
        "lora": LORA if lora else {},
    }, {}


def cases(tiny: bool, compiled: bool = False) -> dict[str, tuple[dict, dict]]:
    checked = {"checkpointing": True}
    if compiled:
        few = {
            "1.3B": wan("1.3B", tiny),
            "5B checkpointing, float8": wan("5B", tiny, dtype="float8", **checked),
            "VideoMMDiT-L": mmdit(tiny, 2),
        }
        return {
            f"{name}, compiled": (raw | {"train": raw["train"] | {"compile": True}}, cut)
            for name, (raw, cut) in few.items()
        }
    products = {"dtype": "float8", "products": "float8"}
    return {
        "1.3B": wan("1.3B", tiny),
        "1.3B checkpointing": wan("1.3B", tiny, **checked),
        "5B, 18 blocks": wan("5B", tiny, 18),
        "5B, 18 blocks, float8": wan("5B", tiny, 18, dtype="float8"),
        "5B checkpointing": wan("5B", tiny, **checked),
        "5B checkpointing, float8": wan("5B", tiny, dtype="float8", **checked),
        "5B checkpointing, float8 and its products": wan("5B", tiny, **products, **checked),
        "5B checkpointing, int8": wan("5B", tiny, dtype="int8", **checked),
        "5B checkpointing, nf4": wan("5B", tiny, dtype="nf4", **checked),
        "5B checkpointing, nf4, offload": wan("5B", tiny, offload=30, dtype="nf4", **checked),
        "5B checkpointing, offload": wan("5B", tiny, offload=30, **checked),
        "5B checkpointing, its inputs away": wan("5B", tiny, offload_activations=True, **checked),
        "5B checkpointing, float8, offload": wan("5B", tiny, offload=30, dtype="float8", **checked),
        "VideoMMDiT-L": mmdit(tiny, 2),
        "VideoMMDiT-L checkpointing": mmdit(tiny, 2, **checked),
        "VideoMMDiT-L LoRA": mmdit(tiny, 2, True),
    }


def parts(case: tuple[dict, dict]):
    raw, cut = case
    train = {"batch_size": 1, "compile": False, "warmup_steps": 0, **raw["train"]}
    config = decode(ExperimentConfig, raw | {"experiment_name": "none", "train": train})
    sizes = (
        replace(SIZES[config.model.name_or_path], **cut) if "name_or_path" in raw["model"] else None
    )
    return config, sizes


def planned(case: tuple[dict, dict]) -> dict:
    torch.set_num_threads(1)
    found = plan_training(*parts(case))
    assert not torch.cuda.is_initialized(), "a plan must not touch the GPU"
    return asdict(found) | {"total": found.total}


def stepping(
    case: tuple[dict, dict], device: torch.device
) -> tuple[ExperimentConfig, TrainState, Callable[[], float]]:
    """Return the case's config and state, and what takes one step by the trainer's own code and
    returns its loss."""
    config, sizes = parts(case)
    shape = latent_shape(config)
    spec = LatentSpec(shape[-1], config.tokenizer.latent_f, temporal=config.tokenizer.temporal)
    learner = build_learner(config, spec, lambda run, *_: random_denoiser(sizes, run.model, device))
    move_to_device(learner, config.train.offload_blocks, device)
    state = TrainState.create(learner.train(), config.train, config.ema)
    trainer = Trainer(config.train, 0, state, None, World(device=device), Path("none"), None)
    caption = " ".join(f"w{i}" for i in range(config.text_encoder.max_length))
    batch = Batch(
        torch.randn(shape).half(), [caption] * shape[0], ["a"] * shape[0], torch.arange(shape[0])
    )

    def step() -> float:
        window = ReportWindow(device)
        trainer.optimizer_step(learner, [batch], config.train.lr, window)
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        return window.taken[-1].losses.mean().item()

    return config, state, step


def measured(case: tuple[dict, dict]) -> dict:
    device = torch.device("cuda", 0)
    kernels.check_device(device)
    config, state, step = stepping(case, device)
    learner = state.learner
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = {"at_rest": torch.cuda.memory_allocated()}
    if config.train.compiles("cuda"):
        learner.compile_model()
    for number in range(2 + learner.compiled):
        torch.cuda.synchronize()
        if learner.compiled and number == 1:
            torch.cuda.reset_peak_memory_stats()  # compiling takes memory of its own
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        result["step_s"] = round(time.perf_counter() - begin, 3)
    return result | {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name begins with it")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    chosen = {
        name: case
        for name, case in cases(args.tiny, args.compiled).items()
        if name.startswith(args.only)
    }
    far, begin = 0, time.perf_counter()
    with ProcessPoolExecutor(8 if torch.cuda.is_available() else 1, get_context("spawn")) as pool:
        plans = {name: pool.submit(planned, case) for name, case in chosen.items()}
        for name, case in chosen.items():
            line = {"case": name}
            try:
                found = measured(case) if torch.cuda.is_available() else {}
            except torch.OutOfMemoryError as error:
                found = {"error": str(error).splitlines()[0]}
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            line |= {"planned": plans[name].result(), "measured": found}
            if "peak" in found:
                line["ratio"] = round(line["planned"]["total"] / found["peak"], 3)
                far += not 0.9 < line["ratio"] < 1.1
            print(
                json.dumps(
                    line | {"config": {key: case[0][key] for key in ("model", "train", "video")}}
                ),
                flush=True,
            )
    print(
        json.dumps(
            {"seconds": round(time.perf_counter() - begin, 1), "further off than a tenth": far}
        )
    )
    return int(far > 0 or not torch.cuda.is_available() and not args.tiny)


if __name__ == "__main__":
    sys.exit(main())
