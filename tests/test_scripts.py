"""The commands as a person runs them: what they write, and one clear message (exit code 2, no
trace) for every bad input."""

import errno
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mmdit.commands.evaluate as scoring
import mmdit.training.checkpoint as checkpoint
import mmdit.training.exporting as exporting
import mmdit.training.memory.shards as stored
from mmdit.__main__ import commands, start
from mmdit.experiment.load import load_pipeline
from mmdit.scripts import (
    cache_moving_shapes,
    cache_vtp_images,
    cache_vtp_latents,
    evaluate,
    export,
    friendly,
    inspect_levels,
    prepare_moving_shapes,
    sample,
    train_t2v,
)
from mmdit.scripts.parsers import parser_of
from mmdit.training.distributed import choose_device, process_group
from mmdit.training.media import read_back
from tests.helpers.tiny import FOUR_STEPS, Workshop, refused

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("scripts"))
    shop.train("base")
    return shop


def tensors(run):
    return checkpoint.read_tensors(checkpoint.latest(run) / "model.safetensors")


def metadata(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(tmp_path):
    """Three good pictures, a damaged one and a missing one; an empty caption; names of any
    script."""
    for i, name in enumerate(("猫.png", "b.png", "c.jpg")):
        Image.new("RGB", (60 + i, 40), (200, 30 * i, 9)).save(tmp_path / name)
    (tmp_path / "torn.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    files = ["猫.png", "b.png", "c.jpg", "torn.png", "absent.png"]
    return metadata(
        tmp_path / "train_images.jsonl",
        [
            {
                "id": Path(file).stem,
                "image_path": file,
                "caption": "" if file == "b.png" else "a cat",
            }
            for file in files
        ],
    )


# ── bad input: data ───────────────────────────────────────────────────────────────────────────────
def test_a_picture_that_cannot_be_used_is_counted_and_the_rest_goes_on(shop, pictures, capsys):
    out = pictures.parent / "my cache"
    words = [
        "--config",
        str(shop.config),
        "--meta_jsonl",
        str(pictures),
        "--out_dir",
        str(out),
        "--device",
        "cpu",
        "video.width=32",
    ]
    assert cache_vtp_images.main(words) == 0
    said = capsys.readouterr().out
    assert (
        "5 records: 3 items written" in said
        and "2 skipped, 1 empty captions" in said
        and "skipped.jsonl" in said
    )
    reasons = {
        row["id"]: row["reason"]
        for row in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    }
    assert reasons.keys() == {"torn", "absent"} and reasons["absent"] == "file not found"
    assert sorted(path.stem for path in out.glob("*.pt")) == ["b", "c", "猫"]
    item = torch.load(out / "b.pt", weights_only=True)
    assert item["latents"].shape == (1, 2, 2, 8) and item["caption"] == ""
    mmdit, train, *following = shlex.split(
        said.rpartition("next: ")[2]
    )  # with what it was cached by
    assert (mmdit, train) == ("mmdit", "train")
    assert train_t2v.main([*following, "--device", "cpu", "experiment_name=own_pictures"]) == 0


def test_bad_data_is_refused(shop, pictures, capsys):
    def cache(rows, *expected, main=cache_vtp_images.main, words=()):
        meta = metadata(pictures.parent / "bad.jsonl", rows)
        out = pictures.parent / "bad_cache"
        refused(
            capsys,
            main,
            [
                "--config",
                shop.config,
                "--meta_jsonl",
                meta,
                "--out_dir",
                out,
                "--device",
                "cpu",
                *words,
            ],
            *expected,
        )
        assert not list(out.rglob("*.pt")) and not list(out.rglob(".writing*"))

    good = {"id": "a", "image_path": "b.png", "caption": "x"}
    cache([good, {**good, "image_path": "c.jpg"}], "bad.jsonl:2: id 'a' was already used in line 1")
    cache(
        [{"id": "a", "image_path": "b.png"}],
        'bad.jsonl:1: has no "caption"',
        "keys here: id, image_path",
    )
    cache(
        [good],
        'has no "frames_dir"',
        "cache it with mmdit cache-images",
        main=cache_vtp_latents.main,
    )
    cache(
        [{**good, "image_path": "d.png"}],
        "none of the 1 records could be used",
        "d.png: file not found",
        "relative to the metadata file's own folder",
    )
    cache(
        [good],
        "command line: video.width, video.height: is 40x32",
        "multiples of 16",
        "nearest is 32x32",
        words=["video.width=40"],
    )
    odd = pictures.parent / "odd.yaml"
    odd.write_text(shop.config.read_text().replace("width: 48", "width: 50"))
    refused(
        capsys,
        train_t2v.main,
        ["--config", odd, "--train_cache_dir", "x"],
        "odd.yaml:4: video.width, video.height: is 50x32",
        "nearest is 48x32",
    )
    refused(
        capsys,
        cache_vtp_images.main,
        ["--config", shop.config, "--meta_jsonl", "absent.jsonl"],
        "absent.jsonl",
        "No such file",
    )


def test_clips_that_are_too_short_are_refused_with_the_settings_that_would_keep_them(shop, capsys):
    clips = shop.cache("clips4", "--frames", "4", "video.num_frames=3", count=2)
    words = ["video.num_frames=3", "video.frame_stride=3"]
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("short", *words, cache=clips),
        "2 items of 4 to 4 frames",
        "num_frames 3 with frame_stride 3 needs 7",
        "video.frame_stride: 1 would keep all",
    )
    assert not (shop.folder / "runs/short").exists()


def test_a_cache_of_another_tokenizer_size_or_none_is_refused(shop, capsys):
    cache = shop.cache("pictures")
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("x", "tokenizer={type: dummy, latent_d: 12}"),
        str(cache),
        "tokenizer",
        "latent channels: the cache has 8, the config asks 12",
        "new folder",
    )
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("x", "tokenizer={type: dummy, latent_f: 8, latent_d: 8}"),
        "pixels per latent cell: the cache has 16, the config asks 8",
    )
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("x", "video.width=32"),
        "sizes: the cache has [(48, 32)], the config asks [(32, 32)]",
    )
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("x", cache=shop.folder / "nowhere"),
        "is no latent cache",
        "cache-images",
    )
    refused(
        capsys,
        cache_moving_shapes.main,
        [
            "--config",
            shop.config,
            "--out_dir",
            cache,
            "--device",
            "cpu",
            "tokenizer={type: dummy, latent_d: 12}",
        ],
        "latent channels: the cache has 8, the config asks 12",
    )
    assert not (shop.folder / "runs/x").exists()


