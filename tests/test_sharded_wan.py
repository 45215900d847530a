"""A Wan transformer in bfloat16 is cut over processes: frozen under a LoRA, and trained."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mmdit.scripts import train_t2v
from mmdit.training import checkpoint
from tests.test_trainer import run_ranks
from tests.test_wan_training import LORA, Shop

WORDS = {
    "lora": [LORA, "model.dtype=bfloat16", "train.lr=0.01"],
    "whole": ["train.precision=pure_bf16"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run both ways on two processes, copied and cut."""
    shop = Shop(tmp_path_factory.mktemp("sharded_wan"))
    shop.cache()
    run_ranks(shop.folder, 2, __file__)
    return shop.folder / "runs"


def one_rank(folder: Path) -> None:
    config, cache = folder / "wan.yaml", folder / "cache0"
    for name, words in WORDS.items():
        for way in ("ddp", "fsdp"):
            train_t2v.main(
                [
                    *("--config", str(config), "--train_cache_dir", str(cache), "--device", "cpu"),
                    f"experiment_name={name}_{way}",
                    f"parallel.type={way}",
                    *words,
                ]
            )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_lora_on_a_base_in_shards_is_the_one_on_copies(folder):
    assert losses(folder / "lora_fsdp") == losses(folder / "lora_ddp")
    stored = {}
    for way in ("ddp", "fsdp"):
        file = checkpoint.latest(folder / f"lora_{way}") / "lora.safetensors"
        stored[way] = checkpoint.read_tensors(file)
    assert stored["ddp"].keys() == stored["fsdp"].keys()
    for name, value in stored["ddp"].items():
        torch.testing.assert_close(stored["fsdp"][name], value, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_whole_models_of_16_bits_train_in_shards_as_in_copies(folder):
    """Gradients add up in another order, and are rounded to bfloat16 by copies."""
    cut, copied = losses(folder / "whole_fsdp"), losses(folder / "whole_ddp")
    assert cut[0] == copied[0]
    torch.testing.assert_close(torch.tensor(cut), torch.tensor(copied), rtol=1e-3, atol=0)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
