"""Post-training with the denoiser cut over processes by FSDP is that of one process: rewards,
losses, weights, the slow copies, checkpoints, and a process without a pair to learn from."""

import json
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmdit.posttrain.loop import post_train
from mmdit.posttrain.online import online_epoch
from mmdit.posttrain.posttrain_config import DPOConfig, KLConfig
from mmdit.scripts import posttrain
from mmdit.training import checkpoint
from mmdit.training.distributed import World, process_group
from mmdit.training.memory.shards import Stored, is_sharded
from tests.helpers.posttrain_shop import SECTION
from tests.helpers.tiny import Workshop
from tests.test_posttrain_pair import ALGORITHMS, paired
from tests.test_processes import drive
from tests.test_sharded import distance
from tests.test_trainer import run_ranks

NEVER_EQUAL = {"seconds", "reward_seconds", "time"}
FEW = {("nft", "lora"): [], ("grpo", "whole"): []}
FEW |= dict.fromkeys([("dpo", "lora"), ("awm", "whole")], pytest.mark.thorough)
WAYS = [
    pytest.param(a, way, marks=FEW.get((a, way), pytest.mark.slow))
    for a in ALGORITHMS
    for way in ("lora", "whole")
]


def settings(algorithm: str, way: str, steps: int = 3) -> dict:
    """Return those of a run, with all the copies of weights that its algorithm can ask. AdamW
    moves by its rate also where a gradient is rounding alone, as that of a key's bias."""
    further = {"dpo": DPOConfig(collect=4, batch=2, source="offline"), "micro_batch": 2}
    if algorithm == "srpo":
        further["micro_batch"] = 1
    else:
        further["kl"] = KLConfig(beta=0.1)  # asks the reference
    if algorithm in ("grpo", "guard", "nft"):
        further["rollout"] = {"guidance": 2.0}  # two calls, differentiated together
    further["train"] = {"lr": 0.01 if way == "lora" else 1e-4}
    return {"algorithm": algorithm, "steps": steps, "lora": way == "lora", **further}


# ── two processes ─────────────────────────────────────────────────────────────────────────────────
def one_rank(folder: Path, way: str) -> None:
    with process_group("cpu", timeout_minutes=1) as world:
        for algorithm in ALGORITHMS:
            for name in ("copied", "cut"):
                run, cut = folder / f"{algorithm}_{name}", name == "cut"
                assert post_train(paired(run, world=world, cut=cut, **settings(algorithm, way)))
        if way == "lora":
            one_pair(folder, world)
            return
        shorter = settings("nft", "whole", steps=2)
        assert post_train(paired(folder / "moved", world=world, cut=True, **shorter))
        again = paired(folder / "stays", world=world, cut=True, **settings("nft", "whole"))
        again.restore(checkpoint.folder_of(folder / "moved", 2))
        assert post_train(again)


