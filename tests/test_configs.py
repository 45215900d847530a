"""Every shipped config decodes, is described by its head comment, trains and draws; stages hand
their weights on."""

import functools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdit.data.moving_shapes.prepare import Recipe, prepare_samples
from mmdit.experiment.build import build_learner, start_from
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.experiment.load import load_pipeline
from mmdit.rng import Draws
from mmdit.scripts import cache_moving_shapes, cache_vtp_images, train_t2v
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from tests.helpers.thorough import thorough_unless
from tests.helpers.tiny import FOUR_STEPS, TINY_MODEL

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STAGES = ["t2v_vtp_256_16f", "t2v_vtp_256_32f", "t2v_vtp_256_80f"]
as_shipped = functools.cache(load_experiment_config)
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def head(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(
        line
        for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    )


def test_the_promised_configs_are_there():
    promised = {
        "t2i_vtp_256_smoke",
        "t2v_vtp_256_smoke",
        "t2i_vtp_256_flow_matching",
        "t2i_vtp_256_flow_matching_anime_buckets",
        "quickstart",
        *STAGES,
    }
    assert promised <= {path.stem for path in CONFIGS}
    spans = {
        (c.video.width, c.video.height, c.video.span)
        for c in (load_experiment_config(ROOT / f"configs/{n}.yaml") for n in STAGES)
    }
    assert spans == {(448, 256, 76), (448, 256, 63), (448, 256, 80)}


@every_config
def test_the_head_comment_says_how_the_run_is_made(path):
    """tests/test_documents.py tests whether its commands parse."""
    config, text = as_shipped(path), head(path)
    assert f"mmdit train --config configs/{path.name} --train_cache_dir" in text
    assert "ardware:" in text
    assert all((ROOT / name).is_file() for name in re.findall(r"--config (\S+\.yaml)", text))
    names = {as_shipped(other).experiment_name for other in CONFIGS}
    assert set(re.findall(r"runs/(\w+)", text)) <= names
    if config.train.init_from:
        assert (
            Path(config.train.init_from).name in names or (ROOT / config.train.init_from).is_file()
        )
    made = set(re.findall(r"--out_dir (\S+)", text))
    if not config.train.init_from:
        used = set(re.findall(r"mmdit train .*--train_cache_dir (data\S+)", text))
        assert used <= made, "the head makes the cache that it trains from"


@every_config
def test_a_config_has_the_model_and_tokenizer_of_the_run_that_it_starts_from(path):
    config = as_shipped(path)
    if config.train.init_from:
        runs = {str(base.run_dir): base for base in map(as_shipped, CONFIGS)}
        base = (
            runs.get(config.train.init_from)
            or load_pipeline(ROOT / config.train.init_from, "cpu")[1]
        )
        ours = {
            name: getattr(config.model, name)
            for name in ("checkpointing", "conditioning", "augmentation", "frame_step")
        }
        assert replace(base.model, **ours) == config.model
        assert base.text_encoder == config.text_encoder
        assert (base.tokenizer.type, base.tokenizer.name_or_path) == (
            config.tokenizer.type,
            config.tokenizer.name_or_path,
        )


def shrunk(path: Path, folder: Path) -> list[str]:
    """Overrides that keep what a config is about (frames, strides, buckets, objective, sampler) and
    make it tiny."""
    config = as_shipped(path)
    words = [
        *TINY_MODEL,
        f"output_dir={folder}/runs",
        "num_workers=0",
        "train.batch_size=2",
        "train.max_steps=2",
        "train.init_from=null",
        "train.log_every_steps=1",
        "train.save_every_steps=2",
        "train.sample_num_steps=2",
        "train.sample_num_images=2",
    ]
    words += [] if config.bucketing.enabled else ["video.width=48", "video.height=32"]
    words += ["tokenizer.low_resolution=[32,16]"] if config.tokenizer.low_resolution else []
    words += ["video.tile=[32,32]"] if config.video.tile else []
    return words + (["train.sample_every_steps=2"] if config.train.sample_prompts else [])


def bucket_cache(path: Path, folder: Path, words: list[str]) -> Path:
    """The data that the head comment makes, with its own lines for joining the parts; 2 pictures of
    each size."""
    block = re.search(r"#   (for [^\n]*\n#     sed.*?done > \S+)", head(path), re.DOTALL)[
        1
    ].replace("\n# ", "\n")
    for size in re.search(r"for size in ([\dx ]+);", block)[1].split():
        prepare_samples(
            folder / "data/shapes_buckets" / size, Recipe(*map(int, size.split("x"))), 2
        )
    subprocess.run(["bash", "-ec", block], cwd=folder, check=True)
    cache_vtp_images.main(
        [
            "--config",
            str(path),
            "--meta_jsonl",
            str(folder / "data/shapes_buckets/train_images.jsonl"),
            "--device",
            "cpu",
            "--out_dir",
            str(folder / "cache"),
            "--num_workers",
            "0",
            *words,
        ]
    )
    return folder / "cache"


TRAINED = {
    "quickstart",
    "t2i_emoji_256",
    "t2i_vtp_256_flow_matching_anime_buckets",
    "t2v_vtp_64_16f",
    "t2v_vtp_720_refine",
    "t2v_vtp_720_super_resolution",
}


@pytest.mark.parametrize(
    "path",
    thorough_unless(lambda path: path.stem in TRAINED, CONFIGS),
    ids=lambda path: path.stem,
)
def test_a_config_trains_and_draws(path, tmp_path, capsys):
    words, cache = shrunk(path, tmp_path), tmp_path / "cache"
    config = load_experiment_config(path, words)
    if "prepare-moving-shapes" in head(path) and config.bucketing.enabled:
        if not shutil.which("bash"):
            pytest.skip("the head comment's commands need bash")
        bucket_cache(path, tmp_path, words)
        sizes = {
            folder.name
            for folder in cache.iterdir()
            if folder.is_dir() and any(folder.glob("*.pt"))
        }
        assert (
            sizes == {"256x256", "288x224", "224x288", "320x208", "208x320"}
            and len(list(cache.rglob("*.pt"))) == 18
        ), "10 pictures, 2 crops of those that do not fit their bucket"
    else:
        cache_moving_shapes.main(
            [
                "--config",
                str(path),
                "--out_dir",
                str(cache),
                "--count",
                "4",
                "--device",
                "cpu",
                *words,
            ]
        )
    assert (
        train_t2v.main(
            ["--config", str(path), "--train_cache_dir", str(cache), "--device", "cpu", *words]
        )
        == 0
    )
    assert "step 2/2" in capsys.readouterr().out
    samples = config.run_dir / "samples"
    assert not (config.run_dir / "failures").exists()
    if config.train.sample_every_steps:
        assert (samples / "step_00000002" / "grid.png").is_file()
    pipeline, stored = load_pipeline(config.run_dir, "cpu")
    assert stored == config
    if config.model.conditioning == "none":
        pixels = pipeline(["a red star"], 48, 32, config.video.num_frames, FOUR_STEPS)
    else:
        small = torch.rand(1, config.video.num_frames, 3, 16, 32)
        pixels = pipeline.refine(small, ["a red star"], 48, 32, 0.1, FOUR_STEPS)
    assert (
        pixels.shape == (1, config.video.num_frames, 3, 32, 48)
        and pixels.isfinite().all()
        and 0 <= pixels.min() <= pixels.max() <= 1
    )


def test_the_three_stages_hand_their_weights_on(tmp_path, capsys):
    """A1 → A2 → A3 from one cache of 80 frames; with next to no learning rate A3 still holds what
    A1 learned."""
    previous, first = None, None
    for name in STAGES:
        path = ROOT / f"configs/{name}.yaml"
        words = [
            *shrunk(path, tmp_path),
            "train.max_steps=1",
            "train.sample_every_steps=0",
            f"train.lr={1e-9 if previous else 1e-2}",
            f"train.init_from={previous or 'null'}",
            "train.warmup_steps=0",
        ]
        if previous is None:
            cache_moving_shapes.main(
                [
                    "--config",
                    str(path),
                    "--frames",
                    "80",
                    "--count",
                    "3",
                    "--out_dir",
                    str(tmp_path / "cache"),
                    "--device",
                    "cpu",
                    *words,
                ]
            )
        train_t2v.main(
            [
                "--config",
                str(path),
                "--train_cache_dir",
                str(tmp_path / "cache"),
                "--device",
                "cpu",
                *words,
            ]
        )
        if previous:
            assert f"starting from {previous}/checkpoints/step_00000001" in capsys.readouterr().out
        previous = tmp_path / "runs" / name
        first = first or checkpoint.load_weights(previous).tensors
    for key, value in checkpoint.load_weights(previous).tensors.items():
        torch.testing.assert_close(value, first[key], rtol=1e-5, atol=1e-7)


def test_a_picture_model_opened_as_a_clip_model_draws_the_same_frames(tmp_path):
    """Through init_from, at step 0; only rounding may differ, as the frames are computed
    together."""
    path = ROOT / "configs/moving_shapes_64_t2i.yaml"
    words = [
        *shrunk(path, tmp_path),
        "train.lr=0.02",
        "train.max_steps=4",
        "train.warmup_steps=0",
        "train.weight_decay=0.1",
    ]
    cache_moving_shapes.main(
        [
            "--config",
            str(path),
            "--out_dir",
            str(tmp_path / "cache"),
            "--count",
            "4",
            "--device",
            "cpu",
            *words,
        ]
    )
    train_t2v.main(
        [
            "--config",
            str(path),
            "--train_cache_dir",
            str(tmp_path / "cache"),
            "--device",
            "cpu",
            *words,
        ]
    )
    pictures, config = load_pipeline(tmp_path / "runs" / config_name(path), "cpu")
    video = load_experiment_config(
        ROOT / "configs/moving_shapes_64.yaml",
        [
            *shrunk(ROOT / "configs/moving_shapes_64.yaml", tmp_path),
            f"train.init_from={config.run_dir}",
        ],
    )
    tokenizer = build_tokenizer(video.tokenizer)
    clips = build_learner(video, tokenizer.spec)
    start_from(clips, video, tokenizer.spec, tokenizer.fingerprint)
    x = Draws.of(0, 0, 2).normal("x", 5, 2, 3, 8)
    with torch.no_grad():
        text, t = clips.text_encoder(["a red star", "two"]), torch.tensor([300.0, 900.0])
        together = clips.eval().model(x, t, text)
        alone = torch.cat(
            [pictures.learner.model(x[:, i : i + 1], t, text) for i in range(5)], dim=1
        )
    assert alone.abs().mean() > 0.01, "an untrained model would give zero either way"
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


def test_frames_are_numbered_when_training_on_clips_begins_and_not_before(tmp_path):
    previous = None
    for name, numbered in (("moving_shapes_64_t2i", False), ("moving_shapes_64", True)):
        path, cache = ROOT / f"configs/{name}.yaml", str(tmp_path / f"cache_{name}")
        words = [
            *shrunk(path, tmp_path),
            "train.lr=1e-9",
            "train.max_steps=1",
            f"train.init_from={previous or 'null'}",
        ]
        cache_moving_shapes.main(
            ["--config", str(path), "--out_dir", cache, "--count", "4", "--device", "cpu", *words]
        )
        train_t2v.main(
            ["--config", str(path), "--train_cache_dir", cache, "--device", "cpu", *words]
        )
        previous = tmp_path / "runs" / name
        weight = checkpoint.load_weights(previous).tensors["model.frame.embed.weight"]
        assert (weight.std() > 0.1) == weight.any().item() == numbered


def config_name(path: Path) -> str:
    return load_experiment_config(path).experiment_name
