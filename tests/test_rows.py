"""Order, shares, weights and augmentation of batches, against the plainest possible reference."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from unsc_plugin.errors import DataError, UnscError
from unsc_plugin.rows import Batch, Loader, Rows, crop_flip, joint


def images(count: int = 11, seed: int = 0, workers: int = -1) -> Rows:
    """Return `count` images of 3 × 8 × 8 bytes; streamed when `workers` is given."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    index = torch.arange(count) * 10
    if workers < 0:
        return Rows.of({"pixel_values": pixels}, labels, index)
    return Rows.of(
        {}, labels, index, decode=lambda at: {"pixel_values": pixels[at]}, workers=workers
    )


def order(loader: Loader) -> list[int]:
    return torch.cat([batch.index for batch in loader]).tolist()


def same(left: Batch, right: Batch) -> bool:
    inputs = left.inputs.keys() == right.inputs.keys() and all(
        torch.equal(left.inputs[key], right.inputs[key]) for key in left.inputs
    )
    columns = all(
        torch.equal(getattr(left, key), getattr(right, key))
        for key in ("labels", "index", "weight")
    )
    return inputs and columns and left.total == right.total


# --------------------------------------------------------------------------- rows


def test_gather_gives_pixels_between_zero_and_one() -> None:
    rows = images()
    batch = rows.gather([3, 1])
    stored = rows.storage["pixel_values"][[3, 1]]
    assert batch.inputs["pixel_values"].dtype == torch.float32
    assert torch.equal(batch.inputs["pixel_values"], stored.float() / 255)
    assert batch.labels.tolist() == [0, 1]
    assert batch.index.tolist() == [30, 10]
    assert batch.total == 2.0
    assert batch.group is None
    assert rows.storage["pixel_values"].dtype == torch.uint8


def test_subsets_share_storage_and_compose() -> None:
    group = torch.arange(11) % 2
    extra = {"sub": np.arange(11) * 2}
    base = Rows.of(
        {"features": torch.arange(22.0).view(11, 2)}, torch.zeros(11), group=group, extra=extra
    )
    part = base.subset([9, 4, 7]).subset(np.array([2, 0]))
    assert len(part) == 2
    assert part.index.tolist() == [7, 9]
    assert part.group is not None
    assert part.group.tolist() == [1, 1]
    assert part.extra["sub"].tolist() == [14, 18]
    assert part.storage["features"] is base.storage["features"]
    assert part.gather([0]).inputs["features"].tolist() == [[14.0, 15.0]]
    assert len(base.subset([])) == 0


def test_a_mask_is_not_taken_for_positions() -> None:
    rows = images(4)
    mask = rows.labels == 0
    try:
        chosen = rows.subset(mask).index.tolist()
    except DataError:
        return
    assert chosen == [0, 30]


def test_weights_and_labels_are_replaced_per_view() -> None:
    rows = images(4)
    heavy = rows.weighted(torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64))
    assert heavy.weight.dtype == torch.float32
    assert heavy.subset([2, 0]).weight.tolist() == [2.0, 0.5]
    assert heavy.gather([2, 0]).total == 2  # rows, not weights
    assert rows.weight.tolist() == [1.0] * 4
    assert rows.relabelled(torch.tensor([2, 2, 2, 2])).subset([1]).gather([0]).labels.tolist() == [
        2
    ]
    assert rows.labels.tolist() == [0, 1, 2, 0]
    for change in (rows.weighted, rows.relabelled):
        with pytest.raises(DataError, match="expected 4"):
            change(torch.ones(3))


def test_merged_views() -> None:
    rows = images(6)
    left = rows.subset([5, 0]).weighted(torch.tensor([0.5, 0.25]))
    right = rows.subset([2]).relabelled(torch.tensor([1]))
    both = left.merged(right)
    assert both.index.tolist() == [50, 0, 20]
    assert both.labels.tolist() == [2, 0, 1]
    assert both.weight.tolist() == [0.5, 0.25, 1.0]
    with pytest.raises(DataError, match="one storage"):
        left.merged(images(6))


def test_columns_of_unequal_length() -> None:
    features = {"features": torch.zeros(4, 2)}
    for wrong in (
        {"inputs": {"features": torch.zeros(3, 2)}},
        {"index": torch.arange(3)},
        {"group": torch.arange(5)},
        {"extra": {"sub": np.arange(3)}},
    ):
        given = {"inputs": features, "labels": torch.zeros(4), **wrong}
        with pytest.raises(DataError, match="expected 4 rows"):
            Rows.of(given.pop("inputs"), given.pop("labels"), given.pop("index", None), **given)


# --------------------------------------------------------------------------- order


