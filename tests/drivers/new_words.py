"""A translator for new words: a base that never saw two colours learns them by adapters of
cross-attention alone.

    python -m tests.drivers.new_words [--steps 900] [--adapter_steps 1000]  # 10 minutes, 2 cores

Trains the quickstart's model on moving shapes without the new colours, then adapts it on all of
them: LoRA and LoKr on the keys and values of cross-attention, and LoRA of the same size on
attention within the picture. Prints one JSON object: how often the colour is right for the new and
for the old words, before and after, how far each adapter moves its base, and what becomes of
attention.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from mmdit.data.moving_shapes.facts import COLORS
from mmdit.data.moving_shapes.oracle import oracle, score_samples
from mmdit.data.moving_shapes.prepare import Recipe, prepare_samples
from mmdit.data.moving_shapes.sentences import prompts
from mmdit.experiment.load import load_pipeline
from mmdit.scripts import cache_vtp_images, inspect_adapter, train_t2v
from mmdit.training.pipeline import SampleSettings

NEW = ("orange", "purple")
CROSS, WITHIN = "[cross.k,cross.v]", "[spatial.q,spatial.k,spatial.v,spatial.proj]"
ADAPTERS = {
    "lora_cross_kv": [f"lora.target_modules={CROSS}", "lora.rank=16", "lora.alpha=16"],
    "lokr_cross_kv": [
        f"lora.target_modules={CROSS}",
        "lora.type=lokr",
        "lora.factor=2",
        "lora.full_second=true",
    ],
    "lora_within": [f"lora.target_modules={WITHIN}", "lora.rank=8", "lora.alpha=8"],
}


def colours(run: Path, device: str) -> dict[str, float]:
    """Share of prompts whose colour is right, for new and old words."""
    pipeline, config = load_pipeline(run, device)
    right: dict[str, list[bool]] = {"new": [], "old": []}
    listed = [prompt for split in ("seen", "held_out") for prompt in prompts(split, False, 64, 64)]
    pixels = pipeline(
        [prompt.caption for prompt in listed],
        64,
        64,
        1,
        SampleSettings.of(config.train),
        batch_size=64,
    )
    correct = score_samples(oracle(pixels), [prompt.facts for prompt in listed])["color"].tolist()
    for prompt, good in zip(listed, correct, strict=True):
        right["new" if prompt.facts.objects[0].color in NEW else "old"].append(good)
    return {which: round(sum(own) / len(own), 4) for which, own in right.items()} | {
        "prompts": {k: len(v) for k, v in right.items()}
    }


def logits(told: dict, kind: str) -> dict[str, list[float]]:
    """Before and after, over the layers of a kind: the largest logit, and the mean spread of logits
    and entropy."""
    rows = [
        [row for name, row in told[which].items() if f".{kind}" in name]
        for which in ("before", "after")
    ]
    mean = lambda key: [round(sum(row[key] for row in some) / len(some), 3) for some in rows]
    return {
        "max_logit": [round(max(row["max_logit"] for row in some), 2) for some in rows],
        "logit_std": mean("logit_std"),
        "entropy": mean("mean_entropy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--adapter_steps", type=int, default=1000)
    parser.add_argument("--lr", default="5e-3", help="of the adapters")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, config = Path(name), "configs/quickstart.yaml"
        listed = (
            prepare_samples(folder / "data", Recipe(64, 64), args.count).read_text().splitlines()
        )
        known = [
            line
            for line in listed
            if json.loads(line)["facts"]["objects"][0]["color"] in set(COLORS) - set(NEW)
        ]
        assert 0 < len(known) < len(listed)
        for which, lines in (("all", listed), ("known", known)):
            (folder / f"data/{which}.jsonl").write_text("\n".join(lines))
            cache_vtp_images.main(
                [
                    "--config",
                    config,
                    "--meta_jsonl",
                    str(folder / f"data/{which}.jsonl"),
                    "--out_dir",
                    str(folder / which),
                    "--device",
                    args.device,
                ]
            )

        def train(run: str, cache: str, *words: str) -> Path:
            train_t2v.main(
                [
                    "--config",
                    config,
                    "--train_cache_dir",
                    str(folder / cache),
                    "--device",
                    args.device,
                    f"output_dir={folder}/runs",
                    f"experiment_name={run}",
                    "train.log_every_steps=100",
                    *words,
                ]
            )
            return folder / "runs" / run

        asked = folder / "asked.txt"
        asked.write_text("\n".join(f"a {color} circle on a white background" for color in COLORS))
        base = train("base", "known", f"train.max_steps={args.steps}")
        report = {"new": NEW, "base": colours(base, args.device)}
        for run, words in ADAPTERS.items():
            path = train(
                run,
                "all",
                f"train.max_steps={args.adapter_steps}",
                f"train.init_from={base}",
                f"train.lr={args.lr}",
                "lora.enabled=true",
                *words,
            )
            with contextlib.redirect_stdout(io.StringIO()):
                inspect_adapter.main(
                    [
                        "--base",
                        str(path),
                        "--prompts_file",
                        str(asked),
                        "--out",
                        str(folder / run),
                        "--device",
                        args.device,
                    ]
                )
            told = json.loads((folder / run / "report.json").read_text())
            total = told["budget"]["total"]
            report[run] = colours(path, args.device) | {
                "moved": round(total["ratio"], 4),
                "spectral": round(total["max_spectral_ratio"], 4),
            }
            report[run] |= {kind: logits(told, kind) for kind in ("spatial", "cross")}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
