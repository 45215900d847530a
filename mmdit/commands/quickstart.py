"""Show the whole path on any machine, in minutes: a shipped model draws; then data → cache →
training → samples → score, from nothing."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import mmdit
from mmdit.data.cache.caching import Caching
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.records import read_records
from mmdit.data.moving_shapes import prompts
from mmdit.data.moving_shapes.prepare import Recipe, claim, prepare_samples
from mmdit.diagnostics.prompt_accuracy import prompt_accuracy_report
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.experiment.load import load_pipeline
from mmdit.experiment.run import run_training
from mmdit.files import write_atomically
from mmdit.tokenizers import build_tokenizer
from mmdit.training.distributed import choose_device
from mmdit.training.media import contact_sheet, grid_video, save_image, save_video
from mmdit.training.metrics import clock
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.runs import discard
from mmdit.weights import parameter_count

SHIPPED = "assets/moving_shapes_64.safetensors"
CONFIG = "configs/quickstart.yaml"
DATA, OUT = Path("data/quickstart"), Path("runs/quickstart")
SETTINGS: list[str] = []  # overrides of CONFIG
PROBE_STEPS = 12


@dataclass(frozen=True)
class Plan:
    """Say how much of everything to do: a GPU gets the full amount, two CPU cores what they can do
    in minutes."""

    images: int  # generated training pictures
    train_seconds: float  # time for training; the number of steps follows from the measured speed
    max_steps: int
    batch_size: int
    count: int  # prompts of each list that are scored, pictures
    video_count: int
    overrides: tuple[str, ...] = ()  # of CONFIG

    @staticmethod
    def for_device(device: torch.device) -> Plan:
        if device.type == "cuda":
            return Plan(
                images=30_000,
                train_seconds=200.0,
                max_steps=12_000,
                batch_size=2048,
                count=256,
                video_count=256,
                overrides=(
                    "model.dim=256",
                    "model.depth=7",
                    "model.num_heads=4",
                    "text_encoder.dim=128",
                    "text_encoder.depth=1",
                    "train.precision=bf16",
                    "train.warmup_steps=200",
                    "ema.decay=0.999",
                ),
            )
        return Plan(
            images=4096,
            train_seconds=180.0,
            max_steps=3000,
            batch_size=64,
            count=96,
            video_count=12,
            # After 1,000 steps 0.16 of 256 seen prompts are right, 0.03 without, 0.11 with the
            # shift alone (docs/install.md), of captions that may leave out a fact.
            overrides=("flow_matching.shift=4", "train.optimizer=muon", "train.lr=5e-3"),
        )


class Stages:
    """Prints each stage before it begins, with the time so far."""

    def __init__(self, total: int):
        self.total, self.done, self.begin = total, 0, time.perf_counter()

    def __call__(self, sentence: str) -> None:
        self.done += 1
        print(f"\n[{self.done}/{self.total}  {clock(self.seconds)}] {sentence}", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin


def summary(report: dict) -> dict:
    """Return the numbers of a prompt-accuracy report as plain values, with their intervals."""
    rate = lambda entry: round(entry["value"], 4)  # noqa: E731
    interval = lambda entry: [round(entry["low"], 4), round(entry["high"], 4)]  # noqa: E731
    return {
        "prompt_accuracy": rate(report["prompt_accuracy"]),
        "prompt_accuracy_interval": interval(report["prompt_accuracy"]),
        **{name: rate(entry) for name, entry in report["attributes"].items()},
        "held_out_accuracy": rate(report["held_out_accuracy"]),
        "held_out_attributes": {
            name: rate(entry) for name, entry in report["held_out_attributes"].items()
        },
        "tokenizer_ceiling": rate(report["tokenizer_ceiling"]),
        "control": rate(report["control"]),
        "count": report["prompt_accuracy"]["count"],
    }


def draw_sheet(pipeline: Pipeline, config: ExperimentConfig, path: Path) -> None:
    """Draw 24 pictures on one sheet."""
    captions = [prompt.caption for prompt in prompts("seen", video=False)[:24]]
    settings, video = SampleSettings.of(config.train), config.video
    pixels = pipeline(captions, video.width, video.height, 1, settings)
    print(f"pictures: {save_image(contact_sheet(pixels, captions, 6), path)}", flush=True)


def score(pipeline: Pipeline, config: ExperimentConfig, frames: int, count: int) -> dict:
    """Return the prompt accuracy of `count` seen and `count` held-out prompts; a progress bar is
    shown."""
    settings, video = SampleSettings.of(config.train), config.video
    with tqdm(
        total=2 * count, desc="drawing and scoring", unit="clip" if frames > 1 else "image"
    ) as bar:

        def sample(captions: list[str], first: int) -> torch.Tensor:
            return pipeline(
                captions,
                video.width,
                video.height,
                frames,
                settings,
                first,
                64 if frames == 1 else 8,
                done=bar.update,
            )

        return prompt_accuracy_report(
            sample,
            pipeline.tokenizer,
            width=video.width,
            height=video.height,
            frames=frames,
            count=count,
            device=pipeline.device,
        )


def draw_shipped(out: Path, device: str, plan: Plan, say: Stages) -> dict:
    """Draw pictures and clips with the shipped model, and return its score."""
    say(
        "Drawing 24 pictures and 4 clips from prompts with the small shipped model (trained by this"
        " code, see README)."
    )
    pipeline, config = load_pipeline(SHIPPED, device)
    settings, video = SampleSettings.of(config.train), config.video
    draw_sheet(pipeline, config, out / "samples" / "grid.png")
    captions = [prompt.caption for prompt in prompts("seen", video=True)[:4]]
    clips = pipeline(captions, video.width, video.height, video.num_frames, settings)
    save_image(contact_sheet(clips, captions, 1), out / "samples" / "video_frames.png")
    clip = grid_video(clips, 2)
    clip = clip.repeat_interleave(3, dim=-1).repeat_interleave(3, dim=-2)  # enlarged, to be visible
    path = save_video(clip, out / "video.mp4", video.sample_fps)
    print(f"clips: {path}", flush=True)
    say(
        f"Scoring the shipped model: {plan.count} pictures and {plan.video_count} clips of each"
        " prompt list, judged from the pixels."
    )
    images = score(pipeline, config, 1, plan.count)
    videos = score(pipeline, config, video.num_frames, plan.video_count)
    return {
        **summary(images),
        "video": summary(videos),
        "parameters": parameter_count(pipeline.learner),
        "checkpoint": SHIPPED,
    }


def affordable_steps(config: ExperimentConfig, cache: Path, device: str, seconds: float) -> int:
    """Return how many training steps fit into `seconds`, from the speed of a few real ones (of
    their later half: the first are slow)."""
    steps = PROBE_STEPS * (4 if choose_device(device).type == "cuda" else 1)
    settings = replace(
        config.train,
        max_steps=steps,
        warmup_steps=0,
        log_every_steps=steps // 2,
        save_every_steps=steps,
        sample_every_steps=0,
    )
    probe = replace(config, experiment_name=f"{config.experiment_name}_speed_probe", train=settings)
    discard(probe.run_dir)
    run_training(probe, cache, device)
    last = json.loads(
        (probe.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    )
    discard(probe.run_dir)
    return max(1, int(seconds * last["samples_per_second"] / config.train.batch_size))


def configured(out: Path, plan: Plan) -> tuple[ExperimentConfig, Recipe]:
    """Return the config of the model that is trained from nothing, and the recipe of its
    pictures."""
    words = [f"output_dir={out.parent}", f"train.batch_size={plan.batch_size}"]
    config = load_experiment_config(CONFIG, [*words, *plan.overrides, *SETTINGS])
    return config, Recipe(config.video.width, config.video.height, complete_captions=True)


def check_data(config: ExperimentConfig, recipe: Recipe) -> None:
    """Raise ValueError, before minutes of drawing, if the data folder holds pictures of another
    version."""
    try:
        claim(DATA, recipe)
        latents = DATA / "latents"
        if (latents / "manifest.json").exists():
            tokenizer = build_tokenizer(config.tokenizer)
            parts = config.video, config.bucketing, config.preprocess
            CacheManifest.read(latents).check(latents, CacheManifest.of(tokenizer, *parts))
    except ValueError as error:
        what, *_ = re.split("; choose another|\nUse the settings", str(error))
        raise ValueError(
            f"{what}\n{DATA} was made by another version of the quickstart: remove that folder,"
            " which is made anew in about a minute, or start the quickstart elsewhere"
        ) from None


def from_scratch(
    config: ExperimentConfig, recipe: Recipe, out: Path, device: str, plan: Plan, say: Stages
) -> dict:
    """Make data and latents, train a model from nothing, draw samples, and return its score."""
    video = config.video
    say(f"Generating {plan.images} captioned pictures of moving shapes at {video.width} px.")
    metadata = prepare_samples(DATA, recipe, plan.images)
    say("Turning the pictures into VTP latents (cached: a second run skips this).")
    tokenizer = build_tokenizer(config.tokenizer, device=choose_device(device))
    records = read_records(metadata, "image")
    report = Caching(
        records,
        "image",
        tokenizer,
        DATA / "latents",
        video,
        config.bucketing,
        config.preprocess,
        source=str(DATA),
        device=choose_device(device),
        batch_size=128,
    ).run()
    print(report.text())
    say("Measuring the speed of this machine to choose the number of training steps.")
    steps = max(
        100,
        min(plan.max_steps, affordable_steps(config, DATA / "latents", device, plan.train_seconds)),
    )
    say(
        f"Training a text-to-image model from scratch: {steps} steps, about"
        f" {clock(plan.train_seconds)}."
    )
    config = replace(
        config, train=replace(config.train, max_steps=steps, save_every_steps=max(1, steps // 2))
    )
    discard(config.run_dir)
    begin = time.perf_counter()
    if not run_training(config, DATA / "latents", device):
        raise KeyboardInterrupt
    seconds = time.perf_counter() - begin
    say("Drawing with the model just trained, and scoring it.")
    pipeline, config = load_pipeline(config.run_dir, device)
    draw_sheet(pipeline, config, out / "samples" / "from_scratch.png")
    images = score(pipeline, config, 1, plan.count)
    return {
        **summary(images),
        "parameters": parameter_count(pipeline.learner),
        "steps": steps,
        "train_seconds": round(seconds, 1),
        "checkpoint": str(config.run_dir),
    }


def run(device: str = "auto") -> dict:
    """Run all of it; return the content of report.json."""
    where = choose_device(device)
    plan, say = Plan.for_device(where), Stages(total=7)
    threads = (
        f", {torch.get_num_threads()} threads"
        if where.type == "cpu"
        else f" ({torch.cuda.get_device_name(where)})"
    )
    print(
        f"mmdit {mmdit.__version__}, torch {torch.__version__}, device {where.type}{threads}."
        f" Results go to {OUT}."
    )
    config, recipe = configured(OUT, plan)
    check_data(config, recipe)
    shipped = draw_shipped(OUT, device, plan, say)
    scratch = from_scratch(config, recipe, OUT, device, plan, say)
    report = {
        "shipped": shipped,
        "from_scratch": scratch,
        "seconds": round(say.seconds, 1),
        "parameters": {"shipped": shipped["parameters"], "from_scratch": scratch["parameters"]},
        "versions": {
            "mmdit": mmdit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": where.type,
    }
    write_atomically(OUT / "report.json", json.dumps(report, indent=1))
    return report
