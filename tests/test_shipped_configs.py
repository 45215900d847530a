"""Every YAML file that ships decodes, and the network that it describes can be built: with the
sizes of the file, without memory for it; those of Wan over a release of the same layout, but
tiny."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vtp.models.vtp_hf import VTPModel

from mmdit.config import decode, encode, load
from mmdit.experiment.build import build_learner
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.interfaces import LatentSpec
from mmdit.vtp_training.pretrain_config import PretrainConfig
from tests.helpers.wan_release import DIT, make_release

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TOKENIZERS = sorted((ROOT / "VTP/configs").rglob("*.yaml"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Return a release of Wan for a config: made once for every number of channels."""
    made: dict[tuple[int, int, bool], Path] = {}

    def release(config: ExperimentConfig) -> Path:
        channels = config.tokenizer.latent_d
        picture = 20 if config.tokenizer.picture != "none" else 0  # the mask, and the picture
        shape = (channels + picture, channels, bool(config.model.expert or config.experts.enabled))
        if shape not in made:
            sizes = replace(DIT, in_dim=shape[0], out_dim=shape[1])
            made[shape] = make_release(tmp_path_factory.mktemp("release"), sizes, pair=shape[2])
        return made[shape]

    return release


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_shipped_config_decodes_and_builds(path, releases):
    config = load_experiment_config(path)
    assert decode(ExperimentConfig, encode(config)) == config
    spec = LatentSpec(config.tokenizer.latent_d, config.tokenizer.latent_f)
    if config.model.released:
        folder = releases(config)
        words = [f"{part}.name_or_path={folder}" for part in ("text_encoder", "model")]
        learner = build_learner(load_experiment_config(path, words), spec)
    else:
        with torch.device("meta"):
            learner = build_learner(config, spec)
    weights = list(learner.parameters())
    assert weights and any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize("path", TOKENIZERS, ids=named)
def test_a_shipped_tokenizer_config_decodes_and_builds(path):
    config = load(PretrainConfig, path)
    assert decode(PretrainConfig, encode(config)) == config
    with torch.device("meta"):
        assert len(list(VTPModel(config.network()).parameters())) > 10


def test_there_are_configs():
    assert len(CONFIGS) >= 25 and len(TOKENIZERS) >= 4
