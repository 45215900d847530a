"""Memory of the CPU in pieces, of which several share an allocation."""

import pytest
import torch
from torch import nn

from mmdit.nn import page_locked
from mmdit.nn.page_locked import PageLocked, laid_out, page_locked_bytes, rounded
from mmdit.training.memory.offload import Streamer, slot_bytes

GIGABYTE = 2**30


@pytest.fixture
def allocated(monkeypatch):
    sizes = []

    def host_memory(size, pinned):
        sizes.append(rounded(size))
        return torch.empty(size, dtype=torch.uint8, device="meta" if size > 2**20 else "cpu")

    monkeypatch.setattr(page_locked, "host_memory", host_memory)
    return sizes


def test_what_a_power_of_two_wastes_is_shared(allocated):
    block = 702_545_920  # of A14B: three of them take 98 % of two gigabytes, one 65 % of one
    memory = PageLocked(pinned=True)
    pieces = [memory.take(block, wanted=40 - number) for number in range(40)]
    assert sum(allocated) == page_locked_bytes([block] * 40) == 27 * GIGABYTE
    assert all(len(piece) == block for piece in pieces)
    # as many as there are already, where nobody knows how many are wanted: 40 inputs of 335 MB
    allocated.clear()
    memory = PageLocked(pinned=True)
    for _ in range(40):
        memory.take(335_462_400)
    assert 40 * 335_462_400 < sum(allocated) < 1.2 * 40 * 335_462_400
    assert allocated[:2] == [GIGABYTE / 2] * 2 and max(allocated) == GIGABYTE


def test_pieces_lie_apart_are_aligned_and_come_again(allocated):
    memory = PageLocked(pinned=False)
    like = torch.randn(7, 5, 12).transpose(0, 1)
    pieces = [memory.take(like.nbytes) for _ in range(7)]
    values = [laid_out(piece, like).copy_(like + number) for number, piece in enumerate(pieces)]
    assert all(torch.equal(value, like + number) for number, value in enumerate(values))
    assert all(value.stride() == like.stride() for value in values)
    assert len({piece.data_ptr() for piece in pieces}) == 7
    assert all(len(piece) == 1792 and piece.data_ptr() % 64 == 0 for piece in pieces)
    count, last = len(allocated), pieces.pop()
    memory.give(last)
    assert memory.take(900).data_ptr() == last.data_ptr() and len(allocated) == count
    memory.give(last)
    smaller = memory.take(700)  # not one that is twice as large
    assert len(smaller) == 768 and len(allocated) == count + 1


def test_blocks_take_what_is_planned_for_them(allocated):
    layers = [nn.Linear(9, size, bias=False).requires_grad_(False) for size in (35, 35, 8, 35)]
    weights = [layer.weight.clone() for layer in layers]
    moved, slots, locked = slot_bytes(layers)
    streamer = Streamer(layers, torch.device("cpu"))
    assert sum(allocated) == locked == rounded(3 * 1280) + 512
    assert (moved, slots) == (3 * 1280 + 512, 2 * 1280) and sum(map(len, streamer.pinned)) == moved
    x = torch.randn(2, 9)
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer(x), nn.functional.linear(x, weight))
