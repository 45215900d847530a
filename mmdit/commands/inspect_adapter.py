"""Tell, from files, what an adapter does to its base: see `mmdit.scripts.inspect_adapter`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from mmdit.adapters import adapters, merge, remove
from mmdit.adapters.lora import before_differences, differences
from mmdit.diagnostics.adapter_norms import Change, delta_budget, difference_budget
from mmdit.diagnostics.attention_statistics import mean_over_heads, observed
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.interop.lora_formats import load_lora, read_lora
from mmdit.interop.wan_weights import (
    infer_config,
    left_out,
    locate,
    note_of_name,
    official_names,
)
from mmdit.models.wan import WanDiT
from mmdit.training.expert_choice import joint_choice
from mmdit.training.media import contact_sheet, save_image
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.weights import Checkpoint, check_fits, check_numbers


def changes(base: str, adapter: str | None, expert: str | None) -> list[Change]:
    """Return the change of each adapted layer, and of each parameter with a whole difference.
    `base` is a run, with its own or another `adapter`, or Wan weights. ValueError if there is no
    adapter."""
    if adapter and not is_ours(base):
        _say(note_of_name(adapter, expert))
        return wan_changes(base, adapter, expert)
    pipeline, config = load_pipeline(base, "cpu", lora=None, wanted=expert)
    name, model = _chosen(pipeline, config, expert, base)
    if adapter:
        _say(note_of_name(adapter, name))
        load_lora(remove(model), adapter, name)
    whole = differences(model)
    if not adapters(model) and not whole:
        raise ValueError(f"{base} holds no adapter: name one with --adapter")
    before = before_differences(model)
    return delta_budget(adapters(model).items()) + difference_budget(whole, before)


def _chosen(
    pipeline: Pipeline, config: ExperimentConfig, expert: str | None, base: str
) -> tuple[str | None, nn.Module]:
    """Return the name and the network of the expert to inspect, and print which it is; for our own
    pairs both experts, unless one is asked for."""
    choice = joint_choice(pipeline, config, expert, base)
    _say(choice.said)
    return choice.name, choice.network


def _say(text: str) -> None:
    if text:
        print(text)


def wan_changes(base: str, adapter: str, expert: str | None) -> list[Change]:
    """Return the change of each adapted layer of Wan weights, which are read one at a time: no
    model is built. ValueError if no model could be made of them, as if they are quantised."""
    stored = Checkpoint(locate(Path(base), expert))
    names, _, _ = official_names(list(stored.entries))
    shapes = {names[name]: entry.shape for name, entry in stored.entries.items() if name in names}
    with torch.device("meta"):
        model = WanDiT(infer_config(shapes, base))
    check_fits(model, stored, names, base, left_out(names))
    content, changes = read_lora(model, adapter, expert), []
    updates = content.updates
    count = len(stored.entries)
    for key, tensor in tqdm(stored.tensors(), total=count, desc="layers", unit="tensor"):
        layer = names.get(key, "").removesuffix(".weight")
        if layer in updates and names[key].endswith(".weight"):
            check_numbers(names[key], tensor, base)
            linear = torch.nn.Linear(*tensor.shape[::-1], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(tensor.float(), requires_grad=False)
            changes += delta_budget([(layer, updates[layer].adapter(linear))])
        if names.get(key) in content.differences:
            name = names[key]
            change = {name: content.differences[name]}
            changes += difference_budget(change, {name: tensor})
    return changes


def compare(
    base: str,
    adapter: str | None,
    prompts: list[str],
    sheet: Path,
    frames: int | None = None,
    device: str = "auto",
    expert: str | None = None,
) -> dict:
    """Compare samples and attention without and with the adapter, from the same noise, and return
    the report; `sheet` gets the samples side by side. In a pair, only one expert has the adapter,
    and only its attention is measured."""
    report, pixels = {}, {}
    for which in ("before", "after"):
        pipeline, config = load_pipeline(base, device, lora=None)
        name, model = _chosen(pipeline, config, expert, base)
        if which == "after" and adapter:
            load_lora(remove(model), adapter, name)
        if which == "after":
            merge(model)
        for network in pipeline.model.networks().values():
            remove(network)
        frames = frames or config.video.num_frames
        with observed(model) as attention:
            pixels[which] = pipeline(
                prompts,
                config.video.width,
                config.video.height,
                frames,
                SampleSettings.of(config.train),
            )
        report[which] = mean_over_heads(attention)
    both = torch.stack([pixels["before"], pixels["after"]], 1).flatten(0, 1)
    captions = [f"{which}: {prompt}" for prompt in prompts for which in ("before", "after")]
    save_image(contact_sheet(both, captions, 4 if frames == 1 else 1), sheet)
    moved = (pixels["after"] - pixels["before"]).abs().flatten(1).mean(1)
    return report | {"pixels_moved": dict(zip(prompts, moved.tolist(), strict=True))}


def is_ours(base: str) -> bool:
    """Return whether `base` is a run, a checkpoint folder or an export, as opposed to Wan
    weights."""
    path = Path(base)
    if path.is_dir():
        return (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as handle:
            return "mmdit" in (handle.metadata() or {})
    except SafetensorError:  # reading it as Wan weights will say what is wrong
        return False
