"""`mmdit COMMAND …` for configs that also name the plain networks to compare with:

    python -m tests.drivers.gpu_baselines reproduce arms_baselines --record
    python -m tests.drivers.gpu_baselines train --config … 'model={type: plain_dit, dim: 320}'

`model.type` may be `plain_dit` or `plain_latte` (tests/helpers), in this process alone; all
else, from the cache to the score, is the product's. A recipe names this module (`module:`), so that
every command of it is run here.
"""

from contextlib import contextmanager
from unittest.mock import patch

from mmdit.__main__ import start
from mmdit.experiment import build, experiment_config
from mmdit.models import ModelConfig, build_model
from tests.helpers.plain_dit import PlainDiT, PlainDiTConfig
from tests.helpers.plain_latte import PlainLatte, PlainLatteConfig

NETWORKS = {PlainDiTConfig: PlainDiT, PlainLatteConfig: PlainLatte}


def build_any(config, latent_channels: int, text_dim: int, tread=None):
    """Return the network of `config`, as `build_model` does, or a plain one."""
    plain = NETWORKS.get(type(config))
    if plain is None:
        return build_model(config, latent_channels, text_dim, tread)
    return plain(config, latent_channels, text_dim)


@contextmanager
def baselines():
    """Let configs name the plain networks inside the block."""
    union = ModelConfig | PlainDiTConfig | PlainLatteConfig
    with (
        patch.object(experiment_config, "ModelConfig", union),
        patch.object(build, "build_model", build_any),
    ):
        yield


if __name__ == "__main__":
    with baselines():
        start()
