"""Worker processes: one that is killed is named and survived, shared memory that is full only costs
time."""

import os
import pickle
import select
import signal
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache import decoding, look
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset import workers
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.problems import Skip
from mmdit.data.dataset.records import read_records
from tests.test_cache import MeanPixels, contents, run, write_meta
from tests.test_packed import MANIFEST


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """A dead worker is looked for every 0.2 s in place of 5."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """40 pictures, of which `deadly` kills the worker that decodes it as a full memory would."""
    names = [f"p{i:02}" for i in range(40)]
    for name in names:
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    load = decoding.load_image

    def load_or_die(path, *rest):
        if "p20" in str(path) and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(path, *rest)

    parent = os.getpid()
    monkeypatch.setattr(decoding, "load_image", load_or_die)
    monkeypatch.setattr(look, "load_image", load_or_die)
    return write_meta(
        tmp_path, [{"id": name, "image_path": f"{name}.png", "caption": ""} for name in names]
    )


def test_helpers_work_in_order_and_end_with_the_process_that_they_help_even_if_it_is_killed():
    with workers.helping_processes(2) as pool:
        assert list(workers.ahead(pool, abs, range(-9, 0), 3)) == [*range(9, 0, -1)]
        assert pool.submit(os.getpid).result() != os.getpid()
    with workers.helping_processes(0) as pool:
        assert pool is None and list(workers.ahead(pool, abs, [-1, 2], 3)) == [1, 2]
    ours, theirs = os.pipe()  # the other end is open as long as one of them lives
    helped = os.fork()
    if not helped:
        with workers.helping_processes(2):
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(theirs)
    os.waitpid(helped, 0)
    assert select.select([ours], [], [], 20)[0] and os.read(ours, 1) == b""
    os.close(ours)


@pytest.mark.thorough
def test_a_record_that_kills_its_worker_is_skipped_and_the_rest_is_cached(deadly, tmp_path, capfd):
    before = signal.getsignal(signal.SIGCHLD)
    report = run(deadly, tmp_path / "cache", num_workers=2)
    assert report.written == 39 and [skip.id for skip in report.skipped] == ["p20"]
    assert "was killed" in report.skipped[0].reason and signal.getsignal(signal.SIGCHLD) == before
    told = capfd.readouterr().err
    assert (
        "one of these 16 records" in told
        and "p16, p17" in told
        and "p31" in told
        and "Traceback" not in told
    )


def test_a_look_at_sources_survives_it_too(deadly, monkeypatch):
    monkeypatch.setattr(look, "AT_ONCE", 2)
    rows = look.look_at(
        read_records(deadly, "image"),
        "image",
        lambda size: (32, 32),
        PreprocessConfig(),
        VideoConfig(),
        1,
    )
    assert [row["id"] for row in rows if isinstance(row, dict)] == [
        f"p{i:02}" for i in range(40) if i != 20
    ]
    assert isinstance(rows[20], Skip) and "was killed" in rows[20].reason


def test_a_killed_reader_of_batches_says_how_to_go_on(tmp_path):
    with CacheWriter(tmp_path, MANIFEST) as writer:
        writer.add_many(list("abcd"), torch.randn(4, 3, 2, 2, 3), [""] * 4)
    cache = open_cache(tmp_path)
    batches = LatentBatches(
        cache, BatchPlan(cache, VideoConfig(32, 32), 2, 0), in_memory=False, num_workers=1
    )
    steps = batches.iterate(0)
    next(steps)
    (child,) = [
        int(pid)
        for pid in open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
        if os.path.exists(f"/proc/{pid}/oom_score_adj")
        and open(f"/proc/{pid}/oom_score_adj").read().strip() == "500"
    ]
    os.kill(child, signal.SIGKILL)
    with pytest.raises(
        ValueError, match="killed, most likely because the memory was full.*--resume"
    ):
        for _ in range(20):
            next(steps)


class Numbers(Dataset):
    def __getitem__(self, key):
        return {"key": key, "numbers": [torch.full((1000,), float(key))]}


def test_full_shared_memory_sends_results_through_pipes(monkeypatch, capfd):
    def full(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
            " (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    found = list(workers.results(Numbers(), range(4), 1))
    assert [result["key"] for result in found] == [0, 1, 2, 3] and found[3]["numbers"][0][999] == 3
    assert capfd.readouterr().err.count("is full: data goes through pipes") == 1
    assert isinstance(pickle.loads(pickle.dumps(found[0]))["numbers"][0], torch.Tensor)


def test_errors_of_the_work_itself_are_raised_as_they_are():
    class Wrong(Dataset):
        def __getitem__(self, key):
            raise RuntimeError("none of ours")

    with pytest.raises(RuntimeError, match="none of ours"):
        list(workers.results(Wrong(), [1], 1))


@pytest.mark.slow
def test_large_pictures_are_cached_with_little_shared_memory(tmp_path):
    """In a mount namespace of its own, with 64 MB of /dev/shm, as containers have by default."""
    import subprocess
    import sys

    for i in range(48):
        Image.effect_noise((1024, 1024), 90).convert("RGB").save(tmp_path / f"{i}.jpg")
    meta = write_meta(
        tmp_path, [{"id": str(i), "image_path": f"{i}.jpg", "caption": ""} for i in range(48)]
    )
    script = (
        "import sys; from tests.test_cache import MeanPixels, run\n"
        "from mmdit.data.dataset.buckets import VideoConfig\n"
        "report = run(*sys.argv[1:3], num_workers=2, video=VideoConfig(1024, 1024))\n"
        "print(report.written)"
    )
    shell = (
        f"mount -t tmpfs -o size=64m tmpfs /dev/shm && exec {sys.executable} -c '{script}' {meta}"
        f" {tmp_path}/small"
    )
    begin = time.monotonic()
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": ":".join(["VTP", "."])},
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.split() == ["48"] and "is full: data goes through pipes" in done.stderr, (
        done.stderr
    )
    run(meta, tmp_path / "whole", MeanPixels(), video=VideoConfig(1024, 1024))
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")
    print(f"{time.monotonic() - begin:.0f} s")


def test_decoded_pixels_are_page_locked_on_their_way_to_a_gpu(monkeypatch):
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self) or self)
    result = decoding.Decoded(1, [(torch.zeros(2), [])])
    assert pin_memory(result).groups == result.groups and locked == [result.groups[0][0]]
