"""The pictures in a folder, all at one size, without a list of records; for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mmdit.data.dataset.frames import load_first_frame
from mmdit.data.dataset.pictures import SUFFIXES
from mmdit.data.dataset.sources import files_below, is_sheet


def folder_pictures(folder: str | Path, width: int, height: int) -> Iterator[Tensor]:
    """Yield every readable picture below `folder`, its middle cut to size, as `(3, height, width)`
    in [0, 1]. Pictures that cannot be read are reported and skipped. ValueError if there is no
    picture, or none can be read."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder of pictures")
    paths = (Path(folder) / name for name in files_below(folder))
    files = [path for path in paths if path.suffix.lower() in SUFFIXES and not is_sheet(path)]
    if not files:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))})")
    count = 0
    for file in files:
        try:
            picture = load_first_frame(file, (width, height))
        except (OSError, ValueError) as error:
            print(f"skipped: {error}", flush=True)
            continue
        count += 1
        yield picture
    if not count:
        raise ValueError(f"{folder}: no picture could be read")
