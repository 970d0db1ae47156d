"""Goals, crossings and the divergence from the first model against hand counts and scipy."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics.goal import (
    LEVELS,
    at_goal,
    came_back,
    first_reaching,
    forgotten_share,
    kl_bits,
)

LOGITS = [[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 5.0]]


def test_forgotten_is_any_other_answer_and_a_tie_goes_to_the_smaller_class():
    assert at_goal(LOGITS, [0, 0, 0, 0]).tolist() == [False, True, False, True]
    assert at_goal(LOGITS, [0, 1, 1, 2]).tolist() == [False, False, True, False]


def test_a_correction_wants_the_label_that_was_asked_for():
    labels, targets = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 1, 0, 1])
    assert at_goal(torch.tensor(LOGITS), labels, targets).tolist() == [False, True, True, False]
    assert at_goal(LOGITS, labels, None).tolist() == [False, True, True, True]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_never_forgotten(value):
    with pytest.raises(DivergedError, match="finite"):
        at_goal([[value, 0.0]], [0])


def test_labels_and_targets_must_fit_the_logits():
    with pytest.raises(DataError, match=r"\[0, 3\)"):
        at_goal(LOGITS, [0, 0, 0, 3])
    with pytest.raises(DataError, match="targets"):
        at_goal(LOGITS, [0, 0, 0, 0], [0])


def test_only_what_was_at_its_goal_can_come_back():
    own, now = [True, True, False, False], [True, False, True, False]
    assert came_back(own, now).tolist() == [False, True, False, False]
    with pytest.raises(DataError, match="same instances"):
        came_back(own, now[:2])


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_exact_for_every_count(level):
    for k in (1, 3, 4, 7, 16, 100, 999, 1024):
        for forgotten in range(k + 1):
            accuracy = float(np.mean([0.0] * forgotten + [1.0] * (k - forgotten)))
            there = first_reaching([forgotten_share(accuracy)], level) == 0
            assert there == (4 * forgotten >= round(4 * level) * k)


def test_the_first_crossing_counts_even_if_it_is_undone():
    shares = [0.0, 0.1, 0.6, 0.2, 1.0, 0.9]
    assert [first_reaching(shares, level) for level in LEVELS] == [2, 2, 4, 4]
    assert first_reaching(shares[:4], 0.75) is None
    assert first_reaching([], 0.25) is None


def test_kl_against_scipy_in_bits():
    rng = np.random.default_rng(0)
    first, last = rng.normal(size=(2, 40, 6)) * 3
    p, q = softmax(first, axis=1), softmax(last, axis=1)
    assert kl_bits(first, last) == pytest.approx(entropy(p, q, base=2, axis=1).mean(), abs=1e-12)
    assert kl_bits(first, last) != pytest.approx(kl_bits(last, first), abs=1e-3)
    assert kl_bits(first, first + 7.0) == pytest.approx(0.0, abs=1e-12)
    assert kl_bits(first, first + 7.0) >= 0.0
    assert kl_bits([[1000.0, 0.0]], [[0.0, 0.0]]) == pytest.approx(1.0)
    with pytest.raises(DataError, match="one shape"):
        kl_bits(first, last[:2])
