import numpy as np
import pytest
import torch

from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics import _arrays
from unsc_plugin.metrics.accuracy import accuracy
from unsc_plugin.metrics.divergence import disagree, js_to_pool
from unsc_plugin.metrics.membership import confidence, cross_entropy
from unsc_plugin.metrics.mubench import zrf

MEASURES = {
    "accuracy": lambda z: accuracy(z, [0] * len(z), split="forget"),
    "confidence": lambda z: confidence(z, [0] * len(z), split="forget"),
    "cross entropy": lambda z: cross_entropy(z, [0] * len(z), split="forget"),
    "js": lambda z: js_to_pool(z, [z], split="forget"),
    "disagree": lambda z: disagree(z, [z], split="forget"),
    "mubench.zrf": lambda z: zrf(z, seed=0),
}


@pytest.fixture(params=MEASURES)
def measure(request):
    return request.param, MEASURES[request.param]


def test_an_empty_split_names_metric_and_split(measure):
    name, compute = measure
    with pytest.raises(DataError, match=rf"{name} on forget: .*empty split") as caught:
        compute(np.empty((0, 3)))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_logits_mean_divergence(measure, value):
    name, compute = measure
    z = np.zeros((5, 3))
    z[3, 1] = value
    with pytest.raises(DivergedError, match=rf"{name} on forget: .*first row 3"):
        compute(torch.tensor(z, dtype=torch.float16))


def test_minus_infinity_is_a_masked_class_for_the_confidence_only():
    z = np.array([[-np.inf, 1.0, 2.0]])
    for name, compute in MEASURES.items():
        if name == "confidence":
            assert compute(z)[0] == -100.0
        else:
            with pytest.raises(DivergedError):
                compute(z)


@pytest.mark.parametrize(
    "z", [np.zeros(3), np.zeros((2, 1)), np.zeros((2, 2, 2)), [[1.0, 2.0], [1.0]], [["a", "b"]]]
)
def test_logits_of_a_wrong_form(z, measure):
    _, compute = measure
    with pytest.raises(DataError):
        compute(z)


def test_shapes_of_logits_and_labels_differ():
    with pytest.raises(DataError, match=r"labels \(2,\) for logits \(3, 4\)"):
        accuracy(np.zeros((3, 4)), [0, 1])


@pytest.mark.parametrize(("labels", "offender"), [([0, 4, 9], 4), ([0, 1, -1], -1)])
def test_labels_outside_the_classes_name_the_first_offender(labels, offender):
    with pytest.raises(DataError, match=rf"\[0, 4\), got {offender} at row"):
        accuracy(np.zeros((3, 4)), labels)


@pytest.mark.parametrize("labels", [[0.0, 1.0], [[0, 1]], ["0", "1"], [True, False]])
def test_labels_must_be_integers(labels):
    with pytest.raises(DataError, match=r"integers of shape \(B,\)"):
        accuracy(np.zeros((2, 2)), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_become_double(dtype):
    array = _arrays.to_numpy(torch.tensor([1.5, 2.5], dtype=dtype, requires_grad=True))
    assert array.dtype == np.float64
    assert array.tolist() == [1.5, 2.5]


def test_inputs_are_never_written_to():
    z = np.random.default_rng(0).normal(size=(6, 3))
    z.setflags(write=False)
    for compute in MEASURES.values():
        compute(z)
