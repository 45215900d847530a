"""An option that would do nothing is refused by one message that names it and says what to do."""

import json

import pytest

from mmdit.config import ConfigError, apply_overrides, decode, parse_yaml
from mmdit.data.cache.caching import Caching
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.scripts import (
    cache_text,
    compare_samples,
    evaluate,
    export,
    inspect_adapter,
    inspect_cache,
    inspect_data,
    inspect_weights,
    pack_cache,
    plan_memory,
    prepare_captions,
    reproduce,
    sample,
    train_t2v,
)
from mmdit.scripts.listing import commands
from mmdit.scripts.parsers import parser_of
from mmdit.tokenizers import DummyTokenizerConfig, build_tokenizer
from mmdit.training.pipeline import SampleSettings
from mmdit.vtp_training.pretrain_config import PretrainConfig
from tests.helpers.tiny import Workshop, refused

PROMPT = "a large red star on a navy background"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("idle"))


@pytest.fixture(scope="module")
def run(shop):
    return shop.train("base", "train.max_steps=1")


@pytest.mark.parametrize(
    ("main", "words", "expected"),
    [
        (sample.main, "--read x.png --seed 3", "--seed is 3, but --read says how"),
        (reproduce.main, "--seeds 0 1", "--seeds is 0 1, but no recipe is run: give its NAME"),
        (reproduce.main, "smoke --list --record", "--record is given, but no recipe is run"),
        (inspect_adapter.main, "--base x --frames 16", "--frames is 16, but nothing is drawn"),
        (inspect_adapter.main, "--base x --max_logit 9", "--max_logit is 9.0, but nothing"),
        (inspect_cache.main, "--config x --cache_dir x --limit 2", "--limit is 2, but no data"),
        (
            pack_cache.main,
            "--cache_dir x --out_dir y text_encoder.cache_dir=z",
            "text_encoder.cache_dir=z is given, but no embeddings are packed",
        ),
        (pack_cache.main, "--cache_dir x --out_dir y --device cpu", "--device is cpu"),
        (train_t2v.main, "--config x --cache_only --resume", "--resume is given, but --cache_only"),
        (
            compare_samples.main,
            "--samples x --clip_score y --stride 4",
            "--stride is 4, but nothing is compared with real items",
        ),
        (sample.main, "--checkpoint x --prompts a --out {out} seed=3", "seed=3 has no part"),
        (evaluate.main, "--checkpoint x ema.enabled=false", "--raw_weights draws with the last"),
        (evaluate.main, "--checkpoint x lora.alpha=2", "--lora FILE --lora_strength"),
        (evaluate.main, "--checkpoint x lora.rslora=true", "as they were trained"),
        (export.main, "--checkpoint x --out y --lora peft train.lr=1", "train.lr=1: an export"),
        (export.main, "--checkpoint x --out y --layout official seed=1", "seed=1: an export"),
    ],
)
def test_what_would_do_nothing_is_refused_before_anything_is_read(
    main, words, expected, tmp_path, capsys
):
    refused(capsys, main, [word.format(out=tmp_path) for word in words.split()], expected)


def test_a_default_that_is_given_is_no_mistake(tmp_path):
    for module in commands().values():
        if module in ("benchmark", "prepare_edges2shoes_t2i"):
            continue  # of a clone
        main = __import__(f"mmdit.scripts.{module}", fromlist=["main"]).main
        parser = parser_of(main)
        names = [action.dest for action in parser._actions if action.dest != "help"]
        values = {name: parser.get_default(name) for name in names}
        overrides = {"overrides": []} if "overrides" in values else {}
        parser.refuse_idle(type("Given", (), values | overrides), names, "nothing")


def test_options_of_the_other_kind_of_captioner_are_refused(tmp_path, capsys):
    pictures, clips = tmp_path / "pictures.jsonl", tmp_path / "clips.jsonl"
    pictures.write_text(json.dumps({"id": "a", "image_path": "a.png", "caption": ""}) + "\n")
    clips.write_text(json.dumps({"id": "a", "video_path": "a.mp4", "caption": ""}) + "\n")
    for file, words, expected in (
        (pictures, "--server http://localhost:1/v1 --device cpu", "--device is cpu, but the model"),
        (pictures, "--server http://localhost:1/v1 --dtype float32", "--dtype is float32"),
        (pictures, "--parallel 2", "--parallel is 2, but no --server is given"),
        (pictures, "--timeout 3", "--timeout is 3.0, but no --server"),
        (pictures, "--seed 3", "--seed is 3, but --temperature is 0"),
        (pictures, "--frames 3", "--frames is 3, but"),
        (clips, "--seed 3", "--seed is 3, but --temperature is 0"),
    ):
        place = ["--meta_jsonl", file, "--out_dir", tmp_path / "out", "--model", tmp_path / "no"]
        refused(capsys, prepare_captions.main, [*place, *words.split()], expected)
    place = ["--config", Workshop(tmp_path).config, "--meta_jsonl", pictures]
    refused(capsys, inspect_data.main, [*place, "--prefer", "video_path"], "--prefer is video_path")


def test_a_plan_is_of_the_model_of_the_config(shop, capsys):
    words = ["--config", shop.config]
    refused(capsys, plan_memory.main, [*words, "--variant", "5B"], "--variant is 5B", "video_mmdit")
    refused(capsys, plan_memory.main, [*words, "--gpu_gb", "0"], "--gpu_gb is 0, must be above 0")


