"""The loop of post-training: an algorithm's epochs, with evaluation, drift, checkpoints and stop
rules between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from mmdit.posttrain.dpo_offline import offline_updates
from mmdit.posttrain.online import online_epoch
from mmdit.posttrain.session import Session
from mmdit.posttrain.srpo import srpo_updates
from mmdit.training.errors import RunError, record_failure
from mmdit.training.metrics import MetricsLog
from mmdit.training.trainer import StopRequest


def epochs_of(session: Session) -> tuple[Callable[[], dict[str, float]], int]:
    """Return the configured algorithm as a function that trains for one epoch and returns numbers
    to report, and the number of updates in an epoch."""
    config = session.config
    if config.algorithm == "srpo":
        return srpo_updates(session), 1
    if config.algorithm == "dpo" and config.dpo.source == "offline":
        return offline_updates(session), 1
    return partial(online_epoch, session), config.updates_per_epoch


def post_train(session: Session) -> bool:
    """Train to `train.max_steps`. Return True when the run came to its end or a stop rule ended it,
    False when it was asked to stop."""
    config, train, state, world = session.config, session.train, session.state, session.world
    epoch, updates = epochs_of(session)
    if world.is_main:
        session.log = MetricsLog(session.run_dir, state.step or -1, session.tracker)
    if state.step == 0:
        session.report({"step": 0, "drift": 0.0, **session.evaluate()})
    ended = has_ended(session)
    with StopRequest().listening() as stop:
        while not ended:
            begin = time.perf_counter()
            values = epoch()
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
            # not when asked to stop: the resumed run would have one evaluation more than another
            if ended or state.step // updates % config.eval_every_epochs == 0:
                values |= session.evaluate()
            session.report(values)
            if ended or asked or state.step % train.save_every_steps < updates:
                session.save(session.files(), False)
            if reason:
                world.print(f"stopped at update {state.step}: {reason}")
            if broken:
                error = RunError(
                    f"stopped at update {state.step}: {reason}; what was saved before is whole."
                    " Look at the rewards and at train.lr, and start again from there"
                )
                record_failure(session.run_dir, "training", state.step, world.rank, error)
                raise error
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


def has_ended(session: Session) -> bool:
    """Return whether a resumed run has nothing left to do, and say why."""
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
