"""What ends a training, and what does not: signals, closed terminals, errors, a parent that is
gone, a process put to sleep."""

import os
import signal
import time

import pytest
import torch

from mmdit.scripts import train_t2v
from mmdit.terminal import PlainStream
from mmdit.training import checkpoint, watch
from mmdit.training.distributed import World, _end_with_parent
from mmdit.training.errors import RunError
from mmdit.training.metrics import MetricsLog
from mmdit.training.optim import Optimizer
from mmdit.training.trainer import StopRequest
from mmdit.training.watch import Watch
from tests.helpers.forks import ended, in_child
from tests.helpers.tiny import Workshop, refused


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("stops"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_asks_for_a_stop_after_the_step(name):
    number = getattr(signal, name)
    handler = signal.default_int_handler
    before = signal.signal(number, handler)  # whatever the tests run under, nohup for one
    try:
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), number)
            assert stop.asked
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_ctrl_c_after_sigterm_stops_as_asked_and_twice_at_once():
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_report_that_nobody_reads_is_no_error():
    """As in `train_t2v … | head -1`."""
    reads, writes = os.pipe()
    stream = PlainStream(os.fdopen(writes, "w"))
    print("first", file=stream, flush=True)
    os.close(reads)
    for _ in range(3):
        print("more", file=stream, flush=True)
    stream.close()


def metrics_fail(at, monkeypatch):
    write = MetricsLog.write

    def fails(self, values):
        if values["step"] == at:
            raise RunError("could not write metrics.jsonl")
        write(self, values)

    monkeypatch.setattr(MetricsLog, "write", fails)


def test_an_error_saves_the_steps_since_the_last_checkpoint(shop, monkeypatch, capsys):
    whole = shop.train("whole", "train.max_steps=6", "train.save_every_steps=6")
    with monkeypatch.context() as context:
        metrics_fail(4, context)
        words = ["train.max_steps=6", "train.save_every_steps=6"]
        refused(
            capsys,
            train_t2v.main,
            shop.train_words("broken", *words),
            "could not write metrics.jsonl",
        )
    run = shop.folder / "runs/broken"
    assert checkpoint.step_of(checkpoint.latest(run)) == 4
    train_t2v.main(shop.train_words("broken", *words, "--resume"))
    for name in ("model", "ema", "optimizer"):
        a, b = (checkpoint.latest(place) / f"{name}.safetensors" for place in (whole, run))
        assert a.read_bytes() == b.read_bytes()


def test_an_error_amid_a_step_saves_nothing(shop, monkeypatch, capsys):
    """Some weights are of the new state by then, and some of the old."""
    step, calls = Optimizer.step, []

    def fails(self):
        calls.append(0)
        if len(calls) == 3:
            raise ValueError("amid a step")
        step(self)

    monkeypatch.setattr(Optimizer, "step", fails)
    refused(
        capsys, train_t2v.main, shop.train_words("amid", "train.save_every_steps=6"), "amid a step"
    )
    assert checkpoint.latest(shop.folder / "runs/amid") is None


def test_a_full_memory_before_any_checkpoint_advises_what_is_possible(shop, monkeypatch, capsys):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("mmdit.training.learner.Learner.forward", full)
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("small"),
        "There is no checkpoint yet: start the run again",
    )


def test_a_rank_stops_when_its_torchrun_is_gone():
    reads, writes = os.pipe()

    def parent():
        in_child(lambda: (_end_with_parent(), os.write(writes, b"x"), time.sleep(30)))
        os.close(writes)
        time.sleep(30)

    pid = in_child(parent)
    os.close(writes)
    assert os.read(reads, 1) == b"x"
    begin = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.read(reads, 1) == b"" and time.monotonic() - begin < 10, "it has ended"
    os.close(reads)


def test_the_watch_is_over_before_the_program_is(monkeypatch):
    """A thread inside a call of torch would abort the interpreter that ends around it."""

    class SlowStore:
        def clone(self):
            return self

        def set_timeout(self, timeout):
            pass

        def set(self, key, value):
            told.append(key)
            time.sleep(0.3)
            told.append("done")

    told = []
    monkeypatch.setattr(watch, "STORE_SECONDS", 0.05)
    with Watch(World(store=SlowStore()), 0.02).running():
        while not told:
            time.sleep(0.002)
    assert told[-1] == "done"


def test_a_process_put_to_sleep_stood_still_in_nothing():
    def work():
        with Watch(World(), 0.01).running() as running:
            running.at(1, "computing")
            for _ in range(4):
                time.sleep(0.1)

    pid = in_child(work)
    time.sleep(0.2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.2)
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
