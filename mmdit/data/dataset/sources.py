"""From a folder of media to metadata: pictures and clips, with captions in text files of the same
name (`cat.txt`, or `cat.jpg.txt`), become JSONL files.

    pets/cat.jpg + pets/cat.txt, walk.mp4 + walk.txt   ─►   train_images.jsonl, train_videos.jsonl

Only the captions are opened here; damaged media are reported when they are cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdit.config import holds_half_a_pair
from mmdit.data.dataset.frames import list_frames
from mmdit.data.dataset.pictures import SUFFIXES
from mmdit.data.dataset.records import (
    BLANK,
    MAX_ID_BYTES,
    PATH_KEYS,
    Record,
    captions_of,
    check_id,
    decoded_object,
    text_captions,
)
from mmdit.data.dataset.stamps import compare_stamp, is_elsewhere, stamp_of
from mmdit.data.dataset.videos import VIDEO_SUFFIXES, read_video
from mmdit.files import (
    open_regular,
    read_bytes,
    read_object,
    remove,
    replace_folder,
    write_atomically,
)

MADE_HERE = {  # recognised by files that only such folders hold together
    "a cache": {"manifest.json", "index.jsonl"},
    "a packed cache": {"manifest.json", "packed.safetensors"},
    "a run": {"config.yaml", "metrics.jsonl"},
    "drawn samples": {"samples.json"},
}
FRAMES_OF = re.compile(r"(?:.*/)?frames_[0-9.e+-]+fps(?=/)")  # names given by `prepare-frames`
OF_A_LINE = {"id", "caption", "captions", *(key for keys in PATH_KEYS.values() for key in keys)}
OTHER_CAPTIONS = {".caption", ".json", ".jsonl", ".csv", ".tsv", ".xml"}  # of other programs
OWN_LINES = re.compile(
    r"\w*(images|videos|skipped|captions_made)[-\w]*\.jsonl"
)  # files that mmdit writes beside media
OTHER_PICTURES = {".heic", ".heif", ".jxl", ".svg", ".psd", ".exr"}  # not read; of cameras:
OTHER_PICTURES |= {".dng", ".cr2", ".cr3", ".nef", ".arw"}


@dataclass
class FolderReport:
    """The contents found in a folder of media."""

    images: int = 0
    videos: int = 0
    without_caption: int = 0  # no text file, or an empty one
    kept_captions: int = 0  # captions of an earlier line, kept because there is no text file
    left_out: list[str] = field(default_factory=list)  # in earlier lines, but not in the folder
    # "path: why it is not used, or is used without its caption"
    problems: list[str] = field(default_factory=list)
    # suffix → number of files that are neither media nor captions
    other_files: Counter = field(default_factory=Counter)
    # folder → what it is, for folders that this program made: they are left out
    made_here: dict[str, str] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)  # text files that belong to no picture or clip
    written: list[Path] = field(default_factory=list)

    def text(self) -> str:
        lines = [
            f"{self.images} images and {self.videos} video files, {self.without_caption} of them"
            " without a caption (trained as unconditional, or as trigger or prefix)"
        ]
        if self.kept_captions:
            lines.append(
                f"{self.kept_captions} captions have no text file, and stay as the lines that were"
                " there have them"
            )
        if self.left_out:
            lines.append(
                f"{len(self.left_out)} files of the lines that were there are not in the folder"
                f" (any more), for example {self.left_out[0]}: their lines are gone"
            )
        if self.made_here:
            made = [f"{name} ({what})" for name, what in self.made_here.items()]
            lines.append(f"left out, for mmdit made them: {', '.join(made[:8])}")
        if self.other_files:
            counts = self.other_files.most_common(8)
            names = [f"{count} {suffix or 'without suffix'}" for suffix, count in counts]
            lines.append(f"other files, not used: {', '.join(names)}")
            formats = ", ".join(sorted(OTHER_PICTURES & self.other_files.keys()))
            if formats:
                lines.append(
                    f"  {formats}: pictures that are not read; convert them to JPEG or PNG"
                )
        if captions := sorted(OTHER_CAPTIONS & self.other_files.keys()):
            lines.append(
                f"  captions in {', '.join(captions)} files are not read, but those of .txt files"
                " (cat.txt beside cat.jpg): rename or convert them"
            )
        if self.orphans:
            lines.append(
                f"{len(self.orphans)} text files belong to no picture or clip, for example"
                f" {self.orphans[0]}"
            )
        lines += [f"  {problem}" for problem in self.problems[:20]]
        if len(self.problems) > 20:
            lines.append(f"  … and {len(self.problems) - 20} more")
        return "\n".join([*lines, *(f"wrote {path}" for path in self.written)])


def files_below(folder: str | Path) -> Iterator[str]:
    """Yield the relative path of every file below `folder`, in a fixed order. Hidden files are left
    out. Links are followed, but no folder is visited twice (so a link to a parent ends there)."""
    seen = {os.path.realpath(folder)}

    def walk(inner: str) -> Iterator[str]:
        for entry in sorted(os.scandir(os.path.join(folder, inner)), key=lambda entry: entry.name):
            name = os.path.join(inner, entry.name)
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # entry.is_dir would raise for a ring of links
                real = os.path.realpath(entry.path)
                if real not in seen:
                    seen.add(real)
                    yield from walk(name)
            else:
                yield name

    yield from walk("")


def is_sheet(path: str | Path) -> bool:
    """Return whether a picture is a contact sheet rather than an item: `mmdit sample` writes one
    beside its samples, and `mmdit inspect-cache` into a cache."""
    name, beside = os.path.basename(path), os.path.join(os.path.dirname(path), "manifest.json")
    return name == "grid.png" or (name == "sheet.png" and os.path.isfile(beside))


def written_here(files: Iterable[str]) -> dict[str, str]:
    """Return folder → what it is, for the relative folders (without the top one) that hold output
    of this program: caches, runs, samples, frames of `prepare-frames`."""
    names: dict[str, set[str]] = defaultdict(set)
    for file in files:
        names[os.path.dirname(file)].add(os.path.basename(file))
    made = {
        folder: what
        for folder, inside in names.items()
        for what, files_of in MADE_HERE.items()
        if folder and files_of <= inside
    }
    frames = filter(None, map(FRAMES_OF.match, names))
    return made | {match[0]: "frames of videos" for match in frames}


def ids_for(files: Iterable[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return a unique id for every relative path: `pets/cat.jpg` → `pets_cat`.

    `known`: ids that files have from earlier runs, which they keep, whatever files are added beside
    them. If several new files would get the same id, the first by name gets it; the others, and
    those whose id could not be a file name, get a hash of their path. The order of `files` does not
    matter."""
    files = list(files)
    file_of: dict[str, str] = {}  # by id
    for file in sorted(files):
        if known and file in known:
            file_of.setdefault(known[file], file)
    for file in sorted(set(files) - set(file_of.values())):
        id = os.path.splitext(file)[0].replace(os.sep, "_")
        try:
            check_id(id)
        except ValueError:
            id = hashed_id(id, file)
        file_of[hashed_id(id, file) if id in file_of else id] = file
    ids = {file: id for id, file in file_of.items()}
    return {file: ids[file] for file in files}