def test_a_damaged_cache_file_is_named_also_when_a_reading_process_finds_it(shop, capsys):
    cache = shop.cache("damaged", count=2)
    (cache / "000001.pt").write_bytes(b"torn")
    for name, words in (("memory", []), ("disk", ["data.in_memory=false", "num_workers=1"])):
        refused(
            capsys,
            train_t2v.main,
            shop.train_words(name, *words, cache=cache),
            "000001.pt is damaged",
            "run the caching command again",
        )


# ── bad input: configs, runs, machines ────────────────────────────────────────────────────────────
def test_mistakes_in_configs_and_arguments_are_refused(shop, capsys, tmp_path):
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("x", "train.learning_rate=1e-4"),
        "command line: train.learning_rate: unknown key",
        "lr",
    )
    refused(
        capsys,
        train_t2v.main,
        ["--config", "absent.yaml", "--train_cache_dir", "x"],
        "cannot read the config absent.yaml",
    )
    refused(
        capsys,
        train_t2v.main,
        ["--config", str(shop.folder), "--train_cache_dir", "x"],
        f"the config {shop.folder} is a folder: name a YAML file",
    )
    refused(
        capsys, train_t2v.main, [*shop.train_words("x"), "--device", "gpu"], "--device is 'gpu'"
    )
    base = shop.folder / "runs/base"
    draw = ["--checkpoint", base, "--device", "cpu", "--out", tmp_path / "out", "--prompts", "a"]
    refused(
        capsys,
        sample.main,
        ["--checkpoint", shop.folder / "nothing", "--prompts", "a"],
        "no checkpoint at",
    )
    refused(capsys, sample.main, draw[:-2], "no prompt")
    refused(
        capsys,
        sample.main,
        [*draw, "train.precision=fp32"],
        "train.precision=fp32",
        "before --prompts",
    )
    refused(capsys, sample.main, [*draw, "--width", "40"], "40x32 is not a multiple of 16")
    refused(capsys, sample.main, [*draw, "--frames", "0"], "--frames: is 0")
    refused(capsys, sample.main, [*draw, "--batch_size", "0"], "--batch_size: is 0")
    refused(capsys, sample.main, [*draw, "--steps", "0"], "steps: is 0")
    (tmp_path / "foreign.safetensors").write_bytes(b"\x80\x04 a pickle")
    refused(
        capsys,
        sample.main,
        ["--checkpoint", tmp_path / "foreign.safetensors", "--prompts", "a"],
        "cannot be read as safetensors",
    )
    refused(
        capsys,
        evaluate.main,
        ["--checkpoint", base, "--device", "cpu", "--count", "1"],
        "count is 1; must be from 2",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "gpu"])
