"""Checkpoints written while the training goes on, trainings that torchrun starts again, and ranks
that are named."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor

from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.run import agree_on_start
from mmdit.interfaces import LatentSpec
from mmdit.scripts import train_t2v
from mmdit.training import checkpoint, saving
from mmdit.training.distributed import World, torchrun_names
from mmdit.training.errors import RunError
from mmdit.training.memory.shards import Stored
from mmdit.training.metrics import slow_rank
from mmdit.training.run_start import STARTS, continues, read_starts, record_start
from mmdit.training.saving import BackgroundSaves
from mmdit.training.step_report import Monitor, Reporter
from mmdit.training.train_config import TrainConfig
from mmdit.training.trainer import Trainer
from tests.helpers.tiny import Workshop, refused
from tests.test_trainer import run_ranks

ROOT = Path(__file__).resolve().parents[1]
BACKGROUND = "train.save_in_background=true"
SAVES = ["train.max_steps=6", "train.save_every_steps=2", "train.keep_last=0"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """`runs/whole` is a run whose training waits for its checkpoints."""
    shop = Workshop(tmp_path_factory.mktemp("saving"))
    shop.train("whole", *SAVES)
    return shop


def contents(run: Path, step: int) -> dict[str, bytes]:
    """Return every number of a checkpoint, by file and name, whole or in parts."""
    folder = checkpoint.folder_of(run, step)
    assert not checkpoint.problem_of(folder)
    names = [name for name in ("model", "ema", "optimizer") if list(folder.glob(f"{name}*"))]
    stored = {name: Stored(folder / f"{name}.safetensors") for name in names}
    return {
        f"{file}/{name}": tensor.numpy().tobytes()
        for file, tensors in stored.items()
        for name, tensor in tensors.items()
    }


def test_a_checkpoint_holds_the_step_it_is_of_however_late_it_is_written(shop, monkeypatch):
    """Each save waits until the training has taken another step."""
    save, advance, goes_on = checkpoint.save, Trainer._advance, threading.Event()

    def late(run_dir, meta, *arguments):
        assert threading.current_thread() is not threading.main_thread()
        assert meta.step == 6 or goes_on.wait(20)
        return save(run_dir, meta, *arguments)

    def steps(self, *arguments):
        advance(self, *arguments)
        (goes_on.set if self.state.step % 2 else goes_on.clear)()

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(Trainer, "_advance", steps)
    run = shop.train("late", *SAVES, BACKGROUND)
    for step in (2, 4, 6):
        assert contents(run, step) == contents(shop.folder / "runs/whole", step)


def test_a_save_that_fails_ends_the_training_and_leaves_earlier_checkpoints(
    shop, monkeypatch, capsys
):
    """The error of a thread reaches the person, as that of a save for which the training waits."""
    write = checkpoint.write

    def full(folder, *arguments):
        if "step_00000004" in folder.name:
            raise OSError("No space left on device")
        return write(folder, *arguments)

    monkeypatch.setattr(checkpoint, "write", full)
    words = [*SAVES, BACKGROUND]
    expected = ["could not save the checkpoint", "step_00000004", "--resume"]
    refused(capsys, train_t2v.main, shop.train_words("full", *words), *expected)
    run = shop.folder / "runs/full"
    assert contents(run, 2) == contents(shop.folder / "runs/whole", 2)
    assert not checkpoint.folder_of(run, 4).exists()
    monkeypatch.undo()
    train_t2v.main([*shop.train_words("full", *words), "--resume"])
    assert contents(run, 6) == contents(shop.folder / "runs/whole", 6)


def test_shards_of_a_gpu_are_copied_onto_one_mesh_however_many_they_are(tmp_path, monkeypatch):
    """A mesh of copies and shards makes process groups: one for each tensor would use up all
    files."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
        parts = [distribute_tensor(torch.full((2,), float(i)), mesh) for i in range(3)]
        host = init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
        of_gpus = property(lambda one: "cuda" if one is mesh else "cpu")
        monkeypatch.setattr(DeviceMesh, "device_type", of_gpus)
        made = []
        monkeypatch.setattr(
            "torch.distributed.device_mesh.init_device_mesh",
            lambda *_, **names: made.append(1) or host,
        )
        copies = saving.snapshots({str(i): part for i, part in enumerate(parts)})
        assert [copy.to_local().tolist() for copy in copies.values()] == [[0, 0], [1, 1], [2, 2]]
        assert len(made) == 1
    finally:
        dist.destroy_process_group()


