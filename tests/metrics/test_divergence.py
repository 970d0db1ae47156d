import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from unsc_plugin.errors import DataError
from unsc_plugin.metrics.divergence import (
    disagree,
    disagree_examples,
    js_bits,
    js_examples,
    js_to_pool,
)


@pytest.fixture
def pool():
    return np.random.default_rng(1).normal(size=(4, 30, 6)) * 4


@pytest.fixture
def logits():
    return np.random.default_rng(2).normal(size=(30, 6)) * 4


def test_known_answers():
    assert js_bits([[0.9, 0.1]], [[0.1, 0.9]])[0] == pytest.approx(0.531004, abs=5e-7)
    assert js_bits([[0.9, 0.1]], [[0.1, 0.9]])[0] * np.log(2) == pytest.approx(0.368064, abs=5e-7)
    assert js_bits([[1.0, 0.0]], [[0.0, 1.0]])[0] == 1.0
    assert js_bits([[0.3, 0.7]], [[0.3, 0.7]])[0] == 0.0


def test_spike_against_uniform_row_by_row():
    # 1 − JS₂, the value that a mean over classes would turn into 0.978
    spike = np.full((1, 100), 0.001 / 99)
    spike[0, 0] = 0.999
    assert 1 - js_bits(spike, np.full((1, 100), 0.01))[0] == pytest.approx(0.0462, abs=5e-5)


def test_against_scipy(logits, pool):
    p = softmax(logits, axis=1)
    oracle = [jensenshannon(p, softmax(r, axis=1), base=2, axis=1) ** 2 for r in pool]
    np.testing.assert_allclose(js_examples(logits, pool), np.mean(oracle, axis=0), atol=1e-12)
    assert js_to_pool(logits, pool) == pytest.approx(np.mean(oracle), abs=1e-12)


def test_repeating_rows_changes_nothing(logits, pool):
    repeated = js_to_pool(np.tile(logits, (1000, 1)), np.tile(pool, (1, 1000, 1)))
    assert repeated == pytest.approx(js_to_pool(logits, pool), abs=1e-12)


@pytest.mark.parametrize("measure", [js_to_pool, disagree])
def test_order_of_examples_members_and_classes_is_irrelevant(measure, logits, pool):
    rng = np.random.default_rng(0)
    rows, models, classes = rng.permutation(30), rng.permutation(4), rng.permutation(6)
    shuffled = measure(logits[rows][:, classes], pool[models][:, rows][:, :, classes])
    assert shuffled == pytest.approx(measure(logits, pool), abs=1e-12)


def test_single_and_double_precision_agree(logits, pool):
    single = js_to_pool(logits.astype(np.float32), torch.tensor(pool, dtype=torch.float32))
    assert single == pytest.approx(js_to_pool(logits, pool), abs=1e-5)


def test_a_list_of_members_equals_a_stacked_pool(logits, pool):
    assert js_to_pool(logits, list(torch.tensor(pool))) == js_to_pool(logits, pool)


def test_saturated_logits_stay_finite_and_in_range():
    z = np.array([[1e4, -1e4], [-1e4, 1e4]])
    values = js_examples(z, [z[::-1], z])
    np.testing.assert_array_equal(values, [0.5, 0.5])


def test_disagreement_counts_members():
    z = np.eye(2)
    swapped = z[::-1]
    assert disagree_examples(z, [z, swapped, swapped]).tolist() == [2 / 3, 2 / 3]
    assert disagree(z, [z]) == 0.0


@pytest.mark.parametrize("measure", [js_to_pool, disagree])
def test_bad_pools(measure, logits, pool):
    with pytest.raises(DataError, match=r"js_forget on forget.*\(30, 6\).*\(29, 6\) in member 0"):
        measure(logits, pool[:, :29], metric="js_forget", split="forget")
    with pytest.raises(DataError, match="at least one retrained model"):
        measure(logits, [])


@pytest.mark.parametrize("wrong", [[[0.5, 0.6]], [[1.5, -0.5]], [[2.0, 1.0]]])
def test_rows_must_be_distributions(wrong):
    with pytest.raises(DataError, match="sum to 1"):
        js_bits(wrong, [[0.5, 0.5]])


def test_two_shapes():
    with pytest.raises(DataError, match=r"\(1, 2\) and \(2, 2\)"):
        js_bits([[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]])
