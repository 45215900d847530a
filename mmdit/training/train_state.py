"""Everything that changes in a training: weights, optimizer, averages, metrics, the step; and the
parts of it that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mmdit.adapters import adapters
from mmdit.adapters.strength import adapter_parameters, alphas, load_alphas
from mmdit.training import checkpoint
from mmdit.training.alpha.schedule import AlphaSchedule, AlphaScheduleConfig, keep_strength
from mmdit.training.alpha.signs import Signs
from mmdit.training.ema import EMA, EMAConfig
from mmdit.training.learner import Learner
from mmdit.training.memory.assigning import assign
from mmdit.training.memory.shards import Stored
from mmdit.training.optim import (
    Optimizer,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from mmdit.training.step_report import Monitor
from mmdit.training.train_config import TrainConfig


@dataclass
class TrainState:
    """Everything that changes. `step` counts finished optimizer steps and is the only position:
    data order, noise, dropout and the learning rate are functions of `(seed, step)`."""

    learner: Learner
    optimizer: Optimizer
    ema: EMA | None
    monitor: Monitor
    signs: Signs | None = None
    schedule: AlphaSchedule | None = None
    step: int = 0

    @staticmethod
    def create(
        learner: Learner,
        config: TrainConfig,
        ema_config: EMAConfig,
        alpha_schedule: AlphaScheduleConfig | None = None,
    ) -> TrainState:
        optimizer = build_optimizer(
            learner,
            config.lr,
            config.weight_decay,
            config.betas,
            config.optimizer,
            config.offload_optimizer,
        )
        ema = EMA(ema_config, learner) if ema_config.enabled else None
        state = TrainState(learner, optimizer, ema, Monitor(tuple(learner.parts())))
        scheduled = alpha_schedule is not None and alpha_schedule.enabled
        if scheduled or not learner.sharded:  # signs would gather shards in every step
            state.signs = _signs(learner)
        if alpha_schedule and scheduled:
            state.schedule = AlphaSchedule(
                alpha_schedule, learner.parts(), optimizer, state.averages()
            )
        return state

    def averages(self) -> dict:
        """Return the averages by parameter; an empty dict if none are kept."""
        if self.ema is None:
            return {}
        return {p: self.ema.shadow[name] for name, p in self.ema.parameters.items()}

    def alphas(self) -> dict[str, float | None]:
        """Return, by expert, the alpha in force in its first adapter; None without adapters."""
        result: dict[str, float | None] = {}
        for name, part in self.learner.parts().items():
            layer = next(iter(adapters(part).values()), None)
            result[name] = None if layer is None else float(layer.alpha)
        return result

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, by the name of the file that holds them."""
        files = {
            "model": self.learner.stored_state(),
            "optimizer": optimizer_tensors(self.learner, self.optimizer),
        }
        if self.ema:
            files["ema"] = self.ema.shadow
        if self.signs:
            files["signs"] = self.signs.tensors()
        return files

    def notes(self) -> dict:
        """Return what a checkpoint holds in monitor.json."""
        notes = {"monitor": self.monitor.state()}
        if self.schedule:
            notes["alpha_schedule"] = self.schedule.state()
        return notes

    def restore(self, folder: Path) -> list[str]:
        """Take over the state of a checkpoint; return lines to print."""
        configured = alphas(self.learner.model)
        meta = checkpoint.Meta.read(folder)
        assign(
            self.learner.state_dict(),
            Stored(folder / "model.safetensors"),
            str(folder),
            fresh=lambda name: not self.learner.is_stored(name),
        )
        load_alphas(self.learner.model, meta.alphas)
        experts = tuple(f"model.{name}." for name in self.learner.parts() if name)
        load_optimizer_tensors(
            self.learner, self.optimizer, Stored(folder / "optimizer.safetensors"), experts
        )
        if self.ema:
            if not any(folder.glob("ema*")):
                raise ValueError(
                    f"{folder} has no EMA weights but ema.enabled is true: set ema.enabled to false"
                    " as it was"
                )
            assign(self.ema.shadow, Stored(folder / "ema.safetensors"), str(folder))
        if self.signs and (folder / "signs.safetensors").is_file():
            self.signs.restore(checkpoint.read_tensors(folder / "signs.safetensors"))
        self._restore_notes(folder)
        self.step = meta.step
        return [] if self.schedule else self._reach(configured)

    def _restore_notes(self, folder: Path) -> None:
        notes = checkpoint.read_notes(folder) or {}
        try:
            if notes:
                self.monitor.restore(notes["monitor"])
            if self.schedule and "alpha_schedule" in notes:
                self.schedule.restore(notes["alpha_schedule"])
            elif self.schedule:
                self.schedule.begin(self.monitor.histories)
                first = self.schedule.config.phases[0].name
                print(
                    f"{folder} holds no alpha schedule: it starts with phase {first!r}", flush=True
                )
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / 'monitor.json'} is not of this project: {error!r}"[:1000]
            ) from None

    def _reach(self, configured: dict[str, float]) -> list[str]:
        """Give adapters the alphas of the config where a checkpoint had others, as
        `alpha_schedule.on_change: preserve` would; return lines to print."""
        layers = adapters(self.learner.model)
        changed = {name: alpha for name, alpha in configured.items() if layers[name].alpha != alpha}
        if not changed:
            return []
        first, alpha = next(iter(changed.items()))
        line = (
            f"alpha of {len(changed)} adapters {layers[first].alpha:g} → {alpha:g}: they compute"
            " what they did and move at another pace; alpha_schedule.on_change has other ways"
        )
        averages = self.averages()
        for name, alpha in changed.items():
            keep_strength(layers[name], alpha, self.optimizer, averages)
        return [line]


def _signs(learner: Learner) -> Signs | None:
    """Return the sign history of the adapters; None if an expert trains no adapter."""
    if not adapters(learner.model):
        return None
    trained: dict[str, list[nn.Parameter]] = {}
    for name, part in learner.parts().items():
        trained[name] = [p for p in adapter_parameters(part).values() if p.requires_grad]
    return Signs(trained) if all(trained.values()) else None