def test_a_save_that_fails_while_the_next_one_waits_for_it_loses_no_step(shop, monkeypatch, capsys):
    save, join, waited_for = checkpoint.save, BackgroundSaves._join, threading.Event()

    def fails(run_dir, meta, *arguments):
        if meta.step == 2 and waited_for.wait(20):
            raise RunError("the disk was away")
        return save(run_dir, meta, *arguments)

    def joins(self):
        if self._thread is not None:
            waited_for.set()
        join(self)

    monkeypatch.setattr(checkpoint, "save", fails)
    monkeypatch.setattr(BackgroundSaves, "_join", joins)
    words = shop.train_words("away", *SAVES, BACKGROUND)
    refused(capsys, train_t2v.main, words, "the disk was away")
    assert contents(shop.folder / "runs/away", 4) == contents(shop.folder / "runs/whole", 4)


@pytest.mark.parametrize("where", ["problem_of", "Stored"])
def test_a_run_is_read_while_its_training_removes_checkpoints(shop, tmp_path, monkeypatch, where):
    """As with train.keep_last=1: the newest is gone while it is read, for there is a newer one."""
    run = tmp_path / "run"
    shutil.copytree(shop.folder / "runs/whole", run)
    newest, newer = checkpoint.folder_of(run, 6), tmp_path / "step_00000006"
    shutil.copytree(newest, newer)
    for step in (2, 4, 6):
        shutil.rmtree(checkpoint.folder_of(run, step))
    place = shutil.copytree(newer, checkpoint.folder_of(run, 4))
    read = getattr(checkpoint, where)

    def reads(*arguments):
        if place.exists():
            shutil.rmtree(place)
            shutil.move(newer, newest)
        return read(*arguments)

    monkeypatch.setattr(checkpoint, where, reads)
    assert checkpoint.load_weights(run).source == newest


def test_a_start_behind_a_torn_line_is_known(tmp_path):
    (tmp_path / STARTS).write_bytes(b'{"step": 0}\n{"step": 4, "torchr')
    record_start(tmp_path, World(), 6, "")
    record_start(tmp_path, World(), 8, "", "mmdit train train.sample_prompts=[a\u2028b\x85c]")
    assert [start["step"] for start in read_starts(tmp_path)] == [0, 6, 8]
    assert (tmp_path / STARTS).read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("torchrun", [3, "job", ["job"], None, {}])
def test_a_start_of_another_form_continues_nothing(tmp_path, monkeypatch, torchrun):
    world = World(torchrun=("job", "host:1"))
    (tmp_path / STARTS).write_text(json.dumps({"step": 0, "torchrun": torchrun}) + "\n")
    assert not continues(tmp_path, world)
    record_start(tmp_path, world, 0, "")
    assert continues(tmp_path, world)


@pytest.mark.parametrize(
    "now, goes_on",
    [
        (("job", "b:1:200:boot"), True),  # the machine of rank 0 is gone, the other is still there
        (("job", "b:1:200:boot", "c:1:300:boot"), True),
        (("job", "c:1:300:boot"), False),  # somebody else's torchrun of the same --rdzv_id
        (("job", "a:1:400:boot"), False),  # in a container of the same name, where it is process 1
        (("none",), False),
        ((), False),
    ],
)
def test_a_run_is_continued_by_a_torchrun_that_was_there_at_its_last_start(tmp_path, now, goes_on):
    record_start(tmp_path, World(torchrun=("job", "a:1:100:boot", "b:1:200:boot")), 0, "")
    assert continues(tmp_path, World(torchrun=now)) is goes_on


def test_a_torchrun_has_a_name_of_its_own_that_its_restarts_keep(monkeypatch):
    assert torchrun_names() == ()
    as_torchrun(monkeypatch, "job", 0)
    first = torchrun_names()
    as_torchrun(monkeypatch, "job", 1)
    assert first == torchrun_names() == torchrun_names(lambda name: [name, name])
    assert torchrun_names(lambda name: ["z", name, "a"]) == ("job", *sorted(["a", "z", first[1]]))
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert first[1] != torchrun_names()[1]
    stat = Path("/proc/self/stat")
    if stat.exists():  # else the number alone tells two of them apart
        began = stat.read_text().rpartition(")")[2].split()[19]
        assert f":{os.getpid()}:{began}:" in torchrun_names()[1]


