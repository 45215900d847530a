"""Limits for a config that comes with weights: it may not choose code to run, fetch anything, or
ask for all memory. `config` is an ExperimentConfig, a type that this layer does not import."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmdit import config as config_io
from mmdit.config import ConfigError
from mmdit.training import checkpoint


def refuse_foreign_code(config, overrides: list[str], source: Path) -> None:
    """Raise ConfigError if the config names a folder of Python code that the command line does not
    name. Weights are data, and must not choose which code is run."""
    repository = config.tokenizer.repo_path
    asked = config_io.apply_overrides({}, overrides).get("tokenizer")
    if repository is not None and not (
        isinstance(asked, dict) and asked.get("repo_path") == repository
    ):
        raise ConfigError(
            "tokenizer.repo_path",
            f"is {repository!r} in the config stored in {source}: its Python code would be run. "
            f"If you trust that folder add tokenizer.repo_path={repository}; to use our own VTP, "
            "tokenizer.repo_path=null",
        )


def stay_offline(config, overrides: list[str]):
    """Return the config with a text encoder that is not fetched. A config that comes with weights
    may name an encoder of a hub, but it is fetched only if the command line names it or sets
    `local_files_only`."""
    encoder = config.text_encoder
    if encoder.local_files_only or asks_for("text_encoder.name_or_path", overrides):
        return config
    if asks_for("text_encoder.local_files_only", overrides):
        return config
    return replace(config, text_encoder=replace(encoder, local_files_only=True))


def asks_for(key: str, overrides: list[str]) -> bool:
    """Return whether the command line sets `key` (a dotted name)."""
    section, _, name = key.rpartition(".")
    asked = config_io.apply_overrides({}, overrides).get(section)
    return isinstance(asked, dict) and name in asked


def check_sizes(config, weights: checkpoint.Weights) -> None:
    """Raise ValueError, before anything is built, if the stored config asks for a network that
    cannot be the stored one: a few bytes of config could ask for all memory."""
    shapes = [tuple(tensor.shape) for tensor in weights.tensors.values()]
    longest = max((length for shape in shapes for length in shape), default=0)
    model, text, lora = config.model, config.text_encoder, config.lora
    ranks = [
        ("lora.rank", lora.rank),
        *(("lora.per_module", entry.rank) for entry in lora.per_module),
    ]
    lengths = [(f"model.{name}", length) for name, length in model.lengths().items()]
    lengths.append(("text_encoder.dim", text.dim))
    if lora.enabled and lora.type != "lokr":
        lengths += ranks
    depths = [("model.depth", model.depth), ("text_encoder.depth", text.depth)]
    for asked, limit, what in (
        (lengths, longest, "elements along an axis"),
        (depths, len(shapes), "tensors"),
    ):
        for name, value in asked:
            if value is not None and value > limit:
                raise ValueError(
                    f"{weights.source} does not fit its own config: {name} is {value}, its weights"
                    f" have at most {limit} {what}; it is damaged, or its config was changed"
                )
