"""Tests run from the repository root; `VTP/` holds the package `vtp`."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # a second thread costs more than it brings where tensors are small

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "VTP"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_collection_finish():
    """Leave what all imports and the collection have made out of every later garbage collection,
    which would walk it each time. A plan of memory asks for two."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, alone or among others."""
    torch.manual_seed(0)
