"""A run folder belongs to one training; its checkpoints are told whole from damaged by sizes and
sums; none is lost."""

import os
import shutil

import pytest
import torch

from mmdit.interfaces import LatentSpec
from mmdit.scripts import export, train_t2v
from mmdit.training import checkpoint, runs
from mmdit.training.media import save_video
from mmdit.training.origin import check_origin, sum_of
from mmdit.training.run_folder import previews_in
from tests.helpers import warm
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, forget_sums, refused

SPEC = LatentSpec(4)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("folders"))
    shop.train("base", "train.keep_last=0", "train.save_every_steps=1")
    return shop


@pytest.fixture
def copied(shop):
    """A copy of the run of three steps, all saved."""
    run = shop.folder / "runs/copied"
    shutil.rmtree(run, ignore_errors=True)
    return shutil.copytree(shop.folder / "runs/base", run)


def saved(run, step, keep_last=0, **options):
    meta = checkpoint.Meta(step, {}, SPEC, "abc")
    tensors = {"w": torch.full((5,), float(step))}
    files = {"model": tensors, "optimizer": tensors}
    return checkpoint.save(run, meta, files, keep_last, notes={"a": 1}, **options)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


# ── retention ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_a_damaged_later_checkpoint_does_not_cost_the_one_just_saved(tmp_path, keep_last):
    for step in range(10, 10 + keep_last):
        file = saved(tmp_path, step) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    assert checkpoint.latest(tmp_path) is None
    for step in (3, 4, 5, 6):
        saved(tmp_path, step, keep_last)
        assert checkpoint.step_of(checkpoint.latest(tmp_path)) == step
    whole = [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)]
    assert whole == list(range(7 - keep_last, 7)), "the last ones are all there"
    assert len([name for name in names(tmp_path) if name.startswith(".abandoned-")]) == keep_last


def test_damaged_earlier_checkpoints_are_not_counted(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    (tmp_path / "checkpoints/step_00000003/optimizer.safetensors").unlink()
    saved(tmp_path, 4, keep_last=2)
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [2, 3, 4]


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path):
    """By name they would come before, and a number of eight digits alone would not see them."""
    steps = [99_999_999, 100_000_000, 100_000_010, 1_000_000_000]
    for step in steps[:3]:
        saved(tmp_path, step)
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == steps[2]
    saved(tmp_path, steps[3], keep_last=2)
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == steps[2:]
    for step in steps:
        (tmp_path / f"samples/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"samples/step_{step:08d}/grid.png").touch()
    assert [preview["step"] for preview in previews_in(tmp_path)] == steps


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "monitor.json", "checkpoint.json"]
)
def test_a_flipped_bit_and_another_size_pass_over_to_the_checkpoint_before(tmp_path, file, capsys):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2) / file
    flip(path, 10)
    assert checkpoint.step_of(checkpoint.latest(tmp_path, None)) == 1
    assert file in capsys.readouterr().out
    flip(path, 10)
    assert checkpoint.step_of(checkpoint.latest(tmp_path, None)) == 2
    path.write_bytes(path.read_bytes() + b" ")
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == (
        2 if file == "checkpoint.json" else 1
    )


def test_another_number_in_what_a_checkpoint_says_of_itself_is_damage(tmp_path, capsys):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2) / "checkpoint.json"
    text = path.read_text(encoding="utf-8")
    changed = text.replace(f'"spatial": {SPEC.spatial}', f'"spatial": {SPEC.spatial + 1}')
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == 1
    assert "checkpoint.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", [*thorough("model.safetensors"), "optimizer.safetensors", *thorough("ema.safetensors")]
)
def test_resume_goes_on_from_the_checkpoint_before_a_damaged_or_missing_file(
    shop, copied, file, capsys
):
    expected = (copied / "checkpoints/step_00000003" / file).read_bytes()
    for damage in (flip, os.unlink):
        damage(copied / "checkpoints/step_00000003" / file)
        train_t2v.main(
            shop.train_words("copied", "--resume", "train.keep_last=0", "train.save_every_steps=1")
        )
        told = capsys.readouterr().out
        assert (
            "passing over the damaged checkpoint" in told and file in told and "at step 2" in told
        )
        assert (copied / "checkpoints/step_00000003" / file).read_bytes() == expected


def test_checkpoints_of_earlier_versions_have_no_sums_and_go_on(shop, copied, capsys):
    for folder in checkpoint.complete(copied):
        forget_sums(folder)
    train_t2v.main(shop.train_words("copied", "--resume", "train.max_steps=4"))
    assert "at step 3" in capsys.readouterr().out


