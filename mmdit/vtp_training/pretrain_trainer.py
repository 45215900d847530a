"""The state of a tokenizer pre-training, one step of it, and its checkpoints. Step `s` is a
function of (config, s, state): resume is exact."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from vtp.models import VTPModel
from vtp.pixels import normalize
from vtp.tokenizers import ByteTokenizer

from mmdit import rng
from mmdit.config import differences, encode
from mmdit.interfaces import LatentSpec
from mmdit.rng import Draws
from mmdit.training import checkpoint
from mmdit.training.ema import EMA
from mmdit.training.graphs import update_graph
from mmdit.training.memory.assigning import assign
from mmdit.training.optim import (
    LearningRate,
    build_optimizer,
    clip_and_guard,
    load_optimizer_tensors,
    optimizer_tensors,
)
from mmdit.vtp_training.images import PictureBatch, PictureSource
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_graphs import ReplayedLosses
from mmdit.vtp_training.pretrain_learner import StepLosses, TokenizerLearner

# The steps between which the speed is measured, to turn max_minutes into a number of steps. The
# second measurement corrects the first for other load on the machine; both are so early that the
# learning rate hardly depends on the plan yet.
CALIBRATION = {40: 120, 600: 800}  # begin: end
# keys that may change when a run is continued
FREE_KEYS = (
    "output_dir",
    "planned_steps",
    "seconds_spent",
    "train.compile",
    "train.replays",
    "train.max_minutes",
    "train.max_skipped_steps",
    "train.log_",
    "train.eval_",
    "train.save_",
)


class TokenizerTrainer:
    """`planned`: the number of steps, on which the decay of the learning rate depends. `windows`:
    the windows of CALIBRATION that have not been measured yet. `rate`: the learning rate of the
    last step. `critic`: the discriminator, if there is one."""

    def __init__(self, config: PretrainConfig, device: torch.device):
        self.config, self.device, self.folder = config, device, config.run_dir
        self.step, self.planned, self.windows = 0, config.train.max_steps, dict(CALIBRATION)
        self.started, self.rate = time.perf_counter(), 0.0
        torch.manual_seed(rng.key(config.seed, "initial weights") & 0x7FFF_FFFF)
        self.learner = TokenizerLearner(config).to(device)
        if config.init_from:
            start = VTPModel.from_pretrained(config.init_from).state_dict()
            assign(
                self.learner.model.state_dict(),
                start,
                config.init_from,
                fresh=lambda name: name not in start,
            )
            if self.learner.self_supervision is not None:
                self.learner.self_supervision.begin_from(self.learner.model.trunk)
        train, self.parts = config.train, self.learner.generator_parts()
        self.optimizer = build_optimizer(
            self.parts, train.lr, train.weight_decay, (0.9, train.beta2)
        )
        self.replays: ReplayedLosses | None = None
        self.updates: update_graph.ReplayedUpdates | None = None
        self.critic, self.critic_optimizer = self.learner.discriminator, None
        if self.critic is not None:
            self.critic_optimizer = build_optimizer(
                self.critic, config.adversarial.lr, 0.0, (0.5, 0.99)
            )
        self.ema = EMA(config.ema, self.learner.model)
        tokenize = None
        if config.contrast.weight:
            tokenize = ByteTokenizer(config.model.text_context_length)
        self.source = PictureSource(config.images, config.seed, device, tokenize)

    # ── one step ──────────────────────────────────────────────────────────────────────────────────
    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        train = self.config.train
        rate = LearningRate(train.lr, train.warmup_steps, "cosine", train.final_lr, self.planned)
        return rate.at(self.step + 1)

    def advance(self) -> dict[str, Tensor]:
        """Take one optimizer step; return scalars, which stay on the device."""
        self.rate = self.learning_rate()
        self.optimizer.set_lr(self.rate)
        begins = self.config.adversarial.start * self.planned
        adversarial = self.critic is not None and self.step >= begins
        batch = self.source.batch(self.step)
        losses = self.losses(batch, adversarial)
        self.optimizer.zero_grad()
        losses.total.backward()
        if self.updates:
            norm, skipped = self.updates()
        else:
            norm, skipped = clip_and_guard(self.optimizer, self.config.train.clip_norm)
            self.optimizer.step()
        if adversarial:
            losses.parts["discriminator"] = self._update_critic(losses)
        elif self.learner.self_supervision is not None:
            self.learner.self_supervision.update_teacher(
                self.learner.model.trunk, self.step / self.planned
            )
        self.step += 1
        self.ema.update(self.step)
        return {**losses.parts, "gradient_norm": norm, "skipped": skipped}

    def losses(self, batch: PictureBatch, adversarial: bool) -> StepLosses:
        """Return the losses of the next step."""
        target, tokens, facts = normalize(batch.pixels), batch.tokens, batch.facts
        # Without the memory of casts, as in a graph, the gradients of the trunk's several calls add
        # up in float32.
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, on_gpu, cache_enabled=False):
            if self.replays and not adversarial:
                return self.replays(target, tokens, facts, self.step)
            draws = Draws.of(self.config.seed, self.step, len(target), self.device)
            return self.learner(target, tokens, facts, draws, adversarial)

    def replay(self) -> None:
        """Replay losses, gradients and updates as CUDA graphs from now on."""
        self.replays = ReplayedLosses(self.learner)
        if update_graph.suits(self.optimizer):
            clip_norm = self.config.train.clip_norm
            self.updates = update_graph.ReplayedUpdates(self.optimizer, clip_norm)

    def _update_critic(self, losses: StepLosses) -> Tensor:
        loss = self.learner.discriminator_loss(losses)
        optimizer = self.critic_optimizer
        assert optimizer is not None, "there is a critic"
        optimizer.zero_grad()
        loss.backward()
        # a number that is not finite would stay in the discriminator's weights, and spoil all later
        # losses
        clip_and_guard(optimizer, 0)
        optimizer.step()
        return loss.detach()

    def prepare(self) -> None:
        """Render the pools and, on CUDA, compile for every size, so that neither disturbs the
        measured speed. No state changes."""
        for width, height, _ in self.config.images.sizes:
            batch = self.source.batch(0, (width, height))
            if self.device.type == "cuda":
                self.losses(batch, adversarial=False).total.backward()
                self.optimizer.zero_grad()

    def averaged_model(self) -> VTPModel:
        """Return a fresh, uncompiled model with the averaged weights, in evaluation mode."""
        model = VTPModel(self.config.network()).to(self.device)
        model.load_state_dict({**self.learner.model.state_dict(), **self.ema.shadow})
        return model.eval()

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────
    def save(self) -> None:
        """Write a checkpoint; the last two are kept."""
        files = {
            "model": self.learner.state_dict(),
            "ema": self.ema.shadow,
            "optimizer": optimizer_tensors(self.parts, self.optimizer),
        }
        if self.critic is not None and self.critic_optimizer is not None:
            files["critic_optimizer"] = optimizer_tensors(self.critic, self.critic_optimizer)
        spent = round(time.perf_counter() - self.started, 3)
        times = {"planned_steps": self.planned, "seconds_spent": spent}
        spec = LatentSpec(self.config.model.vision_feature_bottleneck)
        meta = checkpoint.Meta(self.step, encode(self.config) | times, spec, "vtp.train")
        checkpoint.save(self.folder, meta, files, keep_last=2)

    def restore(self) -> None:
        """Continue from the newest undamaged checkpoint in the output folder. ValueError if there
        is none, or if it belongs to another run."""
        folder = checkpoint.latest(self.folder, None)
        if folder is None:
            raise ValueError(
                f"--resume, but {self.folder}/checkpoints holds no checkpoint; leave the flag out"
                " to start"
            )
        meta = checkpoint.Meta.read(folder)
        free: tuple[str, ...] = FREE_KEYS  # and idle keys, which earlier versions accepted
        for _, section, names in self.config.without_part():
            free += tuple(f"{section}.{name}:" for name in names)
        changed = [
            line
            for line in differences(meta.config, encode(self.config))
            if not line.startswith(free)
        ]
        if changed:
            raise ValueError(
                f"{folder} was written with another config ({'; '.join(changed[:5])}); use the"
                " same, or another output_dir"
            )

        def stored(name: str) -> dict[str, Tensor]:
            return checkpoint.read_tensors(folder / f"{name}.safetensors")

        assign(self.learner.state_dict(), stored("model"), str(folder))
        assign(self.ema.shadow, stored("ema"), str(folder))
        load_optimizer_tensors(self.parts, self.optimizer, stored("optimizer"))
        if self.critic is not None and self.critic_optimizer is not None:
            load_optimizer_tensors(self.critic, self.critic_optimizer, stored("critic_optimizer"))
        self.step = meta.step
        if self.config.train.max_minutes is not None:  # without, `max_steps` are planned
            self.planned = meta.config["planned_steps"]
        self.started -= meta.config.get("seconds_spent", 0.0)
        longer = meta.config["train"]["max_minutes"] != self.config.train.max_minutes
        self.windows = windows_after(self.step, longer)


def windows_after(step: int, anew: bool) -> dict[int, int]:
    """Return the windows of `CALIBRATION` that a run resumed at `step` must still measure. A window
    that had begun is measured again, as long after the resume as the first window is after the
    start. The same holds for the first window if none is left and the time limit has changed
    (`anew`).
    """
    first, *_ = CALIBRATION
    left = {begin: end for begin, end in CALIBRATION.items() if end > step}
    if anew and not left:
        left = {first: CALIBRATION[first]}
    windows = {}
    for begin, end in left.items():
        delay = step + first - begin if begin <= step else 0
        windows[begin + delay] = end + delay
    return windows
