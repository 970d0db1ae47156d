import random

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import roc_curve

from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics.membership import (
    confidence,
    cross_entropy,
    label_histogram_weights,
    logistic_mia,
    umia_auc,
    umia_tpr1,
)


def test_confidence_known_answers():
    assert confidence([[1.0, 0.0, 0.0]], [0])[0] == pytest.approx(0.306853, abs=5e-7)
    assert confidence([np.log([0.9, 0.1])], [0])[0] == pytest.approx(2.197225, abs=5e-7)
    assert confidence([[0.3, 0.3]], [1])[0] == 0.0


@pytest.mark.parametrize(
    "row",
    [
        [-1e4, 0.0, 0.0],
        [-np.inf, 0.0, 0.0],
        [-np.inf, -np.inf, -np.inf],
    ],
)
def test_confidence_of_a_masked_label(row):
    assert confidence([row], [0])[0] == -100.0


def test_confidence_is_clipped_above_when_all_other_classes_are_masked():
    assert confidence([[0.0, -np.inf, -np.inf]], [0])[0] == 100.0


def test_confidence_is_the_log_odds():
    z = np.random.default_rng(0).normal(size=(50, 7)) * 3
    y = np.random.default_rng(1).integers(7, size=50)
    p = softmax(z, axis=1)[np.arange(50), y]
    np.testing.assert_allclose(confidence(z, y), np.log(p / (1 - p)), rtol=1e-9)
    np.testing.assert_allclose(cross_entropy(z, y), -np.log(p), rtol=1e-12)


def test_confidence_of_low_precision_tensors():
    z = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert confidence(z, torch.tensor([0]))[0] == pytest.approx(0.306853, abs=5e-7)


def test_auc_known_answers():
    assert umia_auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert umia_auc([1.0, 2.0], [3.0, 4.0]) == 0.0
    assert umia_auc([5.0, 5.0], [5.0, 5.0, 5.0]) == 0.5
    assert umia_auc([1.0, 2.0], [1.0, 2.0]) == 0.5


def test_auc_is_the_weighted_share_of_pairs():
    rng = np.random.default_rng(0)
    inside, outside, weight = rng.integers(6, size=40), rng.integers(6, size=70), rng.random(70)
    wins = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)
    oracle = (wins * weight).sum() / (len(inside) * weight.sum())
    assert umia_auc(inside, outside, weight) == pytest.approx(oracle, abs=1e-12)


def test_duplicating_a_nonmember_is_doubling_its_weight():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=60), rng.normal(size=150)
    weight = np.ones(150)
    weight[:30] = 2.0
    doubled = np.concatenate([outside, outside[:30]])
    assert umia_auc(inside, doubled) == pytest.approx(umia_auc(inside, outside, weight), abs=1e-12)
    for fpr in (0.01, 0.1):
        assert umia_tpr1(inside, doubled, fpr=fpr) == umia_tpr1(inside, outside, weight, fpr=fpr)


def test_auc_ignores_the_order_of_examples():
    rng = np.random.default_rng(0)
    inside, outside, weight = rng.normal(size=60), rng.normal(size=150), rng.random(150)
    order = rng.permutation(150)
    shuffled = umia_auc(rng.permutation(inside), outside[order], weight[order])
    assert shuffled == pytest.approx(umia_auc(inside, outside, weight), abs=1e-12)


def test_tpr_takes_the_best_threshold_without_interpolation():
    outside = np.arange(100.0)
    inside = [98.5, 97.5, 99.5, 0.0]  # one non-member (99) may lie above the threshold
    assert umia_tpr1(inside, outside) == 0.5
    assert umia_tpr1(inside, outside, fpr=0.0) == 0.25
    assert umia_tpr1(inside, outside, fpr=0.0199) == 0.5
    assert umia_tpr1(inside, outside, fpr=0.02) == 0.75


def test_tpr_agrees_with_the_curve():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(1, 1, 200).round(1), rng.normal(0, 1, 500).round(1)
    false, true, _ = roc_curve(
        np.repeat([1, 0], [200, 500]), np.r_[inside, outside], drop_intermediate=False
    )
    assert umia_tpr1(inside, outside, fpr=0.05) == true[false <= 0.05].max()


