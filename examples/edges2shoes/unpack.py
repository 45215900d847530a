"""Unpack edges2shoes (Isola et al. 2017) from parquet files into PNG images and JSONL."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mmdit.data.dataset.pictures import load_image
from mmdit.files import open_atomically, write_atomically

PHOTO_COLUMNS = ("imageB", "image_b", "target", "image", "combined")
CAPTION_COLUMNS = ("caption", "text", "prompt")


def rows(files: list[Path]) -> Iterator[tuple[bytes | dict, str | None]]:
    """Yield `(encoded picture, caption or None)` of every row."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("reading parquet needs pyarrow: pip install pyarrow") from None
    for file in map(parquet.ParquetFile, files):
        names = file.schema_arrow.names
        photo = next((name for name in PHOTO_COLUMNS if name in names), None)
        caption = next((name for name in CAPTION_COLUMNS if name in names), None)
        if photo is None:
            raise ValueError(
                f"a parquet file has the columns {', '.join(names)}; needs one of"
                f" {', '.join(PHOTO_COLUMNS)}"
            )
        columns = [photo, caption] if caption else [photo]
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                yield row[photo], row[caption] if caption else None


def photo_of(data: bytes | dict) -> Image.Image:
    """Return the photo of a row: the right half where edges and photo lie side by side."""
    image = load_image(io.BytesIO(data["bytes"] if isinstance(data, dict) else data))
    width, height = image.size
    return image.crop((height, 0, width, height)) if width == 2 * height else image


def unpack(
    source: Path, out_dir: Path, split: str, caption: str, max_samples: int | None
) -> tuple[int, int]:
    """Write `images/*.png` and `<split>_images.jsonl`; return how many pictures were written and
    how many could not be read. ValueError: there is nothing to read."""
    files = sorted([source] if source.is_file() else source.rglob("*.parquet"))
    if not files:
        raise ValueError(
            f"no .parquet file in {source}; put the data set's parquet files there or give --source"
        )
    lines, bad = [], 0
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    chosen = [file for file in files if file.name.startswith(split)] or files
    for number, (data, words) in enumerate(
        tqdm(rows(chosen), desc=f"writing {out_dir}", total=max_samples, unit="image")
    ):
        id = f"{split}_{number:06d}"
        try:
            with open_atomically(out_dir / "images" / f"{id}.png") as file:
                photo_of(data).save(file, format="PNG")
            row = {"id": id, "image_path": f"images/{id}.png", "caption": words or caption}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        except (OSError, TypeError, ValueError) as error:
            bad += 1
            print(f"row {number} skipped: {error}", file=sys.stderr)
        if len(lines) == max_samples:
            break
    if not lines:
        raise ValueError(f"no picture could be read from {source}")
    write_atomically(out_dir / f"{split}_images.jsonl", "".join(lines))
    return len(lines), bad
