"""Write the model card beside an export: what it is, how it was made and how it is used, for people
and for the Hugging Face hub.

A folder gets `README.md`, a file `NAME.safetensors` gets `NAME.md`, with pictures beside it. A page
that somebody else wrote, or has changed since, is never replaced.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path

from PIL import Image

import mmdit
from mmdit.commands.card_scores import score_tables
from mmdit.commands.card_text import escaped, fenced, picture, table
from mmdit.commands.exported import Exported, commands_for, uses_elsewhere
from mmdit.config import decode, to_yaml
from mmdit.data.dataset.captions import CaptionsConfig, with_trigger
from mmdit.diagnostics.curves import learning_curves, read_metrics
from mmdit.diagnostics.run_facts import figures, start_rows
from mmdit.experiment.card_config import CardConfig
from mmdit.files import write_atomically
from mmdit.privacy import portable_command, portable_config, without_paths
from mmdit.training.media import as_webp, some_frames
from mmdit.training.run_folder import RunFolder, is_run
from mmdit.training.run_start import read_starts

LAST_LINE = re.compile(r"<!-- written by mmdit export, CRC-32 (\d+) -->\n?\Z")
SHEET_SIDE, CLIP_SIDE, CLIP_FRAMES = 1400, 640, 24
WAN_NAME = re.compile(r"Wan2\.[12]-(?:T2V|I2V|TI2V|FLF2V)-[\w.-]+")
LIBRARIES = {"diffusers": "diffusers", "peft": "peft", "diffusers_pipeline": "diffusers"}
NOT_STATED = "not stated"
UNSTATED_LICENSE = f"{NOT_STATED}. Ask their author before you use or share them"


def write_card(exported: Exported) -> list[str]:
    """Write the card of an export, with curves and samples of its run, and return lines to print
    about it."""
    card = Card(exported)
    if not is_ours(card.path):
        return [
            f"{card.path} is no card that mmdit wrote, or was changed since: it stays as it is, and"
            " no other is written"
        ]
    for name, data in card.pictures.items():
        write_atomically(card.path.with_name(name), data)
    write_atomically(card.path, signed(card.text()))
    return [f"its card is {card.path}", *card.notes]


def card_path(out: Path) -> Path:
    """Return the path of an export's card: inside a folder, or beside a file."""
    return out / "README.md" if out.is_dir() else out.with_name(f"{export_name(out)}.md")


def export_name(out: Path) -> str:
    """Return the name of an export without the suffix `.safetensors`; `v1.5` has no suffix."""
    return out.stem if out.suffix == ".safetensors" else out.name


def signed(text: str) -> str:
    """Return a page with a last line by which `is_ours` recognises it if nobody has changed it."""
    return f"{text}<!-- written by mmdit export, CRC-32 {zlib.crc32(text.encode())} -->\n"


