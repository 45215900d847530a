"""FSDP beyond `rank_training.py`: skipped steps, compiled blocks, adapters on frozen weights and
their alpha schedule, Muon, previews, files that are read by one process, by torch's own reader and
by export, and damaged ones that are not. And gradients that travel as bfloat16.
"""

import json
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed import device_mesh, fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.model import Bench
from mmdit.config import ConfigError, apply_overrides, decode
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.rng import Draws
from mmdit.scripts import export, inspect_weights, train_t2v
from mmdit.training import checkpoint, parallel
from mmdit.training.distributed import World, process_group
from mmdit.training.errors import RunError
from mmdit.training.memory.shards import Stored
from mmdit.training.muon import GatheredMuon, StackedMuon
from mmdit.training.parallel import ParallelConfig, shard, wrap
from tests.helpers.tiny import FOUR_STEPS, Workshop, forget_sums
from tests.test_trainer import SPEC, learner, run_ranks, trained

ADAPTERS = [
    "lora.enabled=true",
    "lora.rank=3",
    "model.checkpointing=true",
    "train.lr=0.05",
    "train.sample_every_steps=2",
    "train.sample_num_images=2",
    "train.val_every_steps=2",
    "train.val_share=0.3",
]
# of ADAPTERS: AdamW moves by about this much a step, however small a gradient and its rounding are
LR = 0.05
PHASES = [
    "lora.enabled=true",
    "lora.rank=3",
    f"train.lr={LR}",
    "train.max_steps=12",
    "alpha_schedule.enabled=true",
    "alpha_schedule.phases=[{name: first, alpha: 16, exit: steps}, {name: second, alpha: 4}]",
]
POISONED = {
    "poison": (2,),
    "steps": 4,
    "depth": 1,
    "accum": 2,
    "lr_schedule": "constant",
    "log_every_steps": 4,
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Runs on two processes: `poisoned` (the loop alone), `adapters` and `reduced` (the command),
    beside the same on one."""
    shop = Workshop(tmp_path_factory.mktemp("sharded"))
    shop.train("base")
    shop.words = [*ADAPTERS, f"train.init_from={shop.folder / 'runs/base'}"]
    shop.train("adapters_alone", *shop.words)
    run_ranks(shop.folder, 2, __file__, "loop", "command", "reduced")
    return shop


def one_rank(folder: Path, part: str) -> None:
    if part == "loop":
        torch.compiler.allow_in_graph(rearrange)  # Dynamo takes seconds to read what it does
        compiled = torch.compile
        with (
            process_group("cpu", timeout_minutes=1) as world,
            pytest.MonkeyPatch.context() as patch,
        ):
            trained(folder / "copied", world=world)
            gradients(folder, world)
            muon(folder, world)
            eager = lambda function, **options: compiled(function, **options | {"backend": "eager"})
            patch.setattr(torch, "compile", eager)
            state = trained(folder / "poisoned", world=world, fsdp=True, compile=True, **POISONED)
            trained(folder / "muon", world=world, fsdp=True, optimizer="muon")
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as on a full disk
            try:
                checkpoint.save(
                    folder / "full",
                    checkpoint.Meta(4, {}, SPEC, "test"),
                    state.files(),
                    0,
                    world=world,
                )
            except RunError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                (folder / f"full{world.rank}.txt").write_text(str(error))
    elif part == "graphs":
        torch.compiler.allow_in_graph(rearrange)
        with process_group("cpu", timeout_minutes=1) as world:
            graphs(folder, world)
    elif part.startswith("frozen_"):
        words = with_frozen_encoder(folder, part.removeprefix("frozen_"))
        train_t2v.main(
            Workshop(folder).train_words(
                "sharded", "train.batch_size=2", "parallel.type=fsdp", *words
            )
        )
    elif part == "phases":
        train_t2v.main(
            Workshop(folder).train_words(
                "phases",
                *PHASES,
                f"train.init_from={folder / 'runs/base'}",
                "train.batch_size=2",
                "parallel.type=fsdp",
            )
        )
    elif part == "reduced":
        train_t2v.main(
            Workshop(folder).train_words(
                "reduced", "train.batch_size=2", "parallel.reduce=bfloat16"
            )
        )
    else:
        words = [
            "parallel.type=fsdp",
            "train.batch_size=2",
            "train.save_in_background=true",
            *ADAPTERS,
            f"train.init_from={folder / 'runs/base'}",
        ]
        train_t2v.main(Workshop(folder).train_words("adapters", *words))


def with_frozen_encoder(folder: Path, kind: str) -> list[str]:
    """Overrides of a run whose frozen encoder looks at a caption once."""
    encoder = f"type: hf, name_or_path: {folder}/t5, max_length: 16"
    if kind == "stored":
        encoder += f", cache_dir: {folder}/embeddings"
    return [
        "train.max_steps=4",
        "train.val_every_steps=2",
        "train.val_share=0.3",
        "train.sample_every_steps=2",
        "train.sample_num_images=1",
        f"text_encoder={{{encoder}}}",
    ]


def gradients(folder: Path, world: World) -> None:
    """Of this rank alone, and the means by each way to reduce them, for noise of its own."""
    latents = torch.randn(
        4, 2, 2, 2, SPEC.channels, generator=torch.Generator().manual_seed(world.rank)
    )
    ways = {
        "own": None,
        "ddp": ParallelConfig(),
        "ddp16": ParallelConfig(reduce="bfloat16"),
        "fsdp16": ParallelConfig(type="fsdp", reduce="bfloat16"),
    }
    for name, config in ways.items():
        model = learner()
        if name == "fsdp16":
            shard(model, world, config)
        called = wrap(model, world, config) if config else model
        called(latents, ["a red ring"] * 4, Draws.of(0, world.rank, 4))[0].mean().backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        whole = {
            key: gradient.full_tensor() if name == "fsdp16" else gradient
            for key, gradient in found.items()
        }
        if world.is_main or name == "own":
            torch.save(whole, folder / f"{name}{world.rank}.pt")


def muon(folder: Path, world: World) -> None:
    """Step matrices, cut and whole, three times with the same gradients; rows do not divide. The
    second step is skipped, and the gradients of the last two are divided."""
    numbers = torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(rows, 4, generator=numbers)) for rows in (5, 1, 8)]
    mesh = init_device_mesh("cpu", (world.size,))
    cut = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    settings = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = StackedMuon(whole, **settings), GatheredMuon(cut, **settings)
    four = torch.tensor(4.0)
    for skip, scale in ((None, None), (torch.ones(()), four), (torch.zeros(()), four)):
        for p, part in zip(whole, cut, strict=True):
            p.grad = torch.randn(p.shape, generator=numbers)
            part.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.found_inf, optimizer.grad_scale = skip, scale
            optimizer.step()
    weights = [part.full_tensor().detach() for part in cut]
    momenta = [optimizers[1].state[part]["momentum_buffer"].full_tensor() for part in cut]
    expected = [optimizers[0].state[p]["momentum_buffer"] for p in whole]
    if world.is_main:
        torch.save((weights, [p.detach() for p in whole], momenta, expected), folder / "muon.pt")


def graphs(folder: Path, world: World) -> None:
    """Made of a compiled block of 1.5 M parameters, more than DDP's first bucket holds."""
    counter = CompileCounter()
    bench = Bench((1, 1, 2, 2), world, False, model={"dim": 256, "depth": 1, "num_heads": 4})
    bench.learner.compile_model(counter)
    bench.step()
    (folder / f"graphs{world.rank}.txt").write_text(str(counter.frame_count))


def distance(found, expected) -> float:
    """Return the root mean square difference of two tensors. AdamW divides by a gradient's own
    size: the largest difference is that of the one element whose gradient is all but zero, which
    rounding alone decides."""
    return float((found - expected).square().mean().sqrt())


def newest(run):
    return checkpoint.latest(run)


def test_two_processes_of_torchrun_give_the_same_weights(shop, tmp_path):
    """2 and 4, and from 2 to 4 to 1: test_processes.py."""
    single = trained(tmp_path / "1")
    stored = checkpoint.read_tensors(
        checkpoint.folder_of(shop.folder / "copied", 6) / "model.safetensors"
    )
    for name, value in single.learner.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-6)