def test_a_device_of_another_type_is_refused(device):
    with pytest.raises(ValueError, match=f"--device is '{device}', must be auto, cpu, cuda or"):
        choose_device(device)


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set, WORLD_SIZE is 2, which is no process of a job"),
        ({"RANK": "1"}, "RANK is 1, WORLD_SIZE is not set, which is no process"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "which is no process of a job"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "must be whole numbers: start the processes with"),
    ],
)
def test_half_of_a_job_is_refused(shop, pictures, capsys, monkeypatch, stated, message):
    """A cluster may set one of the two: caching left out every other record, or the first."""
    for name, value in stated.items():
        monkeypatch.setenv(name, value)
    out = pictures.parent / "c"
    words = ["--config", shop.config, "--meta_jsonl", pictures, "--out_dir", out, "--device", "cpu"]
    refused(capsys, cache_vtp_images.main, words, message)
    assert not out.exists()


def test_a_job_without_a_place_to_meet_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    meeting = pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT not set, where")
    with meeting, process_group("cpu"):
        pass


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="'cuda:2', but this machine has 2 GPUs, from cuda:0"):
        choose_device("cuda:2")


def test_what_is_near_a_checkpoint_is_refused_with_the_checkpoint(shop, tmp_path, capsys):
    run = shop.folder / "runs/base"
    step = checkpoint.latest(run)
    cases = [
        (run / "checkpoints", f"is a part of a run: give the run's folder, {run}"),
        (step / "ema.safetensors", f"is a part of a checkpoint: give its folder, {step}"),
    ]
    for path, message in cases:
        refused(capsys, sample.main, ["--checkpoint", path, "--prompts", "a"], message)
    words = ["--checkpoint", run, "--out", tmp_path / "x.pt"]
    refused(capsys, export.main, words, "x.pt, a name for files of torch.save")
    words[-1] = f"{tmp_path}/new/"
    refused(capsys, export.main, words, "new/, a folder, but one file is written", "model.safe")
    assert not (tmp_path / "new").exists()
    words = ["--checkpoint", run, "--prompts", "a", "--lora", run]
    refused(capsys, sample.main, words, f"{run} is the folder of a run", "mmdit export")


@pytest.mark.parametrize("option", ["lora", "lora_low", "refine", "image"])
def test_a_file_that_is_not_there_is_told_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch, option
):
    """Of 14 B weights that takes minutes."""
    monkeypatch.setattr(sample, "load_pipeline", lambda *_, **__: pytest.fail("it was loaded"))
    words = ["--checkpoint", "x", "--prompts", "a", "--out", tmp_path / "out", f"--{option}"]
    refused(
        capsys, sample.main, [*words, tmp_path / "none.png"], f"--{option}", "none.png", "exist"
    )
    if option == "image":
        (tmp_path / "text.png").write_text("no picture")
        words += [tmp_path / "text.png"]
        refused(capsys, sample.main, words, "--image", "text.png: no picture that can be read")