def is_ours(path: Path) -> bool:
    """Return whether a page may be written: it does not exist, or `write_card` wrote it and nobody
    has changed it since."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeError):
        return False
    last = LAST_LINE.search(text)
    return last is not None and int(last[1]) == zlib.crc32(text[: last.start()].encode())


@dataclass
class Card:
    """The page about an export. `notes`: what is missing on it, and why."""

    exported: Exported
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self):
        self.path = card_path(self.exported.out)
        self.config = portable_config(self.exported.config)
        self.stated = decode(CardConfig, self.exported.config.get("card") or {})
        words = self.exported.config.get("captions")
        stated = words if isinstance(words, dict) else {}
        known = {name: stated.get(name) for name in ("trigger", "separator")}
        given = {name: word for name, word in known.items() if word and isinstance(word, str)}
        self.captions = CaptionsConfig(**given)
        self.run = run_of(self.exported.checkpoint)
        self.records = self._records()
        self.scores: list[str] = []
        if self.run:
            self.scores, self.notes = score_tables(self.run.folder, self.exported)

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """Return the contents of the picture files by their names."""
        stem = "" if self.exported.out.is_dir() else f"{export_name(self.exported.out)}-"
        parts = {"curves.png": self._curves(), "samples.webp": self._samples()}
        parts["clips.webp"] = self._clips()
        return {f"{stem}{name}": data for name, data in parts.items() if data}

    def text(self) -> str:
        """Return the whole page, except for its last line."""
        front = to_yaml(self._front())
        license = self.stated.license or UNSTATED_LICENSE
        parts = {
            "Use": self._use(),
            "Samples": self._shown_samples(),
            "Scores": "\n\n".join(self.scores),
            "Training": self._training(),
            "Data": self._data(),
            "Licence": f"The licence of these weights is {license}.{self._licence_of_code()}",
            "Configuration": self._configuration(),
        }
        body = "\n\n".join(f"## {title}\n\n{part}" for title, part in parts.items() if part)
        name = export_name(self.exported.out)
        return f"---\n{front}---\n\n# {escaped(name)}\n\n{self._about()}\n\n{body}\n"

    def _licence_of_code(self) -> str:
        """Return a sentence on the file LICENSE, if an export holds code."""
        if self.exported.form != "diffusers_pipeline":
            return ""
        return " The file `LICENSE` is that of the code in `pipeline.py`."

    # ── what it is ────────────────────────────────────────────────────────────────────────────────
    @cached_property
    def task(self) -> str:
        """Return the task, under the hub's name."""
        if self.config.get("tokenizer", {}).get("picture", "none") != "none":
            return "image-to-video"
        if self.config.get("model", {}).get("conditioning", "none") != "none":
            return "video-to-video"
        frames = self.config.get("video", {}).get("num_frames", 1)
        return "text-to-image" if frames == 1 else "text-to-video"

    @cached_property
    def base(self) -> str:
        """Return the hub's name of the model that was fine-tuned; "" if it is not known."""
        if self.stated.base_model or self.config.get("model", {}).get("type") != "wan":
            return self.stated.base_model
        place = str(self.config["model"].get("name_or_path", "")).rstrip("/")
        name = re.split(r"[/\\]", place)[-1]
        return f"Wan-AI/{name}" if WAN_NAME.fullmatch(name) else ""

    def _front(self) -> dict:
        """Return the metadata of a card, which the hub reads."""
        exported, lora = self.exported, self.config.get("lora") or {}
        adapted = bool(lora.get("enabled")) and (exported.is_lora or exported.form == "mmdit")
        tags = ["mmdit", self.task, str(self.config.get("train", {}).get("objective", "")).strip()]
        tags.append(str(lora.get("type", "lora")) if adapted else "")
        front: dict = {"license": self.stated.license} if self.stated.license else {}
        front["library_name"] = LIBRARIES.get(exported.form, "mmdit")
        front["pipeline_tag"] = self.task
        front["tags"] = [tag.replace("_", "-") for tag in tags if tag]
        if self.base:
            front["base_model"] = self.base
            front["base_model_relation"] = "adapter" if exported.is_lora else "finetune"
        if exported.is_lora and self.captions.trigger:
            front["instance_prompt"] = without_paths(self.captions.trigger)
        if self.stated.datasets:
            front["datasets"] = list(self.stated.datasets)
        return front

    def _about(self) -> str:
        """Return sentences on what was exported."""
        exported, lora = self.exported, self.config.get("lora") or {}
        size = f"{exported.parameters:,} parameters"
        what = f"A {self.task} model of {size}"
        expert = f"the {exported.expert}-noise expert of " if exported.expert else ""
        if exported.is_lora:
            what = (
                f"An adapter of {size} ({escaped(lora.get('type', 'lora'))}, rank"
                f" {escaped(lora.get('rank'))}) for {expert}{self._base_in_words()}"
            )
        elif exported.form == "mmdit" and self.base:
            what = f"What a run trained on {self._base_in_words()}: {size}, without the base"
        elif exported.form not in ("mmdit", "diffusers_pipeline"):
            what = f"A {self.task} transformer of {size} in the layout `{exported.form}`"
            what += f", {expert}a pair" if expert else ""
        if exported.is_lora:
            what += f", in the format `{exported.form}`"
        start = (self.config.get("train") or {}).get("init_from")
        began = f" Its training began from {escaped(Path(str(start)).name)}." if start else ""
        step = "" if exported.step is None else f" It is of step {exported.step:,}"
        weights = ", the last weights." if exported.raw else ", the average of its weights."
        averaged = self.run is not None and (self.config.get("ema") or {}).get("enabled")
        step += (weights if averaged else ".") if step else ""
        if exported.without_encoder:
            began += " Its text encoder was trained with it, and is not in it."
        return f"{what}. It was written by mmdit {mmdit.__version__}.{step}{began}"

    def _base_in_words(self) -> str:
        if self.base:
            return f"[{escaped(self.base)}](https://huggingface.co/{self.base})"
        start = (self.config.get("train") or {}).get("init_from")
        return escaped(Path(str(start)).name) if start else "a base that is not stated"

    # ── how it is used ────────────────────────────────────────────────────────────────────────────
    def _use(self) -> str:
        """Return commands that use the export."""
        prompts = (self.config.get("train") or {}).get("sample_prompts") or ["a prompt"]
        prompt = with_trigger(" ".join(str(prompts[0]).split()), self.captions)
        prompt = without_paths(prompt)
        lines = commands_for(self.exported, self.base, prompt)
        said = [fenced("\n".join(lines), "bash")] if lines else []
        if self.captions.trigger:
            trigger = escaped(without_paths(self.captions.trigger))
            held = "which prompts must hold"
            if self.exported.form in ("mmdit", "diffusers_pipeline"):
                held = "which is put in front of prompts that lack it"
            said.append(f"It was trained with the trigger word {trigger}, {held}.")
        return "\n\n".join([*said, *uses_elsewhere(self.exported, prompt)])

    def _shown_samples(self) -> str:
        """Return samples of the run, with their prompts."""
        shown = [picture("samples", name) for name in self.pictures if name.endswith(".webp")]
        if not shown or self.run is None:
            return ""
        prompts = [f"- {escaped(without_paths(prompt))}" for prompt in self.run.prompts()]
        step = f"Previews of step {self._preview()['step']:,}, drawn while training, of:"
        return "\n\n".join([*shown, step, "\n".join(prompts)])

    # ── how it was made ───────────────────────────────────────────────────────────────────────────
    def _records(self) -> list[dict]:
        """Return the records of metrics.jsonl up to the step of the export."""
        if self.run is None:
            return []
        try:
            records = read_metrics(self.run.folder)
        except ValueError:
            return []
        step = self.exported.step
        return [record for record in records if step is None or record["step"] <= step]

    def _training(self) -> str:
        """Return the figures, curves, starts and commands of the training."""
        parts = []
        if self.run and self.records:
            said = figures(self.records[-1], self.run.max_steps())
            parts.append(" · ".join(map(escaped, said)))
        rows = start_rows(self.run.folder) if self.run else []
        if len(rows) > 1:
            parts.append(table(rows))
        parts += [picture("curves", name) for name in self.pictures if name.endswith("curves.png")]
        if commands := self._commands():
            parts.append("It was made by these commands; `config.yaml` is below.")
            parts.append(fenced("\n".join(commands), "bash"))
        return "\n\n".join(parts)

    def _commands(self) -> list[str]:
        """Return the commands as typed, without the paths of this machine."""
        typed: list[str] = []
        for start in read_starts(self.run.folder) if self.run else []:
            command = start.get("command")
            if isinstance(command, str) and command and command not in typed:
                typed.append(command)
        if self.run and not typed:  # a run of an older version recorded none
            typed.append("mmdit train --config config.yaml --train_cache_dir CACHE")
        if self.exported.command:
            typed.append(self.exported.command)
        commands = []
        for command in typed:
            try:
                commands.append(portable_command(command))
            except ValueError:  # no shell quotes in this way
                continue
        return commands

    def _curves(self) -> bytes:
        if not self.records or self.run is None:
            return b""
        try:
            image = learning_curves(self.run.name, self.records)
        except ValueError as error:
            self.notes.append(f"it has no curves: {error}")
            return b""
        file = BytesIO()
        image.save(file, format="PNG", optimize=True)
        return file.getvalue()

    def _preview(self) -> dict:
        """Return the newest preview up to the step of the export; an empty dictionary if there is
        none."""
        listed = self.run.previews() if self.run else []
        step = self.exported.step
        return next((row for row in reversed(listed) if step is None or row["step"] <= step), {})

    def _samples(self) -> bytes:
        preview = self._preview()
        return self._webp(preview, "grid.png", SHEET_SIDE, 1) if preview else b""

    def _clips(self) -> bytes:
        preview = self._preview()
        if not preview or not preview["video"]:
            return b""
        return self._webp(preview, preview["video"], CLIP_SIDE, CLIP_FRAMES)

    def _webp(self, preview: dict, name: str, side: int, most: int) -> bytes:
        """Return a picture or a clip of a preview as WebP."""
        assert self.run is not None
        path = self.run.folder / "samples" / preview["folder"] / name
        try:
            frames, seconds = some_frames(path, most)
        except (OSError, ValueError, ImportError, SyntaxError, Image.DecompressionBombError):
            self.notes.append(f"it lacks a preview: {path} cannot be read")
            return b""
        return as_webp(frames, side, round(1000 * seconds / len(frames)))

    # ── how good it is, and of what ───────────────────────────────────────────────────────────────
    def _data(self) -> str:
        """Return what is known about the data: what the config states, and what the run counted."""
        stated = self.stated
        rows = [
            ["data", stated.data or NOT_STATED],
            ["licence of the data", stated.data_license or NOT_STATED],
        ]
        if stated.datasets:
            rows.append(["data sets", ", ".join(stated.datasets)])
        parts = [table([["", ""], *rows])]
        starts = read_starts(self.run.folder) if self.run else []
        counted = str(starts[-1].get("data") or "") if starts else ""
        if counted:
            parts.append(fenced(without_paths(counted)))
        return "\n\n".join(parts)

    def _configuration(self) -> str:
        text = to_yaml(self.config)
        return f"<details><summary>config.yaml</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"


def run_of(checkpoint: Path | None) -> RunFolder | None:
    """Return the run to which a checkpoint folder belongs; None for a file, or for a checkpoint
    outside of a run."""
    if checkpoint is None or checkpoint.is_file():
        return None
    for folder in list(checkpoint.resolve().parents)[:3]:
        if is_run(folder):
            return RunFolder(folder.parent, folder.name)
    return None
