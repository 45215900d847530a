"""`mmdit COMMAND …` for configs that also name the ablation arms of tests/drivers/arms:

    python -m tests.drivers.gpu_arms reproduce arms_128 --record
    python -m tests.drivers.gpu_arms train --config … flow_matching.contrast=0.05
    python -m tests.drivers.gpu_arms train --config … model.type=arms 'model.changes=[u_skips]'

`flow_matching:` takes the weights `contrast`, `self_alignment` and `vtp_alignment`, and the share
`token_times`, `captions:` a `length`, `video:` whether clips come `both_ways`, and `model.type` may
be `arms` with `changes`, in this process alone; all else, from the cache to the score, is the
product's. A recipe names this module (`module:`), so that every command of it is run here. Data are
moving shapes.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch

from mmdit.__main__ import start
from mmdit.config import ConfigError
from mmdit.data.batches import batch_plan, latent_batches, stores
from mmdit.experiment import build, experiment_config, run
from mmdit.models import ModelConfig, build_model
from mmdit.rng import key
from mmdit.training import checkpoint
from tests.drivers.arms.both_ways import ArmsVideoConfig, with_reversed, worded
from tests.drivers.arms.captions import ArmsCaptionsConfig, drawn_lengths, with_facts
from tests.drivers.arms.model import ArmsConfig, build_arms
from tests.drivers.arms.objective import ArmsFlowMatching, ArmsFlowMatchingConfig

build_learner, weights_of_folder = build.build_learner, checkpoint._of_folder


def build_any(config, latent_channels: int, text_dim: int, tread=None):
    """Return the network of `config`, as `build_model` does, or one with arms."""
    builder = build_arms if isinstance(config, ArmsConfig) else build_model
    return builder(config, latent_channels, text_dim, tread)


def training_learner(config, spec, network=build.build_network, *encoder):
    """Return what `build_learner` does, with the arms of the loss."""
    learner = build_learner(config, spec, network, *encoder)
    if config.train.objective == "ddpm" and "sprint" in getattr(config.model, "changes", ()):
        raise ConfigError(
            "train.objective",
            "is ddpm, but sprint leaves out parts of samples by the last digits of their times,"
            " which its levels have in common; use flow_matching",
        )
    section = config.flow_matching
    if config.train.objective == "flow_matching":
        check_token_times(config)
    arms = isinstance(section, ArmsFlowMatchingConfig) and (
        section.contrast or section.self_alignment or section.vtp_alignment
    )
    if arms and config.train.objective == "flow_matching":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(config.seed, "arms") & (2**63 - 1))
            learner.objective = ArmsFlowMatching(config, learner)
    return learner


def check_token_times(config) -> None:
    """Refuse times of tokens that nothing would see."""
    section, changes = config.flow_matching, getattr(config.model, "changes", ())
    linear = (section.path, section.prediction) == ("linear", "velocity")
    complete = "token_times" in changes and section.self_alignment and linear
    if getattr(section, "token_times", 0) and not complete:
        raise ConfigError(
            "flow_matching.token_times",
            f"is {section.token_times}; needs model.changes with token_times,"
            " flow_matching.self_alignment above 0, path linear and prediction velocity",
        )


def weights_of_model(*words):
    """Return weights to sample with or to export: what a loss trains beside the model stays."""
    weights = weights_of_folder(*words)
    mine = {name: value for name, value in weights.tensors.items() if name[:10] != "objective."}
    weights.tensors = mine
    return weights


@contextmanager
def arms():
    """Let configs name the arms inside the block."""
    with (
        patch.object(experiment_config, "ModelConfig", ModelConfig | ArmsConfig),
        patch.object(experiment_config, "FlowMatchingConfig", ArmsFlowMatchingConfig),
        patch.object(experiment_config, "CaptionsConfig", ArmsCaptionsConfig),
        patch.object(experiment_config, "VideoConfig", ArmsVideoConfig),
        patch.object(batch_plan.BatchPlan, "batch", with_reversed),
        patch.object(latent_batches.LatentBatches, "_batch", worded),
        patch.object(stores, "all_captions", with_facts),
        patch.object(latent_batches, "drawn_captions", drawn_lengths),
        patch.object(build, "build_model", build_any),
        patch.object(run, "build_learner", training_learner),
        patch.object(checkpoint, "_of_folder", weights_of_model),
    ):
        yield


if __name__ == "__main__":
    with arms():
        start()
