"""Processes that share clips, beside one process: predictions, gradients and compiled blocks of
models, a run, samples, and adapters of Wan. Gloo on a CPU; for `tests/test_context_parallel.py`.

    python -m tests.drivers.context_parallel FOLDER PARTS SIZE PROCESSES

PARTS, with commas between them, are `models` (their distances go to FOLDER/report<rank>.json),
`compiled` (those of compiled blocks as well), `run` (training by FOLDER's config), `samples` or
names of `WAN_RUNS`. SIZE of PROCESSES share each clip.

Axes: f frame · r row · c column · d width.
"""

import json
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit.interfaces import TextTokens
from mmdit.models import TreadConfig, VideoMMDiTConfig, build_model
from mmdit.models.wan import WanConfig
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.nn import context_parallel
from mmdit.scripts import sample, train_t2v
from mmdit.training.distributed import World, process_group
from tests.helpers.tiny import Workshop

SAMPLES, ROWS, COLUMNS, CHANNELS = 2, 3, 4, 3
# by name: frames, settings of the model, further inputs of the call
CASES = {
    "clip": (5, {}, []),
    "no_rotation": (4, {"temporal_position": False}, []),
    "recomputed": (4, {"checkpointing": True}, []),
    "routed": (5, {}, ["keep"]),
    "tile": (6, {}, ["place"]),
    "redrawn": (5, {"conditioning": "low_resolution"}, ["small"]),
    "picture": (1, {}, []),
}
# of Wan, by name: sizes of the model, further inputs of the call
WAN = {
    "wan": ({}, []),
    "wan_given": ({}, ["given"]),
    "wan_picture": ({"in_dim": 24, "image_dim": 10}, ["y", "clip"]),
}
LORA = "lora={enabled: true, rank: 2, alpha: 4, target_modules: [q, v, ffn.0]}"
# of adapters of Wan, by name: processes, and what differs from the run of one
WAN_RUNS = {
    "shared": (2, []),
    "sharded": (2, ["parallel.type=fsdp"]),
    "pairs": (4, ["train.batch_size=1"]),
}
STEPS, RATE = 4, 1e-3
CLIPS = [
    "video.num_frames=5",
    "video.image_fraction=0.4",
    f"train.max_steps={STEPS}",
    f"train.lr={RATE}",
    "train.val_every_steps=2",
    "train.val_share=0.3",
    f"train.sample_every_steps={STEPS}",
    "train.sample_num_images=2",
    "tread={enabled: true, apply_to: [1, 2]}",
    "model.depth=3",
]


def case(name: str) -> tuple[nn.Module, list[Tensor], dict]:
    """Return a model whose every path counts, its latents, times and text, and further inputs, in
    float64."""
    frames, settings, names = CASES[name]
    torch.manual_seed(3)
    config = VideoMMDiTConfig(dim=16, depth=4, num_heads=2, window_size=2, **settings)
    tread = TreadConfig(enabled="keep" in names, apply_to=(1, 3))
    model = build_model(config, CHANNELS, 8, tread).double()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)  # at its start the model is nothing
    shape = (SAMPLES, frames, ROWS, COLUMNS, CHANNELS)
    x, small = torch.randn(2, *shape, dtype=torch.float64)
    text = TextTokens(torch.randn(SAMPLES, 4, 8, dtype=torch.float64), torch.ones(SAMPLES, 4) > 0)
    times = torch.tensor([200.0, 700.0])
    places = torch.tensor([[0, 0, 0, 3, 4], [7, 2, 1, 9, 9]])
    inputs = {"keep": torch.tensor([0, 1, 3]), "place": places, "small": small}
    inputs = {key: inputs[key] for key in names}
    if "small" in inputs:
        inputs["small_t"] = times / 10
    return model, [x, times, text], inputs


def wan_case(name: str) -> tuple[nn.Module, list[Tensor], dict]:
    """Return what `case` does, of a Wan transformer, for three frames of six tokens each."""
    sizes, names = WAN[name]
    torch.manual_seed(4)
    sizes = {"in_dim": 4, "out_dim": 4, "freq_dim": 16, "text_dim": 8, "text_len": 6} | sizes
    model = WanDenoiser(WanConfig(dim=48, ffn_dim=32, num_heads=4, num_layers=2, **sizes)).double()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    shape = (SAMPLES, 3, 4, 6)
    x, y = (torch.randn(*shape, width, dtype=torch.float64) for width in (4, 20))
    text = TextTokens(torch.randn(SAMPLES, 4, 8, dtype=torch.float64), torch.ones(SAMPLES, 4) > 0)
    clip = torch.randn(SAMPLES, 257, 10, dtype=torch.float64)
    inputs = {"given": 1, "y": y, "clip": clip}
    return model, [x, torch.tensor([200.0, 700.0]), text], {key: inputs[key] for key in names}


