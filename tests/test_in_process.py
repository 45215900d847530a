"""`mmdit reproduce --in_process`: commands that run in one process do what each does in its own."""

import gc
import json
import logging
import os
import random
import signal
import sys
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import yaml

from mmdit.commands import in_process
from mmdit.commands.in_process import InProcess
from mmdit.commands.reproduce import Chain
from mmdit.config import decode
from mmdit.data.batches import kept_cache, stores
from mmdit.diagnostics.recipe import Recipe
from mmdit.diagnostics.results_file import results
from mmdit.experiment import load
from mmdit.experiment import run as training_run
from mmdit.scripts import call, reproduce
from mmdit.training import trainer
from mmdit.training.checkpoint import read_tensors
from mmdit.training.errors import RunError
from mmdit.training.graphs import common
from tests.drivers import gpu_baselines
from tests.helpers import warm
from tests.helpers.tiny import CONFIG, Workshop, refused

ROOT = Path(__file__).resolve().parents[1]
KEPT = ["train.save_every_steps=1", "train.keep_every_steps=1", "model.dropout=0.1"]
SCORES = [{"name": "s", "evaluate": "--count 2 --steps 1 --at_steps 1 3"}]
ARMS = "model={type: arms, dim: 16, depth: 2, num_heads: 2, window_size: 4, changes: [u_skips]}"


def toy(folder: Path, *stages: dict, module: str = "mmdit") -> dict:
    """Write a recipe of tiny stages, which train on one cache, into `folder`; return it."""
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(folder=folder))
    rows = []
    for number, stage in enumerate(stages):
        cached = {"cache_of": stages[0]["name"]} if number else {}
        cached = cached or {"cache": "cache-moving-shapes --count 8"}
        rows.append({"config": str(config), **cached, **stage})
    recipe = {"title": "t", "module": module, "seeds": [0], "stages": rows}
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


def started(folder: Path, out: str, *words: str, module: str = "mmdit") -> warm.Process:
    """Start `mmdit reproduce toy`, or that of another program."""
    command = ["tests.drivers.forked_commands", module, "reproduce", "toy", "--results", folder]
    return warm.Process("-m", *command, "--device", "cpu", "--out", folder / out, *words)


@pytest.mark.thorough
def test_weights_and_scores_are_those_of_separate_processes_to_the_bit(tmp_path):
    """Compare both ways for a recipe of a program that knows more, whose networks draw from torch's
    own generator."""
    arm = {"name": "arm", "overrides": ["text_encoder.dim=24", *KEPT[:2], ARMS], "scores": SCORES}
    stages = [{"name": "base", "overrides": KEPT}, arm]
    driver = "tests.drivers.gpu_arms"
    toy(tmp_path, *stages, module=driver)
    ways = {"apart": (), "together": ("--in_process",)}
    running = {out: started(tmp_path, out, *words, module=driver) for out, words in ways.items()}
    said = {out: (process.wait(), process.outputs()) for out, process in running.items()}
    made = {out: json.loads((tmp_path / out / "results.json").read_text()) for out in ways}
    assert made["together"]["stages"]["arm"]["scores"] == made["apart"]["stages"]["arm"]["scores"]
    for stage in ("base", "arm"):
        rows = [made[out]["stages"][stage] for out in ways]
        assert ["in_process" in row for row in rows] == [False, True], said
        assert rows[0]["training"]["loss"] == rows[1]["training"]["loss"]
        for name in ("model", "ema", "optimizer"):
            file = f"seed_0/{stage}/checkpoints/step_00000003/{name}.safetensors"
            one, other = (read_tensors(tmp_path / out / file) for out in ways)
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    starts = [tmp_path / out / "seed_0/arm/starts.jsonl" for out in ways]
    typed = [json.loads(path.read_text())["command"] for path in starts]
    assert typed[0].replace("/apart", "/together") == typed[1], "what was typed is recorded alike"


