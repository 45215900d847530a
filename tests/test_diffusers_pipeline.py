"""`export --layout diffusers_pipeline`: the real Diffusers opens what it writes, and draws what
`mmdit sample` draws."""

import builtins
import contextlib
import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdit.config import decode, encode
from mmdit.experiment.build import build_learner
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.scripts import export, sample
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint
from mmdit.training.media import read_back
from mmdit.training.pipeline import SampleSettings
from tests.helpers.thorough import thorough

# Diffusers, and our module that needs it, are imported by the tests alone: that takes 3 s, and each
# process of xdist collects this file.
if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

CONFIG = {
    "experiment_name": "run",
    "video": {"width": 64, "height": 32, "num_frames": 3},
    "text_encoder": {"type": "byte_level", "dim": 16, "depth": 1, "num_heads": 2},
    "model": {"dim": 16, "depth": 2, "num_heads": 2, "window_size": 2},
    "captions": {"trigger": "zwx"},
    "ema": {"decay": 0.9},
    "train": {
        "objective": "flow_matching",
        "precision": "fp32",
        "sample_num_steps": 3,
        "sample_cfg_scale": 2.5,
        "sample_negative_prompt": "grey",
    },
}
PROMPTS = ["a red circle on black", "a blue star"]


def write_run(folder, **sections):
    """Write a checkpoint of random weights, and of others as their average; return its folder."""
    config = decode(ExperimentConfig, CONFIG | sections)
    tokenizer = build_tokenizer(config.tokenizer).plain
    learner = build_learner(config, tokenizer.spec)
    files = {}
    for seed, name in enumerate(checkpoint.WEIGHTS):
        generator = torch.Generator().manual_seed(seed)
        files[name] = {
            key: 0.3 * torch.randn(value.shape, generator=generator)
            for key, value in learner.stored_state().items()
        }
    meta = checkpoint.Meta(7, encode(config), tokenizer.spec, tokenizer.fingerprint)
    checkpoint.save(folder, meta, files, 0)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory):
    """Diffusers copies the code that it runs: not among that of the user."""
    from diffusers.utils import dynamic_modules_utils

    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", place)
        yield


def write(run, folder, *options):
    words = ["--checkpoint", run, "--out", folder, "--layout", "diffusers_pipeline", *options]
    assert export.main([str(word) for word in words]) == 0
    return folder


def open_folder(folder, **options):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return write(run, tmp_path_factory.mktemp("elsewhere") / "pipe")


@pytest.fixture(scope="module")
def pipe(folder):
    return open_folder(folder)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ours(source, frames, seed, prompts=PROMPTS, use_ema=True, **changes):
    pipeline, config = load_pipeline(source, "cpu", use_ema=use_ema)
    settings = replace(SampleSettings.of(config.train), seed=seed, **changes)
    return pipeline(prompts, 64, 32, frames, settings)


def test_the_folder_holds_a_licence_and_no_pickle(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    parts = ("transformer", "text_encoder", "vae")
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in parts}
    settings = {f"{part}/config.json" for part in parts} | {"scheduler/scheduler_config.json"}
    code = {f"{part}/pipeline.py" for part in (*parts, "scheduler")}
    assert files >= weights | settings | code | {"model_index.json", "pipeline.py", "LICENSE"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    assert "MIT" in (folder / "LICENSE").read_text()
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*.*")} - {0o755}
    assert len(modes) == 1, "weights may be read by whom the rest may be read by"
    card = (folder / "README.md").read_text()
    assert "library_name: diffusers" in card and "trust_remote_code=True" in card
    assert "`LICENSE` is that of the code" in card and "mmdit sample" not in card


def test_its_code_runs_only_if_it_is_trusted(folder):
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="contains custom code in pipeline.py"):
        DiffusionPipeline.from_pretrained(folder)
    pipe = open_folder(folder, custom_pipeline=str(folder))
    assert type(pipe).__name__ == "MMDiTPipeline"


@pytest.mark.parametrize("frames", [1, 3])
def test_it_draws_the_samples_of_mmdit_bit_for_bit(run, pipe, frames):
    drawn = pipe(PROMPTS, num_frames=frames, generator=seeded(7), output_type="pt")
    pixels = drawn.images[:, None] if frames == 1 else drawn.frames
    expected = ours(run, frames, 7)
    assert torch.equal(pixels, expected) and expected.std() > 0.01
    raw = ours(run, frames, 7, use_ema=False)
    assert not torch.equal(pixels, raw), "the average is what was written"