def test_order_depends_on_seed_name_and_epoch_only() -> None:
    rows = images(40)

    def epochs(seed: int = 0, name: str = "retain", **more: int) -> list[list[int]]:
        loader = Loader(rows, more.get("batch_size", 7), seed=seed, name=name, shuffle=True)
        return [order(loader) for _ in range(3)]

    reference = epochs()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert epochs() == reference
    assert epochs(batch_size=9) == reference
    assert len({tuple(e) for e in reference}) == 3
    assert epochs(seed=1) != reference
    assert epochs(name="forget") != reference
    fresh = Loader(rows, 7, name="retain", shuffle=True)
    assert torch.cat([b.index for b in fresh.epoch(2)]).tolist() == reference[2]
    assert order(fresh) == reference[0]


@pytest.mark.parametrize("workers", [-1, 0, 1])
def test_iterating_touches_no_global_generator(workers: int) -> None:
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    list(Loader(images(workers=workers), 4, shuffle=True, augment="crop_flip"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_another_loader_changes_nothing() -> None:
    rows = images(40)
    alone = Loader(rows, 7, name="retain", shuffle=True)
    expected = [order(alone) for _ in range(2)]
    loader = Loader(rows, 7, name="retain", shuffle=True)
    found = []
    for _ in range(2):
        seen = []
        for batch in loader:
            next(iter(Loader(rows, 3, name="forget", shuffle=True)))
            seen += batch.index.tolist()
        found.append(seen)
    assert found == expected


def test_without_shuffle_rows_come_as_they_lie() -> None:
    loader = Loader(images(11), 4)
    assert [len(batch) for batch in loader] == [4, 4, 3]
    assert order(loader) == [10 * i for i in range(11)]
    assert len(loader) == 3


@pytest.mark.parametrize(
    ("count", "size", "shuffle", "expected"),
    [
        (9, 4, True, [4, 5]),
        (9, 4, False, [4, 4, 1]),
        (1, 4, True, [1]),
        (10, 4, True, [4, 4, 2]),
        (8, 4, True, [4, 4]),
        (5, 4, True, [5]),
        (0, 4, True, []),
        (0, 4, False, []),
    ],
)
def test_a_trailing_row_joins_the_batch_before_it(
    count: int, size: int, shuffle: bool, expected: list[int]
) -> None:
    loader = Loader(images(12).subset(list(range(count))), size, shuffle=shuffle)
    assert [len(batch) for batch in loader] == expected
    assert len(loader) == len(expected)
    assert sorted(i for batch in loader for i in batch.index.tolist()) == [
        10 * i for i in range(count)
    ]


# --------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("count", "size"), [(11, 4), (9, 4), (7, 3), (2, 2), (1, 4), (16, 3)])
def test_shares_make_up_the_whole_batch(world: int, count: int, size: int) -> None:
    weight = torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.1
    rows = images(count).weighted(weight)
    whole = list(Loader(rows, size, name="x", shuffle=True).epoch(1))
    shares = [
        list(Loader(rows, size, name="x", shuffle=True, rank=rank, world=world).epoch(1))
        for rank in range(world)
    ]
    assert {len(part) for part in shares} == {len(whole)}
    for step, batch in enumerate(whole):
        parts = [part[step] for part in shares]
        assert all(len(part) for part in parts)
        assert {part.total for part in parts} == {batch.total}
        own = {
            i: w for p in parts for i, w in zip(p.index.tolist(), p.weight.tolist(), strict=True)
        }
        counted = [i for p in parts for i, w in zip(p.index.tolist(), p.weight, strict=True) if w]
        assert sorted(counted) == sorted(batch.index.tolist())
        assert batch.total == len(batch)
        shared = sum(float(p.weight.double().sum()) for p in parts)
        assert shared == pytest.approx(float(batch.weight.double().sum()))
        for part in parts:
            borrowed = part.weight == 0
            assert bool(borrowed.all()) or not bool(borrowed.any())
            assert not bool(borrowed.any()) or (len(part) == 1 and len(batch) < world)
        assert own.keys() == set(batch.index.tolist())


@pytest.mark.parametrize("world", [2, 3])
def test_augmentation_does_not_depend_on_the_number_of_processes(world: int) -> None:
    rows = images(10)

    def pixels(rank: int, of: int) -> dict[int, Tensor]:
        loader = Loader(
            rows, 4, name="r", shuffle=True, augment="crop_flip", rank=rank, world=of, seed=3
        )
        return {
            int(index): image
            for batch in loader
            for index, image, weight in zip(
                batch.index, batch.inputs["pixel_values"], batch.weight, strict=True
            )
            if weight
        }

    alone = pixels(0, 1)
    together: dict[int, Tensor] = {}
    for rank in range(world):
        together |= pixels(rank, world)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[index], together[index]) for index in alone)
    assert any(
        not torch.equal(alone[10 * i], rows.gather([i]).inputs["pixel_values"][0])
        for i in range(10)
    )


