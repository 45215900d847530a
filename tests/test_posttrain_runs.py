"""Run folders of post-training: one process at a time, one reference for good, one record a
step."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mmdit.config import ConfigError, decode
from mmdit.posttrain.dpo_offline import MADE_OF, SUMS, read_pairs, sum_of_text
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.posttrain.prompt_lists import Prompts, written_prompts
from mmdit.posttrain.rewards import Brightness
from mmdit.scripts import export, posttrain
from mmdit.text_encoders.byte_level import ByteLevelEncoder
from mmdit.tokenizers.dummy import DummyTokenizer
from mmdit.training import checkpoint, runs
from tests.helpers.posttrain_shop import SRPO_WORDS, PosttrainShop, command
from tests.helpers.tiny import refused


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return PosttrainShop(tmp_path_factory.mktemp("posttrain_runs"))


def test_the_reference_stays_though_its_run_trains_on(shop, capsys):
    assert (
        posttrain.main(command(shop, "whole", "train.max_steps=4", "train.save_every_steps=4")) == 0
    )
    assert posttrain.main(command(shop, "stopped")) == 0
    begun = checkpoint.latest(shop.folder / "runs/base")
    shop.train("base", "--resume", "train.max_steps=5", "train.keep_last=0")
    assert posttrain.main(command(shop, "stopped", "--resume", "train.max_steps=4")) == 0
    assert f"starting from {begun}" in capsys.readouterr().out
    a, b = (
        checkpoint.latest(shop.folder / "runs" / name) / "model.safetensors"
        for name in ("whole", "stopped")
    )
    assert a.read_bytes() == b.read_bytes()
    shutil.rmtree(begun)
    words = command(shop, "stopped", "--resume", "train.max_steps=5")
    refused(capsys, posttrain.main, words, "began from", "no longer the same", begun.name)


def test_a_start_anew_reports_the_first_step_once_and_two_at_once_are_refused(shop, capsys):
    run = shop.folder / "runs/anew"
    posttrain.main(command(shop, "anew"))
    shutil.rmtree(run / "checkpoints")  # as if it was killed before the first one
    with runs.hold(run):
        refused(capsys, posttrain.main, command(shop, "anew"), "another process is training in")
    posttrain.main(command(shop, "anew"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_a_model_that_redraws_small_clips_has_none_here(shop, capsys):
    words = ["model.conditioning=low_resolution", "tokenizer.low_resolution=[32, 16]"]
    refused(
        capsys, posttrain.main, command(shop, "never", *words), "model.conditioning", "draws them"
    )


@pytest.mark.parametrize(
    "word, expected",
    [
        ("train.save_in_background=true", "writes its checkpoints between two updates"),
        ("train.precision=pure_bf16", "keeps the weights that it trains in float32: use bf16"),
        ("train.sample_every_steps=5", "is 5, but post-training draws no previews"),
        ("train.val_every_steps=5", "train.val_every_steps: is 5, but"),
        ("video.tile=[48,16]", "draws clips of 48x32 whole"),
        ("parallel.reduce=bfloat16", "parallel.reduce: is bfloat16, but copies add"),
        (
            "parallel.context_parallel=2 video.num_frames=2",
            "each process draws and scores whole clips of its own",
        ),
    ],
)
def test_a_key_of_training_alone_is_refused_where_it_would_do_nothing(shop, capsys, word, expected):
    section = word.partition(".")[0]
    refused(capsys, posttrain.main, command(shop, "never", *word.split()), section, expected)


@pytest.mark.parametrize("key, value", [("frame_stride", "2"), ("shrink_video_to_frames", "true")])
def test_real_clips_that_move_otherwise_than_the_model_s_are_refused(shop, capsys, key, value):
    words = [*SRPO_WORDS, f"posttrain.srpo.latents={shop.folder}"]
    words += ["video.num_frames=4", f"video.{key}={value}"]
    expected = (f"video.{key}: is {value}", "more slowly than the model's")
    refused(capsys, posttrain.main, command(shop, "never", *words), *expected)


def test_an_evaluation_that_is_not_finite_names_its_sample(shop, capsys, monkeypatch):
    decode = DummyTokenizer.decode

    def overflows(self, latents):
        pixels = decode(self, latents)
        pixels[1] = float("nan")
        return pixels

    monkeypatch.setattr(DummyTokenizer, "decode", overflows)
    refused(capsys, posttrain.main, command(shop, "overflows"), "sample 1: not finite")


@pytest.mark.parametrize("algorithm", ["grpo", "srpo"])  # srpo: also captions of real pictures
def test_prompts_have_the_trigger_word_and_rewards_judge_without_it(shop, monkeypatch, algorithm):
    asked, judged = set(), set()
    encode, call = ByteLevelEncoder.forward, Brightness.call
    monkeypatch.setattr(
        ByteLevelEncoder, "forward", lambda self, texts: asked.update(texts) or encode(self, texts)
    )
    monkeypatch.setattr(
        Brightness, "call", lambda self, some: judged.update(some.captions) or call(self, some)
    )
    words = [f"posttrain.algorithm={algorithm}", "captions.trigger=zork"]
    if algorithm == "srpo":
        words += [*SRPO_WORDS, f"posttrain.srpo.latents={shop.cache('pictures')}"]
    assert (
        posttrain.main(
            command(
                shop, f"zork_{algorithm}", "posttrain.eval_rewards=[{type: brightness}]", *words
            )
        )
        == 0
    )
    assert all(text.startswith("zork, ") for text in asked - {""}) and len(asked) > 8
    assert judged and not any("zork" in text for text in judged)


def test_a_resume_with_other_real_samples_says_so_and_an_export_does_not_name_them(
    shop, tmp_path, capsys
):
    first, other = shop.cache("pictures"), shop.cache("others", count=6)
    for step, cache in ((2, first), (3, first), (4, other)):
        capsys.readouterr()
        more = ["--resume"] if step > 2 else []
        given = [*SRPO_WORDS, f"posttrain.srpo.latents={cache}", f"train.max_steps={step}", *more]
        assert posttrain.main(command(shop, "real", *given)) == 0
        out = capsys.readouterr().out
        assert ("other data: before 8 items in" in out) == (cache == other)
    assert f"now 6 items in {other}" in out
    run = shop.folder / "runs/real"
    assert "others" in (checkpoint.latest(run) / "checkpoint.json").read_text(encoding="utf-8")
    export.main(["--checkpoint", str(run), "--out", str(tmp_path / "x.safetensors")])
    assert str(shop.folder).encode() not in (tmp_path / "x.safetensors").read_bytes()


def test_pairs_of_another_form_are_refused_where_they_are_read(tmp_path):
    """Pairs that a model can learn from, and the same with one tensor of another kind."""
    path, shape = tmp_path / "pairs.safetensors", (1, 2, 3, 8)
    session = SimpleNamespace(shape=shape, prompts=Prompts(list("abcde")))
    good = {name: torch.randn(4, *shape).half() for name in ("win", "lose")}
    good["prompts"] = torch.arange(4, dtype=torch.int32)
    save_file(good, path)
    assert read_pairs(path, session).prompts.dtype == torch.int64
    for name, tensor, message in (
        ("prompts", torch.zeros(4), r"its prompts is float32 \(4,\)"),
        ("prompts", torch.zeros(4, dtype=torch.bool), "its prompts is bool"),
        ("prompts", torch.zeros(4, 1, dtype=torch.int64), r"its prompts is int64 \(4, 1\)"),
        ("win", torch.zeros(4, *shape, dtype=torch.int32), "its win is int32"),
        ("lose", torch.full((4, *shape), torch.nan), "its lose holds nan"),
        ("lose", torch.cat([torch.zeros(2, *shape), good["win"][2:]]).half(), "2 of its .* in 2:"),
    ):
        save_file(good | {name: tensor}, path)
        with pytest.raises(ConfigError, match=message):
            read_pairs(path, session)


def test_pairs_of_a_person_name_prompts_by_their_places_in_the_file(shop, tmp_path, capsys):
    """Those to train on are fewer: some are held out. What a run made is known by its texts."""
    path, place = tmp_path / "pairs.safetensors", torch.tensor([1, 3, 16, 9])
    win = place.float().reshape(4, 1, 1, 1, 1).expand(4, 1, 2, 3, 8).contiguous()
    given = {"win": win, "lose": -win, "prompts": place}
    save_file(given, path)
    file = tmp_path / "prompts.yaml"
    file.write_text("prompts:\n" + "".join(f"- number {i}\n" for i in range(20)))

    def read(held: int) -> list[tuple[float, str]]:
        prompts, _ = written_prompts(file, held)
        pairs = read_pairs(path, SimpleNamespace(shape=(1, 2, 3, 8), prompts=prompts))
        assert len(pairs) + pairs.held_out == 4
        captions = [prompts.captions[i] for i in pairs.prompts.tolist()]
        return list(zip(pairs.win[:, 0, 0, 0, 0].tolist(), captions, strict=True))

    assert read(0) == [(i, f"number {i}") for i in place.tolist()]
    assert read(2) == [(i, f"number {i}") for i in (1, 3, 9)]  # every eighth is held out
    words = ["posttrain.algorithm=dpo", f"posttrain.prompts={file}", *SRPO_WORDS[1:]]
    words += [f"posttrain.dpo={{pairs: {path}, batch: 3}}", "posttrain.prompts_per_epoch=16"]
    words += ["posttrain.rewards=[{type: brightness}]", "--dry-run"]
    posttrain.main(command(shop, "by_places", *words))
    told = capsys.readouterr().out
    assert f"pairs: 3 of {path}" in told and "1 more are of prompts that are held out" in told
    save_file(given, path, {MADE_OF: "1"})  # by a run of an earlier version: among the trained
    assert read(2) == list(zip(place.tolist(), [f"number {i}" for i in (2, 4, 19, 11)]))
    sums = torch.tensor([sum_of_text(f"number {i}") for i in place.tolist()])
    save_file(given | {"prompts": torch.zeros(4, dtype=torch.int64), SUMS: sums}, path)
    assert read(2) == [(i, f"number {i}") for i in (1, 3, 9)]
    save_file(given | {SUMS: sums + 1}, path)
    with pytest.raises(ConfigError, match="a prompt is not in the list"):
        read(0)


def test_a_key_that_the_algorithm_does_not_use_is_refused():
    """With its default it is taken, and so is a key that another setting gives an effect. Sampling
    asks nothing: an earlier version may have trained with such a key."""
    given, real = {"pairs": "p"}, {"latents": "cache"}
    bright = [{"type": "brightness"}]
    for algorithm, message, settings, *allowed in (
        (
            "srpo",
            "group_size: is 4, which has no effect in srpo, .*; must be 16",
            {"srpo": real, "group_size": 4},
        ),
        ("srpo", "rewards: is", {"rewards": bright}, {"prompts": "p.yaml"}),
        ("srpo", "storage.dtype: is", {"storage": {"dtype": "bf16"}}),
        ("dpo", "group_size: is 4", {"dpo": given, "group_size": 4}, {"dpo": {}}),
        ("dpo", "prompts_per_epoch: is 4", {"dpo": given, "prompts_per_epoch": 4}, {"dpo": {}}),
        ("dpo", "dpo.collect: is 4", {"dpo": {**given, "collect": 4}}, {"dpo": {"collect": 4}}),
        ("dpo", "dpo.pairs: is", {"dpo": {**given, "source": "online"}}, {"dpo": given}),
        ("dpo", "advantage.clip: is 2", {"advantage": {"clip": 2.0}}),
        ("nft", "rollout.noise_level: is 0.5", {"rollout": {"noise_level": 0.5}}),
        ("nft", "rollout.dynamics", {"rollout": {"dynamics": "cps"}}, {"algorithm": "grpo"}),
        ("nft", "ratio.clip: is", {"ratio": {"clip": [-1.0, 1.0]}}, {"algorithm": "awm"}),
        ("awm", "ratio.replay_tol", {"ratio": {"replay_tolerance": 0.1}}, {"algorithm": "guard"}),
        ("grpo", "nft.beta: is 2", {"nft": {"beta": 2.0}}, {"algorithm": "nft"}),
        ("grpo", "kl.space", {"kl": {"space": "x"}}, {"kl": {"space": "x", "beta": 1.0}}),
    ):
        settings = {"algorithm": algorithm, **settings}
        with pytest.raises(ConfigError, match=rf"^posttrain\.{message}"):
            decode(PosttrainConfig, settings).check_idle()
        for change in allowed:
            decode(PosttrainConfig, settings | change).check_idle()


def test_nothing_is_asked_of_groups_where_none_are_compared(shop, tmp_path, capsys):
    """Neither of pairs that are given, nor of real latents, of which an update may have more than
    there are prompts."""
    shape = (3, 1, 2, 3, 8)
    pairs = {"win": torch.zeros(shape), "lose": torch.ones(shape), "prompts": torch.arange(3)}
    save_file(pairs, tmp_path / "pairs.safetensors")
    given = [f"posttrain.dpo={{pairs: {tmp_path}/pairs.safetensors, batch: 3}}"]
    given += ["posttrain.algorithm=dpo", *SRPO_WORDS[1:], "posttrain.prompts_per_epoch=16"]
    real = [*SRPO_WORDS, f"posttrain.srpo.latents={shop.cache('pictures')}"]
    real += ["posttrain.prompts_per_epoch=8", "posttrain.prompt_count=4"]
    for name, words in (("ungrouped", given), ("all_real", real)):
        words = command(shop, name, *words, "posttrain.micro_batch=3", "posttrain.eval_prompts=0")
        assert posttrain.main(words) == 0
        told = capsys.readouterr().out
        assert "update 2/2" in told and "groups" not in told
    given += ["posttrain.eval_prompts=0", "posttrain.eval_every_epochs=3", "--dry-run"]
    posttrain.main(command(shop, "told", *given))
    assert "part in this training: posttrain.eval_every" in capsys.readouterr().out


def test_a_resume_keeps_the_config_before_and_the_scale_of_adapters(shop, capsys):
    words = ["lora.enabled=true", "lora.rank=2"]
    posttrain.main(command(shop, "scaled", *words, "train.max_steps=1"))
    run = shop.folder / "runs/scaled"
    before = (run / "config.yaml").read_bytes()
    again = command(shop, "scaled", *words, "--resume", "train.max_steps=1", "train.keep_last=2")
    refused(
        capsys, posttrain.main, [*again, "lora.rslora=true"], "lora.rslora is True", "with False"
    )
    words = [*again, "posttrain.algorithm=nft"]
    refused(capsys, posttrain.main, words, "no slow copy", "resume with the algorithm that wrote")
    assert (run / "config.yaml").read_bytes() == before
    posttrain.main(again)
    assert (run / "config.yaml").read_bytes() == before, "there was nothing left to do"
    posttrain.main([*again, "train.max_steps=2"])
    (kept,) = run.glob("config.before-*.yaml")
    assert kept.read_bytes() == before != (run / "config.yaml").read_bytes()


def test_the_slow_copy_keeps_its_strength_under_another_alpha(shop, capsys):
    """NFT moves it after the first update, and then no more."""
    words = ["posttrain.algorithm=nft", "posttrain.nft={flat: 1, rate: 1, most: 1}"]
    words += ["lora.enabled=true", "lora.rank=2", "train.save_every_steps=1", "train.keep_last=0"]
    posttrain.main(command(shop, "slow", *words, "lora.alpha=4", "train.max_steps=1"))
    posttrain.main(command(shop, "slow", *words, "lora.alpha=16", "--resume"))
    assert "4 → 16: they compute what they did" in capsys.readouterr().out
    before, after = (
        checkpoint.read_tensors(folder / "old.safetensors")
        for folder in checkpoint.complete(shop.folder / "runs/slow")[-2:]
    )
    factors = [name for name in before if name.endswith("lora_B")]
    assert any(before[name].any() for name in factors)
    assert all(torch.equal(after[name], before[name] / 4) for name in factors)