def test_adapters_of_a_base_that_was_trained_too_are_not_handed_on_as_the_whole(
    shop, tmp_path, capsys
):
    base = f"train.init_from={shop.folder / 'runs/base'}"
    for name, alone in (("both", "false"), ("alone", "true")):
        adapted = f"lora={{enabled: true, rank: 2, train_lora_only: {alone}}}"
        run = shop.train(name, base, adapted, "train.max_steps=1")
        capsys.readouterr()
        out = tmp_path / f"{name}.safetensors"
        export.main(["--checkpoint", str(run), "--out", str(out), "--lora", "comfy"])
        told = capsys.readouterr().out
        assert ("its base was trained, too" in told) == ("--merge" in told) == (alone == "false")
        assert ("its text encoder was trained, too" in told) == (alone == "false")
        card = out.with_suffix(".md").read_text(encoding="utf-8")
        assert ("encoder was trained with it, and is not in it" in card) == (alone == "false")


def test_options_and_overrides_may_be_mixed(shop):
    run = shop.folder / "runs/mixed"
    first, *rest = shop.train_words("mixed", "train.max_steps=1")
    train_t2v.main(["train.batch_size=2", first, *rest, "--device", "cpu", "seed=7"])
    assert (
        checkpoint.load_weights(run).meta.config["train"]["batch_size"] == 2
        and checkpoint.load_weights(run).meta.config["seed"] == 7
    )


def test_a_loss_that_is_no_number_stops_the_run_with_an_explanation(shop, capsys):
    """The latents overflow: their scale is absurd."""
    words = ["tokenizer={type: dummy, latent_d: 8, latent_scale: 1e38}", "train.log_every_steps=2"]
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("nan", *words),
        "2 of the last 2 steps up to step 2",
        "non-finite",
        "runs/nan/skipped",
        "train.lr",
    )
    run = shop.folder / "runs/nan"
    rows = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and len(rows[0]["ids"]) == 4
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("nan2", words[0], "train.max_skipped_steps=2"),
        "up to step 3",
        "train.max_skipped_steps = 2",
    )


def test_a_full_disk_is_told_and_leaves_nothing_half_written(shop, capsys, monkeypatch, tmp_path):
    def full(tensors, *rest):
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (stored, exporting):
        monkeypatch.setattr(module, "tensor_pieces", full)
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("full"),
        "could not save the checkpoint",
        "No space left",
        "start the run again",
    )
    assert not list((shop.folder / "runs/full/checkpoints").iterdir())
    refused(
        capsys,
        export.main,
        ["--checkpoint", shop.folder / "runs/base", "--out", tmp_path / "x.safetensors"],
        "could not write",
        "No space left",
    )
    assert not list(tmp_path.iterdir())


def test_a_full_gpu_is_told_in_one_line_with_what_helps_and_a_bug_keeps_its_trace(capsys):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand more")

    assert "train.batch_size" in refused(
        capsys, lambda _: friendly()(fails)(), [], "CUDA out of memory. Tried to allocate 9 GiB."
    )


def test_a_full_memory_of_the_host_is_told_and_other_errors_of_torch_keep_their_trace(capsys):
    def fails(_):
        with friendly():
            torch.empty(1 << 60, dtype=torch.uint8)

    refused(capsys, fails, [], "memory of this machine is full", "can't allocate", "Take smaller")

    @friendly()
    def has_a_bug():
        torch.zeros(2) @ torch.zeros(3)

    with pytest.raises(RuntimeError):
        has_a_bug()
    with pytest.raises(AssertionError), friendly():
        raise AssertionError("ours")