def test_a_bad_step_is_skipped_by_every_shard_and_compiled_blocks_change_nothing(shop):
    alone = trained(shop.folder / "alone", **POISONED)
    weights = Stored(newest(shop.folder / "poisoned") / "model.safetensors")
    assert not (newest(shop.folder / "poisoned") / "model.safetensors").exists()
    for name, value in alone.learner.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    assert not torch.equal(
        weights["model.output.weight"], learner().state_dict()["model.output.weight"]
    )
    told = (shop.folder / "poisoned/metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["skipped"] for line in told) == 1


def test_adapters_are_trained_drawn_with_and_stored_as_by_one_process(shop):
    runs = [shop.folder / "runs" / name for name in ("adapters", "adapters_alone")]
    lora, expected = (load_file(newest(run) / "lora.safetensors") for run in runs)
    assert lora.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(lora[name], value) < 1e-3 * LR, name
    last, same = (json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs)
    for name in ("loss", "val_loss", "val_loss_ema", "grad_norm"):
        assert last[name] == pytest.approx(same[name], rel=1e-5), name
    for run in runs:
        assert sorted(p.parent.name for p in run.glob("samples/*/grid.png")) == [
            "step_00000002",
            "step_00000003",
        ]
    assert not (runs[0] / "failures").exists()
    names = {path.name for path in newest(runs[0]).iterdir()}
    assert names == {
        "checkpoint.json",
        "monitor.json",
        "ema",
        "lora.safetensors",
        "model",
        "optimizer",
    }


@pytest.mark.parametrize("way", ["ddp16", "fsdp16"])
def test_gradients_travel_as_bfloat16_and_only_then_are_rounded(shop, way):
    """A process's gradient is rounded to 8 bits (an error of 1/256 at most), and so is the sum."""
    first, second, mean, reduced = (
        torch.load(shop.folder / f"{name}.pt") for name in ("own0", "own1", "ddp0", f"{way}0")
    )
    assert mean.keys() == reduced.keys() and any(gradient.any() for gradient in mean.values())
    for name, gradient in mean.items():
        scale = (first[name].abs() + second[name].abs()) / 2
        torch.testing.assert_close(gradient, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-7)
        assert ((reduced[name] - gradient).abs() <= scale / 120 + 1e-7).all(), name
        assert reduced[name].dtype == torch.float32 and torch.equal(
            reduced[name], reduced[name].bfloat16().float()
        ), name
    assert any(not torch.equal(reduced[name], gradient) for name, gradient in mean.items())


def test_muon_trains_in_shards_as_alone(shop, tmp_path):
    """Compare roughly: its products are of bfloat16, in which the order that gradients were added
    up in may turn a last digit, and the steps that follow are of other weights."""
    state = trained(tmp_path, optimizer="muon").learner.state_dict()
    stored = Stored(checkpoint.folder_of(shop.folder / "muon", 6) / "model.safetensors")
    start = learner().state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            moved = distance(value, start[name])
            assert distance(stored[name], value) <= 0.05 * moved + 1e-7, name
    trained(shop.folder / "muon", steps=7, resume_at=6, optimizer="muon")


def test_muon_steps_whole_matrices(shop):
    weights, expected, momenta, expected_momenta = torch.load(shop.folder / "muon.pt")
    for found, wanted in zip(weights + momenta, expected + expected_momenta, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.thorough
def test_copies_leave_a_compiled_block_whole(tmp_path):
    run_ranks(tmp_path, 2, __file__, "graphs")
    assert [(tmp_path / f"graphs{rank}.txt").read_text() for rank in (0, 1)] == ["1", "1"]


def test_what_its_processes_wrote_is_told_whole(shop, capsys):
    reports = []
    for name in ("adapters", "adapters_alone"):
        inspect_weights.main([str(shop.folder / "runs" / name), "--json"])
        reports.append(json.loads(capsys.readouterr().out)["parts"])
    cut, whole = reports
    for name in ("ema", "lora", "model", "optimizer"):
        for what in ("kind", "tensors", "parameters", "bytes", "dtypes"):
            assert cut[name][what] == whole[name][what], (name, what)
    assert len(cut["model"]["files"]) == 2 > len(whole["model"]["files"])
    inspect_weights.main([str(newest(shop.folder / "runs/adapters") / "ema"), "--json"])
    assert json.loads(capsys.readouterr().out) == cut["ema"]


def test_a_run_reduces_as_its_config_says(shop):
    told, base = (
        [
            json.loads(line)
            for line in (shop.folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("reduced", "base")
    )
    for step, tolerance in ((0, 1e-6), (-1, 0.02)):
        assert told[step]["loss"] == pytest.approx(base[step]["loss"], rel=tolerance)
    assert 1e-6 < abs(told[0]["grad_norm"] / base[0]["grad_norm"] - 1) < 1 / 256


def test_one_process_samples_exports_and_goes_on(shop):
    run = shop.folder / "runs/adapters"
    draw = lambda path: load_pipeline(path, "cpu")[0](["a red ring"], 48, 32, 1, FOUR_STEPS)
    torch.testing.assert_close(
        draw(run), draw(shop.folder / "runs/adapters_alone"), rtol=0, atol=1e-5
    )
    export.main(
        ["--checkpoint", str(run), "--out", str(shop.folder / "one.safetensors"), "--dtype", "fp32"]
    )
    assert torch.equal(draw(shop.folder / "one.safetensors"), draw(run))
    shutil.copytree(run, shop.folder / "runs/goes_on")
    train_t2v.main([*shop.train_words("goes_on", *shop.words, "train.max_steps=5"), "--resume"])
    whole = shop.train("whole", *shop.words, "train.max_steps=5")
    gone_on = Stored(newest(shop.folder / "runs/goes_on") / "model.safetensors")
    for name, value in Stored(newest(whole) / "model.safetensors").items():
        assert distance(gone_on[name], value) < 1e-3 * LR, name


def test_the_parts_are_what_torch_reads_itself(shop):
    folder = newest(shop.folder / "poisoned")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
    }
    for kind in ("model", "optimizer", "ema"):
        stored = Stored(folder / f"{kind}.safetensors")
        read = {
            name: torch.empty(shape, dtype=stored[name].dtype)
            for name, shape in stored.shapes.items()
        }
        dcp.load(
            read, storage_reader=dcp.HuggingFaceStorageReader(str(folder / kind)), no_dist=True
        )
        assert all(torch.equal(read[name], stored[name]) for name in stored)


def test_a_full_disk_is_told_by_every_process_and_leaves_nothing(shop):
    for rank in (0, 1):
        message = (shop.folder / f"full{rank}.txt").read_text()
        assert (
            "could not save the checkpoint" in message
            and "step_00000004" in message
            and "start the run again" in message
        ), message
    assert not list((shop.folder / "full/checkpoints").iterdir())


@pytest.mark.parametrize(
    "damage", ["absent", "torn", "elsewhere", "huge", "negative", "shapes", "unnamed"]
)
def test_damaged_parts_are_passed_over(shop, tmp_path, damage, capsys):
    run = shutil.copytree(shop.folder / "poisoned", tmp_path / "run")
    forget_sums(newest(run))
    part = sorted((newest(run) / "model").glob("*.safetensors"))[1]
    with safe_open(part, "pt") as file:
        header = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    tensors = load_file(part)
    if damage == "absent":
        part.unlink()
    elif damage == "torn":
        part.write_bytes(part.read_bytes()[:-9])
    elif damage == "shapes":
        (part.parent / "shapes.json").write_text("[]")
    elif damage == "unnamed":
        shapes = json.loads((part.parent / "shapes.json").read_text())
        shapes.popitem()
        (part.parent / "shapes.json").write_text(json.dumps(shapes))
    else:
        place = {"elsewhere": [1], "huge": [10**15], "negative": [-4]}[damage]
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 1 and len(tensor))
        header[name]["saved_offsets"] = place
        save_file(tensors, part, {"DCP_SHARDING_INFO": json.dumps(header)})
    before = newest(run)
    assert (
        checkpoint.step_of(before) == 3
        and "passing over the damaged checkpoint" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="step_00000004/model.safetensors cannot be read"):
        checkpoint.load_weights(before.with_name("step_00000004"))


@pytest.mark.parametrize(
    "rate, megabytes", [(200.0, 400), (12.0, 25), (None, 25)]
)  # NVLink, PCIe, CPUs
def test_gradients_are_reduced_in_few_parts_where_that_is_fast(monkeypatch, rate, megabytes):
    given = {}
    monkeypatch.setattr(
        parallel, "DistributedDataParallel", lambda module, **options: given.update(options)
    )
    if rate:
        monkeypatch.setattr(parallel, "exchange_rate", lambda world: rate)
    parallel.wrap(learner(), World(0, 2))
    assert given["bucket_cap_mb"] == megabytes


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_encoder_stays_whole_for_processes_call_it_differently_often(monkeypatch, trained):
    model, cut = learner(), []
    model.text_encoder.requires_grad_(trained)
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: cut.append(module))
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *arguments, **options: None)
    shard(model, World(0, 2))
    assert model.model in cut and (model.text_encoder in cut) == trained
    assert trained or not set(model.text_encoder.modules()) & set(cut)


