"""Read a data set in any of its forms: a JSONL file, WebDataset tars, or parquet files.

    my_images.jsonl, shards/, shards/*.tar, shards-{000000..000127}.tar, data/train.parquet

All of them become the same kind of records, in an order and with ids that depend on the files
alone. The bytes of pictures are read later, where they are decoded.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from mmdit.data.dataset.members import Archive, Sample, Unreadable
from mmdit.data.dataset.parquets import parquet_samples
from mmdit.data.dataset.records import (
    ARCHIVES,
    Media,
    Record,
    check_id,
    media_of,
    read_records,
)
from mmdit.data.dataset.sources import hashed_id
from mmdit.data.dataset.tars import other_contents, tar_samples

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
NAMES = {"image": "images", "video": "videos"}  # in the names of JSONL files
MOST_FILES = 100_000  # that a pattern may stand for
HUB_NAME = re.compile(r"(\w+)-\d{5}-of-\d{5}(?:-\w+)?\.\w+")  # split, number, count, hash
# name, perhaps ending with a split, and number: cc3m-validation-0004.tar
SHARD_NAME = re.compile(r"(?:.+[-_])?([^\W_]+)[-_]\d+\.\w+")
OTHER_SPLITS = {"val", "valid", "validation", "dev", "eval", "test"}  # not train


# ── files ─────────────────────────────────────────────────────────────────────────────────────────
def input_files(path: str | Path, media: Media, split: str | None = None) -> list[str]:
    """Return the files of a data set: one JSONL file, or tars or parquet files in the order of
    their names. `path`: one file; a folder that holds `<split>_images.jsonl` or files of the other
    kinds; or a pattern with `*` or `{000..127}`. `split`: of a folder; None takes train, if its
    files have splits. ValueError if there are none, or some are missing."""
    text = os.path.expanduser(str(path))
    if re.match(r"[a-z0-9]{2,}:/", text):  # Path has joined the two slashes
        raise ValueError(f"{path} is an address: download what is there, and name that")
    if os.path.isdir(text):
        return _files_in(Path(text), media, split)
    if os.path.exists(text) or not re.search(r"[*?\[{]", text):
        return [text]
    if split is not None:
        raise ValueError(
            f"--split is {split!r}, but {text} names files, and a split is one of a folder: leave"
            " it out"
        )
    folder, pattern = os.path.split(text)
    if not os.path.isdir(folder):  # otherwise the brackets are part of its name
        folder, pattern = "", text
    names = [os.path.join(folder, name) for name in expand_braces(pattern)]
    plain = {name for name in names if not glob.has_magic(name.removeprefix(folder))}
    missing = [name for name in names if name in plain and not os.path.exists(name)]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} files that {text} names are missing, the first is"
            f" {missing[0]}"
        )
    files: list[str] = []
    for name in names:
        matching = glob.escape(folder) + name.removeprefix(folder)
        files += [name] if name in plain else sorted(glob.glob(matching))
    if not files:
        raise ValueError(f"no file matches {text}")
    return _of_one_kind(list(dict.fromkeys(files)), text)


def _files_in(folder: Path, media: Media, asked: str | None) -> list[str]:
    split = asked or "train"
    metadata = folder / f"{split}_{NAMES[media]}.jsonl"
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    archives = sorted(name for name in names if name.endswith(ARCHIVES))
    if not archives and not metadata.exists() and (inner := _folders_of_archives(folder)):
        raise ValueError(
            f"{folder} holds no {metadata.name} and no tar or parquet file, but"
            f" {', '.join(inner[:5])} does: name that folder"
        )
    if metadata.exists() or not archives:
        return [str(metadata)]
    is_hub = all(map(HUB_NAME.fullmatch, archives))
    named = {name: _split_of(name) for name in archives}
    chosen = [name for name in archives if split in (named[name], _prefix_of(name))]
    here = sorted(set(named.values()) - {""})
    if not chosen and (is_hub or asked):
        there = ", ".join(here) or "files without one"
        raise ValueError(f"{folder} has no split {split!r}; choose one with --split: {there}")
    held_out = OTHER_SPLITS.intersection(here)
    if not chosen and held_out and not held_out.issuperset(named.values()):
        raise ValueError(
            f"{folder} holds files of the split {', '.join(sorted(held_out))} beside others"
            f" ({', '.join(sorted(set(here) - held_out)) or 'without one'}): name those to be read"
            " by a pattern, or the split by --split"
        )
    archives = chosen or archives
    return _of_one_kind([str(folder / name) for name in archives], str(folder))


def _folders_of_archives(folder: Path) -> list[str]:
    """Return the folders in `folder` that hold tars or parquet files, as in a clone of a hub's data
    set."""
    inner = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(OSError):  # not a folder, or not readable
            if any(name.endswith(ARCHIVES) for name in os.listdir(path)):
                inner.append(str(path))
    return inner


def _split_of(name: str) -> str:
    """Return the word before the number in a file's name, which may be its split; "" if there is
    none."""
    match = HUB_NAME.fullmatch(name) or SHARD_NAME.fullmatch(name)
    return match[1] if match else ""


def _prefix_of(name: str) -> str:
    """Return the part of a shard's name before its number."""
    return re.sub(r"[-_]\d+\.\w+$", "", name)


