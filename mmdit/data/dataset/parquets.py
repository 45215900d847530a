"""Parquet files as on dataset hubs: a column of pictures or clips, as `{bytes, path}` or plain
bytes, and a column of captions.

The columns of text are read when the file is searched, some rows at a time. The bytes are read by
one process, in the order of the rows, and passed to the workers, because a row group can only be
read from its start. Types that Python would have to unpickle, and other extension types, are
refused.
"""

from __future__ import annotations

import base64
import io
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO

from mmdit.data.dataset.members import Archive, Loaded, Member, Sample, Unreadable
from mmdit.data.dataset.problems import Unusable
from mmdit.data.dataset.records import Media
from mmdit.data.dataset.tars import BOTH, CAPTION_KEYS, captions_under

ROWS = 1024  # of text columns that are read at once
PICTURES = 16  # that are read at once, if together they are no larger than:
AT_ONCE = 1 << 25  # bytes
PICTURE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "bytes")
CLIP_COLUMNS = ("video", "mp4", "clip", "video_bytes", "bytes")
ID_COLUMNS = ("id", "__key__", "key")
PICKLED = b"arrow.py_extension_type"


def import_parquet() -> tuple[ModuleType, ModuleType]:
    """Return pyarrow and its parquet module. ValueError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet files need pyarrow: pip install 'mmdit[hf]', or pip install pyarrow"
        ) from None
    return pyarrow, pyarrow.parquet


def _opened(archive: Archive) -> Any:
    """Open a parquet file. Unusable if it is damaged, or holds pickled types; OSError if it was
    modified since it was searched."""
    pyarrow, parquet = import_parquet()
    archive.open_binary().close()
    try:
        # checked before any part of the schema becomes a Python object
        metadata = parquet.read_metadata(archive.path).metadata or {}
        schema = base64.b64decode(metadata.get(b"ARROW:schema", b""))
        if PICKLED in schema or any(PICKLED in value for value in metadata.values()):
            raise Unusable("pickled types in a parquet file", "they would run code; write it anew")
        return parquet.ParquetFile(archive.path, pre_buffer=False, buffer_size=1 << 16)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> Unusable:
    if isinstance(error, Unusable):
        return error
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return Unusable("damaged parquet file", f"{reason}; get it again")


# ── columns ───────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Columns:
    """The columns to read. `media`: the path of the column, or field of a struct, that holds the
    bytes."""

    media: str
    caption: str
    id: str  # "": rows are numbered
    facts: tuple[str, ...]
    beside: tuple[str, ...] = ()  # further captions


def choose_columns(
    schema: Any, path: str, media: Media, media_column: str = "", caption_column: str = ""
) -> Columns:
    """Return the columns of a file to read: those that are named, or else those with usual names.
    ValueError lists the existing columns."""
    import_parquet()
    fields = {field.name: field for field in schema}
    usual = PICTURE_COLUMNS if media == "image" else CLIP_COLUMNS
    leaves = {name: leaf for name, field in fields.items() if (leaf := _leaf(field))}
    texts = [name for name, field in fields.items() if _is_text(field.type)]
    here = ", ".join(f"{field.name} ({_type_name(field.type)})" for field in schema)
    try:
        chosen = _choose(f"{media}s", media_column, list(leaves), usual, "--image_column")
        caption = _choose("captions", caption_column, texts, CAPTION_KEYS, "--caption_key")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; columns here: {here}") from None
    plain = [name for name, field in fields.items() if _is_plain(field.type)]
    ids = [name for name in ID_COLUMNS if name in plain]
    used = {chosen, caption, *ids[:1], *BOTH}
    facts = tuple(name for name in plain if name not in used)
    beside = tuple(name for name in BOTH if caption in BOTH and name != caption and name in texts)
    return Columns(leaves[chosen], caption, next(iter(ids), ""), facts, beside)


def _in_place_of_usual(schema: Any, path: str, media: Media, columns: Columns) -> str:
    """Return a suffix for the names of rows if the media column is not the usual one but was named;
    else "". By it, a cache recognises that its pictures come from another column."""
    try:
        usual = choose_columns(schema, path, media, caption_column=columns.caption).media
    except ValueError:  # there is no usual one
        usual = ""
    return "" if columns.media == usual else f", {columns.media}"


def _choose(what: str, named: str, fit: list[str], usual: Iterable[str], option: str) -> str:
    """Return the named column, else the first with a usual name, else the only one. ValueError if
    it is not clear."""
    if named:
        if named not in fit:
            raise ValueError(f"{option} is {named!r}, which is no column of {what}")
        return named
    by_name = {name.lower(): name for name in reversed(fit)}
    for name in usual:
        if name in by_name:
            return by_name[name]
    if len(fit) == 1:
        return fit[0]
    raise ValueError(f"which column holds the {what} is not clear; name it with {option}")


def _leaf(field: Any) -> str:
    """Return the path of the bytes of pictures in a column; "" if it holds none."""
    from pyarrow import types

    def is_bytes(value_type: Any) -> bool:
        views = getattr(types, "is_binary_view", types.is_binary)  # newer than the oldest pyarrow
        return any(of(value_type) for of in (types.is_binary, types.is_large_binary, views))

    if is_bytes(field.type):
        return field.name
    if not types.is_struct(field.type) or field.type.get_field_index("bytes") < 0:
        return ""
    return f"{field.name}.bytes" if is_bytes(field.type.field("bytes").type) else ""


def _is_text(value_type: Any) -> bool:
    """Return whether the values are texts, or lists of texts."""
    from pyarrow import types

    if types.is_list(value_type) or types.is_large_list(value_type):
        value_type = value_type.value_type
    if types.is_dictionary(value_type):
        value_type = value_type.value_type
    views = getattr(types, "is_string_view", types.is_string)
    return any(of(value_type) for of in (types.is_string, types.is_large_string, views))


def _is_plain(value_type: Any) -> bool:
    """Return whether the values are single numbers, booleans or texts, as in JSON."""
    from pyarrow import types

    is_one = not (types.is_list(value_type) or types.is_large_list(value_type))
    numbers = types.is_integer(value_type) or types.is_floating(value_type)
    return numbers or types.is_boolean(value_type) or (is_one and _is_text(value_type))


def _type_name(value_type: Any) -> str:
    text = str(value_type)
    return text if len(text) <= 60 else f"{text[:57]}…"


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────
def parquet_samples(
    archive: Archive, media: Media, media_column: str = "", caption_column: str = ""
) -> Iterator[Sample]:
    """Yield the rows of a parquet file, in order, without the bytes of pictures. Rows that cannot
    be used are `Unreadable`. ValueError if a column is missing or ambiguous."""
    pyarrow, _ = import_parquet()
    number = 0
    try:
        file = _opened(archive)
        columns = choose_columns(
            file.schema_arrow, archive.path, media, media_column, caption_column
        )
        named = _in_place_of_usual(file.schema_arrow, archive.path, media, columns)
        names = [name for name in (columns.caption, columns.id, *columns.facts) if name]
        names += columns.beside
        for group in range(file.num_row_groups):
            first = number
            parts = file.iter_batches(ROWS, row_groups=[group], columns=names, use_threads=False)
            for rows in parts:
                for row in _decoded(rows):
                    name = f"row {number}{named}"
                    place = ParquetRow(archive, name, group, number - first, columns.media)
                    yield _sample(place, row, columns, number)
                    number += 1
    except (pyarrow.ArrowException, OSError, Unusable) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        name = f"from row {number}" if number else "the file"
        rest = Unreadable(archive, name, _damaged(error))
        yield Sample(f"{archive.stem}-{number}-end", rest)


def _decoded(rows: Any) -> list[dict]:
    """Return rows as dicts; an empty dict for a row with text that is not UTF-8, which Parquet does
    not check."""
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        if len(rows) == 1:
            return [{}]
        return [row for place in range(len(rows)) for row in _decoded(rows.slice(place, 1))]


def _sample(member: ParquetRow, row: dict, columns: Columns, number: int) -> Sample:
    key = row.get(columns.id)
    key = f"{member.archive.stem}_{number:06d}" if key in (None, "") else str(key)
    if not row:
        problem = Unusable("its caption cannot be read", "a text in its row is not UTF-8")
        return Sample(key, Unreadable(member.archive, member.name, problem))
    facts = {}
    for name in columns.facts:
        value = row[name]
        is_number = not isinstance(value, float) or math.isfinite(value)
        facts[name] = value if is_number else None
    try:
        captions = captions_under(row, columns.caption)
    except ValueError as error:
        problem = Unusable("its caption cannot be read", str(error))
        return Sample(key, Unreadable(member.archive, member.name, problem))
    facts |= {"captions": captions} if len(captions) > 1 else {}
    return Sample(key, member, tuple(captions), facts)


@dataclass(frozen=True, slots=True)
class ParquetRow(Member):
    """The bytes in one row: row number `place` of the row group `group`, in the column `leaf`."""

    group: int
    place: int
    leaf: str

    @property
    def block(self) -> object:
        """Return the identity of the row group, see `Member.block`."""
        return self.archive.path, self.group

    def open_binary(self) -> BinaryIO:
        """Open the member, see `Member.open_binary`."""
        return io.BytesIO(READER.read(self))

    def loaded(self) -> Member:
        """Return the row with its bytes, which are read here, in one process."""
        try:
            return Loaded(self.archive, self.name, READER.read(self))
        except (OSError, Unusable) as error:
            return Unreadable(self.archive, self.name, error)


class _Reader:
    """Reads rows, remembering its position in a row group: the next row costs little, an earlier
    one starts the group again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group: tuple = ()  # archive, group and column
        self._error: Unusable | None = None  # of this group
        self._first = 0  # number of the first row in:
        self._batch: Any = ()
        self._batches: Iterator = iter(())

    def read(self, row: ParquetRow) -> bytes:
        """Return the bytes of a row. Unusable if there are none, or the file is damaged; OSError if
        it cannot be read."""
        group = (row.archive, row.group, row.leaf)
        with self._lock:
            if group != self._group:
                self._error = None
            if group != self._group or row.place < self._first:
                self._begin(row)
                self._group = group
            while self._error is None and row.place >= self._first + len(self._batch):
                self._next(row)
            if self._error is not None:
                raise self._error
            value = self._batch[row.place - self._first].as_py()
        if not value:
            raise Unusable("no bytes in the row", "a path alone is not followed")
        return value

    def _begin(self, row: ParquetRow) -> None:
        """Open the row group of a row, at its first row."""
        self._first, self._batch, self._batches = 0, (), iter(())
        try:
            file = _opened(row.archive)
        except Unusable as error:
            self._error = error
            return
        size = _mean_bytes(file.metadata.row_group(row.group), row.leaf)
        self._batches = file.iter_batches(
            max(1, min(PICTURES, AT_ONCE // size)),
            row_groups=[row.group],
            columns=[row.leaf],
            use_threads=False,
        )

    def _next(self, row: ParquetRow) -> None:
        """Read the next rows."""
        pyarrow, _ = import_parquet()
        self._first += len(self._batch)
        self._batch = ()
        try:
            column = next(self._batches).column(0)
        except StopIteration:
            self._error = _damaged(ValueError(f"its row group {row.group} has too few rows"))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            self._error = _damaged(error)
        else:
            # by type, not by the path: the name of a column may hold a dot, too
            is_struct = pyarrow.types.is_struct(column.type)
            self._batch = column.flatten()[0] if is_struct else column


def _mean_bytes(group: Any, leaf: str) -> int:
    """Return the mean size in bytes of a value of the column in a row group, at least 1."""
    columns = (group.column(number) for number in range(group.num_columns))
    sizes = [part.total_uncompressed_size for part in columns if part.path_in_schema == leaf]
    return max(1, sum(sizes) // max(1, group.num_rows))


READER = _Reader()  # of this process
