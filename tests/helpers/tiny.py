"""Runs so small that a test can make them: a config, a cache and the commands, called as a person
calls them."""

import json
from pathlib import Path

import pytest
import torch

from mmdit.diffusion import SamplerConfig
from mmdit.scripts import cache_moving_shapes, train_t2v
from mmdit.training import checkpoint
from mmdit.training.pipeline import SampleSettings

FOUR_STEPS = SampleSettings(SamplerConfig(steps=4))  # of the default 50, which tell no more here
TOKENIZER = "tokenizer={type: dummy, latent_d: 8}"
TINY_MODEL = [
    TOKENIZER,
    *(f"text_encoder.{word}" for word in ("dim=16", "depth=1", "num_heads=2")),
    *(f"model.{word}" for word in ("size=null", "dim=16", "depth=2", "num_heads=2")),
]
CONFIG = """\
experiment_name: base
output_dir: {folder}/runs
num_workers: 0
video: {{width: 48, height: 32}}
tokenizer: {{type: dummy, latent_d: 8}}
text_encoder: {{type: byte_level, dim: 16, depth: 1, num_heads: 2}}
model: {{dim: 16, depth: 2, num_heads: 2, window_size: 2}}
train:
  precision: fp32
  batch_size: 4
  lr: 1.0e-2
  warmup_steps: 0
  max_steps: 3
  log_every_steps: 1
  save_every_steps: 2
  sample_num_steps: 2
  sample_prompts: [a large red star on a navy background]
ema: {{decay: 0.5}}
"""


class Workshop:
    """A folder with a config (48x32 pictures of 3x2 latent cells), caches made on request, and
    runs."""

    def __init__(self, folder):
        self.folder = folder
        self.config = folder / "tiny.yaml"
        if (
            not self.config.exists()
        ):  # ranks share the folder: one would read what another has half written
            self.config.write_text(CONFIG.format(folder=folder))

    def cache(self, name: str, *words: str, count: int = 8):
        """Generated samples in `<folder>/<name>`, cached with the config and the overrides `words`
        (options first)."""
        out = self.folder / name
        if not out.exists():
            cache_moving_shapes.main(
                [
                    "--config",
                    str(self.config),
                    "--out_dir",
                    str(out),
                    "--count",
                    str(count),
                    "--device",
                    "cpu",
                    *words,
                ]
            )
        return out

    def train_words(self, name: str, *words: str, cache=None) -> list[str]:
        """The arguments of `train_t2v` for the run `<folder>/runs/<name>`."""
        cache = cache or self.cache("pictures")
        return [
            "--config",
            str(self.config),
            "--train_cache_dir",
            str(cache),
            "--device",
            "cpu",
            *words,
            f"experiment_name={name}",
        ]

    def train(self, name: str, *words: str, cache=None):
        train_t2v.main(self.train_words(name, *words, cache=cache))
        return self.folder / "runs" / name


def trained_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights, averages and moments of the newest checkpoint of a run."""
    tensors = {}
    for file in ("model", "ema", "optimizer"):
        stored = checkpoint.read_tensors(checkpoint.latest(run) / f"{file}.safetensors")
        tensors |= {f"{file} {key}": value for key, value in stored.items()}
    return tensors


def forget_sums(folder):
    """Make a changed checkpoint look as one of an earlier version, whose files have no check
    sums."""
    path = folder / "checkpoint.json"
    row = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: row[key] for key in row if key != "files"}), encoding="utf-8")


def refused(capsys, main, words: list, *expected: str) -> str:
    """The command ends with code 2 and one message, no stack trace, which holds every one of
    `expected`; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    message = capsys.readouterr().err
    message = message[message.index("error: ") :]
    assert stop.value.code == 2 and "Traceback" not in message
    for part in expected:
        assert part in message, f"{part!r} is not in: {message}"
    return message
