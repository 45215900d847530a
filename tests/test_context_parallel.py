"""Clips that several processes share: predictions, gradients, runs and previews are those of one
process. More runs, and moves between numbers of processes, are in `rank_training.py`.

Axes: f frame · r row · c column · d width.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdit.config import ConfigError, load
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.interfaces import TextTokens
from mmdit.models import TreadConfig, VideoMMDiTConfig, build_model
from mmdit.models.wan import WanConfig
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.nn import context_parallel
from mmdit.nn.context_parallel import Context, lengths
from mmdit.scripts import sample, train_t2v
from mmdit.training import checkpoint
from mmdit.training.distributed import World, process_group
from mmdit.training.media import read_back
from tests.helpers.tiny import Workshop, refused
from tests.test_trainer import run_ranks

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
STOP = "train.max_steps=1"
LORA = "lora={enabled: true, rank: 2, alpha: 4, target_modules: [q, v, ffn.0]}"
# of adapters of Wan, by name: processes, and what differs from the run of one
WAN_RUNS = {
    "shared": (2, []),
    "sharded": (2, ["parallel.type=fsdp"]),
    "pairs": (4, ["train.batch_size=1"]),
}
STEPS, RATE = 4, 1e-3
MEASURED = {"loss", "val_loss", "val_loss_ema", "grad_norm", "images_seen"}
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
        "prediction": float((shared - alone).abs().max()),
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


def one_rank(folder: Path, part: str, size: int) -> None:
    if part in WAN_RUNS:
        words = ["--config", f"{folder}/wan.yaml", "--train_cache_dir", f"{folder}/cache0"]
        words += ["--device", "cpu", LORA, *WAN_RUNS[part][1], f"experiment_name={part}"]
        train_t2v.main([*words, f"parallel.context_parallel={size}"])
        return
    with process_group("cpu", timeout_minutes=1, context_parallel=size) as world:
        report = {name: compared(name, world) for name in (*CASES, *WAN)}
        if part == "compiled":
            report["compiled"] = [compiled(name, world) for name in ("clip", "wan")]
        report["place"] = [world.data_rank, world.data_size, world.context.rank]
        (folder / f"report{world.rank}.json").write_text(json.dumps(report))
    if part == "run":
        words = Workshop(folder).train_words(
            "shared", *CLIPS, f"parallel.context_parallel={size}", cache=folder / "clips"
        )
        train_t2v.main(words)
        with counting_exchanges() as joined:
            sample.main(sample_words(folder, "shared"))
        (folder / f"sampled{world.rank}.json").write_text(json.dumps(joined))


def sample_words(folder: Path, name: str) -> list[str]:
    """Return the words of `mmdit sample` for two clips, one of them of one frame, by the run
    `alone`, into the folder `<name>_samples`."""
    words = ["--checkpoint", folder / "runs" / "alone", "--device", "cpu", "--steps", "2"]
    asked = folder / "asked.txt"
    words += ["--prompts_file", asked, "--out", folder / f"{name}_samples"]
    return [str(word) for word in words]


def reports(folder: Path, processes: int) -> list[dict]:
    """Return what each process wrote of its models."""
    return [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Let two processes share clips: return a folder with the reports of their models, and with
    their run `shared` on clips and pictures beside `alone`, that of one process."""
    shop = Workshop(tmp_path_factory.mktemp("shared"))
    cache = shop.cache("clips", "--frames", "5", "video.num_frames=5")
    shop.train("alone", *CLIPS, cache=cache)
    (shop.folder / "asked.txt").write_text('a red star\n{"prompt": "a blue ring", "frames": 1}\n')
    sample.main(sample_words(shop.folder, "alone"))
    run_ranks(shop.folder, 2, __file__, "run", "2")
    return shop


@pytest.mark.parametrize("name", [*CASES, *WAN])
def test_prediction_and_gradient_are_those_of_one_process(shop, name):
    """Take the mean of the gradients over processes, as DDP and FSDP do."""
    for report in reports(shop.folder, 2):
        values = report[name]
        assert max(values[key] for key in ("prediction", "drawn", "gradient")) < 1e-10, values


def test_each_process_computes_its_own_frames_and_pictures_whole(shop):
    pair = reports(shop.folder, 2)
    assert [report["clip"]["frames"] for report in pair] == [3, 2]
    assert [report["picture"]["frames"] for report in pair] == [1, 1]
    assert [report["wan"]["frames"] for report in pair] == [9, 9]


