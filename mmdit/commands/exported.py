"""Describe what `mmdit export` wrote, and the commands that use it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmdit.commands.card_text import fenced
from mmdit.interop.wan_weights import EXPERT_FOLDERS
from mmdit.privacy import NEEDED, is_local, last_part
from mmdit.shipped import shipped_path

PICTURES = {"first": " --image first.png", "first_last": " --image first.png --image last.png"}


@dataclass(frozen=True)
class Exported:
    """Describes an export, or a model that was fetched, at `out`. `form`: `mmdit` for our own file,
    a format of LoRA, a layout, or `release` for a whole Wan. `config`: that of its run, as plain
    data; `checkpoint` and `step`: what was exported, None for a release; `raw`: the last weights,
    not their average; `is_pair`: it holds the adapters of two experts; `expert`: which of a
    release's two experts was written; `command`: the command as typed."""

    out: Path
    form: str
    config: dict
    checkpoint: Path | None
    step: int | None
    parameters: int
    is_lora: bool = False
    raw: bool = False
    is_pair: bool = False
    expert: str | None = None
    without_encoder: bool = False
    command: str = ""


def commands_for(exported: Exported, base: str, prompt: str, place: str = "") -> list[str]:
    """Return commands that use an export. `place`: its path, relative to where they are typed;
    `base`: the name of the model that adapters belong to."""
    name, asked = shlex.quote(place or exported.out.name), shlex.quote(prompt)
    asked += PICTURES.get(_value(exported.config, "tokenizer.picture"), "")
    train = "mmdit train --config my.yaml --train_cache_dir CACHE"
    if exported.form == "mmdit":
        places = " ".join(shlex.quote(word) for word in needed_places(exported.config))
        drawn_by = f"{name} --prompts {asked} --out samples {places}".strip()
        if _value(exported.config, "model.conditioning") == "low_resolution":
            drawn_by = f"SMALL_MODEL --refine {name} --prompts {asked} --out samples"
        return [f"mmdit sample --checkpoint {drawn_by}", f"{train} train.init_from={name}"]
    if exported.form == "diffusers_pipeline" or exported.is_pair:
        return []
    if exported.is_lora:
        changed = shlex.quote(base.rpartition("/")[2] or "BASE")
        laid = "--lora_low" if exported.expert == "low" else "--lora"
        lines = [
            f"mmdit sample --checkpoint {changed} {laid} {name} --prompts {asked} --out samples"
        ]
        if _value(exported.config, "model.type") in ("", "wan"):  # ours continue from a run only
            lines.append(f"{train} train.init_from={name} lora.enabled=true")
            if exported.expert:
                lines[-1] += f" model.expert={exported.expert}"
        return lines
    if exported.expert:  # alone it is no model: see `uses_elsewhere`
        return []
    lines = [f"{train} model.name_or_path={name}"]
    if exported.form == "release":
        lines.insert(0, f"mmdit sample --checkpoint {name} --prompts {asked} --out samples")
    return lines


def needed_places(config: dict) -> list[str]:
    """Return overrides for the files that an export needs and does not hold, unless these ship with
    mmdit."""
    here = dict(places_here(config))
    words = []
    for key in NEEDED:
        place = here.get(key) or _value(config, key)
        if key in here or (key.endswith(".name_or_path") and place and not shipped_path(place)):
            known = last_part(place) if is_local(place) else place
            words.append(f"{key}={known}")
    return words


def places_here(config: dict) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of every needed path that belongs to this machine: an absolute
    one, or a relative one at which there is a file that does not ship with mmdit."""
    for key in NEEDED:
        place = _value(config, key)
        if is_local(place) or (place and not shipped_path(place) and Path(place).exists()):
            yield key, place


def _value(config: dict, key: str) -> str:
    """Return the text at a dotted key of two parts; "" if there is none."""
    section, _, name = key.partition(".")
    value = (config.get(section) or {}).get(name)
    return value if isinstance(value, str) else ""


def uses_elsewhere(exported: Exported, prompt: str) -> list[str]:
    """Return paragraphs of Markdown on how other programs use an export."""
    if exported.form == "diffusers_pipeline":
        opened = "pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)"
        call = f"from diffusers import DiffusionPipeline\n\n{opened}\npipe({prompt!r})"
        said = "In Diffusers, where mmdit is installed too; `pipeline.py` is run, and imports it:"
        return [said, fenced(call, "python")]
    if exported.is_pair:
        said = (
            "It holds the adapters of two experts, whose names begin with `high.` and `low.`. Both"
            " draw together from the run's file, which `mmdit export` writes without `--lora`; one"
            " is written with `--expert`."
        )
        return [said]
    if exported.expert and not exported.is_lora:
        place = EXPERT_FOLDERS[exported.expert][exported.form == "diffusers"]
        return [f"It takes the place of the folder `{place}` in its release."]
    if not exported.is_lora or (exported.config.get("model") or {}).get("type") != "wan":
        return []
    if exported.form in ("kohya", "comfy"):
        said = "In ComfyUI it belongs into `models/loras`"
        if exported.expert:
            said += f", and changes the model of the {exported.expert}-noise expert alone"
        return [f"{said}."]
    low = ", load_into_transformer_2=True" if exported.expert == "low" else ""
    call = f"pipeline.load_lora_weights(FOLDER, weight_name={exported.out.name!r}{low})"
    return ["In Diffusers:", fenced(call, "python")] if exported.form == "diffusers" else []
