"""Train three tiny models (pictures, clips, a LoRA) and print every loss to the last bit.

    python -m tests.drivers.loss_compare > before.json      # on one commit
    python -m tests.drivers.loss_compare > after.json  # on another; then `diff` the two

A refactoring should change nothing: run this on both commits, on the same machine. It uses the
commands alone, so it also runs on a commit whose modules were arranged differently. The `weights`
of each run are a hash of the trained tensors.
"""

import contextlib
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmdit.scripts import cache_moving_shapes, train_t2v

CONFIG = """\
output_dir: {folder}/runs
num_workers: 0
video: {{width: 96, height: 64, fps: 8}}
text_encoder: {{type: byte_level, dim: 32, depth: 1, num_heads: 2}}
model:
  {{dim: 64, depth: 4, num_heads: 2, window_size: 2, dropout: 0.1,
    spatial: [window, shifted, window, frame]}}
flow_matching: {{time: logit_normal, shift: 1.5}}
train:
  precision: fp32
  batch_size: 8
  lr: 2.0e-3
  warmup_steps: 5
  max_steps: 30
  log_every_steps: 1
  save_every_steps: 30
  val_every_steps: 10
  cfg_dropout_prob: 0.1
ema: {{decay: 0.9}}
"""
RUNS = {
    "t2i": [],
    "t2v": ["video.num_frames=8", "video.image_fraction=0.34", "train.init_from={folder}/runs/t2i"],
    "lora": [
        "lora={{enabled: true, rank: 4, dropout: 0.1, train_lora_only: true}}",
        "train.init_from={folder}/runs/t2i",
    ],
}


def losses_of(record: dict) -> dict:
    """Return what a line of `metrics.jsonl` says of losses; `float.hex` rounds nothing."""
    known = {key: value for key, value in record.items() if "loss" in key and value is not None}
    return {key: float(value).hex() for key, value in known.items()}


def train(folder: Path, config: Path, name: str, words: list[str]) -> dict:
    """Train one run from its own cache and return its losses, as hexadecimal floats, and a hash of
    its weights."""
    words = [word.format(folder=folder) for word in words]
    words = [f"experiment_name={name}", *words]
    cache = folder / f"cache_{name}"
    shared = ["--config", str(config), "--device", "cpu"]
    cache_moving_shapes.main([*shared, "--out_dir", str(cache), "--count", "48", *words])
    train_t2v.main([*shared, "--train_cache_dir", str(cache), *words])
    run = folder / "runs" / name
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [losses_of(record) for record in records]
    digest = hashlib.sha256()
    checkpoint = max((run / "checkpoints").iterdir())
    for path in sorted(checkpoint.glob("*.safetensors")):
        for key, value in sorted(load_file(path).items()):
            digest.update(
                f"{path.name} {key}".encode()
                + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return {"losses": losses, "weights": digest.hexdigest()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(CONFIG.format(folder=folder), encoding="utf-8")
        with contextlib.redirect_stdout(sys.stderr):
            results = {name: train(folder, config, name, words) for name, words in RUNS.items()}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