def test_export_and_what_reads_an_export_look_at_the_sums(shop, copied, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    newest = copied / "checkpoints/step_00000003"
    flip(newest / "ema.safetensors")
    refused(
        capsys, export.main, ["--checkpoint", newest, "--out", out], "ema.safetensors", "check sum"
    )
    assert export.main(["--checkpoint", str(copied), "--out", str(out)]) == 0
    assert "passing over" in capsys.readouterr().out
    weights = checkpoint.load_weights(out)
    assert weights.meta.step == 2
    flip(out)
    with pytest.raises(ValueError, match="check sum of .*x.safetensors"):
        checkpoint.load_weights(out)


def test_tensors_that_share_memory_are_saved(tmp_path):
    """As those of a trained T5 on a CPU."""
    one = torch.arange(6.0)
    meta = checkpoint.Meta(1, {}, SPEC, "abc")
    tensors = {"a": one, "b": one, "c": one[2:], "d": one.view(2, 3).T}
    folder = checkpoint.save(tmp_path, meta, {"model": tensors}, 1)
    found = checkpoint.read_tensors(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


# ── one training at a time ───────────────────────────────────────────────────────────────────────
def test_a_second_training_in_a_folder_is_told_at_once_and_changes_nothing(shop, copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with runs.hold(copied):
        for words in ([], ["--resume"]):
            refused(
                capsys,
                train_t2v.main,
                shop.train_words("copied", *words),
                "another process is training in",
                "runs/copied",
            )
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_lock_outlives_no_process_and_a_failed_start_leaves_no_folder(tmp_path):
    code = "import os, sys; from pathlib import Path; from mmdit.training import runs\n"
    code += "with runs.hold(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    run = tmp_path / "run"
    assert warm.run("-c", code, run).returncode == -9
    assert (run / ".lock").exists()
    with runs.hold(run):
        with pytest.raises(ValueError, match="another process is training"), runs.hold(run):
            pass
        with pytest.raises(ValueError, match="another process is training"):
            runs.discard(run)
    assert not run.exists()
    with pytest.raises(RuntimeError), runs.hold(run):
        raise RuntimeError
    assert not run.exists()


def test_what_a_killed_training_left_goes_when_the_next_one_begins(tmp_path):
    saved(tmp_path, 1)
    for name in (
        ".writing-step_00000002-abcd",
        ".removing-step_00000000",
        ".writing-step_00000009",
    ):
        (tmp_path / "checkpoints" / name).mkdir()
    preview = tmp_path / "samples/step_00000001"
    preview.mkdir(parents=True)
    (preview / ".writing-0123456789abcdef.tmp").touch()
    with runs.hold(tmp_path):
        assert names(tmp_path) == ["step_00000001"] and not list(preview.iterdir())


def test_a_file_that_came_to_a_checkpoint_later_is_told(tmp_path):
    """Averaged weights of another run would be drawn with."""
    folder = saved(tmp_path, 1)
    assert not checkpoint.problem_of(folder)
    shutil.copy(folder / "model.safetensors", folder / "ema.safetensors")
    assert "ema.safetensors does not belong to it" in checkpoint.problem_of(folder)


def test_resume_removes_what_a_kill_between_saving_and_pruning_left(shop):
    words = ["train.keep_last=1", "train.max_steps=2"]
    run = shop.train("pruned", *words)
    last = checkpoint.folder_of(run, 2)
    shutil.copytree(last, checkpoint.folder_of(run, 1))
    shop.train("pruned", *words, "--resume")
    assert names(run) == [last.name]


# ── links ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "config.yaml",
        ".lock",
        "samples/index.html",
        "skipped.jsonl",
        ".writing-metrics.jsonl",
        "checkpoints/step_00000003/model.safetensors",
    ],
)
def test_links_in_a_run_folder_are_refused_and_what_they_lead_to_stays(
    shop, copied, tmp_path, name, capsys
):
    precious = tmp_path / "precious"
    precious.write_text("precious", encoding="utf-8")
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(precious)
    words = shop.train_words("copied", "--resume", "train.max_steps=4")
    refused(capsys, train_t2v.main, words, name, "is a link")
    assert precious.read_text(encoding="utf-8") == "precious" and (copied / name).is_symlink()


def test_an_export_replaces_no_device(shop, capsys):
    refused(
        capsys,
        export.main,
        ["--checkpoint", shop.folder / "runs/base", "--out", "/dev/null"],
        "/dev/null",
        "no regular file",
    )


# ── words ────────────────────────────────────────────────────────────────────────────────────────
def test_a_video_that_cannot_be_written_is_an_error_and_no_picture(tmp_path, monkeypatch):
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(ValueError, match="clip.mp4 is no regular file"):
        save_video(torch.zeros(2, 3, 32, 32), tmp_path / "clip.mp4", 8)
    assert save_video(torch.zeros(2, 3, 32, 32), tmp_path / "b.mp4", 8).suffix == ".mp4"
    assert save_video(torch.zeros(2, 3, 31, 32), tmp_path / "odd.mp4", 8).suffix == ".png"
    full = os.open("/dev/full", os.O_WRONLY)

    def write_fails(path, mode="r", *rest, **options):
        file = open(path, mode, *rest, **options)
        os.dup2(full, file.fileno())
        return file

    monkeypatch.setattr("mmdit.files.open", write_fails, raising=False)
    with pytest.raises(OSError, match="No space left.*c.mp4"):
        save_video(torch.rand(2, 3, 64, 64), tmp_path / "c.mp4", 8)
    assert not list(tmp_path.glob("c.*"))


# ── what a resume reads again elsewhere ──────────────────────────────────────────────────────────
def test_a_resume_refuses_frozen_weights_that_were_exchanged(shop, capsys):
    model = torch.nn.Linear(3, 2)
    states = [{"w": model.weight, "b": model.bias}]
    before = {"source": "somewhere", "crc32": sum_of(states, ["a prompt"])}
    meta = checkpoint.Meta(1, {}, SPEC, "abc", origin=before)
    check_origin(meta, {"crc32": sum_of(states, ["a prompt"])}, "folder")
    check_origin(checkpoint.Meta(1, {}, SPEC, "abc"), before, "folder")  # of an earlier version
    with pytest.raises(ValueError, match="folder began from somewhere"):
        check_origin(meta, {"crc32": sum_of(states, ["another"])}, "folder")
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="no longer the same"):
        check_origin(meta, {"crc32": sum_of(states, ["a prompt"])}, "folder")


def test_a_missing_last_preview_is_drawn_when_the_run_is_continued(shop):
    words = ["train.sample_every_steps=3", "train.sample_num_images=1"]
    run = shop.train("pictures_missing", *words)
    grid = run / "samples/step_00000003/grid.png"
    before = grid.read_bytes()
    grid.unlink()
    train_t2v.main(shop.train_words("pictures_missing", *words, "--resume"))
    assert grid.read_bytes() == before