@pytest.mark.thorough
def test_a_training_that_is_asked_to_stop_saves_and_ends_and_goes_on(tmp_path):
    steps = ["train.max_steps=600", "train.save_every_steps=100000"]
    toy(tmp_path, {"name": "a", "overrides": steps}, {"name": "b", "overrides": steps[1:]})
    first = started(tmp_path, "out", "--in_process")
    while not (tmp_path / "out/seed_0/a/metrics.jsonl").exists():
        time.sleep(0.05)
        assert not first.ended(), first.outputs()
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 130
    said = "".join(first.outputs())
    assert "stopped on request" in said and "Traceback" not in said
    saved = list((tmp_path / "out/seed_0/a/checkpoints").glob("step_*"))
    assert len(saved) == 1 and 0 < int(saved[0].name[5:]) < 600
    assert not (tmp_path / "out/seed_0/b").exists(), "the next command is not begun"
    second = started(tmp_path, "out", "--in_process")
    assert second.wait() == 0, second.outputs()
    record = json.loads((tmp_path / "out/seed_0.json").read_text())
    assert (
        record["stages"]["a"]["attempts"] == 2 and record["stages"]["b"]["training"]["steps"] == 3
    )


def test_plain_networks_are_trained_in_the_process_of_their_driver(tmp_path, monkeypatch):
    plain = ["model={type: plain_dit, dim: 16, depth: 2, num_heads: 2}"]
    recipe = toy(tmp_path, {"name": "a", "overrides": plain}, module=gpu_baselines.__name__)
    monkeypatch.setattr(in_process, "program", lambda: gpu_baselines.__name__)
    with gpu_baselines.baselines():
        execute = InProcess(call, gpu_baselines.__name__)
        chain = Chain(decode(Recipe, recipe), 0, tmp_path, "cpu", execute, in_process=True)
        record = chain.run()
    assert record["stages"]["a"]["training"]["steps"] == 3
    assert results("toy", chain.recipe, [record])["stages"]["a"]["in_process"] is True


# ── the cache ──
@pytest.fixture
def opened(monkeypatch):
    """Return what caches are opened, and read into memory, from now on."""
    made: list[str] = []
    open_cache, read = kept_cache.open_cache, stores.InMemory.__init__

    def opening(*words):
        made.append("opened")
        return open_cache(*words)

    def reading(*words):
        made.append("read")
        read(*words)

    monkeypatch.setattr(kept_cache, "open_cache", opening)
    monkeypatch.setattr(stores.InMemory, "__init__", reading)
    return made