# ── what the commands write ───────────────────────────────────────────────────────────────────────
def test_samples_can_be_drawn_again_from_their_json(shop, tmp_path):
    out = tmp_path / "samples"
    words = [
        "--checkpoint",
        str(shop.folder / "runs/base"),
        "--device",
        "cpu",
        "--prompts",
        "a red star",
        "",
        "blue",
        "--seed",
        "5",
        "--guidance",
        "2",
        "--steps",
        "3",
        "--solver",
        "heun",
        "--width",
        "32",
        "--interval",
        "0.1",
        "0.9",
        "--shift",
        "2",
    ]
    assert sample.main([*words, "--out", str(out)]) == 0
    story = json.loads((out / "samples.json").read_text())
    names = [row["file"] for row in story["samples"]]
    assert (
        names == ["0000.png", "0001.png", "0002.png"]
        and Image.open(out / "0000.png").size == (32, 32)
        and (out / "grid.png").is_file()
    )
    settings, sampler = story["settings"], story["settings"]["sampler"]
    (tmp_path / "prompts.txt").write_text("\n".join(row["prompt"] for row in story["samples"]))
    again = [
        "--checkpoint",
        story["checkpoint"],
        "--device",
        "cpu",
        "--prompts",
        *(row["prompt"] for row in story["samples"]),
        "--width",
        story["size"][0],
        "--height",
        story["size"][1],
        "--frames",
        story["size"][2],
        "--seed",
        settings["seed"],
        "--guidance",
        settings["cfg_scale"],
        "--interval",
        *settings["cfg_interval"],
        "--steps",
        sampler["steps"],
        "--solver",
        sampler["solver"],
        "--shift",
        sampler["shift"],
        "--eta",
        sampler["eta"],
        "--out",
        tmp_path / "again",
    ]
    sample.main(
        [
            *map(str, again),
            *(["--raw_weights"] if story["raw_weights"] else []),
            *story["overrides"],
        ]
    )
    assert all(
        torch.equal(read_back(out / name), read_back(tmp_path / "again" / name)) for name in names
    )
    sample.main([*words, "--out", str(tmp_path / "other"), "--raw_weights"])
    assert any(
        (out / name).read_bytes() != (tmp_path / "other" / name).read_bytes() for name in names
    )


def test_an_export_draws_the_same_and_starts_other_runs(shop, tmp_path, capsys):
    base, file = shop.folder / "runs/base", tmp_path / "model.safetensors"
    assert export.main(["--checkpoint", str(base), "--out", str(file), "--dtype", "fp32"]) == 0
    assert "step 3" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".md", ".png", ".webp"}
    for source, name in ((base, "a"), (file, "b")):
        sample.main(
            [
                "--checkpoint",
                str(source),
                "--device",
                "cpu",
                "--prompts",
                "a red star",
                "--frames",
                "3",
                "--out",
                str(tmp_path / name),
            ]
        )
    made = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert made[0].startswith("0000.") and made[1:] == ["grid.png", "samples.json"]
    assert (tmp_path / "a/grid.png").read_bytes() == (tmp_path / "b/grid.png").read_bytes()
    shop.train("from_export", f"train.init_from={file}", "train.max_steps=1")


@pytest.mark.parametrize("dtype, most", [("bf16", 2**-8), ("fp16", 2**-11)])
def test_an_export_of_half_size_draws_the_same_within_its_precision(
    shop, tmp_path, monkeypatch, dtype, most
):
    """Of two bytes a weight; it needs neither the run nor its folder, and every weight is as near
    as its type allows."""
    base, file = shop.folder / "runs/base", tmp_path / "model.safetensors"
    export.main(["--checkpoint", str(base), "--out", str(file), "--dtype", dtype])
    whole, half = checkpoint.load_weights(base), checkpoint.load_weights(file)
    weights = sum(tensor.numel() for tensor in whole.tensors.values())
    assert 2 * weights < file.stat().st_size < 2 * weights + 60_000, "and names and the config"
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(half.tensors[name], tensor, rtol=most, atol=2**-24)
    pictures = {}
    monkeypatch.chdir(tmp_path)
    for source in (base, file):
        pipeline, _ = load_pipeline(source, "cpu")
        pictures[source] = pipeline(["a red star", "a blue ring"], 48, 32, 2, FOUR_STEPS)
    difference = (pictures[file] - pictures[base]).abs().mean().item()
    assert 0 < difference < most / 16
    words = ["--checkpoint", str(file), "--device", "cpu", "--count", "2", "--out", "report.json"]
    assert evaluate.main(words) == 0 and (tmp_path / "report.json").exists()


