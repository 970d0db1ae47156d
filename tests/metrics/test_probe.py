import numpy as np
import pytest
import torch

from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics.probe import draw_shots, prototype_recall


def clusters(count, *, spread, seed, classes=4, width=6):
    """Unit directions per class plus noise, at lengths that differ from row to row."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), count)
    features = np.eye(classes, width)[labels] + spread * rng.normal(size=(len(labels), width))
    return features * rng.uniform(0.1, 10, size=(len(labels), 1)), labels


def recall(features, labels, test, test_labels, **options):
    shots = draw_shots(labels, seed=0, **options)
    return prototype_recall(features[shots.rows], shots, test, test_labels)


def brute_force(features, labels, test, test_labels, shots):
    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    features, test, hits = unit(features), unit(test), []
    for positions in shots.positions:
        prototypes = np.array([features[at].mean(axis=0) for at in positions])
        for row, label in zip(test, test_labels, strict=True):
            distance = np.linalg.norm(prototypes - row, axis=1)
            hits.append(shots.classes[distance.argmin()] == label)
    return np.mean(hits)


def test_separable_classes_are_found_whatever_the_lengths():
    features, labels = clusters(20, spread=0.01, seed=0)
    assert recall(features, labels, *clusters(5, spread=0.01, seed=1)) == 1.0


def test_agrees_with_the_definition():
    features, labels = clusters(20, spread=0.6, seed=0)
    test, test_labels = clusters(10, spread=0.6, seed=1)
    test, test_labels = test[test_labels > 1], test_labels[test_labels > 1]
    shots = draw_shots(labels, seed=5, repeats=7)
    value = prototype_recall(features[shots.rows], shots, test, test_labels)
    assert 0.3 < value < 1.0
    expected = brute_force(features, labels, test, test_labels, shots)
    assert value == pytest.approx(expected, abs=1e-12)


def test_a_rotation_of_the_features_changes_nothing():
    features, labels = clusters(20, spread=0.5, seed=0)
    test, test_labels = clusters(10, spread=0.5, seed=1)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    assert recall(features @ turn, labels, test @ turn, test_labels) == pytest.approx(
        recall(features, labels, test, test_labels), abs=1e-12
    )


def test_order_of_test_rows_is_irrelevant_and_precision_nearly():
    features, labels = clusters(20, spread=0.5, seed=0)
    test, test_labels = clusters(10, spread=0.5, seed=1)
    value = recall(features, labels, test, test_labels)
    order = np.random.default_rng(0).permutation(len(test))
    assert recall(features, labels, test[order], test_labels[order]) == pytest.approx(
        value, abs=1e-12
    )
    single = recall(torch.tensor(features).float(), labels, torch.tensor(test).float(), test_labels)
    assert single == pytest.approx(value, abs=1e-5)


def test_shots_are_distinct_examples_of_their_label_and_depend_on_the_seed_only():
    labels = np.array([3, 7] * 8)
    shots = draw_shots(labels, seed=1, shots=5, repeats=4)
    assert shots.classes.tolist() == [3, 7]
    assert shots.positions.shape == (4, 2, 5)
    for drawn in shots.positions:
        assert (labels[drawn] == [[3], [7]]).all()
        assert len(np.unique(drawn)) == 10
    np.testing.assert_array_equal(
        shots.positions, draw_shots(torch.tensor(labels), seed=1, repeats=4).positions
    )
    assert (shots.positions != draw_shots(labels, seed=2, repeats=4).positions).any()


def test_labels_need_not_be_consecutive():
    features, labels = clusters(20, spread=0.01, seed=0)
    test, test_labels = clusters(5, spread=0.01, seed=1)
    assert recall(features, labels * 10 + 3, test, test_labels * 10 + 3) == 1.0


def test_dead_features_count_as_wrong_not_as_nan():
    features, labels = clusters(20, spread=0.01, seed=0)
    assert recall(features, labels, np.zeros((3, 6)), [1, 2, 3]) < 0.7


def test_a_rare_label_gives_all_it_has():
    shots = draw_shots([0, 0, 0, 0, 0, 0, 1, 1], seed=0, shots=5, repeats=3)
    assert shots.positions.shape == (3, 2, 5)
    for common, rare in shots.positions:
        assert len(set(common)) == 5
        assert set(rare) == {6, 7}


def test_bad_input():
    features, labels = clusters(6, spread=0.1, seed=0)
    shots = draw_shots(labels, seed=0)
    support = features[shots.rows]
    with pytest.raises(DataError, match="shots and repeats of 1 or more"):
        draw_shots(labels, seed=0, repeats=0)
    with pytest.raises(DataError, match="shot rows"):
        prototype_recall(support[1:], shots, support[:2], [0, 1])
    with pytest.raises(DataError, match="one width"):
        prototype_recall(support, shots, support[:2, :3], [0, 1])
    with pytest.raises(DataError, match=r"\[9\]"):
        prototype_recall(support, shots, support[:1], [9])
    with pytest.raises(DataError, match=r"probe on test: .*empty"):
        prototype_recall(support, shots, support[:0], [])
    with pytest.raises(DivergedError, match="probe on train"):
        prototype_recall(support * np.nan, shots, support[:1], [0])
