"""From a folder of media to metadata: pictures and clips with captions in text files of the same name, written as JSONL.

    pets/cat.jpg + pets/cat.txt, walk.mp4 + walk.txt   ─►   train_images.jsonl, train_videos.jsonl

Nothing is opened here but the captions; what is damaged is told when it is cached.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mmdit.data.frames import SUFFIXES
from mmdit.data.records import MAX_ID_BYTES, Record, check_id
from mmdit.data.videos import VIDEO_SUFFIXES, read_video
from mmdit.files import folder_aside, open_regular, write_aside


@dataclass
class FolderReport:
    """What a folder holds."""

    images: int = 0
    videos: int = 0
    without_caption: int = 0  # no text file, or an empty one
    problems: list[str] = field(default_factory=list)  # "path: why it is not used, or used without its caption"
    other_files: Counter = field(default_factory=Counter)  # suffix → how many are neither media nor captions
    written: list[Path] = field(default_factory=list)

    def text(self) -> str:
        lines = [f"{self.images} images and {self.videos} video files, {self.without_caption} of them without a caption "
                 "(trained as unconditional)"]  # fmt: skip
        if self.other_files:
            kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.other_files.most_common(8))
            lines.append(f"other files, not used: {kinds}")
        lines += [f"  {problem}" for problem in self.problems[:20]]
        lines += [f"  … and {len(self.problems) - 20} more"] if len(self.problems) > 20 else []
        return "\n".join(lines + [f"wrote {path}" for path in self.written])


def files_below(folder: str | Path) -> Iterator[str]:
    """Every file below `folder`, relative, in a fixed order; hidden ones are left out, links are followed but never twice into
    one folder (a link to a parent ends there)."""
    seen = {os.path.realpath(folder)}

    def walk(inner: str) -> Iterator[str]:
        for entry in sorted(os.scandir(os.path.join(folder, inner)), key=lambda entry: entry.name):
            name = os.path.join(inner, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in seen:
                    seen.add(real)
                    yield from walk(name)
            else:
                yield name

    yield from walk("")


def ids_for(files: Iterable[str]) -> dict[str, str]:
    """An id of its own for every relative path: `pets/cat.jpg` → `pets_cat`. Those that meet or are no file name get a hash of
    their path, so that an id does not depend on the order of the files."""
    files = list(files)
    plain = {file: os.path.splitext(file)[0].replace(os.sep, "_") for file in files}
    taken = Counter(plain.values())

    def id_of(file: str) -> str:
        id = plain[file]
        try:
            if taken[id] == 1:
                return check_id(id)
        except ValueError:
            pass
        clean = "".join("_" if ord(letter) < 32 or letter in '\x7f\\' else letter for letter in id).lstrip(".")
        short = clean.encode()[: MAX_ID_BYTES - 13].decode(errors="ignore")
        return f"{short}-{hashlib.sha256(file.encode()).hexdigest()[:12]}"

    return {file: id_of(file) for file in files}


def read_captions(path: Path, per_line: bool) -> list[str]:
    """The captions in a text file: all of it as one, or one a line. ValueError if it is not UTF-8; FileNotFoundError."""
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8 text") from None
    captions = [" ".join(line.split()) for line in (text.splitlines() if per_line else [text])]
    return list(dict.fromkeys(caption for caption in captions if caption))


def prepare_folder(folder: str | Path, out_dir: str | Path | None = None, split: str = "train",
                   per_line: bool = False) -> FolderReport:  # fmt: skip
    """Write `<split>_images.jsonl` and `<split>_videos.jsonl`, if not empty, into `out_dir`, or into the folder itself.
    ValueError: no media in it."""
    folder, out_dir = Path(folder), Path(out_dir or folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    report, media = FolderReport(), {}
    for file in tqdm(files_below(folder), desc=f"looking through {folder}", unit="file", delay=2):
        suffix = os.path.splitext(file)[1].lower()
        if suffix not in SUFFIXES | VIDEO_SUFFIXES:
            report.other_files[suffix] += suffix not in (".txt", ".jsonl")
        elif any(0xD800 <= ord(letter) < 0xE000 for letter in file):
            report.problems.append(f"{file!r}: not used, its name is not UTF-8; rename it")
        else:
            media[file] = suffix in VIDEO_SUFFIXES
    report.other_files = +report.other_files
    lines: dict[str, list[str]] = {"images": [], "videos": []}
    ids = ids_for(media)
    for file, is_video in media.items():
        captions: list[str] = []
        try:
            captions = read_captions((folder / file).with_suffix(".txt"), per_line)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            report.problems.append(f"{file}: used without its caption, {error}")
        report.without_caption += not captions
        path = Path(os.path.relpath(folder / file, out_dir)).as_posix()
        row = {"id": ids[file], "video_path" if is_video else "image_path": path, "caption": captions[0] if captions else ""}
        row |= {"captions": captions} if len(captions) > 1 else {}
        lines["videos" if is_video else "images"].append(json.dumps(row, ensure_ascii=False) + "\n")
    report.images, report.videos = len(lines["images"]), len(lines["videos"])
    if not media:
        looked = " ".join(sorted(SUFFIXES | VIDEO_SUFFIXES))
        raise ValueError(f"no picture or video in {folder}: looked for {looked}\n{report.text()}")
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        path = out_dir / f"{split}_{name}.jsonl"
        if rows:
            write_aside(path, "".join(rows))
            report.written.append(path)
    return report


def extract_frames(record: Record, folder: Path, fps: float, suffix: str = "png") -> int:
    """Frames of a video file as pictures in `folder`, `fps` a second; returns how many. The folder appears when it is whole;
    one that is there is left as it is. ValueError or OSError: the file cannot be used."""
    if folder.is_dir():
        return len(os.listdir(folder))
    number, options = 0, {"quality": 95} if suffix == "jpg" else {}
    with folder_aside(folder) as aside:
        for number, image in enumerate(read_video(record.path, fps), 1):
            image.save(aside / f"{number - 1:06d}.{suffix}", **options)
    return number
