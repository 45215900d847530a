"""Memory that tensors free is used again, not mapped and zeroed anew."""

import platform

import pytest
import torch

from mmdit.training.memory.host import keep_freed_memory
from tests.helpers import warm

MEGABYTES = 128
COUNT = f"""
import resource, torch
from mmdit.training.memory.host import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty({MEGABYTES} << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(4)
mapped = faults(4)
keep_freed_memory(torch.device("cpu"))
faults(16)
print(mapped, faults(4))
"""


@pytest.mark.thorough
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_large_tensors_find_the_memory_of_those_before_them():
    done = warm.run("-c", COUNT)
    mapped, kept = map(int, done.stdout.split())
    pages = MEGABYTES << 8  # of 4 kB
    assert mapped >= pages and kept < pages / 10


def test_on_a_gpu_and_without_the_function_nothing_happens(monkeypatch):
    called = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: called.append(name) or object())
    keep_freed_memory(torch.device("cuda"))
    assert not called
    keep_freed_memory(torch.device("cpu"))
    assert called == [None]
