import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import METRICS
from unsc_plugin.metrics.mubench import (
    block,
    knowledge_gap,
    overall_v1,
    random_accuracy,
    table_orig_dt,
    unlearn_overall,
    zrf,
)


@pytest.mark.parametrize(
    ("dt", "df", "expected"), [(0.985, 0.983, 0.2094), (0.95, 0.10, 0.9796), (0.9899, 1.0, 0.1818)]
)
def test_overall_known_answers(dt, df, expected):
    assert unlearn_overall(dt, df, orig_dt=0.9899, random=0.1) == pytest.approx(expected, abs=5e-5)


def test_overall_is_zero_after_a_large_drop():
    settings = {"orig_dt": 0.9, "random": 0.1}
    assert unlearn_overall(0.73, 0.1, **settings) > 0
    assert unlearn_overall(0.71, 0.1, **settings) == 0.0
    for method in ("neggrad", "grad_ascent"):
        assert unlearn_overall(0.55, 0.1, **settings, method=method) > 0
        assert unlearn_overall(0.53, 0.1, **settings, method=method) == 0.0
    assert unlearn_overall(0.9, 0.081, **settings) > 0
    assert unlearn_overall(0.9, 0.079, **settings) == 0.0


def test_overall_without_a_denominator():
    assert unlearn_overall(0.0, 1.0, orig_dt=1.0, random=0.0) == 0.0


def test_first_formula():
    assert overall_v1(0.9, 0.3, 0.8) == pytest.approx((0.9 + 0.7 + 0.8) / 3)
    assert overall_v1(0.9, 0.3) == pytest.approx((0.9 + 0.7) / 2)


def test_knowledge_gap_is_the_limit_of_the_draws():
    rng = np.random.default_rng(0)
    forget, retain = rng.random(60) < 0.55, rng.random(400) < 0.8
    member = np.repeat([1, 0], 60)
    draws = [
        roc_auc_score(member, np.r_[rng.choice(retain, 60, replace=False), forget])
        for _ in range(500)
    ]
    error = np.std(draws, ddof=1) / np.sqrt(500)
    assert abs(knowledge_gap(retain.mean(), forget.mean()) - np.mean(draws)) < 3 * error


@pytest.mark.parametrize(("classes", "expected"), [(10, 0.473), (100, 0.335)])
def test_zrf_range_depends_on_the_number_of_classes(classes, expected):
    one_hot = 1e3 * np.eye(classes)[np.arange(1000) % classes]
    assert zrf(one_hot, seed=0) == pytest.approx(expected, abs=1e-3)
    assert zrf(np.zeros((1000, classes)), seed=0) == pytest.approx(0.99, abs=2e-3)


def test_zrf_against_the_definition_with_500_draws():
    rng = np.random.default_rng(0)
    z = 3 * rng.normal(size=(100, 10))
    p = softmax(z, axis=1)
    draws = [
        1 - np.mean(jensenshannon(p, softmax(rng.random(p.shape), axis=1), axis=1) ** 2)
        for _ in range(500)
    ]
    assert zrf(z, seed=0) == pytest.approx(np.mean(draws), abs=1e-3)


def test_zrf_repeats_for_a_seed_and_leaves_global_state_alone():
    z = np.random.default_rng(0).normal(size=(40, 5))
    state = np.random.get_state()[1].copy()
    assert zrf(z, seed=1) == zrf(z, seed=1)
    assert zrf(z, seed=1) != zrf(z, seed=2)
    assert (np.random.get_state()[1] == state).all()
    assert zrf(torch.tensor(z).float(), seed=1) == pytest.approx(zrf(z, seed=1), abs=1e-5)


def test_zrf_needs_a_draw():
    with pytest.raises(DataError, match="at least one draw"):
        zrf(np.zeros((2, 2)), seed=0, draws=0)


def test_table():
    assert random_accuracy("ddi", 5) == 0.2
    assert random_accuracy("digits", 10) == 0.1
    assert table_orig_dt("cifar10", "vit-base") == 0.9899
    assert table_orig_dt("cifar10", "resnet-18") is None
    assert table_orig_dt("digits", "mlp") is None


def splits(*names):
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=(30 + i, 10)), rng.integers(10, size=30 + i))
        for i, name in enumerate(names)
    }


def test_block_has_every_key_of_the_catalogue_in_its_order():
    full = block(**splits("test", "forget", "retain"), orig_dt=0.1, seconds=3.0, seed=0)
    assert list(full) == [name for name in METRICS if name.startswith("mubench.")]
    assert all(type(value) is float for value in full.values())
    assert full["mubench.unlearn_time"] == 3.0


def test_block_leaves_out_what_cannot_be_computed():
    small = block(**splits("test", "forget"), seed=0)
    assert set(small) == {
        f"mubench.{name}" for name in ("dt_accuracy", "df_accuracy", "zrf", "overall_v1")
    }
    dt, df = small["mubench.dt_accuracy"], small["mubench.df_accuracy"]
    assert small["mubench.overall_v1"] == pytest.approx((dt + 1 - df) / 2)


def test_block_takes_chance_from_the_table_where_the_data_set_is_in_it():
    data = splits("test", "forget")
    ours, theirs = (
        block(**data, orig_dt=0.1, seed=0, dataset=name)["mubench.unlearn_overall_accuracy"]
        for name in ("digits", "imdb")
    )
    dt, df = (np.mean(z.argmax(axis=1) == y) for z, y in data.values())
    assert ours == unlearn_overall(dt, df, orig_dt=0.1, random=0.1)
    assert theirs == unlearn_overall(dt, df, orig_dt=0.1, random=0.5)
    assert ours != theirs