def one_pair(folder: Path, world: World) -> None:
    """Update by DPO where this process alone, and where neither, has samples to compare."""
    for name, ranks in (("second", (1,)), ("neither", ())):
        for way in ("copied", "cut"):
            online = {"algorithm": "dpo", "micro_batch": 2, "dpo": DPOConfig(source="online")}
            session = paired(folder / "pairs", world=world, cut=way == "cut", **online)
            gather = session.rollouts.gather_rewards

            def flat(rollouts, gather=gather, ranks=ranks):
                rewards = gather(rollouts)["brightness"]
                for rank in {0, 1} - set(ranks):
                    rewards[2 * rank : 2 * rank + 2] = 0.5
                return {"brightness": rewards}

            session.rollouts.gather_rewards = flat
            for _ in range(2):
                online_epoch(session)
            session.save(session.files(), False)
            done = checkpoint.folder_of(folder / "pairs", 2)
            if world.is_main:
                done.rename(folder / f"{name}_{way}")
            world.barrier()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of all runs with adapters, or of all with whole weights, once asked for."""

    @cache
    def of(way: str) -> Path:
        folder = tmp_path_factory.mktemp("sharded_posttrain")
        run_ranks(folder, 2, __file__, way)
        return folder

    return of


# ── comparisons ───────────────────────────────────────────────────────────────────────────────────
@contextmanager
def one_process():
    """Make a group of this process alone, over which FSDP cuts as over many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World()
    finally:
        dist.destroy_process_group()


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_numbers(run: Path, expected: Path) -> None:
    rows = metrics(run), metrics(expected)
    assert len(rows[0]) == len(rows[1]) == 4
    for row, wanted in zip(*rows, strict=True):
        assert row.keys() == wanted.keys()
        for name in wanted.keys() - NEVER_EQUAL:
            assert row[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name


def assert_same_weights(folder: Path, expected: Path) -> None:
    """Compare everything that two checkpoints keep but signs, of which there are none in shards."""
    names = {path.stem for path in folder.iterdir()}
    assert names == {path.stem for path in expected.iterdir()} - {"signs"} and "model" in names
    for stem in names - {"checkpoint"}:
        stored, wanted = (Stored(place / f"{stem}.safetensors") for place in (folder, expected))
        assert stored.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(stored[key].reshape(value.shape), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm, way", WAYS)
def test_a_cut_network_learns_as_a_whole_one(tmp_path, algorithm, way):
    assert post_train(paired(tmp_path / "whole", **settings(algorithm, way)))
    with one_process() as world:
        session = paired(tmp_path / "cut", world=world, cut=True, **settings(algorithm, way))
        held = [*session.policy.reference.values(), *session.policy.old.values()]
        held += [p for part in session.model.networks().values() for p in part.parameters()]
        assert all(is_sharded(tensor) for tensor in held)
        assert post_train(session)
    assert_same_numbers(tmp_path / "cut", tmp_path / "whole")
    ends = [checkpoint.folder_of(tmp_path / name, 3) for name in ("cut", "whole")]
    assert_same_weights(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "whole"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_that_cut_are_two_that_copy_and_one(run, tmp_path, algorithm, way):
    """Compare with one process roughly: it sums samples up in another order, which AdamW magnifies
    where a gradient is all but zero."""
    cut, copied = (run(way) / f"{algorithm}_{name}" for name in ("cut", "copied"))
    assert_same_numbers(cut, copied)
    ends = [checkpoint.folder_of(path, 3) for path in (cut, copied)]
    assert_same_weights(*ends)
    alone = paired(tmp_path, **settings(algorithm, way))
    assert post_train(alone)
    weights = Stored(ends[0] / "model.safetensors")
    for name, value in alone.learner.stored_state().items():
        assert distance(weights[name], value) < 5e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["second", "neither"])
def test_a_process_without_a_pair_computes_with_the_one_that_has_some(run, name):
    """Weights move by what the other learnt; where nobody has a pair they stay."""
    cut, copied = (run("lora") / f"{name}_{way}" for way in ("cut", "copied"))
    assert_same_weights(cut, copied)
    moved = Stored(copied / "optimizer.safetensors")
    assert bool(moved) == (name == "second")


@pytest.mark.slow
def test_a_run_goes_on_in_as_many_parts_as_there_are_processes(run, tmp_path):
    """Begin in two parts, and go on with two, and with one process and whole weights."""
    folder = run("whole")
    expected = checkpoint.folder_of(folder / "nft_cut", 3)
    assert_same_weights(checkpoint.folder_of(folder / "stays", 3), expected)
    session = paired(tmp_path, **settings("nft", "whole"))
    session.restore(checkpoint.folder_of(folder / "moved", 2))
    assert post_train(session)
    assert_same_weights(checkpoint.folder_of(tmp_path, 3), expected)


# ── the command ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
def test_the_command_cuts_and_its_run_goes_on_alone(tmp_path):
    shop = Workshop(tmp_path)
    base = shop.train("base")
    section = tmp_path / "post.yaml"
    text = shop.config.read_text(encoding="utf-8")
    section.write_text(text.replace("train:", f"train:\n  init_from: {base}", 1) + SECTION)
    words = ["--config", str(section), "--device", "cpu", "posttrain.algorithm=nft"]
    words += ["lora={enabled: true, rank: 2}", "posttrain.micro_batch=1", "train.keep_last=0"]
    assert not posttrain.main([*words, "experiment_name=alone", "train.max_steps=3"])
    cut = [*words, "experiment_name=cut", "parallel.type=fsdp"]
    drive(
        *("ranks_of_command", "2", "mmdit.scripts.posttrain", *cut, "train.max_steps=2"),
        seconds=200,
    )
    assert (checkpoint.folder_of(tmp_path / "runs/cut", 2) / "old").is_dir()  # as parts
    assert not posttrain.main([*cut, "--resume", "train.max_steps=3"])
    for step in (2, 3):
        files = [
            checkpoint.folder_of(tmp_path / "runs" / name, step) / "lora.safetensors"
            for name in ("cut", "alone")
        ]
        parts, whole = map(Stored, files)
        assert parts.keys() == whole.keys() and any(value.any() for value in whole.values())
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), sys.argv[2])