def test_captions_are_those_of_all_sources(shop, capsys):
    sources = "data.sources=[{path: a}, {path: b}]"
    words = ["--config", shop.config, "--cache_dir", "c", sources]
    refused(capsys, cache_text.main, words, "data.sources", "names 2 sources")


def test_an_expert_of_a_checkpoint_is_refused(run, capsys):
    refused(capsys, inspect_weights.main, [run, "--expert", "low"], "--expert is low, but")


def test_guidance_that_is_off_has_no_options(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "guidance": 1, "negative": "dark"}))
    place = ["--checkpoint", run, "--device", "cpu"]
    drawn = [*place, "--out", tmp_path / "out"]
    off = [*drawn, "--prompts", PROMPT, "--guidance", "1"]
    for words in (["--negative", "dark"], ["--interval", "0", "0.5"]):
        refused(capsys, sample.main, [*off, *words], f"{words[0]} is ", "guidance is 1")
        refused(capsys, evaluate.main, [*place, "--guidance", "1", *words], f"{words[0]} is ")
    message = "prompt 0 has a negative prompt, 'dark', but its guidance is 1"
    refused(capsys, sample.main, [*drawn, "--prompts_file", prompts], message)
    low = ["--guidance_low", "2"]
    for main, words in ((sample.main, [*drawn, "--prompts", PROMPT]), (evaluate.main, place)):
        refused(capsys, main, [*words, *low], "2.0 (--guidance_low", "no pair of experts")
    one = [*off, "--negative", "dark", "--prompts_file", prompts]
    prompts.write_text(json.dumps({"prompt": PROMPT, "guidance": 2}))
    assert sample.main([str(word) for word in one]) == 0, "one of them is guided"
    assert SampleSettings(cfg_scale=1, cfg_scale_low=2).guides


def test_the_precision_that_the_command_names_is_heeded_on_a_cpu(run):
    for words, expected in (([], "fp32"), (["train.precision=bf16"], "bf16")):
        pipeline, _ = load_pipeline(run, "cpu", overrides=words)
        assert pipeline.precision == expected
    settings = SampleSettings(cfg_scale=1.0)
    half, full = (
        load_pipeline(run, "cpu", overrides=words)[0].latents([PROMPT], 48, 32, 1, settings)
        for words in (["train.precision=bf16"], [])
    )
    assert not half.equal(full) and half.sub(full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "train.sample_cfg_scale_low=2",
            "train.sample_cfg_scale_low: is 2.0, but experts.enabled is false and",
        ),
        ("captions.trim_prob=0.5", "captions.trim_prob: is 0.5 but trim_keywords is empty"),
        (
            "alpha_schedule={enabled: true, phases: [{name: a, alpha: 8, high: 4}]}",
            "alpha_schedule.phases[0].high: is 4, but experts.enabled is false",
        ),
        ("lora.factor=4", "lora.factor: is 4 with type lora: it is of lokr"),
        ("lora={type: dora, full_second: true}", "lora.full_second: is True with type dora"),
    ],
)
def test_a_key_of_what_the_config_has_not_is_refused(shop, word, expected):
    raw, _ = parse_yaml(shop.config.read_text(), "tiny.yaml")
    raw = apply_overrides(raw, ["lora.enabled=true", "train.init_from=x"])
    decode(ExperimentConfig, raw)
    with pytest.raises(ConfigError) as error:
        decode(ExperimentConfig, apply_overrides(raw, [word]))
    assert str(error.value).startswith(expected)


def test_a_norm_that_awm_does_not_take_is_refused():
    with pytest.raises(ConfigError, match="ratio.norm: is sum, which has no effect in awm"):
        decode(PosttrainConfig, {"algorithm": "awm", "ratio": {"norm": "sum"}}).check_idle()


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"ema": {"use_for_sampling": False}}, "ema.use_for_sampling"),
        ({"contrast": {"keep_text_tower": True}}, "contrast.keep_text_tower"),
        ({"contrast": {"pairs": 8}}, "contrast.pairs"),
        ({"adversarial": {"start": 0.5}}, "adversarial.start"),
        ({"adversarial": {"weight": 0.0, "lr": 1e-3}}, "adversarial.lr"),
        ({"self_supervision": {"mask_ratio": [0.2, 0.3]}}, "self_supervision.mask_ratio"),
        ({"reconstruction": {"gradient": 0, "levels": 2}}, "reconstruction.levels"),
        ({"images": {"objects": 3, "mix": {"piles": 0}}}, "images.objects"),
        ({"images": {"shape_pool": 9, "mix": {"shapes": 0}}}, "images.shape_pool"),
    ],
)
def test_a_key_of_a_loss_or_a_picture_that_a_tokenizer_does_not_train_with_is_refused(raw, key):
    with pytest.raises(ConfigError) as error:
        decode(PretrainConfig, raw)
    assert error.value.path == key


def test_a_decoder_of_pictures_is_not_asked_for_clips(tmp_path):
    preprocess = PreprocessConfig(jpeg_decoder="torchvision")
    tokenizer = build_tokenizer(DummyTokenizerConfig(latent_d=8))
    clips = Caching([], "video", tokenizer, tmp_path / "c", VideoConfig(), preprocess=preprocess)
    with pytest.raises(ConfigError, match="jpeg_decoder: is torchvision, .* these are clips"):
        clips.run()
    assert not (tmp_path / "c").exists()