def test_trainings_of_one_process_share_a_cache_until_its_files_change(tmp_path, opened):
    shop, run = Workshop(tmp_path), InProcess(call)
    first, other = shop.cache("pictures"), shop.cache("others", count=4)

    def train(name: str, cache: Path) -> list[str]:
        opened.clear()
        run(["train", *shop.train_words(name, "train.max_steps=1", cache=cache)])
        return list(opened)

    anew = ["opened", "read"]
    assert train("a", first) == anew and train("b", first) == []
    assert train("c", other) == anew and train("d", other) == []
    item = next(other.glob("**/*.pt"))
    os.utime(item, ns=(0, 0))
    assert train("e", other) == anew
    item.write_bytes(item.read_bytes()[:-1])
    with pytest.raises(RunError, match="status 2"):
        train("f", other)
    run(["cache-moving-shapes", *cache_words(shop, first, 12)])
    assert train("g", first) == anew and train("h", first) == []
    with pytest.raises(RunError, match="status 2"):
        run(["train", *shop.train_words("i", "tokenizer.latent_d=4", cache=first)])
    opened.clear()
    shop.train("apart", "train.max_steps=1", cache=first)
    shop.train("again", "train.max_steps=1", cache=first)
    assert opened == anew + anew, "nothing is kept outside"
    one, two = (read_tensors(model_of(tmp_path / "runs" / name)) for name in ("h", "apart"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_kept_cache_is_compared_with_what_is_wanted_and_stands_for_no_other(tmp_path):
    shop, kept = Workshop(tmp_path), kept_cache.KeptCache()
    folders = [shop.cache("pictures"), shop.cache("others", count=4)]
    with kept.used():
        first, second = (kept_cache.opened(folder, None) for folder in folders)
        assert kept_cache.opened(folders[1], second.manifest) is second
        with pytest.raises(ValueError, match="tokenizer"):
            kept_cache.opened(folders[1], replace(second.manifest, tokenizer="another"))
        stores = [kept_cache.in_memory(cache, object) for cache in (first, second)]
        assert stores[0] is not stores[1]
        assert kept_cache.in_memory(second, object) is stores[1], "it is read once"


def test_networks_of_a_command_are_gone_when_it_has_ended(tmp_path, monkeypatch):
    """Follow the learners of trainings, one of which fails in its loop, and of a score."""
    shop, run, made = Workshop(tmp_path), InProcess(call), []

    def follow(module) -> None:
        build = module.build_learner

        def following(*words, **options):
            learner = build(*words, **options)
            made.append(weakref.ref(learner))
            return learner

        monkeypatch.setattr(module, "build_learner", following)

    def fails(*_):
        raise ValueError("of the loop")

    follow(training_run)
    follow(load)
    run(["train", *shop.train_words("a", cache=shop.cache("pictures"))])
    words = ["--checkpoint", str(tmp_path / "runs/a"), "--count", "2", "--steps", "1"]
    run(["evaluate", *words, "--device", "cpu", "--at_steps", "2", "3"])
    monkeypatch.setattr(trainer, "clip_and_guard", fails)
    with pytest.raises(RunError, match="status 2"):
        run(["train", *shop.train_words("b", cache=shop.cache("pictures"))])
    assert [learner() for learner in made] == [None, None, None]


def cache_words(shop: Workshop, folder: Path, count: int) -> list[str]:
    words = ["--config", shop.config, "--out_dir", folder, "--count", count, "--device", "cpu"]
    return list(map(str, words))


def model_of(run: Path) -> Path:
    return run / "checkpoints/step_00000001/model.safetensors"


def test_checkpoints_that_are_scored_are_removed_where_that_is_asked(tmp_path):
    score = {"scores": [{"name": "s", "evaluate": "--count 2 --steps 1"}]}
    a, b = {"name": "a", **score}, {"name": "b", "init_from": "a", **score}
    recipe = decode(Recipe, toy(tmp_path, a, b, {"name": "c"}))

    def left(**how) -> list[str]:
        chain = Chain(recipe, 0, tmp_path, "cpu", InProcess(call), **how)
        chain.run()
        folders = tmp_path.glob("seed_0/*/checkpoints/step_*")
        return sorted({folder.parts[-3] for folder in folders})

    assert left() == ["a", "b", "c"]
    assert left(discard=True) == ["a", "c"], "b starts from a, and c is not scored"
    assert left(discard=True) == ["a", "c"], "nothing is made again"


def test_commands_that_share_go_past_a_stage_that_fails(tmp_path, capsys):
    """Let one fail for all of them, and what starts from it; one command alone tries it again."""
    broken = {"name": "b", "overrides": [f"train.init_from={tmp_path}/nowhere"]}
    after = {"name": "c", "init_from": "b"}
    toy(tmp_path, {"name": "a"}, broken, after, {"name": "d"})
    words = [*("--results", tmp_path, "--out", tmp_path / "out"), "toy", "--device", "cpu"]
    words += ["--in_process"]
    said = refused(capsys, reproduce.main, [*words, "--share"], "these stages failed")
    assert "b of seed 0, c of seed 0" in said
    path = tmp_path / "out/seed_0.json"
    record = json.loads(path.read_text())["stages"]
    assert record["b"]["attempts"] == 1 and "ended with status 2" in record["b"]["failed"]
    assert all("training" in record[name] for name in "ad") and "c" not in record
    said = refused(capsys, reproduce.main, [*words, "--share"], "these stages failed")
    assert "b of seed 0" not in said and json.loads(path.read_text())["stages"] == record
    refused(capsys, reproduce.main, words, "train --config", "ended with status 2; see above")
    assert json.loads(path.read_text())["stages"]["b"]["attempts"] == 2


# ── programs and help ──
def test_a_recipe_of_another_program_is_refused(tmp_path, capsys):
    words = [*("--results", tmp_path, "--out", tmp_path / "out"), "toy", "--in_process"]
    toy(tmp_path, {"name": "a"}, module="tests.drivers.gpu_arms")
    refused(capsys, reproduce.main, words, "give `python -m tests.drivers.gpu_arms reproduce …")
    assert not (tmp_path / "out").exists()


# ── one command ──
def command(main) -> InProcess:
    """Return what runs the function `main` as a command."""
    return InProcess(lambda words: main())


def ends(with_what):
    """Return a command that ends so."""

    def main():
        if isinstance(with_what, BaseException):
            raise with_what
        return with_what

    return main


@pytest.mark.parametrize(
    "end, status",
    [(2, 2), (SystemExit(2), 2), (SystemExit("no"), 1), (KeyError("k"), 1), (SystemExit(130), 130)],
)
def test_a_command_that_fails_is_told_as_one_in_its_own_process(end, status, capsys):
    with pytest.raises(RunError, match=f"`mmdit fake --a 'b c'` ended with status {status}; see"):
        command(ends(end))(["fake", "--a", "b c"])
    said = capsys.readouterr().err
    assert ("Traceback" in said) == isinstance(end, KeyError), "a bug of ours keeps its trace"


@pytest.mark.parametrize("end", [None, 0, SystemExit(), SystemExit(0)])
def test_a_command_that_ends_well_says_nothing(end, capsys):
    command(ends(end))(["fake"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_and_the_chain(number):
    """Send one, too, that a training listens to, ends well after, and tells nobody of."""
    before = signal.getsignal(number)

    def signalled():
        os.kill(os.getpid(), number)
        time.sleep(10)

    def training():
        with trainer.StopRequest().listening() as stop:
            os.kill(os.getpid(), number)
            assert stop.asked
        return 0

    for main in (signalled, training):
        with pytest.raises(KeyboardInterrupt):
            command(main)(["fake"])
        assert signal.getsignal(number) is before
    command(ends(0))(["fake"])


class Held:
    """Something large that refers to itself."""

    def __init__(self):
        self.itself = self


def state() -> list:
    """Return what a command may find or leave."""
    return [
        os.getcwd(),
        dict(os.environ),
        list(sys.argv),
        random.random(),
        float(np.random.rand()),
        float(torch.rand(())),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        logging.getLogger().level,
        list(logging.getLogger().handlers),
        [tuple(rule) for rule in warnings.filters],
        [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGHUP)],
        common._able,
    ]


def test_every_command_finds_the_state_that_the_first_one_found(tmp_path):
    seen, left = [], []

    def spoil():
        seen.append(state())
        held = Held()
        left.append(weakref.ref(held))
        os.chdir(tmp_path)
        os.environ["MMDIT_SPOILT"] = "1"
        sys.argv.append("--more")
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch.backends.cudnn.deterministic = True
        logging.getLogger().setLevel(logging.DEBUG)
        logging.getLogger().addHandler(logging.NullHandler())
        warnings.simplefilter("error")
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: None)
        common.give_up()
        return 0

    run = command(spoil)
    before, gc_on = state(), gc.isenabled()
    run.fresh.restore()
    gc.disable()  # what refers to itself is freed by the runner alone
    try:
        for _ in range(3):
            run(["fake"])
            assert left[-1]() is None, "its memory is freed"
    finally:
        if gc_on:
            gc.enable()
    assert seen[0] == seen[1] == seen[2]
    assert state() == before == seen[0], "the caller finds its own, too"


def test_compiled_graphs_of_a_command_do_not_count_in_the_next():
    """Torch compiles a function anew for every network that calls it, up to a limit; beyond that
    it would silently run as it is."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def main():
        step = torch.compile(lambda x: x + 1, backend=backend)
        step(torch.ones(2))
        return 0

    run = command(main)
    for _ in range(3):
        run(["fake"])
    assert len(compiled) == 3
    spare = torch.compile(in_process_probe, backend=backend)
    spare(torch.ones(2))
    run(["fake"])
    spare(torch.ones(2))
    assert len(compiled) == 6, "it was forgotten, as in a process of its own"


def in_process_probe(x):
    return x * 2


def test_the_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "where each would take longer to start" in said and "without that" in said
