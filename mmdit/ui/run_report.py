"""Write one HTML file about a run that can be sent to others: it contains its pictures and curves,
has no script, and loads nothing from a network."""

from __future__ import annotations

import base64
import datetime
import html
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
from PIL import Image

from mmdit.config import ConfigError, decode, differences, encode, shortened
from mmdit.diagnostics.curves import curves_svg, read_metrics
from mmdit.diagnostics.run_facts import figures, start_rows, stored_versions
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.files import real_path
from mmdit.posttrain.posttrain_config import PosttrainConfig
from mmdit.training.media import as_webp, read_frames, some_frames
from mmdit.training.run_folder import RunFolder, sheets_in
from mmdit.training.run_start import read_starts
from mmdit.ui.run_folders import held_locks
from mmdit.vtp_training.pretrain_config import PretrainConfig

MEDIA_BYTES = 5_500_000  # of all pictures and clips; base64 adds a third; 10 MB in all
PREVIEWS, SHEET_SIDE = 8, 1400  # steps to show; longer side of a sheet in pixels
CLIP_SIDE, CLIP_FRAMES = 640, 24
LONGEST_TEXT = 60_000
STARTS_SHOWN = 50
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
h1{margin-bottom:0}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}
img,svg{max-width:100%;height:auto}td{padding:.15rem .9rem .15rem 0;vertical-align:top}
pre{background:#f6f6f6;padding:.8rem;overflow:auto;font-size:13px;white-space:pre-wrap}
img{display:block}.failed{color:#a00}figure{margin:1.2rem 0}figcaption{color:#666}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass
class RunReport:
    """The page about the run in `folder`, in its present state: going on, at its end, stopped or
    failed."""

    folder: Path
    left: int = field(init=False)  # bytes that further pictures may take

    def __post_init__(self):
        folder = real_path(self.folder)
        self.run = RunFolder(folder.parent, folder.name)
        self.left = MEDIA_BYTES
        self.records: list[dict] = []
        self.missing = ""  # why there are no figures
        try:
            self.records = read_metrics(folder)
        except ValueError as error:
            self.missing = str(error).replace(f"{folder}", folder.name)

    def page(self) -> str:
        """Return the whole page."""
        parts = {
            "Curves": self._curves(),
            "Samples": self._samples(),
            "Configuration, where it differs from the defaults": self._difference(),
            "Data": self._data(),
            "Starts": self._starts(),
            "Skipped steps": _block("\n".join(self.run.skipped())),
            "Configuration": _block(self.run.config_text()),
        }
        body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in parts.items() if part)
        name = html.escape(self.run.name)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f"<title>{name}</title><style>{STYLE}</style></head><body>\n"
            f"<h1>{name}</h1>\n{self._head()}\n{body}\n</body></html>\n"
        )

    def _head(self) -> str:
        """Return the state of the run, and its last figures."""
        last: dict = {}
        for record in self.records[-2:]:  # training of a tokenizer writes two for a step
            last = last | record if last.get("step") == record["step"] else record
        most = self.run.max_steps()
        state = self.run.state(last, held_locks())
        reason = f": {html.escape(state.reason)}" if state.reason else ""
        lines = [f'<p class="{state.word}"><strong>{state.word}</strong>{reason}</p>']
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
        lines.append(f"<p>{' · '.join([*figures(last, most), f'reported {now}'])}</p>")
        return "\n".join(lines)

    def _curves(self) -> str:
        if not self.records:
            return _block(self.missing)
        try:
            return curves_svg(self.run.name, self.records)
        except ValueError as error:
            return _block(str(error))

    def _samples(self) -> str:
        """Return the previews of some steps, evenly spread, the newest first."""
        listed = sheets_in(self.run.folder)
        if not listed:
            return ""
        places = np.linspace(0, len(listed) - 1, min(PREVIEWS, len(listed))).round().astype(int)
        chosen = [listed[place] for place in reversed(places)]
        shown = [_block("\n".join(self.run.prompts()))]
        for number, (step, sheet, clip) in enumerate(chosen):
            pictures = [self._picture(sheet, len(chosen) - number)]
            if clip:
                pictures.append(self._clip(clip, len(chosen) - number))
            step_text = f"<figcaption>step {step}</figcaption>"
            shown.append(f"<figure>{step_text}{''.join(pictures)}</figure>")
        skipped = len(listed) - len(chosen)
        if skipped:
            shown.append(f"<p>{skipped} previews between these are left out.</p>")
        return "\n".join(shown)

    def _picture(self, path: Path, shares: int) -> str:
        """Return a sheet as an HTML element, within its share of the bytes that are left."""
        try:
            frames, _ = read_frames(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return _block(f"{path.name} cannot be read: {error}")
        return self._embedded(frames, SHEET_SIDE, shares, "samples")

    def _clip(self, path: Path, shares: int) -> str:
        """Return a video as an HTML element with an animated picture."""
        try:
            frames, seconds = some_frames(path, CLIP_FRAMES)
        except (OSError, ValueError, ImportError, SyntaxError) as error:
            return _block(f"{path.name} cannot be read: {error}")
        duration = round(1000 * seconds / len(frames))
        return self._embedded(frames, CLIP_SIDE, shares, "clips", duration)

    def _embedded(
        self, frames: list[Image.Image], side: int, shares: int, title: str, duration: int = 0
    ) -> str:
        """Return frames as an HTML element with a WebP inside. They are made smaller until they
        take at most half of one of `shares` parts of the bytes that are left."""
        allowed = self.left // (2 * shares)  # half, as there are a sheet and a clip
        while side >= 64:
            data = as_webp(frames, side, duration)
            if len(data) <= allowed:
                self.left -= len(data)
                text = base64.b64encode(data).decode()
                return f'<img alt="{title}" src="data:image/webp;base64,{text}">'
            side = side * 3 // 4
        return _block(f"{title}: too large for a report")

    def _difference(self) -> str:
        stored = self.run.config()
        return _block("\n".join(differences(defaults(stored), stored))) if stored else ""

    def _data(self) -> str:
        starts = read_starts(self.run.folder)
        return _block(str(starts[-1].get("data", ""))) if starts else ""

    def _starts(self) -> str:
        """Return a table with versions, commit and device of every start."""
        rows = start_rows(self.run.folder)
        if len(rows) == 1:
            return _block(stored_versions(self.run.folder))
        left_out = rows[1:-STARTS_SHOWN]
        lines = []
        for row in [rows[0], *rows[1:][-STARTS_SHOWN:]]:
            cells = [f"<td>{html.escape(cell)}</td>" for cell in row]
            lines.append(f"<tr>{''.join(cells)}</tr>")
        table = f"<table>{''.join(lines)}</table>"
        return f"<p>{len(left_out)} earlier ones are left out.</p>{table}" if left_out else table


def defaults(stored: dict) -> dict:
    """Return, as plain data, a config with the defaults of the types that `stored` chooses; with
    the default types if the chosen ones need further keys."""
    if "images" in stored and "reconstruction" in stored:  # the config of a tokenizer's training
        return encode(PretrainConfig())
    name = str(stored.get("experiment_name", "x"))
    chosen: dict = {}
    for section, hint in get_type_hints(ExperimentConfig).items():
        value = stored.get(section)
        several = len([option for option in get_args(hint) if is_dataclass(option)]) > 1
        if several and isinstance(value, dict) and "type" in value:
            chosen[section] = {"type": value["type"]}
    try:
        usual = encode(decode(ExperimentConfig, {"experiment_name": name, **chosen}))
    except ConfigError:
        usual = encode(ExperimentConfig("x"))
    if stored.get("posttrain"):
        usual["posttrain"] = encode(PosttrainConfig())
    return usual


def _block(text: str) -> str:
    """Return a text as an HTML element, escaped; "" if the text is empty."""
    text = shortened(text.strip(), LONGEST_TEXT)
    return f"<pre>{html.escape(text)}</pre>" if text else ""