def test_evaluate_scores_at_the_size_asked_for_and_by_default_at_the_first_bucket(
    shop, tmp_path, monkeypatch
):
    words = ["bucketing={enabled: true, buckets: [[48, 32], [32, 48]]}", "train.max_steps=1"]
    run = shop.train("buckets", *words, cache=shop.cache("buckets", words[0]))
    scored, real = [], scoring.score_variant

    def spy(*given, **sizes):
        scored.append((sizes["width"], sizes["height"], sizes["frames"]))
        return real(*given, **sizes)

    monkeypatch.setattr(scoring, "score_variant", spy)
    evaluated = ["--checkpoint", str(run), "--device", "cpu", "--count", "2"]
    for size in ([], ["--width", "64", "--height", "96"], ["--height", "80"]):
        assert evaluate.main([*evaluated, *size]) == 0
    assert scored == [(48, 32, 1), (64, 96, 1), (48, 80, 1)]
    with pytest.raises(SystemExit):
        evaluate.main([*evaluated, "--width", "50"])


def test_evaluate_scores_several_objects_by_task(shop, tmp_path, capsys):
    words = ["--checkpoint", shop.folder / "runs/base", "--device", "cpu", "--variant", "many"]
    words += ["--count", "2", "--out", tmp_path / "report.json", "--sheet", tmp_path / "sheet.png"]
    assert evaluate.main([str(word) for word in words]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    tasks = ["single", "two", "counting", "colors", "position", "attribution"]
    assert list(report["tasks"]) == tasks and report["prompt_accuracy"]["count"] == 12
    printed = capsys.readouterr().out
    assert all(f"\n{task} " in printed for task in tasks)
    assert Image.open(tmp_path / "sheet.png").height > 3 * 48  # two of each call, in rows of 8


def test_evaluate_writes_its_report_and_sheet(shop, tmp_path, capsys):
    report, sheet = tmp_path / "deep/report.json", tmp_path / "sheet.png"
    evaluate.main(
        [
            "--checkpoint",
            str(shop.folder / "runs/base"),
            "--device",
            "cpu",
            "--count",
            "3",
            "--out",
            str(report),
            "--sheet",
            str(sheet),
        ]
    )
    assert "tokenizer ceiling" in capsys.readouterr().out and Image.open(sheet).width > 100
    row = json.loads(report.read_text())
    assert row["prompt_accuracy"]["count"] == row["held_out_accuracy"]["count"] == 3
    assert (
        row["settings"]["sampler"]["steps"] == 2
        and {"control", "tokenizer_ceiling", "seconds"} <= row.keys()
    )


# ── several processes ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(shop):
    """torchrun with --device cpu (so gloo), pictures, previews on rank 0 while the other waits; the
    same global batch."""
    words = ["train.sample_every_steps=1", "train.sample_num_images=1", "train.lr=1e-3"]
    one = shop.train("one", *words, "train.batch_size=4")
    arguments = shop.train_words("two", *words, "train.batch_size=2")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'VTP'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "mmdit.scripts.train_t2v", *arguments],
        cwd=shop.folder,
        env=env,
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("step 3/3") == 1
        and (shop.folder / "runs/two/samples/step_00000003/grid.png").is_file()
    )
    for name, value in tensors(one).items():
        difference = (
            tensors(shop.folder / "runs/two")[name] - value
        ).norm() / value.norm().clamp_min(1e-3)
        assert difference < 1e-5, f"{name}: {difference}"