def as_torchrun(monkeypatch, job: str, restarts: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))


def ends_after(step: int, monkeypatch) -> None:
    """Have the process meet an error that saves nothing, amid a step."""
    advance = Trainer._advance

    def fails(self, *arguments):
        if self.state.step == step:
            raise ValueError("the end")
        advance(self, *arguments)

    monkeypatch.setattr(Trainer, "_advance", fails)


@pytest.mark.parametrize("job", ["none", "my_job"])  # torchrun without and with --rdzv_id
def test_a_restart_goes_on_by_itself(shop, monkeypatch, capsys, job):
    words = shop.train_words(f"restarted_{job}", *SAVES)
    run = shop.folder / f"runs/restarted_{job}"
    with monkeypatch.context() as broken:
        as_torchrun(broken, job, 0)
        ends_after(1, broken)
        refused(capsys, train_t2v.main, words, "the end")
    with monkeypatch.context() as broken:  # nothing was saved yet: from the beginning
        as_torchrun(broken, job, 1)
        ends_after(5, broken)
        refused(capsys, train_t2v.main, words, "the end")
    as_torchrun(monkeypatch, job, 2)
    train_t2v.main(words)
    assert [start["step"] for start in read_starts(run)] == [0, 0, 4]
    assert contents(run, 6) == contents(shop.folder / "runs/whole", 6)


def test_a_restart_leaves_the_run_of_another_job_alone(shop, monkeypatch, capsys):
    """Of one that was started under the same rendezvous id, too."""
    for job in ("none", "job"):
        ours = World(torchrun=(job, "host:1:100:boot"))
        record_start(shop.folder / "runs/whole", ours, 6, "")
        as_torchrun(monkeypatch, job, 1)
        words = shop.train_words("whole", *SAVES)
        refused(capsys, train_t2v.main, words, "already holds a run (step 6)")


class SomeRanks(World):
    """Stands for `size` ranks, of which the others answer with `others`."""

    others: ClassVar[list] = []

    def gather(self, value):
        return [value, *self.others]


def test_a_machine_that_does_not_see_the_checkpoint_is_named(shop, monkeypatch):
    monkeypatch.setattr(SomeRanks, "others", [True, False])
    config = load_experiment_config(shop.config, ["experiment_name=whole"])
    with pytest.raises(ValueError, match="rank 2 does not find .*step_00000006.*on a disk"):
        agree_on_start(config, True, SomeRanks())


@pytest.mark.parametrize(
    "seconds, step, expected",
    [
        ([0.2, 0.2, 0.5, 0.21], 1.0, 2),
        ([0.5, 0.2], 1.0, 0),
        ([0.2, 0.25, 0.22], 1.0, None),
        ([0.2, 0.5], 20.0, None),  # nothing that matters for a step of 20 s
        ([0.001, 0.009], 0.02, None),  # noise
    ],
)
def test_a_rank_that_all_others_wait_for_is_named(seconds, step, expected):
    assert slow_rank(seconds, step) == expected


def reporter(tmp_path, size: int) -> Reporter:
    return Reporter(TrainConfig(), 0, SomeRanks(size=size), tmp_path, 0, Monitor())


def test_a_slow_rank_is_told_once_and_not_for_compiling(tmp_path, monkeypatch, capsys):
    told = reporter(tmp_path, 3)
    monkeypatch.setattr(SomeRanks, "others", [(0.1, 0.9), (0.0, 0.3)])
    told._tell_slow(0.0, 3.0, 20.0, 10)  # the first report
    assert not capsys.readouterr().out
    told.seen = 10
    told._tell_slow(0.0, 3.0, 20.0, 10)
    assert "rank 1 is slow" in (line := capsys.readouterr().out)
    assert "waits 0.100 s for data" in line and "takes 0.900 s" in line and "is 0.300 s" in line
    told._tell_slow(0.0, 3.0, 20.0, 10)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("others, named", [([0, 4], "Only rank 2 met"), ([2, 4], ""), ([0, 0], "")])
