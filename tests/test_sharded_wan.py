"""A Wan transformer is cut over processes, out of its files: frozen under a LoRA, and trained."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmdit.adapters import LoRAConfig, inject, is_adapter
from mmdit.diffusion import build_objective
from mmdit.interfaces import LatentSpec
from mmdit.interop.wan_weights import load_denoiser, load_dit, save_dit
from mmdit.interop.weights_in_files import unpack_weights
from mmdit.models.wan_denoiser import WanDenoiser, WanModelConfig
from mmdit.nn.stored_weights import StoredWeight
from mmdit.scripts import train_t2v
from mmdit.text_encoders import HashConfig, build_text_encoder
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.learner import Learner
from mmdit.training.memory.lean import to_bfloat16
from mmdit.training.memory.shards import local
from mmdit.training.origin import frozen_elsewhere, sum_of
from mmdit.training.parallel import shard
from tests.helpers.thorough import thorough
from tests.helpers.wan_release import random_dit
from tests.test_scaled_float8 import ONE_HEAD, written
from tests.test_trainer import run_ranks
from tests.test_wan_training import LORA, Shop

WORDS = {
    "lora": [LORA, "model.dtype=bfloat16", "train.lr=0.01"],
    "nf4": [LORA, "model.dtype=nf4", "train.lr=0.01"],
    "float8": [LORA, "model.dtype=float8", "model.checkpointing=true", "train.lr=0.01"],
    "whole": ["train.precision=pure_bf16"],
}
PAIR = [  # both experts, with previews, and a validation in which processes have times of both
    *(LORA, "model.dtype=nf4", "train.lr=0.01", "experts={enabled: true, switch_every: 1}"),
    *("train.val_every_steps=1", "train.val_share=0.5", "train.sample_every_steps=2"),
    *("train.sample_prompts=[a star]", "train.sample_num_images=2", "train.sample_num_steps=4"),
]


@pytest.fixture(scope="module", params=[2, 3])
def folder(request, tmp_path_factory):
    """Run both ways on two and on three processes, among which rows do not divide, copied and
    cut."""
    shop = Shop(tmp_path_factory.mktemp("sharded_wan"))
    shop.cache()
    pair = Shop(shop.folder / "pair", pair=True)
    pair.cache()
    run_ranks(shop.folder, request.param, __file__)
    return shop.folder / "runs"


def one_rank(folder: Path) -> None:
    def train(shop: Path, name: str, way: str, *words: str) -> None:
        files = ["--config", str(shop / "wan.yaml"), "--train_cache_dir", str(shop / "cache0")]
        ways = (f"experiment_name={name}", f"parallel.type={way}")
        assert not train_t2v.main([*files, "--device", "cpu", *ways, *words])

    for way in ("ddp", "fsdp"):
        for name, words in WORDS.items():
            train(folder, f"{name}_{way}", way, *words)
        train(folder / "pair", f"pair_{way}", way, *PAIR)
    train(folder, "moved", "ddp", *WORDS["nf4"], "train.max_steps=2")
    train(folder, "moved", "fsdp", *WORDS["nf4"], "--resume")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


# ── out of the files ──────────────────────────────────────────────────────────────────────────────
def single_file(folder: Path, dtype: torch.dtype) -> Path:
    weights = {key: value.to(dtype) for key, value in random_dit(ONE_HEAD).state_dict().items()}
    save_file(weights, folder / "base.safetensors")
    return folder / "base.safetensors"


def sharded_folder(folder: Path, dtype: torch.dtype) -> Path:
    """Write what Diffusers would, in several files."""
    model = random_dit(ONE_HEAD).to(dtype)
    save_dit(model, folder / "base", "diffusers", shard_bytes=10**5)
    return folder / "base"


def pickle(folder: Path, dtype: torch.dtype) -> Path:
    weights = {key: value.to(dtype) for key, value in random_dit(ONE_HEAD).state_dict().items()}
    torch.save(weights, folder / "base.pth")
    return folder / "base.pth"


def scaled_float8(folder: Path, dtype: torch.dtype) -> Path:
    written(folder / "base.safetensors")
    return folder / "base.safetensors"


def wan_learner(path: Path, dtype: torch.dtype, adapter: str, in_file: bool) -> Learner:
    """Return a learner of the base in `path`, with adapters of the type `adapter` unless that is
    empty."""
    model = load_dit(path, dtype, model_class=WanDenoiser, in_file=in_file)
    encoder = build_text_encoder(HashConfig(dim=ONE_HEAD.text_dim))
    objective = build_objective("flow_matching")
    learner = Learner(model, encoder, objective, LatentSpec(ONE_HEAD.out_dim))
    if adapter:
        inject(
            model, LoRAConfig(enabled=True, type=adapter, rank=3, target_modules=("q", "ffn.0")), 0
        )
    return learner


def mapped_ranges() -> list[range]:
    """Return the addresses at which the files of the base are mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    pairs = (line.split()[0].split("-") for line in lines if "/base" in line)
    return [range(int(first, 16), int(last, 16)) for first, last in pairs]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
