"""Tests run from the repository root; `VTP/` holds the package `vtp`."""

import copy
import functools
import gc
import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # a second thread costs more than it brings where tensors are small

# Where an image has Python keep no bytecode, each worker would rewrite the assertions of all files
# (7 s), and each process that a test starts would compile what it imports (0.3 s).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "VTP"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


# xdist hands out whole files. Those that take longest come first, so that at the end no process
# waits for one that began late; left to itself, xdist hands out those with few tests last.
LONGEST_FIRST = [
    f"test_{name}.py"
    for name in (
        "in_process",
        *("processes", "posttrain_loops", "memory_ladder", "fused", "sharded", "wan_training"),
        *("trainer", "posttrain_wan", "quickstart", "configs", "diffusion_samplers", "experts"),
        *("experiment", "wan_pictures", "ui_jobs", "wan_step", "replays", "products", "wan_files"),
        *("context_parallel", "vtp_train", "model", "benchmark", "alpha_schedule"),
        *("posttrain_pair", "vtp_tokenizer", "run_report"),
    )
]


def pytest_configure(config):
    if getattr(config.option, "dist", "") == "load":  # as with -n alone: whole files all the same,
        config.option.dist = "loadfile"  # for each worker would make what the tests of a file share
    if hasattr(config.option, "loadscopereorder"):  # of xdist: else the file with most tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


# Objects are made by the million and seldom in circles: looking for these as often as Python does
# took 2 % of the time.
gc.set_threshold(20_000, 20, 20)
full_collections = 0


def leave_out_what_is_there():
    """Leave all objects that are reachable now out of every later garbage collection."""
    global full_collections
    gc.collect()
    gc.freeze()
    full_collections = gc.get_stats()[2]["collections"]


def pytest_collection_finish():
    """Leave out what all imports and the collection have made: a full garbage collection would walk
    it each time (0.15 s). A plan of memory asks for two."""
    leave_out_what_is_there()


def pytest_runtest_logfinish():
    """Leave out what tests have imported since, such as Dynamo, once it has been walked."""
    if gc.get_stats()[2]["collections"] > full_collections:
        leave_out_what_is_there()


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, alone or among others."""
    import torch  # which the process that hands out the tests never needs: its workers begin sooner

    # `torch.manual_seed` also notes for CUDA who called it, which takes 1 ms where CUDA is not used
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Leave to the system when it writes: tests would wait for thousands of files, 4 ms each. That
    they are flushed is a fact of tests/test_files.py."""
    from mmdit.data.cache import writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        patch.setattr(writer, "flush_file_system", os.stat)
        yield


@pytest.fixture(autouse=True, scope="module")
def small_curves(request):
    """Have exports draw no curves, which takes longer than the export, save where they are the
    fact."""
    from PIL import Image

    from mmdit.commands import export_card

    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_export_card.py":
            nothing = Image.new("L", (1, 1))
            patch.setattr(export_card, "learning_curves", lambda name, records: nothing)
        yield


@pytest.fixture(autouse=True, scope="module")
def tokenizers_are_read_once(request):
    """Keep networks of tokenizers, save where how they are read is the fact."""
    from tests.helpers.kept_tokenizers import kept_tokenizers

    if request.path.name in ("test_vtp_tokenizer.py", "test_wan_vae.py", "test_security.py"):
        yield
    else:
        with kept_tokenizers():
            yield


@pytest.fixture(autouse=True, scope="session")
def yaml_is_parsed_once():
    """Keep what YAML holds, for hundreds of tests read the same files and overrides."""
    from mmdit import config

    parsed = functools.cache(config.parse_yaml)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "parse_yaml", lambda *words: copy.deepcopy(parsed(*words)))
        yield


@pytest.fixture
def opaque_einops():
    """Have Dynamo put `rearrange` into its graphs as it is, without tracing what it does, which
    takes 0.1 s a call. That it can be traced is a fact of tests/test_model.py."""
    import torch
    from einops import rearrange

    torch.compiler.allow_in_graph(rearrange)
    yield
    torch._dynamo.trace_rules._allowed_callable_ids.remove(id(rearrange))
    torch._dynamo.reset()
