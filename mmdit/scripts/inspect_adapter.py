"""What an adapter does to its base: how far it moves the weights, what attention makes of it, and the same samples with and without.

    python -m mmdit.scripts.inspect_adapter --base runs/my_run                          the adapter that the run holds
    python -m mmdit.scripts.inspect_adapter --base Wan2.1-T2V-1.3B --adapter style.safetensors --max_ratio 0.3
    python -m mmdit.scripts.inspect_adapter --base runs/base --adapter new.safetensors --prompts_file prompts.txt --out looked

--base: Wan weights (any layout; read layer by layer), or a run, checkpoint or export of ours. --adapter: LoRA, DoRA or LoKr in any
format. With prompts (a base of ours, or a whole Wan release) it samples with the same noise before and after and measures the
attention while it does; writes before_after.png and report.json into --out. Exit code 1 beyond a limit.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from mmdit.adapters import adapters, merge, remove
from mmdit.diagnostics.adapters import Change, delta_budget, format_budget, summarise
from mmdit.diagnostics.attention import observed, summary
from mmdit.experiment import load_pipeline
from mmdit.interop.lora_formats import load_lora, read_lora
from mmdit.interop.wan import infer_config, locate, official_names
from mmdit.interop.wan_release import release_config
from mmdit.models.wan import WanDiT
from mmdit.scripts import friendly
from mmdit.training.media import contact_sheet, save_image
from mmdit.training.pipeline import SampleSettings
from mmdit.weights import Checkpoint

LIMITS = {"max_ratio": "of ‖ΔW‖/‖W‖ over all adapted layers", "max_layer_ratio": "of it in one layer",
          "max_spectral_ratio": "of the spectral norms in one layer", "max_logit": "of an attention logit with the adapter"}


def wan_changes(base: str, adapter: str, expert: str | None) -> list[Change]:
    """Of the adapted layers of Wan weights, one at a time: no model is built."""
    stored = Checkpoint(locate(Path(base), expert))
    names, _, _ = official_names(list(stored.entries))
    with torch.device("meta"):
        model = WanDiT(infer_config({names[name]: entry.shape for name, entry in stored.entries.items() if name in names}, base))
    updates, changes = read_lora(model, adapter, expert).updates, []
    for key, tensor in tqdm(stored.tensors(), total=len(stored.entries), desc="layers", unit="tensor"):
        layer = names.get(key, "").removesuffix(".weight")
        if layer in updates and names[key].endswith(".weight"):
            linear = torch.nn.Linear(*tensor.shape[::-1], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(tensor.float(), requires_grad=False)
            changes += delta_budget([(layer, updates[layer].adapter(linear))])
    return changes


def compare(args: argparse.Namespace, prompts: list[str]) -> dict:
    """Samples and attention without and with the adapter, from the same noise."""
    report, pixels = {}, {}
    for which in ("before", "after"):
        pipeline, config = load_pipeline(args.base, args.device, lora=which == "after" and not args.adapter)
        if which == "after" and args.adapter:
            load_lora(pipeline.learner.model, args.adapter)
            merge(pipeline.learner.model)
        frames = args.frames or config.video.num_frames
        with observed(pipeline.learner.model) as found:
            pixels[which] = pipeline(prompts, config.video.width, config.video.height, frames, SampleSettings.of(config.train))
        report[which] = summary(found)
    both = torch.stack([pixels["before"], pixels["after"]], 1).flatten(0, 1)
    captions = [f"{which}: {prompt}" for prompt in prompts for which in ("before", "after")]
    save_image(contact_sheet(both, captions, 4 if frames == 1 else 1), args.out / "before_after.png")
    moved = (pixels["after"] - pixels["before"]).abs().flatten(1).mean(1)
    return report | {"pixels_moved": {prompt: value for prompt, value in zip(prompts, moved.tolist(), strict=True)}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--expert", choices=("high", "low"), help="of a pair of Wan experts")
    parser.add_argument("--prompts_file", help="one prompt a line")
    parser.add_argument("--frames", type=int, help="default: the config's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder for report.json and before_after.png")
    for name, what in LIMITS.items():
        parser.add_argument(f"--{name}", type=float, help=f"limit {what}")
    args = parser.parse_args(argv)
    with friendly():
        if args.prompts_file and not args.out:
            raise ValueError("--prompts_file needs --out, a folder for what is drawn")
        ours = not args.adapter or _is_ours(args.base)
        if args.prompts_file and not (ours or release_config(args.base)):
            raise ValueError(f"--prompts_file draws, but {args.base} is a transformer without text encoder and VAE; name the release's folder")
        if ours:
            model = load_pipeline(args.base, "cpu", lora=None)[0].learner.model
            if args.adapter:
                load_lora(remove(model), args.adapter)
            if not adapters(model):
                raise ValueError(f"{args.base} holds no adapter: name one with --adapter")
            changes = delta_budget(adapters(model).items())
        else:
            changes = wan_changes(args.base, args.adapter, args.expert)
        report = {"budget": summarise(changes)}
        print(format_budget(report["budget"]))
        if args.prompts_file:
            prompts = [line.strip() for line in Path(args.prompts_file).read_text(encoding="utf-8").splitlines() if line.strip()]
            report |= compare(args, prompts)
            print(f"\n{'attention':32}  {'logit std':>17}  {'largest logit':>17}  {'entropy':>17}  {'on padding':>17}")
            for name, row in report["after"].items():
                cells = (f"{report['before'][name][key]:8.3f} {row[key]:8.3f}" for key in ("logit_std", "max_logit", "mean_entropy", "padding_mass"))
                print(f"{name:32}  {'  '.join(cells)}")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
        total = report["budget"]["total"]
        found = {"max_ratio": total["ratio"], "max_layer_ratio": total["max_ratio"], "max_spectral_ratio": total["max_spectral_ratio"],
                 "max_logit": max((row["max_abs_logit"] for row in report.get("after", {}).values()), default=None)}
        beyond = [f"{name} is {found[name]:.4g}, the limit {limit}" for name in LIMITS
                  if (limit := getattr(args, name)) is not None and found[name] is not None and found[name] > limit]
        if args.max_logit is not None and found["max_logit"] is None:
            raise ValueError("--max_logit needs --prompts_file: logits are measured while drawing")
        for line in beyond:
            print(f"beyond the limit: {line}")
    return 1 if beyond else 0


def _is_ours(base: str) -> bool:
    """A run, a checkpoint folder or an export, and not Wan weights."""
    path = Path(base)
    if path.is_dir():
        return (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with safe_open(path, "pt") as handle:
        return "mmdit" in (handle.metadata() or {})


if __name__ == "__main__":
    raise SystemExit(main())
