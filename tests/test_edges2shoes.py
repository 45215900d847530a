"""edges2shoes: the photo of each row, whichever way the parquet holds it, ends up as PNG with a
line of metadata."""

import io
import sys

import pytest
from PIL import Image

from examples.edges2shoes.unpack import unpack
from mmdit.data.dataset.frames import load_image
from mmdit.data.dataset.records import read_records

EDGES, PHOTO = (255, 255, 255), (200, 30, 10)


def png(*colours):
    picture = Image.new("RGB", (8 * len(colours), 8))
    for i, colour in enumerate(colours):
        picture.paste(colour, (8 * i, 0, 8 * i + 8, 8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "columns",
    [
        {
            "imageA": [{"bytes": png(EDGES)}] * 3,
            "imageB": [{"bytes": png(PHOTO)}, {"bytes": b"broken"}, {"bytes": png(PHOTO)}],
        },
        {"image": [png(EDGES, PHOTO), b"broken", png(PHOTO)], "caption": ["", None, "a red boot"]},
    ],
)
def test_the_photo_is_found_and_broken_rows_are_skipped(tmp_path, columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("train-0.parquet", "val-0.parquet"):
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
    assert unpack(tmp_path, tmp_path / "out", "train", "a photo of a shoe", None) == (2, 1)
    records = read_records(tmp_path / "out/train_images.jsonl", "image")
    assert [record.id for record in records] == ["train_000000", "train_000002"]
    last = "a red boot" if "caption" in columns else "a photo of a shoe"
    assert [record.caption for record in records] == ["a photo of a shoe", last]
    for record in records:
        assert (
            load_image(record.path).size == (8, 8)
            and load_image(record.path).getpixel((4, 4)) == PHOTO
        )
    assert unpack(tmp_path, tmp_path / "one", "train", "shoe", 1)[0] == 1


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no .parquet file"):
        unpack(tmp_path, tmp_path / "out", "train", "shoe", None)
    (tmp_path / "train.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        unpack(tmp_path, tmp_path / "out", "train", "shoe", None)
