"""A start from the weights of another run, under FSDP: each process reads its rows, and has what a
start in one process has."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.run import Run
from mmdit.scripts import export
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.memory.sharded import is_sharded
from mmdit.training.memory.shards import Chosen, local
from tests.helpers.tiny import Workshop, forget_sums

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


@pytest.mark.parametrize("source", ["whole", "parts", "export"])
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
