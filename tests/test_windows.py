"""Gram matrices of windows against the windows themselves, copied out one by one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from unsc_plugin import _windows
from unsc_plugin._windows import Workspace, window_gram


def copied(x: Tensor, groups: int, kernel: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
    columns = functional.unfold(x.double(), kernel)
    split = columns.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
    return split @ split.mT, split.sum(-1), split.shape[-1]


def maps(*shape: int, pad: int = 0, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return functional.pad(drawn.relu() + 0.3 * drawn, (pad,) * 4)


def agrees(x: Tensor, groups: int, kernel: tuple[int, int], room: Workspace | None = None) -> None:
    product, total, count = window_gram(x, groups, kernel, room or Workspace())
    wanted, summed, number = copied(x, groups, kernel)
    assert count == number
    assert product.dtype == total.dtype == torch.float64
    torch.testing.assert_close(product, wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))
    torch.testing.assert_close(total, summed, rtol=0, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "groups", "kernel"),
    [
        ((3, 6, 9, 11), 1, (3, 3)),
        ((3, 6, 9, 8), 2, (2, 4)),
        ((2, 8, 7, 7), 4, (1, 3)),
        ((2, 8, 7, 7), 1, (3, 1)),
        ((4, 4, 6, 6), 1, (5, 5)),
        ((2, 4, 3, 3), 1, (3, 3)),  # one window without padding
        ((2, 4, 3, 4), 1, (3, 2)),
        ((2, 4, 4, 5), 1, (4, 3)),  # fewer places than offsets
        ((1, 1, 2, 2), 1, (2, 2)),
        ((2, 3, 6, 6), 3, (1, 1)),
    ],
)
def test_products_are_those_of_the_copied_windows(shape, groups, kernel, pad) -> None:
    agrees(maps(*shape, pad=pad), groups, kernel)


@pytest.mark.parametrize("shape", [(2, 3, 63, 9), (2, 3, 9, 70), (1, 2, 66, 71), (1, 2, 128, 65)])
def test_long_lines_take_the_fast_transform(shape) -> None:
    agrees(maps(*shape), 1, (3, 3))


def test_parts_of_the_maps_add_up(monkeypatch) -> None:
    monkeypatch.setattr(_windows, "SAMPLES", (3, 4))
    agrees(maps(11, 5, 8, 7, pad=1), 1, (3, 3))


def test_frequencies_are_taken_in_blocks(monkeypatch) -> None:
    monkeypatch.setattr(_windows, "BLOCK", 1)
    agrees(maps(3, 5, 12, 13), 1, (3, 3))


def test_lines_of_zeros_inside_the_maps_change_nothing() -> None:
    x = maps(3, 4, 8, 9)
    x[:, :, 1] = 0
    x[:, :, :, -2:] = 0
    agrees(x, 1, (3, 3))


def test_a_line_that_only_one_map_has_counts() -> None:
    x = maps(3, 4, 8, 9, pad=1)
    x[1, 2, 0, 4] = 5.0
    x[2, 0, 5, 0] = -3.0
    agrees(x, 1, (3, 3))


def test_a_large_mean_costs_no_digits() -> None:
    x = maps(4, 5, 9, 9).double() + 1000
    product, total, count = window_gram(x, 1, (3, 3), Workspace())
    mean = total / count
    spread = product / count - mean[:, :, None] * mean[:, None]
    columns = functional.unfold(x - 1000, 3).transpose(0, 1).flatten(1)
    torch.testing.assert_close(spread[0], torch.cov(columns, correction=0), rtol=0, atol=1e-8)


def test_memory_is_used_again_and_results_stay() -> None:
    room = Workspace()
    first = window_gram(maps(5, 4, 12, 12), 1, (3, 3), room)
    kept = [one.clone() for one in first[:2]]
    held = {name: one.data_ptr() for name, one in room.held.items()}
    agrees(maps(5, 4, 12, 12, seed=1), 1, (3, 3), room)
    agrees(maps(2, 3, 8, 7, seed=2), 1, (2, 3), room)
    assert {name: one.data_ptr() for name, one in room.held.items()} == held
    agrees(maps(9, 4, 20, 20, seed=3), 1, (3, 3), room)  # grows
    assert all(torch.equal(*pair) for pair in zip(kept, first[:2], strict=True))


def test_nothing_holds_the_maps_afterwards() -> None:
    x = maps(2, 3, 8, 8)
    seen = weakref.ref(x)
    window_gram(x, 1, (3, 3), Workspace())
    del x
    gc.collect()
    assert seen() is None