def hashed_id(id: str, file: str) -> str:
    """Return an id that can be a file name, for a file whose path gives no id or one that is
    taken."""
    clean = re.sub(r"[\x00-\x1f\x7f\\]", "_", id).lstrip(".")
    short = clean.encode()[: MAX_ID_BYTES - 13].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(file.encode()).hexdigest()[:12]}"


def known_rows(paths: Iterable[Path]) -> dict[str, dict]:
    """Return path → line, for the lines that an earlier run wrote, perhaps edited since. ValueError
    if a line cannot be read, or if a file has several lines, which one new line would replace."""
    keys = [key for keys in PATH_KEYS.values() for key in keys]
    known: dict[str, dict] = {}
    for path in filter(Path.is_file, paths):
        for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
            if not line.strip(BLANK):
                continue
            try:
                row = decoded_object(line)
                source = next((row[key] for key in keys if key in row), None)
                if not isinstance(source, str) or "id" not in row:
                    raise ValueError("must have an id and the path of a file")
                check_id(row["id"])
                captions_of(row)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: {error}; what it says would be lost: mend the line, or take"
                    " it out"
                ) from None
            source = os.path.relpath(path.parent / os.path.expanduser(source), path.parent)
            if "video_span" in row or source in known:
                what = "frames of videos" if "video_span" in row else f"{source} more than once"
                raise ValueError(
                    f"{path} names {what}, and would be replaced by a line for each file;"
                    " name another --out_dir or --split"
                )
            known[source] = row
    return known


def _texts_of(media: list[str], texts: list[str]) -> dict[str, str]:
    """Return picture or clip → its text file, by name: for `cat.jpg` it is `cat.txt`, else
    `cat.TXT`, else `cat.jpg.txt`. Accented letters match however a system encodes them."""
    by_name: dict[str, str] = {}
    for path in sorted(texts, key=lambda path: (not path.endswith(".txt"), path)):
        by_name.setdefault(os.path.splitext(path)[0], path)
    composed: dict[str, str] = {}
    for name, path in by_name.items():
        composed.setdefault(unicodedata.normalize("NFC", name), path)
    text_of = {}
    for file in media:
        for name in (file, os.path.splitext(file)[0]):  # the latter is preferred
            text = by_name.get(name) or composed.get(unicodedata.normalize("NFC", name))
            if text:
                text_of[file] = text
    return text_of


def read_captions(path: Path, per_line: bool) -> list[str]:
    """Return the captions in a text file: one from all of it, or one for each line. ValueError if
    it is not UTF-8; FileNotFoundError."""
    with open_regular(path) as file:
        return text_captions(file.read(), per_line)