def _of_one_kind(files: list[str], where: str) -> list[str]:
    """Return `files`. ValueError unless all are tars, or all are parquet files."""
    suffixes = sorted({os.path.splitext(file)[1] for file in files})
    if len(suffixes) > 1 or suffixes[0] not in ARCHIVES:
        raise ValueError(
            f"{where} holds files of {', '.join(suffixes)}; name those of one kind, .tar or"
            f" .parquet, by a pattern (for example {Path(where).parent}/*.tar)"
        )
    return files


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with `{000..127}` and `{a,b}` stands for, in order.
    ValueError if they are too many, or an alternative leads to another folder."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    if span is None:
        parts = match[1].split(",")
        if len(parts) < 2 or any("/" in part or ".." in part for part in parts):
            raise ValueError(
                f"{{{match[1]}}} in {pattern} is no range like {{000..127}}, and no list like"
                " {a,b} of parts of names"
            )
    else:
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if span[1].startswith("0") else 0
        _check_count(abs(last - first) + 1, pattern)
        step = 1 if last >= first else -1
        parts = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    rest = expand_braces(after)
    _check_count(len(parts) * len(rest), pattern)
    return [before + part + end for part in parts for end in rest]


def _check_count(count: int, pattern: str) -> None:
    if count > MOST_FILES:
        raise ValueError(f"{pattern} stands for {count} files, more than {MOST_FILES}")


# ── records ───────────────────────────────────────────────────────────────────────────────────────
def read_input(
    path: str | Path,
    media: Media,
    prefer: str = "",
    *,
    split: str | None = None,
    image_column: str = "",
    caption_key: str = "",
    limit: int = 0,
) -> list[Record]:
    """Return the records of a data set, in its order, only the first `limit` if it is not 0; see
    `input_files` and, for JSONL files, `read_records`. `image_column`: the column of parquet files
    that holds the pictures; `caption_key`: the column with their captions, or the key in the
    `.json` files of tars. ValueError if there are no records, or they cannot be read."""
    if limit < 0:
        raise ValueError(f"the limit is {limit}, must be at least 1 (0: no limit)")
    files = input_files(path, media, split)
    suffix = os.path.splitext(files[0])[1]
    options = {"--image_column": image_column, "--caption_key": caption_key}
    unused = ["--image_column"] if suffix == ".tar" else list(options)
    for name in unused if suffix != ".parquet" else ():
        if options[name]:
            raise ValueError(f"{name} is {options[name]!r}, but {files[0]} has no such choice")
    if suffix in COMPRESSED:
        raise ValueError(f"cannot read {files[0]}: it is compressed; unpack it first")
    if suffix not in ARCHIVES:
        return read_records(files[0], media, prefer)[: limit or None]
    samples = _samples(files, media, image_column, caption_key)
    records = list(itertools.islice(_records(samples), limit or None))
    if not records:
        what = other_contents(Archive.of(files[0])) if suffix == ".tar" else "no row"
        raise ValueError(f"{path} holds no {media}; {files[0]} has {what}")
    return records


def _samples(
    files: list[str], media: Media, image_column: str, caption_key: str
) -> Iterator[Sample]:
    """Yield the samples in the files. ValueError names a file that cannot be read."""
    for file in tqdm(files, "looking through archives", unit="file", delay=2):
        try:
            archive = Archive.of(file)
        except FileNotFoundError:
            raise ValueError(f"cannot read {file}: it is not there") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot read {file}: {reason}") from None
        if file.endswith(".tar"):
            yield from tar_samples(archive, media, caption_key)
        else:
            yield from parquet_samples(archive, media, image_column, caption_key)


def _records(samples: Iterable[Sample]) -> Iterator[Record]:
    """Yield the record of each sample with a unique id: its key; if an earlier sample has that,
    with the name of its file in front; and with a number if that is taken, too."""
    taken: set[str] = set()
    numbers: Counter[str] = Counter()  # the last number given, by what stands before it
    for sample in samples:
        member, key = sample.member, sample.key.replace("/", "_")
        id, longer = _fit(key, member.name), f"{member.archive.stem}_{key}"
        if id in taken:
            id = _fit(longer, member.name)
        while id in taken:
            numbers[longer] += 1
            id = _fit(f"{longer}-{numbers[longer] + 1}", member.name)
        taken.add(id)
        yield Record(id, member.path, sample.captions[0], sample.facts, member)


def _fit(id: str, name: str) -> str:
    try:
        return check_id(id)
    except ValueError:
        return hashed_id(id, f"{id} {name}")


def media_of_input(path: str | Path) -> Media:
    """Return whether a data set holds pictures or clips: for a JSONL file by its first line, for an
    archive by whether it holds a picture."""
    file = input_files(path, "image")[0]
    if not file.endswith(ARCHIVES):
        return media_of(file)
    with contextlib.suppress(ValueError):  # a parquet file without pictures
        for sample in _samples([file], "image", "", ""):
            if not isinstance(sample.member, Unreadable):
                return "image"
    return "video"


def dealt(records: list[Record], rank: int, world: int) -> list[Record]:
    """Return the records of one of `world` processes; together they get all records. Records that
    are read together (a row group of a parquet file) go to the same process, unless there are too
    few such blocks for fair shares."""
    blocks: list[list[Record]] = []
    if world > 1 and any(record.member and record.member.block for record in records[:1]):
        blocks = [list(group) for _, group in itertools.groupby(records, _block)]
    if len(blocks) < 4 * world:
        return records[rank::world]
    return list(itertools.chain.from_iterable(blocks[rank::world]))


def _block(record: Record) -> object:
    return record.member.block if record.member else None