@pytest.mark.parametrize(
    "write, stored, dtype, adapter, pure",
    [
        (single_file, torch.bfloat16, torch.bfloat16, "lora", False),
        *thorough((sharded_folder, torch.float32, torch.bfloat16, "dora", False)),
        (pickle, torch.float16, torch.float32, "lokr", False),
        *thorough(
            (scaled_float8, torch.float16, torch.bfloat16, "lora", False),
            (single_file, torch.bfloat16, torch.float32, "", False),
        ),
        (sharded_folder, torch.float32, torch.float32, "", True),
    ],
    ids=["bf16", "float32 as bf16", "pickle", "scaled float8", "trained", "pure_bf16"],
)
def test_shards_out_of_the_files_are_those_of_a_base_in_memory(
    tmp_path, write, stored, dtype, adapter, pure
):
    """Compare to the bit, where rows do not divide and where processes get none. Before they are
    cut no weight of the base takes memory."""
    path = write(tmp_path, stored)
    whole = wan_learner(path, dtype, adapter, in_file=False)
    if pure:
        to_bfloat16(whole)
    for size, rank in ((2, 1), (3, 0), (3, 2)):
        learner = wan_learner(path, dtype, adapter, in_file=True)
        in_files = mapped_ranges()
        for name, weight in learner.model.named_parameters():
            codes = weight.codes if isinstance(weight, StoredWeight) else weight
            assert is_adapter(name) or any(codes.data_ptr() in places for places in in_files), name
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            shard(learner, World(rank, size), pure_bf16=pure)
        finally:
            dist.destroy_process_group()
        cut: dict[str, nn.Parameter] = dict(learner.model.named_parameters())
        assert cut.keys() == dict(whole.model.named_parameters()).keys()
        for name, expected in whole.model.named_parameters():
            parts = expected.detach().chunk(size)
            part = parts[rank] if rank < len(parts) else expected[:0]
            mine = local(cut[name].detach())
            assert cut[name].requires_grad == expected.requires_grad
            assert mine.dtype == part.dtype and torch.equal(mine, part), name
            assert not any(mine.data_ptr() in places for places in in_files), name


def encoded_learner(path: Path, encoding: str, adapter: str, in_file: bool) -> Learner:
    """Return a learner of the base in `path`, as `model.dtype` would keep it, with adapters."""
    settings = WanModelConfig(name_or_path=str(path), dtype=encoding)
    spec = LatentSpec(ONE_HEAD.out_dim)
    model = load_denoiser(settings, spec, ONE_HEAD.text_dim, in_file=in_file)
    encoder = build_text_encoder(HashConfig(dim=ONE_HEAD.text_dim))
    learner = Learner(model, encoder, build_objective("flow_matching"), spec)
    rank_and_layers = {"rank": 3, "target_modules": ("q", "ffn.0")}
    inject(model, LoRAConfig(enabled=True, type=adapter, **rank_and_layers), 0)
    return learner


