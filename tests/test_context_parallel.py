"""Clips that several processes share: predictions, gradients, runs and previews are those of one
process. The processes are those of `drivers/context_parallel.py`; more runs, and moves between
numbers of processes, are in `rank_training.py`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdit.config import ConfigError, load
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.nn.context_parallel import Context, lengths
from mmdit.scripts import sample, train_t2v
from mmdit.training import checkpoint
from mmdit.training.distributed import process_group
from mmdit.training.media import read_back
from tests.drivers.context_parallel import (
    CASES,
    CLIPS,
    LORA,
    STEPS,
    WAN,
    WAN_RUNS,
    case,
    sample_words,
)
from tests.helpers.tiny import Workshop, refused
from tests.test_processes import drive

MEASURED = {"loss", "val_loss", "val_loss_ema", "grad_norm", "images_seen"}
STOP = "train.max_steps=1"


def share(folder: Path, parts: str, size: int, processes: int) -> None:
    """Let `processes` do `parts` of the driver, `size` of them with each clip."""
    drive("context_parallel", str(folder), parts, str(size), str(processes), seconds=300)


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
    share(shop.folder, "models,run,samples", 2, 2)
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
    share(tmp_path, "compiled", size, 4)
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
        share(tmp_path, name, 2, processes)
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
    monkeypatch.setenv("RANK", "0")
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