def test_the_rank_that_alone_meets_losses_that_are_no_numbers_is_named(
    tmp_path, monkeypatch, others, named
):
    monkeypatch.setattr(SomeRanks, "others", others)
    assert named in (line := reporter(tmp_path, 3)._only_rank()) and bool(named) == bool(line)


def one_rank(folder: Path, name: str, kills: bool) -> None:
    """Train as a rank of torchrun; with `kills`, rank 1 is killed in step 5 of its first life."""
    if kills and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        advance = Trainer._advance

        def dies(self, *arguments):
            if self.state.step == 4:
                self.background.wait()  # else step 4 is whole or not, as it happens
                os.kill(os.getpid(), signal.SIGKILL)
            advance(self, *arguments)

        Trainer._advance = dies
    words = [*SAVES, BACKGROUND, "train.batch_size=2", "parallel.type=fsdp"]
    train_t2v.main(Workshop(folder).train_words(name, *words))


def test_a_checkpoint_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    final, flushed = checkpoint.folder_of(tmp_path, 3), []
    monkeypatch.setattr(
        checkpoint, "flush_to_disk", lambda path: flushed.append((path.name, final.exists()))
    )
    meta = checkpoint.Meta(3, {}, LatentSpec(4), "x")
    checkpoint.save(tmp_path, meta, {"model": {"a": torch.ones(2)}}, 0)
    *before, last = flushed
    assert {"model.safetensors", "checkpoint.json"} < {name for name, _ in before}
    assert not any(named for _, named in before) and last == ("checkpoints", True)


@pytest.mark.slow
def test_torchrun_restarts_a_sharded_training_whose_process_was_killed(shop):
    """Its checkpoints are written in the background by both processes, each its shards."""
    run_ranks(shop.folder, 2, __file__, "undisturbed")
    run_ranks(shop.folder, 2, __file__, "killed", options=["--max_restarts=1"])
    runs = [shop.folder / "runs" / name for name in ("undisturbed", "killed")]
    assert [start["step"] for start in read_starts(runs[1])] == [0, 4]
    for step in (2, 4, 6):
        assert (checkpoint.folder_of(runs[1], step) / "optimizer").is_dir()  # in parts
        assert contents(runs[0], step) == contents(runs[1], step)


def machine(folder: Path, number: int, port: int, *words: str) -> subprocess.Popen:
    """Start the torchrun of one of two machines, in a folder of its own."""
    shop = Workshop(folder)
    home = folder / f"machine{number}"
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=both"]
    command += ["-m", "mmdit.scripts.train_t2v", *shop.train_words("machines", *words)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "VTP"))),
        "OMP_NUM_THREADS": "1",
    }
    with (home / "log.txt").open("w") as log:
        return subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log)


@pytest.mark.slow
def test_a_machine_that_is_lost_is_named_and_the_training_goes_on(shop):
    """Two torchruns meet by their rendezvous; the second is killed with its process."""
    words = ["train.batch_size=2", "train.save_every_steps=4", "parallel.type=fsdp"]
    endless = [*words, "train.max_steps=100000"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = shop.folder / "runs/machines"
    first, end = machine(shop.folder, 0, port, *endless), time.monotonic() + 120
    with socket.socket() as probe:  # it is the one at which they meet
        while probe.connect_ex(("localhost", port)) and time.monotonic() < end:
            time.sleep(0.1)
    second = machine(shop.folder, 1, port, *endless)
    while not checkpoint.complete(run) and time.monotonic() < end:
        time.sleep(0.2)
    ranks = {
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.exists() and int(path.read_text().rpartition(")")[2].split()[1]) == second.pid
    }
    for process in {second.pid, *ranks}:
        os.kill(process, signal.SIGKILL)
    second.wait()
    assert first.wait(60) == 1
    text = "".join(path.read_text() for path in shop.folder.glob("machine*/log.txt"))
    assert "lost another process in step" in text
    assert ": last heard of in step" in text or "with it the machine of rank 0" in text
    stopped = checkpoint.step_of(checkpoint.latest(run))
    again = [*words, f"train.max_steps={stopped + 4}", "--resume"]
    both = [machine(shop.folder, number, port, *again) for number in (0, 1)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert checkpoint.step_of(checkpoint.latest(run)) == stopped + 4


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), sys.argv[2], kills=sys.argv[2] == "killed")
