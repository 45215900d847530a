"""A run of post-training that is ready to start: its setup, and the parts that work on it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mmdit.posttrain.evaluation import Evaluator
from mmdit.posttrain.policy import Policy
from mmdit.posttrain.rollouts import Rollouts
from mmdit.posttrain.setup import Files, Setup
from mmdit.posttrain.stop_rules import StopRules
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.memory.assigning import assign
from mmdit.training.memory.shards import Stored
from mmdit.training.metrics import MetricsLog
from mmdit.training.optim import clip_and_guard
from mmdit.training.run_folder import ENDED_BY

HISTORY_FILE = "marks"


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Replace the gradient of each parameter by its mean over all processes. A process without a
    gradient for it, as one without a pair in DPO, counts as zero if another process has one."""
    there = world.gather([p.grad is not None for p in parameters])
    moved = [p for p, *flags in zip(parameters, *there, strict=True) if any(flags)]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
    world.sum_(*gradients)
    for parameter, gradient in zip(moved, gradients, strict=True):
        parameter.grad = gradient.div_(world.size)


class Session(Setup):
    """A setup together with the parts with which the algorithms work."""

    def __post_init__(self):
        super().__post_init__()
        self.evaluator = Evaluator(self)
        self.learner.text_encoder.put_away()
        self.policy = Policy(self)
        self.rollouts = Rollouts(self, self.policy)
        self.stop_rules = StopRules(self, self.policy, self.rollouts)
        self.log: MetricsLog | None = None
        self.moving = False  # whether an update is under way

    def update(self) -> dict[str, float]:
        """Take an optimizer step with the gradients that the micro-batches have summed up, averaged
        over ranks, and return numbers to report."""
        state, train, world = self.state, self.train, self.world
        optimizer = state.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if world.size > 1 and not self.learner.sharded:  # sharded gradients are averaged already
            average_gradients(parameters, world)
        optimizer.set_lr(train.learning_rate().at(state.step + 1))
        self.moving = True
        norm, skipped = clip_and_guard(optimizer, train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        self.moving = False
        return {"grad_norm": norm.item(), "skipped": skipped.item()}

    def files(self) -> Files:
        """Return the contents of a checkpoint from which a run can resume exactly."""
        files = self.state.files()
        if self.config.keeps_old:
            files["old"] = self.policy.old
        if self.history:
            files[HISTORY_FILE] = self.history
        return files

    def restore(self, folder: Path) -> list[str]:
        """Continue from a checkpoint; the reference stays the model from which the first run began.
        Return lines to print."""
        if self.config.keeps_old and not any(folder.glob("old*")):
            raise ValueError(
                f"{folder} has no slow copy of the weights, which posttrain.algorithm"
                f" {self.config.algorithm} follows: resume with the algorithm that wrote it, or"
                " start a new run with train.init_from"
            )
        lines = self.state.restore(folder)
        if self.config.keeps_old:
            assign(self.policy.old, Stored(folder / "old.safetensors"), str(folder))
            self.policy.carry_over_old(checkpoint.Meta.read(folder).alphas)
        history = folder / f"{HISTORY_FILE}.safetensors"
        self.history = checkpoint.read_tensors(history) if history.is_file() else {}
        return lines + self.evaluator.continue_from(self.history)

    def evaluate(self) -> dict[str, float]:
        """Return the evaluation rewards; if they are the best so far, the weights have been saved
        separately."""
        values = self.evaluator.evaluate()
        if self.evaluator.is_best(values):
            self.save(self.files(), True)
        return values

    def report(self, values: dict[str, float], ended_by: str = "") -> None:
        """Log the numbers of an epoch and print them as one line, on the main rank. `ended_by`: the
        stop rule that ends the run with this epoch."""
        if self.log:
            self.log.write(values | ({ENDED_BY: ended_by} if ended_by else {}))
            words = [f"{name} {value:.4g}" for name, value in values.items() if name != "step"]
            print(f"update {values['step']}/{self.train.max_steps}  {'  '.join(words)}", flush=True)