@pytest.mark.parametrize(
    "write, stored, encoding, adapter",
    [
        (sharded_folder, torch.float32, "nf4", "dora"),
        *thorough(
            (single_file, torch.bfloat16, "int8", "lora"),
            (scaled_float8, torch.float16, "float8", "lora"),
        ),
        (scaled_float8, torch.float16, "nf4", "lora"),
    ],
)
def test_codes_and_scales_out_of_the_files_are_cut_by_rows(
    tmp_path, write, stored, encoding, adapter
):
    """Compare to the bit with those of a base in memory, of which a checkpoint's sum, and what
    adapters begin from, must be the same."""
    path = write(tmp_path, stored)
    whole = encoded_learner(path, encoding, adapter, in_file=False)
    for size, rank in ((2, 1), (3, 0), (3, 2)):
        learner = encoded_learner(path, encoding, adapter, in_file=True)
        in_files = mapped_ranges()
        for name, weight in learner.model.named_parameters():
            expected = whole.model.get_parameter(name).detach()
            assert torch.equal(local(weight.detach()) + 0, expected + 0), name
            codes = weight.codes if isinstance(weight, StoredWeight) else weight
            assert is_adapter(name) or any(codes.data_ptr() in places for places in in_files), name
        assert sum_of([frozen_elsewhere(learner)]) == sum_of([frozen_elsewhere(whole)])
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            shard(learner, World(rank, size))
        finally:
            dist.destroy_process_group()
        cut: dict[str, nn.Parameter] = dict(learner.model.named_parameters())
        for name, expected in whole.model.named_parameters():
            parts, places = [expected.detach()], [name]
            if isinstance(expected, StoredWeight):
                layer, original = name.removesuffix(".weight"), "parametrizations.weight.original"
                parts = [expected.codes, expected.scale]
                places = [f"{layer}.{original}{number}" for number in (0, 1)]
            for part, place in zip(parts, places, strict=True):
                mine, rows = local(cut.pop(place).detach()), part.chunk(size)
                wanted = rows[rank] if rank < len(rows) else part[:0]
                assert mine.dtype == wanted.dtype
                assert torch.equal(mine.float(), wanted.float()), place
                assert not any(mine.data_ptr() in places for places in in_files), place
        assert not cut
        grid = (3, 4, 4)
        assert learner.model.train_flops(grid, 7) == whole.model.train_flops(grid, 7)


def test_weights_to_be_replaced_are_unpacked_before(tmp_path):
    """Write float32 numbers over a base of bfloat16 files that is to be float32: none is rounded,
    and other weights stay in their file."""
    learner = wan_learner(single_file(tmp_path, torch.bfloat16), torch.float32, "", in_file=True)
    name = "model.blocks.0.ffn.0.weight"
    value = torch.rand_like(learner.get_parameter(name).detach().float())
    unpack_weights(learner, {name})
    with torch.no_grad():
        learner.state_dict()[name].copy_(value)
    assert torch.equal(learner.get_parameter(name), value)
    packed = [key for key, p in learner.named_parameters() if isinstance(p, StoredWeight)]
    assert len(packed) == len(list(learner.model.parameters())) - 1 and name not in packed


# ── training ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "nf4", "float8"])
def test_a_lora_on_a_base_in_shards_is_the_one_on_copies(folder, name):
    assert losses(folder / f"{name}_fsdp") == losses(folder / f"{name}_ddp")
    stored = {}
    for way in ("ddp", "fsdp"):
        file = checkpoint.latest(folder / f"{name}_{way}") / "lora.safetensors"
        stored[way] = checkpoint.read_tensors(file)
    assert stored["ddp"].keys() == stored["fsdp"].keys()
    for name, value in stored["ddp"].items():
        torch.testing.assert_close(stored["fsdp"][name], value, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_pair_in_shards_is_the_one_on_copies(folder):
    """Compare training, validation, previews and the adapters of both experts."""
    ways = [folder.parent / "pair" / "runs" / f"pair_{way}" for way in ("ddp", "fsdp")]
    copied, cut = (metrics(run) for run in ways)
    assert len(copied) == len(cut) > 2
    for row, other in zip(copied, cut, strict=True):
        assert row["loss"] == other["loss"] and row["expert"] == other["expert"]
        names = [name for name in row if name.startswith("val_loss")]
        assert len(names) > 9
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=1e-5)
    assert {row["expert"] for row in copied} == {"high", "low"}
    adapters = [
        checkpoint.read_tensors(checkpoint.latest(run) / "model.safetensors") for run in ways
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=0, atol=1e-7)
    previews = [sorted((run / "samples").rglob("*.png")) for run in ways]
    assert previews[0]
    for picture, other in zip(*previews, strict=True):
        assert picture.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_run_on_codes_goes_on_in_shards(folder):
    assert losses(folder / "moved") == losses(folder / "nf4_ddp")
    assert len(losses(folder / "moved")) > 2


@pytest.mark.slow
def test_whole_models_of_16_bits_train_in_shards_as_in_copies(folder):
    """Gradients add up in another order, and are rounded to bfloat16 by copies."""
    cut, copied = losses(folder / "whole_fsdp"), losses(folder / "whole_ddp")
    assert cut[0] == copied[0]
    torch.testing.assert_close(torch.tensor(cut), torch.tensor(copied), rtol=1e-3, atol=0)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