def test_an_encoder_without_weights_is_opened_too(tmp_path):
    run = write_run(tmp_path / "run", text_encoder={"type": "hash", "dim": 16})
    pipe = open_folder(write(run, tmp_path / "pipe"))
    drawn = pipe(PROMPTS, num_frames=1, generator=seeded(7), output_type="pt")
    torch.testing.assert_close(drawn.images[:, None], ours(run, 1, 7), rtol=0, atol=1e-3)


def test_it_draws_the_files_that_the_command_writes(run, pipe, tmp_path):
    out = tmp_path / "samples"
    words = ["--checkpoint", run, "--out", out, "--frames", "1", "--seed", "3", "--prompts"]
    assert sample.main([*map(str, words), *PROMPTS]) == 0
    pictures = pipe(PROMPTS, num_frames=1, generator=seeded(3)).images
    for number, picture in enumerate(pictures):
        stored = read_back(out / f"{number:04d}.png")[0].permute(1, 2, 0)
        assert np.array_equal(np.asarray(picture), stored.numpy())


def test_every_argument_of_a_call_reaches_the_sampler(run, pipe):
    drawn = pipe(
        PROMPTS[0],
        negative_prompt=["a ring"],
        height=32,
        width=64,
        num_frames=2,
        num_inference_steps=2,
        guidance_scale=4.0,
        num_images_per_prompt=2,
        generator=seeded(5),
        output_type="np",
        return_dict=False,
    )[0]
    settings = SampleSettings.of(decode(ExperimentConfig, CONFIG).train)
    changes = {"cfg_scale": 4.0, "negative_prompt": "a ring"}
    changes["sampler"] = replace(settings.sampler, steps=2)
    expected = ours(run, 2, 5, [PROMPTS[0]] * 2, **changes)
    assert np.array_equal(drawn, expected.permute(0, 1, 3, 4, 2).numpy())
    latents = pipe(PROMPTS, generator=seeded(7), output_type="latent").frames
    assert torch.equal(pipe.vae.decode(latents), ours(run, 3, 7))
    clips = pipe(PROMPTS).frames
    assert [len(clip) for clip in clips] == [3, 3] and clips[1][2].size == (64, 32)


def test_a_generator_decides_the_noise_once(pipe):
    def draw(generator, prompts=PROMPTS):
        return pipe(prompts, num_frames=1, generator=generator, output_type="pt").images

    once = seeded(7)
    first, second = draw(once), draw(once)
    assert torch.equal(first, draw(seeded(7))) and not torch.equal(first, second)
    alone = draw([seeded(7)], PROMPTS[:1])
    pair = draw([seeded(8), seeded(7)], PROMPTS[::-1])
    torch.testing.assert_close(pair[1:], alone, atol=1e-3, rtol=0)  # batches round otherwise
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        draw([seeded(7)])


def test_a_callback_sees_changes_and_ends_a_call(pipe):
    seen, end_at = [], 1

    def look(pipe, step, timestep, given):
        seen.append((step, round(float(timestep)), tuple(given["latents"].shape)))
        pipe._interrupt = step == end_at
        return {"latents": torch.zeros_like(given["latents"])}

    call = {"num_frames": 1, "num_inference_steps": 4, "output_type": "latent"}
    drawn = pipe("x", callback_on_step_end=look, **call).frames
    shape = (1, 1, 2, 4, 64)
    assert seen == [(0, 750, shape), (1, 500, shape)]
    assert torch.equal(drawn, pipe.vae.spec.denormalize(torch.zeros(shape)))
    end_at = None
    drawn = pipe("x", callback_on_step_end=look, **call).frames
    assert len(seen) == 6 and torch.equal(drawn, pipe.vae.spec.denormalize(torch.zeros(shape)))


def test_another_thread_can_interrupt_a_call(pipe, monkeypatch):
    steps = []

    class Bar(contextlib.nullcontext):
        def __enter__(self):
            return self

        def update(self):  # what another thread does while a step is computed
            steps.append(1)
            pipe._interrupt = True

    monkeypatch.setattr(pipe, "progress_bar", lambda total: Bar(), raising=False)
    assert len(pipe("x", num_frames=1, num_inference_steps=4).images) == len(steps) == 1


def test_offloaded_and_saved_again_it_draws_the_same(run, folder, tmp_path):
    from diffusers.utils import is_accelerate_available

    pipe = open_folder(folder)
    pipe.save_pretrained(tmp_path / "again")
    again = open_folder(tmp_path / "again")
    if is_accelerate_available():
        again.enable_model_cpu_offload(device="cpu")
    drawn = again(PROMPTS, generator=seeded(7), output_type="pt").frames
    assert torch.equal(drawn, ours(run, 3, 7))
    with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
        again.enable_sequential_cpu_offload()