@pytest.mark.parametrize(
    "command, option, given, fewest",
    [
        ("cache-images", "--num_workers", -1, 0),
        ("cache-images", "--batch_size", 0, 1),
        ("cache-latents", "--batch_size", -1, 1),
        ("cache-text", "--batch_size", 0, 1),
        ("cache-moving-shapes", "--count", 0, 1),
        ("cache-moving-shapes", "--frames", 0, 1),
        ("estimate-latent-scale", "--max_items", -1, 0),
        ("evaluate-vtp", "--count", 0, 1),
        ("inspect-adapter", "--frames", 0, 1),
        ("inspect-data", "--num_workers", -1, 0),
        ("inspect-levels", "--batch_size", 0, 1),
        ("inspect-levels", "--count", 0, 1),
        ("plan-memory", "--words", -4, 1),
        ("sample", "--columns", -1, 1),
    ],
)
def test_a_count_that_means_nothing_is_refused_by_its_option(
    capsys, command, option, given, fewest
):
    main = importlib.import_module(f"mmdit.scripts.{commands()[command]}").main
    needed = [
        [action.option_strings[0], "x"]
        for action in parser_of(main)._actions
        if action.required and action.option_strings
    ]
    with pytest.raises(SystemExit) as stop:
        main([*sum(needed, []), option, str(given)])
    expected = f"argument {option}: is {given}, must be at least {fewest}"
    assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_a_cache_is_verified_or_pruned(shop, pictures, capsys):
    words = ["--config", shop.config, "--data", pictures, "--prune", "--verify"]
    refused(capsys, cache_vtp_images.main, words, "--verify only reads", "--prune removes")


def test_ctrl_c_leaves_no_trace_while_a_command_is_loaded(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr("mmdit.terminal.install", lambda: None)
    monkeypatch.setattr("mmdit.__main__.main", stopped)
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("words", [["--lora", ""], ["--lora="], ["--out", "", "--seed", "1"]])
def test_a_value_of_nothing_is_refused_but_for_the_empty_prompt(capsys, words):
    """Such words are what a shell makes of `--lora "$LORA"` where the variable is not set."""
    option = words[0].rstrip("=")
    refused(capsys, sample.main, [*words, "--checkpoint", "x"], f"argument {option}: is empty")
    parser = parser_of(sample.main)
    empty = parser.parse_intermixed_args(["--prompts", "", "a", "--negative="])
    assert empty.prompts == ["", "a"] and empty.negative == ""


@pytest.mark.parametrize(
    "main, words, option",
    [
        (sample.main, ["--prompts", "a", "--prompts", "b"], "--prompts"),
        (cache_vtp_images.main, ["--meta_jsonl", "a", "--data=b"], "--meta_jsonl"),
        (train_t2v.main, ["--config", "a", "--conf=b"], "--config"),
    ],
)
def test_what_is_read_is_named_once_for_the_first_of_two_would_be_lost(capsys, main, words, option):
    refused(capsys, main, words, f"argument {option}: is given twice")


@pytest.mark.parametrize(
    "main, option, value, most",
    [
        (sample.main, "--seed", 10**21, 2**63 - 1),
        (cache_vtp_images.main, "--batch_size", 2**31, 2**31 - 1),
        (prepare_moving_shapes.main, "--frames", 10**9, 65536),
        (inspect_levels.main, "--count", 10**12, 65536),
    ],
)
def test_numbers_that_nothing_can_hold_are_refused_by_their_option(
    capsys, main, option, value, most
):
    refused(capsys, main, [option, value], f"argument {option}: is {value}, must be at most {most}")


def test_a_picture_of_a_million_columns_is_refused(shop, capsys):
    words = ["--checkpoint", shop.folder / "runs/base", "--prompts", "a", "--width", 10**6]
    refused(capsys, sample.main, words, "--width: is 1000000, must be at most 65536")
