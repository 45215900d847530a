"""The loop of a tokenizer pre-training: one process, one device."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from mmdit.config import to_yaml
from mmdit.training import checkpoint
from mmdit.training.continuing import write_config
from mmdit.training.distributed import World
from mmdit.training.run_start import record_start
from mmdit.training.runs import hold
from mmdit.training.trainer import StopRequest
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_export import export_tokenizer
from mmdit.vtp_training.pretrain_report import PretrainReport
from mmdit.vtp_training.pretrain_trainer import TokenizerTrainer
from mmdit.weights import parameter_count

EXPORT = "export"  # subfolder of a run folder
EXPORT_SECONDS = 20  # reserved from max_minutes for the last evaluation and the export


def pretrain(config: PretrainConfig, device: torch.device, resume: bool = False) -> Path | None:
    """Train to the planned last step, then export. Return the folder of the exported checkpoint, or
    None if the run was asked to stop earlier (continue with `resume`)."""
    with hold(config.run_dir), StopRequest().listening() as stop:
        trainer = _prepare(config, device, resume)
        report, settings, began = PretrainReport(trainer), config.train, None
        while trainer.step < trainer.planned:
            scalars = trainer.advance()
            report.skipped.append(scalars["skipped"])
            began = calibrate(trainer, began)
            ends = stop.asked or trainer.step == trainer.planned
            if ends or trainer.step % settings.log_every_steps == 0:
                report.progress(scalars)
            if not ends and trainer.step % settings.eval_every_steps == 0:
                report.evaluate(min(128, settings.evaluation_samples))
            if ends or trainer.step % settings.save_every_steps == 0:
                trainer.save()
            if stop.asked and trainer.step < trainer.planned:
                print(f"stopped on request at step {trainer.step}; continue with --resume")
                return None
        if report.scored_step != trainer.step:  # false when a finished run is exported again
            report.evaluate(min(256, settings.evaluation_samples), ends=True)
        return _export(trainer)


def _prepare(config: PretrainConfig, device: torch.device, resume: bool) -> TokenizerTrainer:
    """Build or restore the trainer, and make the first batch of every size."""
    torch.set_float32_matmul_precision("high")
    trainer = TokenizerTrainer(config, device)
    if resume:
        trainer.restore()
    elif checkpoint.complete(trainer.folder):
        raise ValueError(
            f"{trainer.folder} holds checkpoints of an earlier run; add --resume, or choose another"
            " output_dir"
        )
    done = trainer.step >= trainer.planned
    write_config(trainer.folder, to_yaml(config), done)
    record_start(trainer.folder, World(device=device), trainer.step, _about(config))
    if device.type == "cuda" and config.train.compile:
        # without a working compiler, the blocks run uncompiled
        torch._dynamo.config.suppress_errors = True
        trainer.learner.compile()
    if device.type == "cuda" and config.train.replays:
        trainer.replay()
    trainer.prepare()
    if done:
        print(
            f"nothing left to do but the export: the run ended at step {trainer.step}, as planned;"
            f" for a further stage set init_from={trainer.folder / EXPORT} and another output_dir"
        )
    size = parameter_count(trainer.learner.model)
    seconds = time.perf_counter() - trainer.started
    print(
        f"{size:,} parameters on {device}, ready after {seconds:.0f} s; step {trainer.step} of"
        f" {trainer.planned}",
        flush=True,
    )
    return trainer


def _about(config: PretrainConfig) -> str:
    """Return a description of the training pictures."""
    images = config.images
    sizes = [f"{width}x{height} ({weight:g})" for width, height, weight in images.sizes]
    shares = [f"{name} {share:g}" for name, share in vars(images.mix).items()]
    return (
        f"generated pictures of {', '.join(sizes)}: size (weight); {images.patches_per_step:,}"
        f" patches a step\nshares of the pictures: {', '.join(shares)}"
    )


def _export(trainer: TokenizerTrainer) -> Path:
    """Export the averaged weights with a record of the run; return the folder."""
    minutes, device = (time.perf_counter() - trainer.started) / 60, trainer.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    run = {"steps": trainer.step, "minutes": round(minutes, 1), "device": place}
    folder = trainer.folder / EXPORT
    export_tokenizer(trainer.averaged_model(), trainer.source, trainer.config, folder, run)
    print(f"exported to {folder} after {minutes:.1f} min", flush=True)
    return folder


def calibrate(trainer: TokenizerTrainer, began: float | None) -> float | None:
    """Measure the speed between early steps, and set the planned number of steps to what fits into
    max_minutes. Return the time at which the current measurement began, or None without one."""
    limit = trainer.config.train.max_minutes
    begins, ends = trainer.step in trainer.windows, trainer.step in trainer.windows.values()
    if limit is None or not (begins or ends):
        return began
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    if begins or began is None:
        return now if begins else None
    first = next(start for start, end in trainer.windows.items() if end == trainer.step)
    seconds = (now - began) / (trainer.step - first)
    left = limit * 60 - (now - trainer.started) - EXPORT_SECONDS
    fitting = trainer.step + max(1, int(left / seconds * 0.97))
    trainer.planned = min(trainer.config.train.max_steps, fitting)
    print(
        f"{seconds * 1000:.1f} ms a step: {trainer.planned} steps fit into {limit} minutes",
        flush=True,
    )
    return None
