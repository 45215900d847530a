"""A start from the weights of another run, under FSDP: each process reads its rows, and has what a
start in one process has."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmdit.experiment import run
from mmdit.experiment.build import build_encoder, build_learner
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.run import Run
from mmdit.nn.stored_weights import StoredWeight
from mmdit.scripts import export
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.memory.shards import Chosen, is_sharded, local
from mmdit.training.parallel import shard
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, forget_sums
from tests.test_sharded_posttrain import one_process

PROCESSES = ((2, 1), (3, 0), (3, 2))  # how many, and which of them: rows do not divide, or are few


def in_parts(folder, count: int = 2) -> None:
    """Store the tensors of a checkpoint as `count` processes would that have them cut."""
    for stem in ("model", "ema"):
        tensors = checkpoint.read_tensors(folder / f"{stem}.safetensors")
        (folder / f"{stem}.safetensors").unlink()
        (folder / stem).mkdir()
        shapes = json.dumps({name: list(value.shape) for name, value in tensors.items()})
        (folder / stem / "shapes.json").write_text(shapes)
        for number in range(count):
            part, offsets = {}, {}
            for name, value in tensors.items():
                size = -(-len(value) // count)
                rows = value[number * size : (number + 1) * size]
                if len(rows):
                    part[name] = rows.clone()
                    offsets[name] = {"saved_offsets": [number * size, *[0] * (value.ndim - 1)]}
            about = {"DCP_SHARDING_INFO": json.dumps(offsets)}
            save_file(part, folder / stem / f"shard-{number}.safetensors", about)
    forget_sums(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Make a run, an export of it, and one whose checkpoint is in parts."""
    shop = Workshop(tmp_path_factory.mktemp("sharded_start"))
    run = shop.train("whole")
    export.main(["--checkpoint", str(run), "--out", str(shop.folder / "export.safetensors")])
    parts = shop.train("parts")
    in_parts(checkpoint.latest(parts))
    shop.sources = {"whole": run, "parts": parts, "export": shop.folder / "export.safetensors"}
    return shop


def begun(shop, world: World, *words: str) -> Run:
    config = load_experiment_config(shop.config, list(words))
    tokenizer = build_tokenizer(config.tokenizer).plain
    return Run(config, world, tokenizer, SimpleNamespace(global_batch=1), None)


@pytest.mark.parametrize("source", [*thorough("whole"), "parts", *thorough("export")])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("video.num_frames=2", "model.frame_step=1"),  # pictures go on as clips
        ("lora={enabled: true, rank: 2}",),
        ("train.precision=pure_bf16", "train.betas=[0.9, 0.95]"),
    ],
    ids=["pictures", "clips", "lora", "pure_bf16"],
)
def test_each_process_reads_its_rows_of_what_one_starts_from(shop, monkeypatch, source, words):
    words = [f"train.init_from={shop.sources[source]}", *words]
    whole = begun(shop, World(), *words).learner.state_dict()
    read = Chosen.__getitem__

    def of_a_frozen_encoder(tensors, name):
        assert name.startswith("text_encoder.") and "lora" in words[-1], f"{name} is read whole"
        return read(tensors, name)

    monkeypatch.setattr(Chosen, "__getitem__", of_a_frozen_encoder)
    for size, rank in PROCESSES:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            cut = begun(shop, World(rank, size), "parallel.type=fsdp", *words).learner
        finally:
            dist.destroy_process_group()
        assert cut.sharded and cut.state_dict().keys() == whole.keys()
        for name, value in cut.state_dict().items():
            expected = whole[name]
            if is_sharded(value):
                rows = expected.chunk(size)
                expected = rows[rank] if rank < len(rows) else expected[:0]
            assert value.dtype == expected.dtype and torch.equal(local(value), expected), name