def test_a_run_is_that_of_one_process(shop):
    """Compare weights, averages and moments, losses and counts, and previews."""
    alone, shared = (shop.folder / "runs" / name for name in ("alone", "shared"))
    folders = [checkpoint.folder_of(run, STEPS) for run in (alone, shared)]
    for part in ("model", "ema", "optimizer"):
        expected, result = (
            checkpoint.read_tensors(folder / f"{part}.safetensors") for folder in folders
        )
        assert expected.keys() == result.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=0, atol=1e-6)
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (alone, shared)]
    assert len(lines[0]) == len(lines[1]) == STEPS
    measured = set()
    for one, two in zip(*lines, strict=True):
        one, two = json.loads(one), json.loads(two)
        for name in MEASURED & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
            measured.add(name)
    assert measured == MEASURED
    pictures = [run / "samples" / f"step_{STEPS:08d}" / "grid.png" for run in (alone, shared)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert not (shared / "failures").exists()


def test_samples_are_those_of_one_process(shop):
    alone, shared = (shop.folder / f"{name}_samples" for name in ("alone", "shared"))
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in shared.iterdir()) and "0000.mp4" in names
    for rank in (0, 1):
        assert [3, 2] in json.loads((shop.folder / f"sampled{rank}.json").read_text())
    for name in names[:2]:
        assert torch.equal(read_back(shared / name), read_back(alone / name)), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_four_processes_are_two_pairs_or_one_group_and_compiled_blocks_change_nothing(
    tmp_path, size
):
    run_ranks(tmp_path, 4, __file__, "compiled", str(size))
    ranks = reports(tmp_path, 4)
    for rank, report in enumerate(ranks):
        assert report.pop("place") == [rank // size, 4 // size, rank % size]
        assert max(report.pop("compiled")) < 1e-10
        for values in report.values():
            assert max(values[key] for key in ("prediction", "drawn", "gradient")) < 1e-10, values
    frames = [report["clip"]["frames"] for report in ranks]
    assert frames == ([3, 2, 3, 2] if size == 2 else [2, 1, 1, 1])


@pytest.mark.slow
def test_adapters_of_wan_are_trained_as_by_one_process(tmp_path):
    """Compare them after runs by DDP, by FSDP and by two pairs."""
    pytest.importorskip("transformers")
    from tests.test_wan_training import Shop

    shop = Shop(tmp_path)
    expected = load_file(checkpoint.latest(shop.train("alone", LORA)) / "lora.safetensors")
    begun = load_file(checkpoint.latest(shop.train("one", LORA, STOP)) / "lora.safetensors")
    assert not any(torch.equal(begun[name], expected[name]) for name in begun if "lora" in name)
    for name, (processes, _) in WAN_RUNS.items():
        run_ranks(tmp_path, processes, __file__, name, "2")
        adapters = load_file(checkpoint.latest(tmp_path / "runs" / name) / "lora.safetensors")
        assert adapters.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(adapters[key], value, rtol=0, atol=1e-6)


def test_lengths_are_those_of_tensor_split():
    for count in range(9):
        for size in range(1, 6):
            parts = torch.arange(count).tensor_split(size)
            assert lengths(count, size) == [len(part) for part in parts]


def test_shared_clips_are_never_replayed():
    model = case("clip")[0]
    assert model.can_be_captured(training=True) and model.can_be_captured(training=False)
    model.context = Context("group", 0, 2)
    assert not model.can_be_captured(training=True) and not model.can_be_captured(training=False)


def test_processes_that_do_not_split_into_groups_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    split = pytest.raises(ConfigError, match="is 4, but 6 processes do not split into groups")
    with split, process_group("cpu", context_parallel=4):
        pass


@pytest.mark.parametrize(
    "words, message",
    [
        (["video.num_frames=3"], "is 4, but clips have 3 latent frames (video.num_frames 3)"),
        ([], "is 4, but clips have 1 latent frames (video.num_frames 1)"),
    ],
)
def test_clips_that_cannot_be_shared_are_refused(tmp_path, words, message):
    shop = Workshop(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        load(ExperimentConfig, shop.config, ["parallel.context_parallel=4", *words])
    assert "parallel.context_parallel" in str(refusal.value) and message in str(refusal.value)


def test_one_process_refuses_a_run_of_two(tmp_path, capsys):
    words = Workshop(tmp_path).train_words("run", "video.num_frames=4", cache=tmp_path)
    refused(
        capsys,
        train_t2v.main,
        [*words, "parallel.context_parallel=2"],
        "parallel.context_parallel",
        "is 2, but 1 processes",
        "torchrun --nproc_per_node=2",
    )


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