def test_tpr_is_absent_below_a_hundred_usable_nonmembers():
    inside, outside = np.zeros(10), np.zeros(100)
    weight = np.ones(100)
    assert umia_tpr1(inside, outside) == 0.0
    assert umia_tpr1(inside, outside[:99]) is None
    weight[0] = 0.0
    assert umia_tpr1(inside, outside, weight) is None


def test_histogram_weights_reproduce_the_forget_histogram():
    rng = np.random.default_rng(0)
    outside, forget = rng.integers(5, size=200), rng.choice([0, 2, 3], p=[0.6, 0.3, 0.1], size=50)
    weight = label_histogram_weights(outside, torch.tensor(forget))
    got = np.bincount(outside, weights=weight, minlength=5) / weight.sum()
    np.testing.assert_allclose(got, np.bincount(forget, minlength=5) / 50, atol=1e-15)
    assert weight.mean() == pytest.approx(1.0)


def test_histogram_weights_keep_only_the_forgotten_class():
    weight = label_histogram_weights([0, 1, 1, 2], [1, 1])
    assert weight.tolist() == [0.0, 2.0, 2.0, 0.0]


def test_weights_remove_a_shift_of_the_label_distribution():
    # the score tells labels apart and nothing else: no membership signal is left after weighting
    outside, forget = np.repeat([0, 1], [900, 100]), np.repeat([0, 1], [10, 90])
    assert umia_auc(forget, outside) == pytest.approx(0.9)
    weight = label_histogram_weights(outside, forget)
    assert umia_auc(forget, outside, weight) == pytest.approx(0.5, abs=1e-12)


def test_a_forget_label_without_nonmembers_is_an_error():
    with pytest.raises(DataError, match=r"label\(s\) \[7\]"):
        label_histogram_weights([0, 1], [0, 7])


@pytest.mark.parametrize(("inside", "outside"), [(0.0, 10.0), (10.0, 0.0)])
def test_logistic_attack_separates_either_way(inside, outside):
    assert logistic_mia(np.full(40, inside), np.full(60, outside), seed=0) == 1.0


def test_logistic_attack_is_near_chance_on_one_distribution_and_repeats():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=500), rng.normal(size=2000)
    value = logistic_mia(inside, outside, seed=3)
    assert value == pytest.approx(0.5, abs=0.06)
    assert logistic_mia(rng.permutation(inside), outside[::-1], seed=3) == value
    assert logistic_mia(inside, outside, seed=4) != value


def test_logistic_attack_balances_the_sides():
    # always saying "test" would be right 95 % of the time on unbalanced sides
    assert logistic_mia(np.zeros(50), np.zeros(1000), seed=0) == 0.5


def test_logistic_attack_needs_examples():
    with pytest.raises(DataError, match="9 forget and 50 test"):
        logistic_mia(np.zeros(9), np.ones(50), seed=0)


def test_global_random_states_are_left_alone():
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    logistic_mia(np.arange(30.0), np.arange(40.0), seed=1)
    assert (np.random.get_state()[1] == before[0]).all()
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("attack", [umia_auc, umia_tpr1])
def test_bad_sides(attack):
    with pytest.raises(DataError, match=r"on non-members: .*empty"):
        attack([1.0], [])
    with pytest.raises(DataError, match=r"on forget: .*empty"):
        attack([], [1.0])
    with pytest.raises(DivergedError, match="on forget"):
        attack([np.nan], [1.0])
    with pytest.raises(DataError, match=r"weights \(2,\)"):
        attack([1.0], [1.0], [1.0, 1.0])
    for weight in ([0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(DataError, match="weights ≥ 0 that are not all 0"):
            attack([1.0], [1.0, 2.0], weight)


def test_bad_operating_point():
    with pytest.raises(DataError, match="fpr in"):
        umia_tpr1([1.0], [1.0], fpr=1.5)