@pytest.mark.parametrize(
    "words, message",
    [
        ("train.offload_optimizer=true", "train.offload_optimizer: is true with .* already"),
        ("train.offload_blocks=1", "train.offload_blocks: is 1 with .* set it to 0, or use ddp"),
        ("experts.enabled=true", "experts.enabled: is true with .* share a base"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_a_remedy(words, message):
    raw = {"experiment_name": "x", "parallel": {"type": "fsdp"}, "lora": {"enabled": True}}
    raw["train"] = {"init_from": "y"}
    with pytest.raises(ConfigError, match=message):
        decode(ExperimentConfig, apply_overrides(raw, [words]))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"type": "ddp", "shard_over": 2}, "is 2 with parallel.type ddp"),
        ({"type": "fsdp", "shard_over": 3}, "is 3, but 4 processes do not split"),
    ],
)
def test_groups_that_cannot_be_are_refused(config, message):
    section = ParallelConfig(**config)
    with pytest.raises(ConfigError, match=message):
        if section.type == "ddp":
            section.check(None)
        shard(learner(), World(0, 4), section)


@pytest.mark.slow
def test_alpha_follows_its_phases_in_shards_as_alone(shop):
    """Rescale one factor of each adapter, its moments and its average, and compare the signs of
    whole gradients."""
    words = [*PHASES, f"train.init_from={shop.folder / 'runs/base'}"]
    alone = shop.train("phases_alone", *words)
    run_ranks(shop.folder, 2, __file__, "phases")
    runs = (alone, shop.folder / "runs/phases")
    expected, found = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    )
    assert [row["phase"] for row in found] == ["first"] * 9 + ["second"] * 3
    for row, wanted in zip(found, expected, strict=True):
        for name in ("phase", "linear_alpha", "loss", "grad_norm", "gradient_stability"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3), name
    for name in ("lora", "signs"):
        stored, wanted = (load_file(newest(run) / f"{name}.safetensors") for run in reversed(runs))
        for key, value in wanted.items():
            assert distance(stored[key].float(), value.float()) < 1e-3 * LR, key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["remembered", "stored"])
def test_sharded_training_with_a_frozen_encoder_is_that_of_one_process(tmp_path, kind):
    """Its captions, those of previews and those of the validation are met by some processes
    only."""
    transformers = pytest.importorskip("transformers")
    from tests.test_text_encoders import T5, save_tokenizer

    transformers.T5EncoderModel(transformers.T5Config(**T5)).save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    shop = Workshop(tmp_path)
    alone = shop.train("alone", *with_frozen_encoder(tmp_path, "remembered"))
    run_ranks(tmp_path, 2, __file__, f"frozen_{kind}")
    sharded = tmp_path / "runs" / "sharded"
    one, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (alone, sharded)
    )
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in (
            name for name in a if name.startswith(("loss", "val_loss")) and a[name] is not None
        ):
            assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)
    assert not (sharded / "failures").exists(), "a preview failed"
    assert len(list(sharded.glob("samples/*/grid.png"))) == 2


if __name__ == "__main__":
    for part in sys.argv[2:]:
        one_rank(Path(sys.argv[1]), part)
