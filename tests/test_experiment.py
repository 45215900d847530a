"""Assembly: runs are never overwritten, resume tells what changed, weights travel between runs,
adapters end to end, previews."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmdit import config as config_io
from mmdit.adapters import is_adapter, lora_state
from mmdit.config import ConfigError
from mmdit.data.batches.latent_batches import contents
from mmdit.data.cache.latent_cache import open_cache
from mmdit.experiment import run
from mmdit.experiment.build import build_learner, start_from
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.experiment.idle_keys import idle_keys
from mmdit.experiment.load import load_pipeline
from mmdit.experiment.run import describe
from mmdit.interop.lora_formats import load_lora
from mmdit.scripts import export, pack_cache, train_t2v
from mmdit.tokenizers import build_tokenizer
from mmdit.tokenizers.dummy import DummyTokenizer
from mmdit.training import checkpoint
from mmdit.training.continuing import kept_no_longer, other_rate, same_draws
from mmdit.training.media import h264
from mmdit.training.memory.assigning import assign
from mmdit.training.metrics import MetricsLog
from mmdit.training.train_config import TrainConfig
from tests.helpers.thorough import thorough
from tests.helpers.tiny import FOUR_STEPS, Workshop, refused

PROMPTS = ["a large red star on a navy background", "blue"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("experiment"))
    shop.train("base")
    return shop


def tensors(run):
    return checkpoint.read_tensors(checkpoint.latest(run) / "model.safetensors")


def draw(pipeline, frames=1):
    return pipeline(PROMPTS, 48, 32, frames, replace(FOUR_STEPS, seed=3))


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_folder_tells_its_story(shop):
    run = shop.folder / "runs/base"
    assert load_experiment_config(run / "config.yaml").experiment_name == "base"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3] and [p.name[-1] for p in checkpoint.complete(run)] == [
        "2",
        "3",
    ], "the last step is saved, too"


def test_an_existing_run_is_not_written_over(shop, capsys):
    before = {path: path.stat().st_mtime_ns for path in (shop.folder / "runs/base").rglob("*")}
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("base"),
        "runs/base",
        "step 3",
        "--resume",
        "experiment_name",
    )
    assert before == {
        path: path.stat().st_mtime_ns for path in (shop.folder / "runs/base").rglob("*")
    }


def test_resume_needs_a_run(shop, capsys):
    refused(
        capsys,
        train_t2v.main,
        [*shop.train_words("nothing"), "--resume"],
        "runs/nothing",
        "start without --resume",
    )
    assert not (shop.folder / "runs/nothing").exists()


def test_resume_goes_on_exactly_and_tells_what_changed(shop, capsys):
    whole = shop.train("whole", "train.max_steps=5")
    parts = shop.train("parts")
    capsys.readouterr()
    shop.train("parts", "--resume", "train.max_steps=5", "train.keep_last=7")
    out = capsys.readouterr().out
    assert (
        "at step 3" in out
        and "config changed: train.max_steps: 3 → 5" in out
        and "train.keep_last: 3 → 7" in out
    )
    assert len(list(parts.glob("config.before-*.yaml"))) == 1, "the earlier config is kept"
    assert all(torch.equal(value, tensors(parts)[name]) for name, value in tensors(whole).items())
    capsys.readouterr()
    ran = (parts / "config.yaml").read_bytes()
    shop.train("parts", "--resume", "train.max_steps=4", "train.lr=0.5")
    assert "nothing left to do: train.max_steps is 4" in capsys.readouterr().out
    assert (parts / "config.yaml").read_bytes() == ran, "it says what was run"


@pytest.mark.parametrize(
    "names, sections",
    [
        (["model.x"], "model: and text_encoder: sections"),
        (["model.x.lora_A"], "lora: section"),
        (["model.x", "model.x.lora_A"], "model:, text_encoder: and lora: sections"),
        (["model.low.x.lora_A"], "lora: and experts: sections"),
    ],
)
def test_what_does_not_fit_is_told_by_the_sections_that_decide_it(names, sections):
    with pytest.raises(ValueError, match=f"Use the {sections} of the run"):
        assign({}, dict.fromkeys(names, torch.zeros(1)), "run")


@pytest.mark.parametrize(
    "first, then, odd",
    [
        (["train.optimizer=muon"], ["train.optimizer=adamw"], "momentum_buffer"),
        (["train.optimizer=adamw"], ["train.optimizer=muon"], "exp_avg"),
        (["train.precision=fp32"], ["train.precision=pure_bf16"], "rest"),
        (["train.precision=pure_bf16"], ["train.precision=fp32"], "rest"),
    ],
)
def test_moments_of_another_optimizer_or_precision_are_refused(shop, capsys, first, then, odd):
    name = "moments_" + "_".join(word.partition("=")[2] for word in first + then)
    shop.train(name, *first, "train.max_steps=1")
    before = (shop.folder / "runs" / name / "config.yaml").read_text()
    refused(
        capsys,
        train_t2v.main,
        shop.train_words(name, "--resume", *then, "train.max_steps=2"),
        "optimizer state",
        odd,
        "resume with the train.optimizer and train.precision that wrote it",
        "train.init_from",
    )
    assert (shop.folder / "runs" / name / "config.yaml").read_text() == before


def test_a_changed_alpha_is_applied_and_changes_no_output(shop, capsys):
    """It changes how fast the adapters move; moments follow."""
    words = [
        "lora.enabled=true",
        "lora.rank=4",
        "lora.alpha=4",
        f"train.init_from={shop.folder / 'runs/base'}",
    ]
    run = shop.train("alpha", *words, "train.max_steps=2")
    before = load_pipeline(run, "cpu", use_ema=False)[0].learner.state_dict()
    still = ["train.lr=1e-30", "train.weight_decay=0", "train.max_steps=3"]
    capsys.readouterr()
    shop.train("alpha", *words, "lora.alpha=64", *still, "--resume")
    out = capsys.readouterr().out
    assert (
        "config changed: lora.alpha: 4.0 → 64.0" in out
        and "alpha of" in out
        and "4 → 64: they compute what they did" in out
    )
    assert set(checkpoint.Meta.read(checkpoint.latest(run)).alphas.values()) == {64.0}
    for name, value in load_pipeline(run, "cpu", use_ema=False)[0].learner.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6, msg=name)
    old, new = (
        checkpoint.read_tensors(checkpoint.folder_of(run, step) / "optimizer.safetensors")
        for step in (2, 3)
    )
    ratio = [
        float(new[name].norm() / old[name].norm())
        for name in old
        if name.endswith("lora_B::exp_avg_sq")
    ]
    assert len(ratio) > 2 and min(ratio) > 100, (
        "second moments are in units of a factor that is 16 times smaller"
    )
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("alpha", *words, "lora.rslora=true", "--resume"),
        "lora.rslora",
        "another scale",
    )
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("alpha", *words, "lora.rank=8", "--resume"),
        "lora_A",
        "the lora: section",
    )


@pytest.mark.parametrize("first, then", [("false", "true"), ("true", "false")])
def test_adapters_of_another_run_keep_their_strength_whatever_rslora_says(shop, first, then):
    words = ["lora.enabled=true", "lora.rank=4", "train.max_steps=1"]
    run = shop.train(
        f"rslora_{first}",
        *words,
        f"lora.rslora={first}",
        f"train.init_from={shop.folder / 'runs/base'}",
    )
    still = [
        "train.lr=1e-30",
        "train.weight_decay=0",
        f"lora.rslora={then}",
        f"train.init_from={run}",
    ]
    after = load_pipeline(shop.train(f"rslora_{first}_{then}", *words, *still), "cpu")[
        0
    ].learner.state_dict()
    for name, value in load_pipeline(run, "cpu")[0].learner.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_resume_that_keeps_fewer_checkpoints_says_so_before_it_removes_any(shop, capsys):
    """A forgotten override would cost all milestones of a run."""
    each = ["train.save_every_steps=1", "train.keep_last=1"]
    run = shop.train("milestones", *each, "train.keep_every_steps=1")
    assert len(checkpoint.complete(run)) == 3
    capsys.readouterr()
    shop.train("milestones", *each, "--resume")
    assert "fewer checkpoints are kept than before" in capsys.readouterr().out
    assert len(checkpoint.complete(run)) == 3, "nothing is saved, and nothing removed"
    shop.train("milestones", *each, "--resume", "train.max_steps=4")
    assert [checkpoint.step_of(folder) for folder in checkpoint.complete(run)] == [4]


@pytest.mark.parametrize(
    "old, new, told",
    [
        ((3, 1000), (3, 0), True),
        ((3, 1000), (3, 500), False),
        ((3, 1000), (3, 1500), True),
        ((3, 1000), (0, 0), False),
        ((0, 0), (3, 0), True),
        ((3, 0), (2, 0), True),
        ((2, 0), (3, 7), False),
    ],
)
def test_what_is_kept_no_longer_is_known(old, new, told):
    configs = (
        {"train": {"keep_last": last, "keep_every_steps": every}} for last, every in (old, new)
    )
    assert bool(kept_no_longer(*configs)) == told


def test_what_a_resume_sees_otherwise_is_told(shop, capsys, monkeypatch):
    """Samples a step, the order of an older version, items that are held out only now, and a key
    that only a new run heeds."""
    shop.train("seen", "train.max_steps=1")
    capsys.readouterr()
    again = ["--resume", f"train.init_from={shop.folder / 'runs/base'}"]
    shop.train(
        "seen",
        *again,
        "train.max_steps=2",
        "train.batch_size=2",
        "train.lr=1e-3",
        "train.val_every_steps=1",
        "train.val_share=0.4",
    )
    out = capsys.readouterr().out
    assert (
        "sees 2 samples (batch_size 2 x grad_accum_steps 1 x 1 processes), before 4 samples"
        " (batch_size 4 x" in out
    )
    assert (
        "held-out items are others" in out
        and "(only a new run heeds it)" in out
        and "learning rate goes on at 0.001, where it would have been" in out
        and "older version" not in out
    )
    shop.train(
        "seen",
        "--resume",
        "train.max_steps=3",
        "train.batch_size=1",
        "train.grad_accum_steps=2",
        "train.val_every_steps=1",
        "train.val_share=0.3",
    )
    out = capsys.readouterr().out
    assert "samples (batch_size" not in out and "held-out" not in out.partition("run folder")[0], (
        "the same product, fewer held out"
    )
    monkeypatch.setattr("mmdit.training.continuing.ORDER", 3)
    shop.train(
        "seen",
        "--resume",
        "train.max_steps=4",
        "train.batch_size=2",
        "seed=5",
        "train.val_every_steps=1",
        "train.val_share=0.4",
    )
    out = capsys.readouterr().out
    assert "items come in another order" in out and "held-out items are others" in out


def test_a_finished_cosine_that_goes_on_rises_again_and_says_so():
    train = TrainConfig(lr=1e-3, lr_schedule="cosine", warmup_steps=0, max_steps=100)
    old = {"train": config_io.encode(train)}
    longer = {"train": config_io.encode(replace(train, max_steps=200))}
    (line,) = other_rate(old, longer, 100)
    assert "at 0.000492, where it would have been 0: " in line
    assert not other_rate(old, old, 50) and not other_rate({}, longer, 50)
    assert not other_rate(longer, old, 100), "nothing is left to do"


def test_a_resume_with_other_data_says_so_and_one_with_the_same_elsewhere_does_not(shop, capsys):
    cache, grown = shop.cache("pictures"), shop.folder / "grown"
    shop.train("data", "train.max_steps=1")
    shutil.copytree(cache, shop.folder / "moved")
    packed = shop.folder / "packed"
    pack_cache.main(["--cache_dir", str(cache), "--out_dir", str(packed)])
    for step, folder in enumerate(("moved", "packed"), 2):
        capsys.readouterr()
        again = ["--resume", f"train.max_steps={step}"]
        shop.train("data", *again, cache=shop.folder / folder)
        assert "other data" not in capsys.readouterr().out
    shop.cache("grown", count=12)
    shop.train("data", "--resume", "train.max_steps=4", cache=grown)
    out = capsys.readouterr().out
    assert f"other data: before 8 items in {shop.folder / 'packed'} (check sum " in out
    assert f"now 12 items in {grown} (check sum " in out and out.count("other data") == 1
    meta, texts = grown / "index.jsonl", []
    for line in meta.read_text(encoding="utf-8").splitlines():
        texts.append(json.loads(line) | {"caption": "written anew"})
    meta.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    shop.train("data", "--resume", "train.max_steps=5", cache=grown)
    assert f"before 12 items in {grown} (check sum " in capsys.readouterr().out


@pytest.mark.thorough
def test_one_of_several_sources_that_was_packed_goes_on_under_its_name(shop, capsys):
    """The name of a source decides in which order its items come."""
    first, second = shop.cache("pictures"), shop.cache("second", count=6)
    packed = shop.folder / "second_packed"
    pack_cache.main(["--cache_dir", str(second), "--out_dir", str(packed)])

    def train(name, other, *words):
        return shop.train(name, "--train_cache_dir", str(other), *words, cache=first)

    whole = train("two", second, "train.max_steps=4")
    parts = train("two_parts", second, "train.max_steps=2")
    for step in (3, 4):  # the second time the stored name is of the packed one
        words = ["--train_cache_dir", str(first), "--resume", f"train.max_steps={step}"]
        shop.train("two_parts", *words, cache=packed)  # in another order, too
    assert "other data" not in capsys.readouterr().out
    assert all(torch.equal(value, tensors(parts)[name]) for name, value in tensors(whole).items())
    assert "name: second\n" in (parts / "config.yaml").read_text()


def test_clips_after_pictures_in_one_run_find_their_frames_numbered(shop):
    clips = shop.cache("clips", "video.num_frames=3")
    run = shop.train("first_pictures", "train.max_steps=1", cache=clips)
    name = "model.frame.embed.weight"
    assert not tensors(run)[name].any()
    shop.train(
        "first_pictures",
        "--resume",
        "train.max_steps=2",
        "video.num_frames=3",
        "train.lr=1e-30",
        cache=clips,
    )
    state = checkpoint.read_tensors(checkpoint.latest(run) / "ema.safetensors")
    assert tensors(run)[name].std() > 0 and torch.allclose(state[name], tensors(run)[name])


def test_a_stop_signal_saves_and_resume_goes_on_exactly(shop, monkeypatch, capsys):
    whole = shop.train("unstopped", "train.max_steps=4")
    original = MetricsLog.write

    def write(log, values):
        original(log, values)
        if values["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", write)
    run = shop.train("stopped", "train.max_steps=4", "train.save_every_steps=100")
    assert "stopped on request at step 2; continue with --resume" in capsys.readouterr().out
    assert [p.name for p in checkpoint.complete(run)] == ["step_00000002"]
    monkeypatch.undo()
    shop.train("stopped", "--resume", "train.max_steps=4", "train.save_every_steps=100")
    assert all(torch.equal(value, tensors(run)[name]) for name, value in tensors(whole).items())


def test_a_resumed_run_does_not_need_the_run_it_started_from(shop, capsys):
    gone = shop.train("gone")
    run = shop.train("heir", f"train.init_from={gone}")
    assert "the same data with the same seed (42) as there" in capsys.readouterr().out
    shutil.rmtree(gone)
    shop.train("heir", "--resume", f"train.init_from={gone}", "train.max_steps=4")
    assert checkpoint.latest(run).name == "step_00000004"
    assert "the same data" not in capsys.readouterr().out


def test_a_new_run_repeats_the_draws_of_another_only_with_its_seed_and_data(shop):
    start = checkpoint.latest(shop.folder / "runs/base")
    data = [contents(open_cache(shop.cache("pictures")))]
    assert len(same_draws(start, 42, data)) == 1
    assert not same_draws(start, 43, data)
    assert not same_draws(start, 42, [data[0] | {"crc32": 1}]) and not same_draws(start, 42, [])
    assert not same_draws(start / "model.safetensors", 42, data), "an export says nothing of data"


# ── weights from elsewhere ────────────────────────────────────────────────────────────────────────
def test_weights_of_another_model_or_tokenizer_are_refused(shop, capsys):
    base = shop.folder / "runs/base"
    other = [*shop.train_words("other"), f"train.init_from={base}"]
    refused(
        capsys,
        train_t2v.main,
        [*other, "model.dim=24"],
        "does not fit this model",
        "file (16,",
        "model (24,",
        "model: and text_encoder:",
    )
    refused(
        capsys,
        train_t2v.main,
        [*shop.train_words("base"), "--resume", "model.depth=3"],
        "step_00000003",
        "missing in the file (model.blocks.2",
    )
    foreign = shop.cache("foreign", "tokenizer={type: dummy, latent_d: 6}")
    refused(
        capsys,
        train_t2v.main,
        [
            *shop.train_words("other", cache=foreign),
            f"train.init_from={base}",
            "tokenizer={type: dummy, latent_d: 6}",
        ],
        "was trained on latents of the tokenizer",
        "tokenizer: section",
    )
    refused(
        capsys,
        train_t2v.main,
        [*other, "tokenizer={type: dummy, latent_d: 8, latent_scale: 2}"],
        "scale: 1.0 → 2.0",
    )
    refused(
        capsys,
        train_t2v.main,
        [*shop.train_words("other"), "train.init_from=runs/absent"],
        "train.init_from: no checkpoint at runs/absent",
    )
    assert not (shop.folder / "runs/other").exists(), (
        "nothing is left of a run that could not start"
    )


def test_what_is_configured_otherwise_than_in_the_base_is_told(shop, capsys):
    shop.train(
        "shifted",
        f"train.init_from={shop.folder}/runs/base",
        "flow_matching.shift=3.0",
        "captions.trigger=zork",
        "train.max_steps=1",
    )
    out = capsys.readouterr().out
    assert "configured otherwise there: flow_matching.shift: 1.0 → 3.0" in out
    assert "configured otherwise there: captions.trigger: '' → 'zork'" in out
    assert out.count("configured otherwise") == 2


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────
def test_adapters_alone_need_a_base(shop, capsys):
    refused(
        capsys,
        train_t2v.main,
        [*shop.train_words("lora0"), "lora.enabled=true"],
        "train.init_from",
        "lora.train_lora_only",
        "random frozen weights",
    )


@pytest.mark.parametrize(
    "words, key",
    [
        (["lora.enabled=true"], "lora.train_lora_only"),
        (["model.freeze=true", "text_encoder.lr_scale=0.5"], "model.freeze"),
    ],
)
def test_muon_needs_matrices_that_are_trained(shop, capsys, words, key):
    words = [*shop.train_words("lora0"), *words, "train.init_from=nowhere", "train.optimizer=muon"]
    refused(capsys, train_t2v.main, words, "train.optimizer", "is muon", f"with {key} none")


@pytest.mark.thorough
def test_adapters_end_to_end(shop, capsys):
    base = shop.folder / "runs/base"
    run = shop.train(
        "lora",
        f"train.init_from={base}",
        "lora.enabled=true",
        "lora.rank=2",
        "lora.alpha=4",
        "train.lr=0.05",
    )
    started = checkpoint.load_weights(base).tensors
    after = tensors(run)
    assert all(torch.equal(after[name], value) for name, value in started.items()), (
        "the base is frozen, the text encoder with it"
    )
    file = checkpoint.latest(run) / "lora.safetensors"
    adapter = checkpoint.read_tensors(file)
    learned = {
        name for name, value in adapter.items() if name.endswith("lora_B") and value.abs().sum() > 0
    }
    assert learned == {
        name for name in adapter if name.endswith("lora_B") and "temporal" not in name
    }, "pictures have no time"

    merged, config = load_pipeline(run, "cpu")
    assert not lora_state(merged.learner.model), "merged: plain layers"
    learner = build_learner(config, merged.learner.spec)
    assign(learner.state_dict(), checkpoint.load_weights(run).tensors, "run")
    unmerged = type(merged)(learner.eval(), merged.tokenizer)
    plain, _ = load_pipeline(run, "cpu", lora=False)
    original, _ = load_pipeline(base, "cpu")
    torch.testing.assert_close(draw(merged), draw(unmerged), rtol=0, atol=1e-5)
    assert torch.equal(draw(plain), draw(original))
    assert (draw(merged) - draw(original)).abs().max() > 1e-3

    raw, _ = load_pipeline(run, "cpu", use_ema=False)
    load_lora(
        original.learner.model, file
    )  # the adapter's file on the base: the last weights, as training left them
    torch.testing.assert_close(draw(original), draw(raw), rtol=0, atol=1e-5)

    shop.train(
        "lora",
        "--resume",
        f"train.init_from={base}",
        "lora.enabled=true",
        "lora.rank=2",
        "lora.alpha=4",
        "train.lr=0.05",
        "train.max_steps=4",
    )
    export.main(
        [
            "--checkpoint",
            str(run),
            "--out",
            str(shop.folder / "lora_export.safetensors"),
            "--dtype",
            "fp32",
        ]
    )
    assert torch.equal(
        draw(load_pipeline(shop.folder / "lora_export.safetensors", "cpu")[0]),
        draw(load_pipeline(run, "cpu")[0]),
    )

    for words, part in (
        (["lora.rank=3"], "lora_A is (2, "),
        (["lora.enabled=false"], "not there here"),
        (["lora.rank=2", "lora.type=dora"], "lora_magnitude is not there"),
    ):
        refused(
            capsys,
            train_t2v.main,
            [*shop.train_words("other"), f"train.init_from={run}", "lora.enabled=true", *words],
            "train.init_from",
            part,
            "export --merge",
        )
    rank_stabilised = shop.train(
        "rs",
        f"train.init_from={run}",
        "lora.enabled=true",
        "lora.rank=2",
        "lora.alpha=4",
        "lora.rslora=true",
        "train.lr=1.0e-9",
        "train.max_steps=1",
        "ema.enabled=false",
    )
    torch.testing.assert_close(
        draw(load_pipeline(rank_stabilised, "cpu")[0]),
        draw(load_pipeline(run, "cpu")[0]),
        rtol=0,
        atol=1e-5,
    )

    whole = shop.folder / "merged.safetensors"  # adapters folded in: a base for others, of any rank
    export.main(["--checkpoint", str(run), "--out", str(whole), "--dtype", "fp32", "--merge"])
    assert not any(is_adapter(name) for name in load_file(whole))
    assert torch.equal(draw(load_pipeline(whole, "cpu")[0]), draw(load_pipeline(run, "cpu")[0]))
    shop.train(
        "again", f"train.init_from={whole}", "lora.enabled=true", "lora.rank=3", "train.max_steps=1"
    )
    shop.train("all", f"train.init_from={whole}", "train.max_steps=1")
    for source, words, told in (
        (whole, ["--merge"], "has none"),
        (run, ["--merge", "--lora", "comfy"], "choose one"),
    ):
        with pytest.raises(SystemExit):
            export.main(
                ["--checkpoint", str(source), "--out", str(shop.folder / "no.safetensors"), *words]
            )
        assert told in capsys.readouterr().err


# ── previews ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "words, path",
    [
        (["train.sample_eta=0.5"], "train.sample_eta"),
        (["train.sample_shift=0"], "train.sample_shift"),
        (["train.sample_cfg_interval=[0.9, 0.1]"], "train.sample_cfg_interval"),
        (
            [
                "train.sample_every_steps=1",
                "train.objective=ddpm",
                "diffusion.num_timesteps=10",
                "train.sample_num_steps=30",
            ],
            "train.sample_num_steps",
        ),
        (["train.lr_final=-3"], "train.lr_final"),
        (["train.init_from=''"], "train.init_from"),
        (["num_workers=-2"], "num_workers"),
        (["train.betas=[1.5, 0.9]"], "train.betas"),
        (["ema.start_step=-5"], "ema.start_step"),
    ],
)
def test_what_would_fail_late_or_was_never_meant_is_told_first(shop, capsys, words, path):
    refused(capsys, train_t2v.main, shop.train_words("late", *words), f"command line: {path}")
    assert not (shop.folder / "runs/late").exists()


def test_weights_that_are_no_numbers_are_named_before_the_first_step(shop, capsys, monkeypatch):
    """Of whatever part, from wherever it came: each step from them would be skipped."""
    made = build_learner  # the real one

    def build(*arguments, **options):
        learner = made(*arguments, **options)
        with torch.no_grad():
            learner.model.output.weight[0, 0] = float("nan")
        return learner

    monkeypatch.setattr("mmdit.experiment.run.build_learner", build)
    refused(
        capsys,
        train_t2v.main,
        shop.train_words("not_finite"),
        "model.output.weight",
        "nan or infinity",
    )


def test_previews_are_written_and_a_failing_one_stops_nothing(shop, monkeypatch, capsys):
    clips = shop.cache("clips", "video.num_frames=3")
    words = ["video.num_frames=3", "train.sample_every_steps=2", "train.sample_num_images=2"]
    good = shop.train("previews", *words, cache=clips)
    for step in (2, 3):
        folder = good / "samples" / f"step_{step:08d}"
        assert (folder / "grid.png").stat().st_size > 100 and any(folder.glob("video.*"))
    page = (good / "samples/index.html").read_text()
    assert (
        page.index("step_00000003") < page.index("step_00000002")
        and "step_00000003/grid.png" in page
    )
    assert ("<video" in page) == h264()
    monkeypatch.setattr("mmdit.training.media.h264", lambda: False)
    plain = shop.train("plain", *words, cache=clips) / "samples/index.html"
    assert '<img src="step_00000003/video.png">' in plain.read_text()

    def decode(self, latents):
        time.sleep(0.4)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(DummyTokenizer, "decode", decode)
    bad = shop.train("failing", *words, cache=clips)
    said = capsys.readouterr().out
    report = bad / "failures/preview_00000002_0.json"
    assert (
        "the preview of step 2 failed" in said
        and f"RuntimeError: no such kernel), see {report}" in said
        and "step 3/3" in said
    )
    assert "in decode" in json.loads(report.read_text())["trace"]
    assert all(torch.equal(value, tensors(bad)[name]) for name, value in tensors(good).items())
    speeds = [
        json.loads(line)["samples_per_second"]
        for line in (bad / "metrics.jsonl").read_text().splitlines()
    ]
    assert speeds[2] > 4 / 0.4, "the time that the preview of step 2 took is not the training's"


# ── latents ───────────────────────────────────────────────────────────────────────────────────────
def test_a_pipeline_draws_what_the_learner_says(shop):
    """The scale of the latents is undone before the tokenizer: a learner that knows the answer
    draws the picture."""
    config = load_experiment_config(
        shop.config, ["tokenizer={type: dummy, latent_d: 8, latent_scale: 3}"]
    )
    tokenizer = build_tokenizer(config.tokenizer)
    pipeline, _ = load_pipeline(shop.folder / "runs/base", "cpu")
    truth = tokenizer.encode(torch.rand(2, 1, 3, 32, 48))
    pipeline.tokenizer, pipeline.learner.spec = tokenizer, tokenizer.spec
    pipeline.learner.objective.denoiser = lambda model, text, **_: (
        lambda x, t: tokenizer.spec.normalize(truth).expand_as(x)
    )
    assert tokenizer.spec.scale == 3
    torch.testing.assert_close(
        pipeline.latents(PROMPTS, 48, 32, 1, replace(FOUR_STEPS, cfg_scale=1.0)),
        truth,
        rtol=0,
        atol=1e-5,
    )


def test_a_frozen_model_leaves_the_training_to_its_text_encoder(shop):
    base = shop.train("translated", "train.max_steps=2")
    run = shop.train(
        "encoder_alone",
        f"train.init_from={base}",
        "model.freeze=true",
        "train.max_steps=2",
        "ema.enabled=false",
    )
    before, after = (checkpoint.load_weights(folder).tensors for folder in (base, run))
    changed = {
        name.partition(".")[0] for name in after if not torch.equal(before[name], after[name])
    }
    assert changed == {"text_encoder"}
    with pytest.raises(ConfigError, match="model.freeze: is true with lora.enabled"):
        load_experiment_config(
            shop.config, ["model.freeze=true", "lora.enabled=true", f"train.init_from={base}"]
        )
    with pytest.raises(ConfigError, match="model.freeze: is true without train.init_from"):
        load_experiment_config(shop.config, ["model.freeze=true"])


def test_keys_that_an_older_version_did_not_know_are_no_change(shop):
    config = load_experiment_config(shop.config)
    older = config_io.encode(config)
    del older["experts"], older["lora"]["factor"]
    assert config_io.differences(config_io.completed(type(config), older), config) == []
    assert config_io.completed(type(config), {"gone": 1}) == {"gone": 1}


@pytest.mark.parametrize("count", [32, 33])
def test_more_sizes_than_are_compiled_are_told(tmp_path, capsys, count):
    """Under a pixel budget every source may have a size of its own; only so many graphs are
    made."""
    rows = [{"grid": [i, 1], "steps": "images"} for i in range(count)]
    plan = SimpleNamespace(report=lambda: "", table=lambda: rows)
    learner = SimpleNamespace(model=nn.Linear(1, 1), text_encoder=nn.Linear(1, 1))
    config = ExperimentConfig("x", output_dir=str(tmp_path))
    describe(config, learner, plan, torch.device("cpu"))
    assert ("33 sizes: where blocks are compiled" in capsys.readouterr().out) == (count == 33)


@pytest.mark.parametrize(
    "precision, times, said", [("bf16", 30, True), ("bf16", 1.2, False), ("fp32", 30, False)]
)
def test_a_cpu_that_multiplies_bfloat16_slowly_is_told(monkeypatch, precision, times, said):
    monkeypatch.setattr(run, "bfloat16_slowdown", lambda: times)
    config = ExperimentConfig("x", train=TrainConfig(precision=precision))
    lines = list(run.slow_products(config, torch.device("cpu")))
    assert [line.count("30 times as long") for line in lines] == [1] * said
    assert not list(run.slow_products(config, torch.device("meta")))


ADAPTED = ["lora.enabled=true", "train.init_from=base"]
CLIPS = ["video.num_frames=4", "model.temporal_position=false"]


@pytest.mark.parametrize(
    "words, keys, reason",
    [
        (["diffusion.prediction_type=eps"], "diffusion.prediction_type", "objective is flow"),
        (["train.objective=ddpm", "flow_matching.shift=3"], "flow_matching.shift", "is ddpm"),
        (["train.lr_final=0.1"], "train.lr_final", "lr_schedule is constant"),
        (["train.val_share=0.2"], "train.val_share", "val_every_steps is 0"),
        ([*CLIPS, "model.joint_position=true"], "model.joint_position", "have no number"),
        (["model.checkpoint_every=2"], "model.checkpoint_every", "checkpointing is false"),
        (["model.augmentation=0.2"], "model.augmentation", "conditioning is none"),
        (["lora.rank=4", "lora.alpha=2"], "lora.rank, lora.alpha", "lora.enabled is false"),
        (
            [*ADAPTED, "experts={enabled: true, train: low, switch_every: 2}"],
            "experts.switch_every",
            "experts.train is low",
        ),
        (
            [*ADAPTED, "alpha_schedule={enabled: true, phases: [{name: a, alpha: 2}]}"]
            + ["alpha_schedule.ramp_steps=5"],
            "alpha_schedule.ramp_steps",
            "on_change is preserve",
        ),
        (
            [*ADAPTED, "experts={enabled: true, train: low}"]
            + ["alpha_schedule={enabled: true, phases: [{name: a, alpha: 2, high: 3, low: 4}]}"],
            "alpha_schedule.phases[0].high",
            "experts.train is low",
        ),
        (
            [*ADAPTED, "posttrain={}", "lora.dropout=0.1"],
            "lora.dropout",
            "posttrain: what is scored again must be what was drawn",
        ),
    ],
)
def test_keys_without_a_part_in_a_training_are_told(shop, words, keys, reason):
    config = load_experiment_config(shop.config, words)
    (line,) = idle_keys(config)
    assert f": {keys} (" in line and reason in line
    assert not idle_keys(load_experiment_config(shop.config))


def test_guidance_away_from_a_prompt_that_is_never_trained_is_told(shop):
    def lines(*words: str) -> list[str]:
        given = ["train.cfg_dropout_prob=0", *words]
        return idle_keys(load_experiment_config(shop.config, given))

    (line,) = lines("train.sample_cfg_scale=2.5")
    assert "guidance (train.sample_cfg_scale 2.5) leads away from the empty prompt" in line
    assert not lines("train.sample_cfg_scale=1")
    assert not lines("train.sample_negative_prompt=blurred")
    assert not lines("train.init_from=runs/base")
    assert not lines("train.sample_cfg_scale=2.5", "train.cfg_dropout_prob=0.1")


TURNS = "experts={{enabled: true, boundary: 0.5, switch_every: {}}}"
PHASES = (
    "alpha_schedule={{enabled: true, phases: "
    "[{{name: a, alpha: 4, min_steps: {}}}, {{name: b, alpha: 8}}]}}"
)


@pytest.mark.parametrize(
    ("words", "number", "said"),
    [
        (["train.warmup_steps={}"], 6, "the learning rate comes to 0.0083 of 0.01"),
        (["ema.start_step={}"], 5, "ema.start_step 5: nothing is averaged"),
        ([*ADAPTED, TURNS], 5, "experts.switch_every 5: the expert low has no turn"),
        ([*ADAPTED, PHASES], 5, "alpha_schedule.phases come to none of b"),
    ],
)
def test_what_a_training_is_too_short_for_is_told(shop, words, number, said):
    *more, word = words

    def lines(value: int) -> list[str]:
        given = ["train.max_steps=5", *more, word.format(value)]
        return idle_keys(load_experiment_config(shop.config, given))

    (line,) = lines(number)
    assert line.startswith("too short: train.max_steps is 5") and said in line
    assert not lines(number - 1)


@torch.no_grad()
def test_the_line_about_idle_keys_is_true_and_printed(shop, tmp_path, capsys):
    words = [*CLIPS, "model.joint_position=true", f"output_dir={tmp_path}"]
    config = load_experiment_config(shop.config, words)
    learner = build_learner(config, build_tokenizer(config.tokenizer).spec)
    plan = SimpleNamespace(report=lambda: "", table=list)
    describe(config, learner, plan, torch.device("cpu"))
    assert "model.joint_position (model.temporal_position is false" in capsys.readouterr().out
    model, text = learner.model.eval(), learner.text_encoder(["a"])
    for weight in model.parameters():
        weight.add_(0.1)
    x, t = torch.randn(1, 4, 2, 3, 8), torch.tensor([500.0])
    before = model(x, t, text)
    model.joint_position.embed.weight.add_(1)
    assert torch.equal(model(x, t, text), before) and before.any()


@pytest.fixture(scope="module")
def trained(shop):
    return shop.train("trained", "train.max_steps=2", "ema.enabled=false")


@torch.no_grad()
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("adapter", ["lora", *thorough("dora", "lokr")])
def test_new_adapters_leave_the_model_that_a_run_starts_from_as_it_is(
    shop, trained, adapter, experts
):
    """DoRA has the lengths of that model's rows, not of the weights that it has replaced."""
    words = [f"lora={{enabled: true, rank: 2, type: {adapter}}}", f"train.init_from={trained}"]
    words += ["experts={enabled: true, boundary: 0.5}"] * experts
    config = load_experiment_config(shop.config, words)
    tokenizer = build_tokenizer(config.tokenizer)
    learner = build_learner(config, tokenizer.spec).eval()
    start_from(learner, config, tokenizer.spec, tokenizer.fingerprint)
    pipeline, _ = load_pipeline(trained, "cpu")
    x, t, text = torch.randn(1, 1, 2, 3, 8), torch.tensor([500.0]), learner.text_encoder(["a"])
    expected = pipeline.learner.model(x, t, text)
    for network in learner.model.networks().values():
        assert torch.equal(network(x, t, text), expected) and expected.any()