def prepare_folder(
    folder: str | Path,
    out_dir: str | Path | None = None,
    split: str = "train",
    per_line: bool = False,
) -> FolderReport:
    """Write `<split>_images.jsonl` and `<split>_videos.jsonl` into `out_dir`, or into the folder
    itself; a file that would be empty is not written. Return a report. ValueError if the folder
    holds no media."""
    folder, out_dir = Path(folder), Path(out_dir or folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    report, media, texts = FolderReport(), [], []
    bar = tqdm(files_below(folder), desc=f"looking through {folder}", unit="file", delay=2)
    files = list(bar)
    report.made_here = written_here(files)
    inside = tuple(f"{made}{os.sep}" for made in report.made_here)
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        if file.startswith(inside) or is_sheet(folder / file):
            continue
        if suffix == ".txt":
            texts.append(file)
        elif suffix not in SUFFIXES | VIDEO_SUFFIXES:
            if not OWN_LINES.fullmatch(os.path.basename(file)):
                report.other_files[suffix] += 1
        elif holds_half_a_pair(file):
            report.problems.append(f"{file!r}: not used, its name is not UTF-8; rename it")
        else:
            media.append(file)
    lines: dict[str, list[str]] = {"images": [], "videos": []}
    places = {file: Path(os.path.relpath(folder / file, out_dir)).as_posix() for file in media}
    known = known_rows(out_dir / f"{split}_{name}.jsonl" for name in lines)
    report.left_out = sorted(known.keys() - places.values())
    before = {file: known[place] for file, place in places.items() if place in known}
    ids = ids_for(media, {file: row["id"] for file, row in before.items()})
    text_of = _texts_of(media, texts)
    for file in media:
        is_video = os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES
        captions: list[str] = []
        text = text_of.get(file)
        try:
            captions = read_captions(folder / text, per_line) if text else []
        except (OSError, ValueError) as error:
            report.problems.append(f"{file}: used without its caption, {error}")
        earlier = before.get(file, {})
        if not text and earlier:  # perhaps written into the lines by hand
            captions = [caption for caption in captions_of(earlier) if caption]
            report.kept_captions += bool(captions)
        if not captions:
            report.without_caption += 1
        row: dict[str, Any] = {
            "id": ids[file],
            "video_path" if is_video else "image_path": places[file],
            "caption": captions[0] if captions else "",
        }
        row |= {"captions": captions} if len(captions) > 1 else {}
        row |= {key: value for key, value in earlier.items() if key not in OF_A_LINE}
        lines["videos" if is_video else "images"].append(json.dumps(row, ensure_ascii=False) + "\n")
    report.orphans = sorted(set(texts) - set(text_of.values()))
    report.images, report.videos = len(lines["images"]), len(lines["videos"])
    if not media:
        looked = " ".join(sorted(SUFFIXES | VIDEO_SUFFIXES))
        raise ValueError(f"no picture or video in {folder}: looked for {looked}\n{report.text()}")
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        path = out_dir / f"{split}_{name}.jsonl"
        if rows:
            write_atomically(path, "".join(rows))
            report.written.append(path)
        else:  # lines of an earlier run would be about files that are gone
            path.unlink(missing_ok=True)
    return report


def _note_of(folder: Path) -> Path:
    """Return the file that says from which video a folder of frames was made."""
    return folder.with_name(f".{folder.name}.json")


def is_of_another_video(record: Record, folder: Path, fps: float) -> bool:
    """Return whether `extract_frames` made a folder from a video at another place than the record's
    and with another content."""
    stored = read_object(_note_of(folder)).get("stamp")
    other = is_elsewhere(record.source, stored)
    return other and compare_stamp(record.source, stored, fps)[0] == "changed"


def extract_frames(record: Record, folder: Path, fps: float, suffix: str = "png") -> int:
    """Write the frames of a video file as pictures into `folder`, `fps` frames a second; return
    their number.

    The folder appears when it is complete. An existing folder, perhaps cleaned by hand, is kept
    unless it was made from another video or with another `suffix`. ValueError or OSError if the
    file cannot be used."""
    note = _note_of(folder)

    def write_note(stamp: dict[str, str]) -> None:
        write_atomically(note, json.dumps({"stamp": stamp, "format": suffix}))

    if folder.is_dir():
        made_from = read_object(note)  # empty for a folder made by an older version
        state, stamp = compare_stamp(record.source, made_from.get("stamp"), fps)
        kept = made_from.get("format") == suffix and state in ("same", "renewed", "gone")
        if kept or not made_from:
            if state in ("renewed", "changed"):
                write_note(stamp or stamp_of(record.source, fps))
            return len(list_frames(folder))
    number, stamp = 0, stamp_of(record.source, fps)
    options: dict[str, Any] = {"quality": 95} if suffix == "jpg" else {}
    with replace_folder(folder) as unfinished:
        for number, image in enumerate(read_video(record.source, fps), 1):
            image.save(unfinished / f"{number - 1:06d}.{suffix}", **options)
        remove(folder)  # which holds frames of another video
    write_note(stamp)
    return number
