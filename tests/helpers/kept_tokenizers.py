"""Tokenizers' networks that are read once: hundreds of tests open the same files, 40 to 60 ms each
time, and nothing trains these networks."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

from mmdit.tokenizers import vtp, wan_vae

networks: dict[tuple, tuple[nn.Module, list[int]]] = {}


def state_of(folder: Path) -> list[tuple]:
    """Return what changes when a file changes, or one in a folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]


def versions(network: nn.Module) -> list[int]:
    """Return how often each tensor was written."""
    return [tensor._version for tensor in network.state_dict(keep_vars=True).values()]


def kept(load: Callable) -> Callable:
    """Return a function that reads what `load` does, unless it did so already and nothing has
    changed since: neither the files nor the network."""

    def loaded(*words) -> nn.Module:
        *config, place = words
        if config and config[0].repo_path is not None:
            return load(*words)
        key = (load, *state_of(place))
        network, before = networks.get(key, (None, []))
        if network is None or versions(network) != before:
            network = load(*words)
            networks[key] = network, versions(network)
        return network

    return loaded


@contextmanager
def kept_tokenizers():
    with pytest.MonkeyPatch.context() as patch:
        for module in (vtp, wan_vae):
            patch.setattr(module, "_load", kept(module._load))
        yield
