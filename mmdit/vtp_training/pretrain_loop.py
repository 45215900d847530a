"""The pre-training loop: one process, one device. Step `s` is a function of (config, s, state):
resume is exact."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from vtp.models import VTPModel
from vtp.pixels import STD
from vtp.tokenizers import ByteTokenizer

from mmdit import rng
from mmdit.config import differences, encode, to_yaml
from mmdit.files import refuse_link, write_atomically
from mmdit.interfaces import LatentSpec
from mmdit.pixels import to_uint8
from mmdit.training import checkpoint
from mmdit.training.ema import EMA
from mmdit.training.errors import RunError
from mmdit.training.media import save_image
from mmdit.training.optim import (
    LearningRate,
    build_optimizer,
    clip_and_guard,
    load_optimizer_tensors,
    optimizer_tensors,
)
from mmdit.training.runs import hold
from mmdit.vtp_training.evaluate import reconstruct, shapes_psnr
from mmdit.vtp_training.images import PictureSource
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_export import export
from mmdit.vtp_training.pretrain_learner import Learner

# Between these steps the speed is measured that turns max_minutes into a number of steps. The
# second time corrects the first for what else shares the machine; both are early enough that the
# learning rate hardly moves.
CALIBRATION = {40: 120, 600: 800}  # begin: end
EXPORT_SECONDS = 20  # kept back from max_minutes for the last evaluation and the export
FREE_KEYS = (
    "output_dir",
    "planned_steps",
    "seconds_spent",
    "train.compile",
    "train.max_minutes",
    "train.max_skipped_steps",
    "train.log_",
    "train.eval_",
    "train.save_",
)


class Trainer:
    """Everything that a step moves forward, and how it is saved."""

    def __init__(self, config: PretrainConfig, device: torch.device):
        self.config, self.device, self.step, self.planned = (
            config,
            device,
            0,
            config.train.max_steps,
        )
        self.folder, self.started = Path(config.output_dir), time.perf_counter()
        self.windows = dict(CALIBRATION)  # those that are still to be measured
        torch.manual_seed(rng.key(config.seed, "initial weights") & 0x7FFF_FFFF)
        self.learner = Learner(config).to(device)
        if config.init_from:
            start = VTPModel.from_pretrained(config.init_from).state_dict()
            checkpoint.assign(
                self.learner.model.state_dict(),
                start,
                config.init_from,
                fresh=lambda name: name not in start,
            )
        parts = self.learner.generator_parts()
        self.optimizer = build_optimizer(
            parts, config.train.lr, config.train.weight_decay, (0.9, config.train.beta2)
        )
        self.parts, self.critic, self.critic_optimizer = parts, self.learner.discriminator, None
        if self.critic is not None:
            self.critic_optimizer = build_optimizer(
                self.critic, config.adversarial.lr, 0.0, (0.5, 0.99)
            )
        self.ema = EMA(config.ema, self.learner.model)
        tokenize = (
            ByteTokenizer(config.model.text_context_length) if config.contrast.weight else None
        )
        self.source = PictureSource(config.images, config.seed, device, tokenize)

    # ── one step ──────────────────────────────────────────────────────────────────────────────────
    def learning_rate(self) -> float:
        train = self.config.train
        return LearningRate(
            train.lr, train.warmup_steps, "cosine", train.final_lr, self.planned
        ).at(self.step + 1)

    def advance(self) -> dict[str, Tensor]:
        """One optimizer step; returns scalars that stay on the device."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        adversarial = (
            self.critic is not None and self.step >= self.config.adversarial.start * self.planned
        )
        losses, norm, skipped = self._update(self.source.batch(self.step), adversarial)
        if adversarial:
            losses.parts["discriminator"] = self._update_critic(losses)
        elif self.learner.self_supervision is not None:
            self.learner.self_supervision.update_teacher(
                self.learner.model.trunk, self.step / self.planned
            )
        self.step += 1
        self.ema.update(self.step)
        return {**losses.parts, "gradient_norm": norm, "skipped": skipped}

    def _update(self, batch, adversarial: bool):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.learner.losses(batch, self.step, adversarial)
        self.optimizer.zero_grad()
        losses.total.backward()
        norm, skipped = clip_and_guard(self.optimizer, self.config.train.clip_norm)
        self.optimizer.step()
        return losses, norm, skipped

    def _update_critic(self, losses) -> Tensor:
        loss = self.learner.discriminator_loss(losses)
        self.critic_optimizer.zero_grad()
        loss.backward()
        clip_and_guard(
            self.critic_optimizer, 0
        )  # what is not finite would stay in its weights, and in all later losses
        self.critic_optimizer.step()
        return loss.detach()

    def prepare(self) -> None:
        """Render the pools and, on CUDA, compile for every size: neither then disturbs the measured
        speed. Changes no state."""
        for size in [tuple(size[:2]) for size in self.config.images.sizes]:
            batch = self.source.batch(0, size)
            if self.device.type == "cuda":
                with torch.autocast("cuda", torch.bfloat16):
                    self.learner.losses(batch, 0, False).total.backward()
                self.optimizer.zero_grad()

    # ── the averaged model ────────────────────────────────────────────────────────────────────────
    def averaged_model(self) -> VTPModel:
        """A fresh, uncompiled model with the averaged weights, in eval mode."""
        model = VTPModel(self.config.network()).to(self.device)
        model.load_state_dict({**self.learner.model.state_dict(), **self.ema.shadow})
        return model.eval()

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────
    def save(self) -> None:
        files = {
            "model": self.learner.state_dict(),
            "ema": self.ema.shadow,
            "optimizer": optimizer_tensors(self.parts, self.optimizer),
        }
        if self.critic is not None:
            files["critic_optimizer"] = optimizer_tensors(self.critic, self.critic_optimizer)
        spent = time.perf_counter() - self.started
        config = {
            **encode(self.config),
            "planned_steps": self.planned,
            "seconds_spent": round(spent, 3),
        }
        spec = LatentSpec(self.config.model.vision_feature_bottleneck)
        checkpoint.save(
            self.folder, checkpoint.Meta(self.step, config, spec, "vtp.train"), files, keep_last=2
        )

    def restore(self) -> None:
        """Continue from the newest whole checkpoint of the output folder; ValueError: none there,
        or one of another run."""
        folder = checkpoint.latest(self.folder, None)
        if folder is None:
            raise ValueError(
                f"--resume, but {self.folder}/checkpoints holds no checkpoint; leave the flag out"
                " to start"
            )
        meta = checkpoint.Meta.from_json(
            (folder / "checkpoint.json").read_text(encoding="utf-8"), str(folder)
        )
        changed = [
            line
            for line in differences(meta.config, encode(self.config))
            if not line.startswith(FREE_KEYS)
        ]
        if changed:
            message = f"{folder} was written with another config ({'; '.join(changed[:5])})"
            raise ValueError(f"{message}; use the same, or another output_dir")
        checkpoint.assign(
            self.learner.state_dict(),
            checkpoint.read_tensors(folder / "model.safetensors"),
            str(folder),
        )
        for name, tensor in checkpoint.read_tensors(folder / "ema.safetensors").items():
            self.ema.shadow[name].copy_(tensor)
        load_optimizer_tensors(
            self.parts, self.optimizer, checkpoint.read_tensors(folder / "optimizer.safetensors")
        )
        if self.critic is not None:
            stored = checkpoint.read_tensors(folder / "critic_optimizer.safetensors")
            load_optimizer_tensors(self.critic, self.critic_optimizer, stored)
        self.step, self.planned = meta.step, meta.config["planned_steps"]
        self.started -= meta.config.get("seconds_spent", 0.0)
        longer = meta.config["train"]["max_minutes"] != self.config.train.max_minutes
        self.windows = windows_after(self.step, longer)