@pytest.mark.parametrize(
    "dtype, half, most",
    [("bf16", torch.bfloat16, 0.02), *thorough(("fp16", torch.float16, 0.002))],
)
def test_half_precision_is_that_of_an_exported_file(run, tmp_path, dtype, half, most):
    file = tmp_path / "half.safetensors"
    export.main(["--checkpoint", str(run), "--out", str(file), "--dtype", dtype])
    folder = write(run, tmp_path / "pipe", "--dtype", dtype)
    drawn = open_folder(folder)(PROMPTS, generator=seeded(7), output_type="pt").frames
    expected = ours(file, 3, 7)
    assert torch.equal(drawn, expected)
    narrow = open_folder(folder, dtype=half)
    assert (narrow.transformer.dtype, narrow.text_encoder.dtype) == (half, half)
    drawn = narrow.to("cpu", half)(PROMPTS, generator=seeded(7), output_type="pt").frames
    assert narrow.vae.dtype == torch.float32, "a tokenizer is never cast"
    assert 0 < (drawn - expected).abs().mean() < most, "computed in that type"


def test_adapters_are_merged(tmp_path):
    run = write_run(tmp_path / "run", lora={"enabled": True, "rank": 2, "train_lora_only": False})
    folder = write(run, tmp_path / "pipe")
    drawn = open_folder(folder)(PROMPTS, generator=seeded(7), output_type="pt").frames
    assert torch.equal(drawn, ours(run, 3, 7))
    raw = write(run, tmp_path / "raw", "--raw_weights")
    drawn = open_folder(raw)(PROMPTS, generator=seeded(7), output_type="pt").frames
    assert torch.equal(drawn, ours(run, 3, 7, use_ema=False))


def test_the_scheduler_says_how_it_samples(pipe, folder):
    from mmdit.experiment.diffusers_pipeline import MMDiTScheduler

    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (config["solver"], config["steps"], config["guidance_scale"]) == ("ab2", 3, 2.5)
    other = MMDiTScheduler.from_config(pipe.scheduler.config, solver="euler", steps=2)
    assert other.settings.sampler.solver == "euler" and other.settings.negative_prompt == "grey"


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(prompt=[]), "nothing to draw"),
        (dict(prompt="x", width=40), "40x32 is not a multiple of 16"),
        (dict(prompt="x", num_frames=0), "must be at least 1"),
        (dict(prompt="x", num_inference_steps=0), "steps"),
        (dict(prompt="x", output_type="jpg"), "output_type is 'jpg'"),
        (dict(prompt=None), "prompt is None; must be a text or a list of texts"),
        (dict(prompt=["x", 3]), r"prompt is \['x', 3\]; must be"),
        (dict(prompt="x", negative_prompt=["a", "b"]), "2 different texts"),
        (dict(prompt="x", callback_on_step_end_tensor_inputs=["noise"]), "only latents"),
    ],
)
def test_calls_that_cannot_be_drawn_are_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"tokenizer": {"type": "dummy", "latent_d": 4}}, "not a VTP tokenizer"),
        (
            {
                "model": CONFIG["model"] | {"conditioning": "low_resolution"},
                "tokenizer": {"low_resolution": [32, 16]},
                "train": CONFIG["train"] | {"sample_every_steps": 0},
            },
            "redraws small clips",
        ),
    ],
)
def test_models_that_are_no_such_pipeline_are_named(tmp_path, capsys, sections, message):
    run = write_run(tmp_path / "run", **sections)
    with pytest.raises(SystemExit):
        write(run, tmp_path / "pipe")
    assert message in capsys.readouterr().err and not (tmp_path / "pipe").exists()


def test_without_diffusers_the_command_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mmdit.experiment.diffusers_pipeline", None)
    with pytest.raises(SystemExit):
        write(run, tmp_path / "pipe")
    assert "needs diffusers" in capsys.readouterr().err and not (tmp_path / "pipe").exists()


def test_nothing_is_replaced(run, folder, capsys):
    with pytest.raises(SystemExit):
        write(run, folder)
    assert "is there already" in capsys.readouterr().err


def test_without_mmdit_the_code_says_what_to_install(monkeypatch):
    from mmdit.experiment.diffusers_pipeline import CODE

    real = builtins.__import__

    def hidden(name, *rest):
        if name.startswith("mmdit"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(ImportError, match=r"needs the package mmdit, version .* pip install -e"):
        exec(compile(CODE, "pipeline.py", "exec"), {})