def test_a_run_of_pictures_that_goes_on_with_clips_numbers_its_frames_in_shards(shop):
    words = ["video.num_frames=2", "model.frame_step=1"]
    start = checkpoint.latest(shop.sources["whole"])

    def gone_on(world: World, *more: str) -> Run:
        config = load_experiment_config(shop.config, [*words, *more])
        tokenizer = build_tokenizer(config.tokenizer).plain
        made = Run(config, world, tokenizer, SimpleNamespace(global_batch=4), start)
        made.continue_from_start()
        return made

    whole = gone_on(World())
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        cut = gone_on(World(1, 2), "parallel.type=fsdp")
    finally:
        dist.destroy_process_group()
    name = "model.frame.embed.weight"
    for part, expected in (
        (cut.learner.get_parameter(name).detach(), whole.learner.get_parameter(name).detach()),
        (cut.state.ema.shadow[name], whole.state.ema.shadow[name]),
    ):
        assert expected.any() and torch.equal(local(part), expected.chunk(2)[1])


# ── a trained UMT5 ────────────────────────────────────────────────────────────────────────────────
ENCODER = "text_encoder={{type: umt5, name_or_path: {0}, dtype: float32, {1}}}"


def in_memory(tensors) -> list[str]:
    """Return the names of those whose numbers do not lie in a mapped file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    pairs = (line.split()[0].split("-") for line in lines if "umt5" in line)
    mapped = [range(int(first, 16), int(last, 16)) for first, last in pairs]
    names = []
    for name, tensor in tensors:
        codes = tensor.codes if isinstance(tensor, StoredWeight) else tensor
        if not any(codes.data_ptr() in places for places in mapped):
            names.append(name)
    return names


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
@pytest.mark.parametrize("kind", ["pickle", *thorough("bfloat16")])
@pytest.mark.parametrize("trained", [*thorough("freeze: false"), "freeze: false, train_blocks: 1"])
def test_a_trained_umt5_is_cut_out_of_its_files(shop, tmp_path, monkeypatch, kind, trained):
    pytest.importorskip("transformers")
    from tests.test_umt5 import GOLDEN, write_tokenizer

    weights = load_file(GOLDEN / "official.safetensors")
    file = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    write_tokenizer(tmp_path / "google" / "umt5-xxl")
    if kind == "pickle":
        torch.save(weights, file)
    else:
        file = tmp_path / "umt5.safetensors"
        save_file({name: value.bfloat16() for name, value in weights.items()}, file)
        write_tokenizer(tmp_path / "tokenizer")
        trained += f", tokenizer_path: {tmp_path / 'tokenizer'}"
    words = [ENCODER.format(file, trained)]
    expected = begun(shop, World(), *words).learner.text_encoder
    assert any(p.requires_grad for p in expected.parameters())
    whole = expected.state_dict()
    in_files = []

    def look(learner, *arguments, **keywords):
        in_files.append(in_memory(learner.text_encoder.named_parameters()))
        shard(learner, *arguments, **keywords)

    monkeypatch.setattr(run, "shard", look)
    for size, rank in PROCESSES:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            cut = begun(shop, World(rank, size), "parallel.type=fsdp", *words).learner.text_encoder
        finally:
            dist.destroy_process_group()
        assert cut.state_dict().keys() == whole.keys()
        assert in_memory(cut.state_dict().items()) == list(whole)
        for name, value in cut.state_dict().items():
            rows = whole[name].chunk(size)
            part = rows[rank] if rank < len(rows) else whole[name][:0]
            assert torch.equal(local(value), part) and value.dtype == torch.float32, name
            assert cut.is_stored(name) == expected.is_stored(name)
    assert in_files == [[]] * len(PROCESSES)


def test_a_umt5_out_of_its_files_computes_and_learns_as_a_whole_one(shop, tmp_path):
    pytest.importorskip("transformers")
    from tests.test_umt5 import GOLDEN, write_tokenizer

    file = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    write_tokenizer(tmp_path / "google" / "umt5-xxl")
    torch.save(load_file(GOLDEN / "official.safetensors"), file)
    words = ENCODER.format(file, "freeze: false")
    config = load_experiment_config(shop.config, [words])
    spec = build_tokenizer(config.tokenizer).plain.spec
    whole = build_learner(config, spec).text_encoder
    learner = build_learner(config, spec, encoder=partial(build_encoder, in_file=True))
    with one_process() as world:
        shard(learner, world)
        outputs = [part(["a red star", "two"]) for part in (learner.text_encoder, whole)]
        assert torch.equal(outputs[0].embeddings, outputs[1].embeddings)
        for text in outputs:
            text.embeddings.square().sum().backward()
        for name, p in learner.text_encoder.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), whole.get_parameter(name).grad)
