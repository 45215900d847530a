"""Write the reports of a tokenizer pre-training: metrics.jsonl, progress lines, held-out scores and
pictures."""

from __future__ import annotations

import contextlib
import json
import math
import time

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from vtp.models import VTPModel
from vtp.pixels import STD

from mmdit.files import lines_of, read_text, refuse_link, write_atomically
from mmdit.pixels import to_shown
from mmdit.training.errors import RunError
from mmdit.training.media import save_image
from mmdit.training.metrics import json_line
from mmdit.training.run_folder import ENDED_BY
from mmdit.vtp_training.pretrain_trainer import TokenizerTrainer
from mmdit.vtp_training.tokenizer_scores import reconstruct, shapes_psnr

HELD_OUT = "held_out_psnr"  # the key that marks the record of an evaluation


def five_digits(value: float) -> float | None:
    """Return a number rounded to five digits, as metrics store it; None if it is not finite."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


class PretrainReport:
    """Writes the reports; losses are read from the device once per report. On opening, records of
    steps that will be repeated after a kill, and a line that it tore, are dropped. `scored_step`:
    the last step that was evaluated, -1 before the first."""

    def __init__(self, trainer: TokenizerTrainer):
        self.trainer, self.path = trainer, refuse_link(trainer.folder / "metrics.jsonl")
        kept, self.scored_step = [], -1
        if self.path.exists():
            for line in lines_of(read_text(self.path, "replace")):
                with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
                    record = json.loads(line)
                    if record["step"] <= trainer.step:
                        kept.append(line + "\n")
                        if HELD_OUT in record:
                            self.scored_step = record["step"]
        write_atomically(self.path, "".join(kept))
        self.since, self.at_step = time.perf_counter(), trainer.step
        self.skipped: list[Tensor] = []  # one flag for each step since the last report
        self.bad_in_a_row = 0

    def _write(self, record: dict) -> None:
        try:
            with refuse_link(self.path).open("a", encoding="utf-8") as file:
                file.write(json_line(record))
        except OSError as error:
            raise RunError(
                f"could not write {self.path}: {error}; checkpoints are untouched. Free disk space"
                " and start the run again, with --resume if it has a checkpoint"
            ) from error

    def progress(self, scalars: dict[str, Tensor]) -> None:
        """Report the last step, and the speed since the last report. RunError if too many steps had
        no finite gradient."""
        trainer, now = self.trainer, time.perf_counter()
        values = {name: float(value) for name, value in scalars.items()}
        speed = (trainer.step - self.at_step) / max(now - self.since, 1e-9)
        self.since, self.at_step = now, trainer.step
        skipped = torch.stack(self.skipped).tolist()
        self.skipped.clear()
        values["skipped"] = sum(skipped)
        self._stop_if_bad(skipped)
        squared = values.pop("squared_error") * (sum(STD) / 3) ** 2
        values["train_psnr"] = -10 * math.log10(max(squared, 1e-10))
        memory = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else 0.0
        record: dict[str, float] = {
            "step": trainer.step,
            "steps_per_second": speed,
            "memory_gib": memory,
            "lr": trainer.rate,
            **values,
        }
        self._write({name: five_digits(value) for name, value in record.items()})
        words = [f"{name} {value:.4g}" for name, value in values.items() if name != "skipped"]
        minutes = (trainer.planned - trainer.step) / max(speed, 1e-9) / 60
        print(
            f"step {trainer.step}/{trainer.planned}  {' '.join(words)}  {speed:.2f} steps/s "
            f" {memory:.1f} GiB  {minutes:.1f} min left",
            flush=True,
        )

    def _stop_if_bad(self, skipped: list[float]) -> None:
        """Raise RunError after too many steps in a row without a finite gradient, or if all steps
        since the last report had none."""
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

    def evaluate(self, count: int, ends: bool = False) -> None:
        """Score the averaged weights on held-out moving shapes, and draw a preview. This time is
        not counted in the speed of the training. `ends`: this is the last planned step."""
        started, trainer = time.perf_counter(), self.trainer
        model = trainer.averaged_model()
        squares = [(w, h) for w, h, _ in trainer.config.images.sizes if w == h]
        sizes = tuple(dict.fromkeys(squares)) or ((64, 64),)
        scores = shapes_psnr(model, count, sizes)
        record: dict[str, object] = {"step": trainer.step, HELD_OUT: scores}
        train = trainer.config.train
        if ends and trainer.step < train.max_steps:
            record[ENDED_BY] = f"no more steps fit into train.max_minutes, {train.max_minutes:g}"
        self._write(record)
        self.scored_step = trainer.step
        print(
            f"step {trainer.step}  held-out moving shapes, averaged weights, PSNR: {scores}",
            flush=True,
        )
        self._preview(model)
        self.since += time.perf_counter() - started

    def _preview(self, model: VTPModel) -> None:
        """Draw samples/step_N.png: generated pictures above their reconstructions."""
        width, height, _ = self.trainer.config.images.sizes[0]
        pictures = self.trainer.source.batch(0, (width, height)).pixels
        pictures = pictures[:: max(1, len(pictures) // 16)][:16]
        rows = to_shown(torch.stack([pictures, reconstruct(model, pictures)]))
        canvas = rearrange(rows, "r b c h w -> (r h) (b w) c")
        folder = self.trainer.folder / "samples"
        save_image(Image.fromarray(canvas.numpy()), folder / f"step_{self.trainer.step:06d}.png")