def gradients(model: nn.Module, prediction: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss in which each element has a weight of its own."""
    generator = torch.Generator().manual_seed(9)
    weights = torch.rand(prediction.shape, generator=generator, dtype=prediction.dtype)
    model.zero_grad()
    (weights * prediction.square()).mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@contextmanager
def counting_frames(model: nn.Module):
    """Yield a list of how many frames (of Wan: tokens) the first MLP computes, call by call."""
    seen: list[int] = []
    block = model.blocks[0]
    mlp = block.ffn if isinstance(model, WanDenoiser) else block.mlp
    handle = mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[1])
    )
    yield seen
    handle.remove()


@contextmanager
def counting_exchanges():
    """Yield a list of how long the part of each process was, exchange by exchange."""
    real, joined = context_parallel.exchange, []

    def exchange(parts, axis, lengths, context):
        joined.append(lengths)
        return real(parts, axis, lengths, context)

    context_parallel.exchange = exchange
    yield joined
    context_parallel.exchange = real


def compared(name: str, world: World) -> dict:
    """Return how far prediction and gradients of shared clips are from those of one process, and
    how many frames this process computed."""
    model, arguments, inputs = wan_case(name) if name in WAN else case(name)
    alone = model(*arguments, **inputs)
    expected = gradients(model, alone)
    model.context = world.context
    with counting_frames(model) as seen:
        shared = model(*arguments, **inputs)
    sums = gradients(model, shared)
    world.sum_(*sums.values())
    distances = [(sums[key] / world.size - expected[key]).abs().max() for key in expected]
    with torch.no_grad():
        drawn = model(*arguments, **inputs)
    return {
        "prediction": float((shared - alone).detach().abs().max()),
        "drawn": float((drawn - alone).abs().max()),
        "gradient": float(max(distances)),
        "frames": seen[0],
    }


def compiled(name: str, world: World) -> float:
    """Return how far compiled blocks, each one graph, are from plain ones on shared clips."""
    model, arguments, _ = wan_case(name) if name in WAN else case(name)
    model.context = world.context
    plain = model(*arguments)
    expected = gradients(model, plain)
    for block in model.blocks:
        block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    result = gradients(model, model(*arguments))
    return float(max((result[name] - expected[name]).abs().max() for name in expected))


def models(folder: Path, size: int, compiles: bool) -> None:
    """Write what this process finds of all models into a file of its own."""
    with process_group("cpu", timeout_minutes=1, context_parallel=size) as world:
        report = {name: compared(name, world) for name in (*CASES, *WAN)}
        if compiles:
            report["compiled"] = [compiled(name, world) for name in ("clip", "wan")]
        report["place"] = [world.data_rank, world.data_size, world.context.rank]
        (folder / f"report{world.rank}.json").write_text(json.dumps(report))


def one_rank(folder: Path, part: str, size: int) -> None:
    words = [f"parallel.context_parallel={size}"]
    if part in WAN_RUNS:
        words += [f"experiment_name={part}", LORA, *WAN_RUNS[part][1]]
        files = ["--config", f"{folder}/wan.yaml", "--train_cache_dir", f"{folder}/cache0"]
        train_t2v.main([*files, "--device", "cpu", *words])
    elif part == "run":
        cache = folder / "clips"
        train_t2v.main(Workshop(folder).train_words("shared", *CLIPS, *words, cache=cache))
    elif part == "samples":
        with counting_exchanges() as joined:
            sample.main(sample_words(folder, "shared"))
        (folder / f"sampled{os.environ['RANK']}.json").write_text(json.dumps(joined))
    else:
        models(folder, size, compiles=part == "compiled")


def sample_words(folder: Path, name: str) -> list[str]:
    """Return the words of `mmdit sample` for two clips, one of them of one frame, by the run
    `alone`, into the folder `<name>_samples`."""
    words = ["--checkpoint", folder / "runs" / "alone", "--device", "cpu", "--steps", "2"]
    asked = folder / "asked.txt"
    words += ["--prompts_file", asked, "--out", folder / f"{name}_samples"]
    return [str(word) for word in words]


def main() -> int:
    from tests.helpers.forked_runs import must, start_ranks, wait

    folder, parts, size, processes = sys.argv[1:]
    for part in parts.split(","):
        work = partial(one_rank, Path(folder), part, int(size))
        ranks = start_ranks(work, Path(folder), int(processes))
        must([wait(rank) for rank in ranks], Path(folder))
    print(json.dumps("done"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