# --------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (5, 12), (3, 3)])
def test_crop_flip_image_by_image(height: int, width: int) -> None:
    source = torch.Generator().manual_seed(1)
    pixels = torch.rand(9, 3, height, width, generator=source)
    moved = crop_flip(pixels, torch.Generator().manual_seed(5), 9, slice(None))
    generator = torch.Generator().manual_seed(5)
    pad = min(4, height // 4, width // 4)
    shifts = torch.randint(0, 2 * pad + 1, (9, 2), generator=generator).tolist()
    flips = (torch.rand(9, generator=generator) < 0.5).tolist()
    for image, found, (down, right), flip in zip(pixels, moved, shifts, flips, strict=True):
        padded = torch.zeros(3, height + 2 * pad, width + 2 * pad)
        padded[:, pad : pad + height, pad : pad + width] = image
        expected = padded[:, down : down + height, right : right + width]
        assert torch.equal(found, expected.flip(-1) if flip else expected)
    assert moved.is_contiguous()


def test_crop_flip_uses_every_shift_and_both_sides() -> None:
    pixels = torch.zeros(400, 1, 16, 16)
    pixels[:, 0, 8, 5] = 1
    moved = crop_flip(pixels, torch.Generator().manual_seed(0), 400, slice(None))
    spots = {tuple(spot) for spot in torch.nonzero(moved[:, 0])[:, 1:].tolist()}
    columns = {*range(5 - 4, 5 + 5), *range(10 - 4, 10 + 5)}
    assert {row for row, _ in spots} == set(range(4, 13))
    assert {column for _, column in spots} == columns


def test_augmentation_moves_with_the_epoch_and_not_without_pixels(
    make_rows: Callable[..., Rows],
) -> None:
    loader = Loader(images(8), 8, augment="crop_flip")
    first, second = (next(iter(loader)).inputs["pixel_values"] for _ in range(2))
    assert not torch.equal(first, second)
    plain = next(iter(Loader(make_rows(8), 8, augment="crop_flip")))
    assert torch.equal(plain.inputs["features"], make_rows(8).storage["features"])


def test_an_unknown_augmentation_is_refused_at_once() -> None:
    with pytest.raises(UnscError, match="crop_flip"):
        Loader(images(), 4, augment="cutmix")


# --------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_streamed_batches_equal_those_in_memory(workers: int, augment: str) -> None:
    settings = {"name": "s", "shuffle": True, "augment": augment, "seed": 4}
    stored = Loader(images(13).subset(list(range(12, -1, -1))), 5, **settings)
    streamed = Loader(images(13, workers=workers).subset(list(range(12, -1, -1))), 5, **settings)
    for left, right in zip(stored, streamed, strict=True):
        assert same(left, right)


def test_a_loader_of_streamed_rows_can_be_left_early() -> None:
    loader = Loader(images(30, workers=1), 3)
    for _ in range(2):
        batches = iter(loader)
        assert next(batches).index.tolist() == [0, 10, 20]
        del batches


# --------------------------------------------------------------------------- batches


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_micro_batches_make_up_the_batch(size: int, parts: int) -> None:
    rows = images(8).weighted(torch.rand(8, generator=torch.Generator().manual_seed(2)))
    batch = rows.gather(list(range(size)))
    micro = batch.split(parts)
    assert 1 <= len(micro) <= min(parts, size)
    assert all(len(part) for part in micro)
    assert {part.total for part in micro} == {batch.total}
    assert torch.equal(torch.cat([part.index for part in micro]), batch.index)
    assert torch.equal(torch.cat([part.weight for part in micro]), batch.weight)
    pixels = torch.cat([part.inputs["pixel_values"] for part in micro])
    assert torch.equal(pixels, batch.inputs["pixel_values"])


def test_micro_batches_keep_the_group() -> None:
    rows = Rows.of({"features": torch.zeros(4, 1)}, torch.zeros(4), group=torch.arange(4))
    assert [part.group.tolist() for part in rows.gather([0, 1, 2, 3]).split(2)] == [[0, 1], [2, 3]]


def test_joint_cycles_the_shorter_loader_with_a_new_order() -> None:
    rows = images(20)
    retain = Loader(rows.subset(list(range(6, 20))), 4, name="retain", shuffle=True)
    forget = Loader(rows.subset(list(range(6))), 4, name="forget", shuffle=True)
    pairs = list(joint(retain, forget))
    assert [len(kept) for kept, _ in pairs] == [4, 4, 4, 2]
    assert [len(gone) for _, gone in pairs] == [4, 2, 4, 2]
    again = Loader(rows.subset(list(range(6))), 4, name="forget", shuffle=True)
    assert [i for _, gone in pairs for i in gone.index.tolist()] == order(again) + order(again)


def test_on_batch_sees_every_batch_once() -> None:
    seen: list[int] = []
    loader = Loader(images(9), 4, on_batch=lambda batch: seen.append(len(batch)))
    list(loader)
    assert seen == [4, 4, 1]