def windows_after(step: int, anew: bool) -> dict[int, int]:
    """Return the windows of `CALIBRATION` that a run resumed at `step` has still to measure. One
    that was begun is measured as long after the resume as the first is after the start; so is the
    first one, if none is left and the limit is another (`anew`).
    """
    first, *_ = CALIBRATION
    left = {begin: end for begin, end in CALIBRATION.items() if end > step}
    if anew and not left:
        left = {first: CALIBRATION[first]}
    moved = {begin: step + first - begin if begin <= step else 0 for begin in left}
    return {begin + moved[begin]: end + moved[begin] for begin, end in left.items()}


class Report:
    """metrics.jsonl and the progress line. Losses are read from the device once per report."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.path = trainer, trainer.folder / "metrics.jsonl"
        self.since, self.at_step = time.perf_counter(), trainer.step
        self.skipped: list[Tensor] = []  # of each step since the last report
        self.bad_in_a_row = 0

    def write(self, record: dict) -> None:
        with refuse_link(self.path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def progress(self, scalars: dict[str, Tensor]) -> None:
        trainer, values = self.trainer, {name: float(value) for name, value in scalars.items()}
        now = time.perf_counter()
        speed = (trainer.step - self.at_step) / max(now - self.since, 1e-9)
        self.since, self.at_step = now, trainer.step
        skipped = torch.stack(self.skipped).tolist()
        self.skipped.clear()
        values["skipped"] = sum(skipped)
        self._stop_if_bad(skipped)
        squared = values.pop("squared_error") * (sum(STD) / 3) ** 2
        values["train_psnr"] = -10 * math.log10(max(squared, 1e-10))
        left = (trainer.planned - trainer.step) / max(speed, 1e-9)
        memory = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else 0.0
        record = {
            "step": trainer.step,
            "steps_per_second": speed,
            "memory_gib": memory,
            "lr": trainer.learning_rate(),
        }
        record |= values
        rounded = {
            name: value if isinstance(value, int) else float(f"{value:.5g}")
            for name, value in record.items()
        }
        self.write(
            {name: value if math.isfinite(value) else None for name, value in rounded.items()}
        )
        words = " ".join(
            f"{name} {value:.4g}" for name, value in values.items() if name != "skipped"
        )
        rest = f"{speed:.2f} steps/s  {memory:.1f} GiB  {left / 60:.1f} min left"
        print(f"step {trainer.step}/{trainer.planned}  {words}  {rest}", flush=True)

    def _stop_if_bad(self, skipped: list[float]) -> None:
        """RunError after too many steps in a row whose gradient was not finite, or when all since
        the last report were such."""
        limit = self.trainer.config.train.max_skipped_steps
        for bad in skipped:
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            if self.bad_in_a_row > limit:
                break
        if self.bad_in_a_row > limit or sum(skipped) == len(skipped) > 1:
            raise RunError(
                f"training stopped: {self.bad_in_a_row} steps in a row up to step"
                f" {self.trainer.step} had a loss or gradient that is not finite (limit"
                f" train.max_skipped_steps = {limit}); the weights are those before them. Start"
                " again with a lower train.lr or a longer train.warmup_steps, or continue with"
                " --resume"
            )

    def evaluate(self, count: int) -> None:
        started, trainer = time.perf_counter(), self.trainer
        model = trainer.averaged_model()
        sizes = tuple(
            dict.fromkeys((w, h) for w, h, _ in trainer.config.images.sizes if w == h)
        ) or ((64, 64),)
        scores = shapes_psnr(model, count, sizes)
        self.write({"step": trainer.step, "held_out_psnr": scores})
        print(
            f"step {trainer.step}  held-out moving shapes, averaged weights, PSNR: {scores}",
            flush=True,
        )
        self._preview(model)
        self.since += time.perf_counter() - started  # evaluation is not training speed

    def _preview(self, model: VTPModel) -> None:
        """samples/step_N.png: made pictures above their reconstructions."""
        width, height, _ = self.trainer.config.images.sizes[0]
        pictures = self.trainer.source.batch(0, (width, height)).pixels
        pictures = pictures[:: max(1, len(pictures) // 16)][:16]
        rows = torch.stack([pictures, reconstruct(model, pictures)])
        canvas = rearrange(to_uint8(rows).cpu(), "r b c h w -> (r h) (b w) c")
        folder = self.trainer.folder / "samples"
        save_image(Image.fromarray(canvas.numpy()), folder / f"step_{self.trainer.step:06d}.png")


def train(config: PretrainConfig, device: torch.device, resume: bool = False) -> Path:
    """Run to the planned last step, then export; returns the exported checkpoint folder."""
    with hold(Path(config.output_dir)):
        return _train(config, device, resume)


def _train(config: PretrainConfig, device: torch.device, resume: bool) -> Path:
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(config, device)
    if resume:
        trainer.restore()
    elif checkpoint.complete(trainer.folder):
        raise ValueError(
            f"{trainer.folder} holds checkpoints of an earlier run; add --resume, or choose another"
            " output_dir"
        )
    write_atomically(trainer.folder / "config.yaml", to_yaml(config))
    if device.type == "cuda" and config.train.compile:
        torch._dynamo.config.suppress_errors = (
            True  # without a working compiler the blocks run as they are
        )
        trainer.learner.compile()
    trainer.prepare()
    size, seconds = (
        sum(p.numel() for p in trainer.learner.model.parameters()),
        time.perf_counter() - trainer.started,
    )
    print(
        f"{size:,} parameters on {device}, ready after {seconds:.0f} s; step {trainer.step} of"
        f" {trainer.planned}",
        flush=True,
    )
    report, settings, calibration = Report(trainer), config.train, None
    while trainer.step < trainer.planned:
        scalars = trainer.advance()
        report.skipped.append(scalars["skipped"])
        if settings.max_minutes is not None:
            calibration = _calibrate(trainer, calibration)
        if trainer.step % settings.log_every_steps == 0 or trainer.step == trainer.planned:
            report.progress(scalars)
        if trainer.step % settings.eval_every_steps == 0 and trainer.step < trainer.planned:
            report.evaluate(min(128, settings.evaluation_samples))
        if trainer.step % settings.save_every_steps == 0 or trainer.step == trainer.planned:
            trainer.save()
    report.evaluate(min(256, settings.evaluation_samples))
    minutes = (time.perf_counter() - trainer.started) / 60
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    folder, run = (
        trainer.folder / "export",
        {"steps": trainer.step, "minutes": round(minutes, 1), "device": place},
    )
    export(trainer.averaged_model(), trainer.source, config, folder, run)
    print(f"exported to {folder} after {minutes:.1f} min", flush=True)
    return folder


def _calibrate(trainer: Trainer, first: float | None) -> float | None:
    """Time the speed between early steps, and set the planned number of steps from what max_minutes
    leaves."""
    begins, ends = trainer.step in trainer.windows, trainer.step in trainer.windows.values()
    if not begins and not (ends and first is not None):
        return first
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    if begins:
        return now
    begin = next(start for start, end in trainer.windows.items() if end == trainer.step)
    seconds = (now - first) / (trainer.step - begin)
    left = trainer.config.train.max_minutes * 60 - (now - trainer.started) - EXPORT_SECONDS
    trainer.planned = min(
        trainer.config.train.max_steps, trainer.step + max(1, int(left / seconds * 0.97))
    )
    limit = trainer.config.train.max_minutes
    print(
        f"{seconds * 1000:.1f} ms a step: {trainer.planned} steps fit into {limit} minutes",
        flush=True,
    )
    return None
