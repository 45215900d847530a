"""Windows: exact on any grid, shifted or not; padding takes no part."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit.nn import kept
from mmdit.nn.attention import SpatialAttention, attend
from mmdit.nn.position import FramePosition, temporal_rotary
from mmdit.nn.tiles import frame_tables
from mmdit.nn.window import Pattern, WindowGrid, coordinates, gather, place_tables
from tests.helpers.dense_video_mmdit import attention, visible

GRIDS = [
    (28, 16, 8),
    (5, 7, 4),
    (8, 8, 8),
    (1, 1, 8),
    (16, 16, 4),
    (9, 4, 8),
    (3, 10, 2),
    (6, 6, 1),
    (13, 11, 5),
]


@pytest.mark.parametrize("pattern", get_args(Pattern))
@pytest.mark.parametrize("rows, columns, window", GRIDS)
def test_groups_equal_dense_attention_under_the_same_mask(rows, columns, window, pattern):
    torch.manual_seed(0)
    layer = SpatialAttention(16, 2).double()
    x = torch.randn(2, 2, rows, columns, 16, dtype=torch.float64)
    grid = WindowGrid.fit(rows, columns, window)
    tables = place_tables(grid, pattern, 8, x.device, x.dtype)
    result = grid.merge(
        layer(grid.partition(x, padding=1e3), tables)
    )  # were padding seen, 1e3 would show
    flat, index = x.flatten(2, 3), torch.arange(rows * columns)
    allowed = visible(rows, columns, window, pattern)
    expected = attention(layer, flat, flat, allowed, [index // columns, index % columns], 100.0)
    torch.testing.assert_close(result.flatten(2, 3), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", get_args(Pattern))
@pytest.mark.parametrize("rows, columns, window", GRIDS)
def test_groups_and_their_inverse_and_a_cut_and_its_inverse_change_nothing(
    rows, columns, window, pattern
):
    x = torch.randn(1, 2, rows, columns, 3)
    grid = WindowGrid.fit(rows, columns, window)
    tables = place_tables(grid, pattern, 8, x.device, x.dtype)
    assert grid.height <= window and grid.width <= window
    moved = gather(grid.partition(x), tables)
    assert torch.equal(grid.merge(gather(moved, tables, back=True)), x)


def test_windows_pad_no_more_than_they_must():
    assert WindowGrid.fit(28, 16, 8) == WindowGrid(28, 16, 7, 8)  # tiles exactly
    assert WindowGrid.fit(9, 8, 8) == WindowGrid(9, 8, 5, 8)
    for size in range(1, 100):
        grid = WindowGrid.fit(size, 1, 8)
        assert grid.counts[0] * grid.height - size < grid.counts[0]


def test_one_window_is_not_shifted_and_needs_no_mask():
    tables = place_tables(WindowGrid.fit(8, 8, 8), "shifted", 8, torch.device("cpu"), torch.float32)
    assert tables.same is None and tables.rows_moved is None and tables.columns_moved is None
    assert (
        place_tables(
            WindowGrid.fit(28, 16, 8), "window", 8, torch.device("cpu"), torch.float32
        ).same
        is None
    )


def test_the_last_row_of_one_window_meets_the_next_window_only_when_shifted():
    assert not visible(8, 1, 4, "window")[3, 4] and visible(8, 1, 4, "shifted")[3, 4]
    assert not visible(8, 1, 4, "shifted")[7, 0]  # no wrap round the edge


def test_tables_first_made_while_sampling_serve_training():
    place_tables.cache_clear()
    layer, grid = SpatialAttention(16, 2), WindowGrid.fit(6, 6, 4)
    with torch.inference_mode():
        place_tables(grid, "shifted", 8, torch.device("cpu"), torch.float32)
    tables = place_tables(grid, "shifted", 8, torch.device("cpu"), torch.float32)
    layer(grid.partition(torch.randn(1, 1, 6, 6, 16)), tables).sum().backward()


def test_frames_of_one_moment_have_one_position_whatever_the_stride_of_the_stage():
    number = FramePosition(8)
    sparse, dense = (
        (*temporal_rotary(count, step, 8, torch.device("cpu"), torch.float32), number(count, step))
        for count, step in ((16, 1.0), (80, 0.2))
    )
    for few, many in zip(sparse, dense, strict=True):
        axis = few.shape.index(16)
        torch.testing.assert_close(many.narrow(axis, 0, 76).unfold(axis, 1, 5)[..., 0], few)
        assert not torch.equal(many.narrow(axis, 0, 16), few)


@pytest.mark.parametrize("tables", [place_tables, coordinates, frame_tables, temporal_rotary])
def test_tables_of_many_sizes_take_bounded_memory_but_graphs_keep_theirs(tables, monkeypatch):
    """Under a pixel budget every source may have a grid of its own."""
    cpu, set_to = torch.device("cpu"), monkeypatch.setattr
    set_to(kept, "MOST", 3)
    tables.cache_clear()

    def of(size):
        grid = WindowGrid.fit(size, 4, 4)
        arguments = {
            place_tables: (grid, "window", 8, cpu, torch.float32),
            coordinates: (grid, cpu, torch.float32),
            frame_tables: (size, 4, 1.0, 8, cpu, torch.float32),
            temporal_rotary: (size, 1.0, 8, cpu, torch.float32),
        }
        return tables(*arguments[tables])

    set_to(kept, "capturing", lambda: True)
    captured = of(1)
    set_to(kept, "capturing", lambda: False)
    first = of(2)
    for size in (3, 4, 2, 5):  # 2 is used again: 3 is the one that goes
        of(size)
    assert of(2) is first and tables.cache_size() <= 4
    for size in range(6, 20):
        of(size)
    assert of(1) is captured and of(2) is not first and tables.cache_size() <= 4
    tables.cache_clear()


def test_true_means_attend_in_every_kernel():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    valid = torch.tensor([[True, True, False, False, True], [True, False, True, True, False]])[
        :, None, None
    ]
    expected = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~valid, -torch.inf).softmax(-1) @ v
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel([backend, SDPBackend.MATH]):
            torch.testing.assert_close(attend(q, k, v, valid), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_calls_beyond_the_kernel_limit_are_split_without_a_trace(axis, monkeypatch):
    q, k, v = (torch.randn(5, 5, 3, 4) for _ in range(3))
    for valid in (None, torch.rand(5, 1, 3, 3) > 0.0, torch.rand(1, 5, 1, 3) > 0.0):
        expected = attend(q, k, v, valid)
        monkeypatch.setattr("mmdit.nn.attention.GRID_LIMIT", 2)
        torch.testing.assert_close(attend(q, k, v, valid), expected)
        monkeypatch.undo()
