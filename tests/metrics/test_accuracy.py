import numpy as np
import pytest
import torch

from unsc_plugin.metrics.accuracy import accuracy, correct


def one_hot(classes, k):
    return np.eye(k)[classes]


def test_known_answer():
    assert accuracy(one_hot([0, 1, 1, 0], 2), [0, 1, 0, 0]) == 0.75


def test_micro_not_macro():
    labels = np.array([0] * 9 + [1])
    always_zero = one_hot(np.zeros(10, int), 2)
    per_class = [accuracy(always_zero[labels == k], labels[labels == k]) for k in (0, 1)]
    assert accuracy(always_zero, labels) == 0.9
    assert np.mean(per_class) == 0.5


def test_is_not_rounded():
    assert accuracy(one_hot([0, 0, 1], 2), [0, 0, 0]) == 2 / 3


def test_ties_go_to_the_smallest_class_for_every_container():
    z = [[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]]
    for logits in (z, np.array(z), torch.tensor(z), torch.tensor(z, dtype=torch.bfloat16)):
        assert correct(logits, [0, 1]).tolist() == [True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_with_gradient_of_every_precision(dtype):
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    value = accuracy(logits, torch.tensor([0, 0], dtype=torch.int32))
    assert type(value) is float
    assert value == 0.5
