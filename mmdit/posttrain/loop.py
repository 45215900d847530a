"""The loop of post-training: it runs the epochs of an algorithm, with evaluation, drift,
checkpoints and stop rules between them."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from mmdit.config import ConfigError
from mmdit.posttrain.dpo_offline import offline_updates
from mmdit.posttrain.online import online_epoch
from mmdit.posttrain.session import Session
from mmdit.posttrain.srpo import srpo_updates
from mmdit.terminal import is_memory_full
from mmdit.training import checkpoint
from mmdit.training.errors import RunError, record_failure
from mmdit.training.metrics import MetricsLog
from mmdit.training.trainer import StopRequest


def epochs_of(session: Session) -> tuple[Callable[[], dict[str, float]], int]:
    """Return the configured algorithm as a function that trains for one epoch and returns numbers
    to report, and the number of updates in an epoch."""
    config = session.config
    if config.in_single_updates:
        updates = srpo_updates if config.algorithm == "srpo" else offline_updates
        return updates(session), 1
    return partial(online_epoch, session), config.updates_per_epoch


def post_train(session: Session) -> bool:
    """Train to `train.max_steps`. Return True if the run came to its end or a stop rule ended it,
    False if it was asked to stop."""
    config, train, state, world = session.config, session.train, session.state, session.world
    epoch, updates = epochs_of(session)
    if state.step % updates:
        raise ConfigError(
            "posttrain.updates_per_epoch",
            f"is {updates}, but the run stands at update {state.step}, within an epoch of so many;"
            " set it as it was, and change it at an update that it divides",
        )
    if world.is_main:
        put_other_best_aside(session)
        session.log = MetricsLog(session.run_dir, state.step or -1, session.tracker)
    if state.step == 0:
        session.report({"step": 0, "drift": 0.0, **session.evaluate()})
    ended = has_ended(session)
    with StopRequest().listening() as stop, rescuing(session) as kept:
        while not ended:
            begin = time.perf_counter()
            values = epoch()
            kept.look()
            seconds = time.perf_counter() - begin
            drift = session.stop_rules.drift()
            values |= {"step": state.step, "seconds": seconds, "drift": drift}
            finite = all(math.isfinite(value) for value in values.values())
            broken = world.any(not finite or bool(values.get("skipped")))
            reason = session.stop_rules.reason(drift)
            if broken:
                reason = "a loss or gradient is not finite"
            asked = world.any(stop.asked)
            ended = state.step >= train.max_steps or reason is not None
            # not when asked to stop: a resumed run would have one evaluation more than an unbroken
            # one
            if ended or state.step // updates % config.eval_every_epochs == 0:
                values |= session.evaluate()
            session.report(values, "" if broken else reason or "")
            if ended or asked or state.step % train.save_every_steps < updates:
                session.save(session.files(), False)
                kept.saved = state.step
            if reason:
                world.print(f"stopped at update {state.step}: {reason}")
            if broken:
                raise RunError(
                    f"stopped at update {state.step}: {reason}; what was saved before is whole."
                    " Look at the rewards and at train.lr, and start again from there"
                )
            if asked and not ended:
                world.print(f"stopped on request at update {state.step}; continue with --resume")
                return False
    if session.log:
        session.log.close()
        best = session.run_dir / "best"
        if best.is_dir():
            update = int(session.history["best"][1])
            print(f"the best on evaluation prompts, of update {update}: {best}")
    return True


def put_other_best_aside(session: Session) -> None:
    """Rename `best/` if it belongs to an attempt from which this run does not continue: until this
    run has a best checkpoint, it would be mistaken for that."""
    folder = session.run_dir / "best"
    steps = {checkpoint.step_of(path) for path in checkpoint.complete(folder)}
    best = session.history.get("best")
    if steps and (best is None or int(best[1]) not in steps):
        elsewhere = folder.with_name(f"best.before-{secrets.token_hex(4)}")
        folder.rename(elsewhere)
        print(f"{folder} is of an earlier attempt: it is now {elsewhere.name}", flush=True)


class Kept:
    """The newest state from which a run can continue; it lies between two epochs. `saved`: the
    update of the newest checkpoint."""

    def __init__(self, session: Session):
        self.session, self.saved = session, session.state.step
        self.look()

    def look(self) -> None:
        """Note the present state as one from which the run can continue."""
        self.step, self.history = self.session.state.step, dict(self.session.history)

    def save(self) -> None:
        """Save the updates since the last checkpoint, unless a further update has been made or
        begun, or there are several processes. Print a line about it."""
        session, step = self.session, self.session.state.step
        if session.world.size > 1 or session.moving or not self.saved < step == self.step:
            return
        session.history = self.history
        session.save(session.files(), False)
        print(f"saved at update {step} before it ends; continue with --resume", flush=True)


@contextlib.contextmanager
def rescuing(session: Session) -> Iterator[Kept]:
    """Save the updates since the last checkpoint before an error ends the run, and record the
    error: a reward that fails does not make the weights worse. With several processes nothing is
    saved, as one cannot know how far the others have come."""
    kept, config = Kept(session), session.config
    try:
        yield kept
    except Exception as error:
        step, rank = session.state.step, session.world.rank
        record_failure(session.run_dir, "training", step, rank, error)
        try:
            kept.save()
        except Exception as second:
            print(f"the updates since {kept.saved} could not be saved: {second}", flush=True)
        if isinstance(error, torch.OutOfMemoryError) or is_memory_full(error):
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(
                f"the memory is full in update {step + 1} on rank {rank} with micro-batches of"
                f" {config.micro_batch} samples ({first}). Reduce posttrain.micro_batch (an update"
                " stays the same) or the size, or set model.checkpointing: true."
                f" {checkpoint.how_to_go_on(session.run_dir)}"
            ) from error
        raise


def has_ended(session: Session) -> bool:
    """Return whether a resumed run has nothing left to do; if so, print why."""
    step, most, world = session.state.step, session.train.max_steps, session.world
    if step >= most:
        world.print(f"nothing left to do: train.max_steps is {most}; raise it to train further")
        return True
    drift = session.stop_rules.drift() if step and session.config.max_drift else 0.0
    reason = session.stop_rules.reason(drift)
    if reason:
        world.print(
            f"nothing is trained, for a stop rule ended this run at update {step}: {reason}; raise"
            " the limit to train further"
        )
    return reason is not None
