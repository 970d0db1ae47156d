"""A user's own datasets become rows: every form of a split, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from unsc_plugin.errors import ConfigError, DataError, ForgetSetError, NotApplicable
from unsc_plugin.method import Weights
from unsc_plugin.models import wrap
from unsc_plugin.own_data import classifier_of, fresh_from, rows_of, scenario_of, task_of
from unsc_plugin.rows import Rows
from unsc_plugin.spec import Scenario

generator = torch.Generator().manual_seed(0)
X = torch.rand(12, 3, 4, 4, generator=generator)
Y = torch.arange(12) % 3


class Pairs(Dataset):
    """Items (image, label), counted."""

    def __init__(self, inputs=X, labels=Y):
        self.inputs, self.labels_, self.reads = inputs, labels, 0

    def __len__(self):
        return len(self.labels_)

    def __getitem__(self, at):
        self.reads += 1
        return self.inputs[at], int(self.labels_[at])


class Named(Pairs):
    """Items with names, as Hugging Face datasets give them."""

    def __init__(self, key="labels", **more):
        super().__init__()
        self.key, self.more = key, more

    def __getitem__(self, at):
        row = {"pixel_values": self.inputs[at], self.key: int(self.labels_[at])}
        return row | {name: column[at] for name, column in self.more.items()}


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((X[at], Y[at]) for at in range(len(Y)))


FORMS = {
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "tensor_dataset": lambda: TensorDataset(X, Y),
    "pairs": Pairs,
    "named": Named,
    "label": lambda: Named("label"),
    "loader": lambda: DataLoader(Pairs(), batch_size=5, shuffle=True, drop_last=True),
    "items": lambda: [(image, label) for image, label in zip(X, Y, strict=True)],
    "batches": lambda: [(X[:7], Y[:7]), (X[7:], Y[7:])],
    "stream": lambda: DataLoader(Stream(), batch_size=5),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_split_gives_the_same_rows(form):
    rows = rows_of({"forget": FORMS[form]()}).parts["forget"]
    batch = rows.gather([11, 0, 5])
    assert torch.equal(rows.labels, Y)
    assert torch.equal(batch.inputs["pixel_values"], X[[11, 0, 5]])
    assert batch.labels.tolist() == [2, 0, 2]
    assert batch.index.tolist() == [11, 0, 5]


@pytest.mark.parametrize("in_memory", [True, False])
def test_parts_share_one_storage_and_count_on(in_memory):
    found = rows_of(
        {"forget": Pairs(X[:4], Y[:4]), "retain": Pairs(X[4:], Y[4:])}, in_memory=in_memory
    )
    forget, retain = found.parts["forget"], found.parts["retain"]
    assert retain.index.tolist() == list(range(4, 12))
    both = forget.merged(retain)
    assert torch.equal(both.gather(range(12)).inputs["pixel_values"], X)
    mixed = both.subset([10, 1, 5]).gather([0, 1, 2])
    assert torch.equal(mixed.inputs["pixel_values"], X[[10, 1, 5]])


def test_validation_and_test_rows_stand_alone_and_count_down():
    found = rows_of({"retain": (X, Y), "val": (X[:2], Y[:2]), "test": (X[:3], Y[:3])})
    assert found.parts["val"].index.tolist() == [-1, -2]
    assert found.parts["test"].index.tolist() == [-1 - 10**9, -2 - 10**9, -3 - 10**9]
    assert list(found.parts) == ["retain", "val", "test"]
    assert found.modality == "image"
    assert found.input_key == "pixel_values"


def test_given_positions_are_kept():
    index = {"forget": torch.tensor([7, 3]), "retain": torch.tensor([1, 0, 9])}
    found = rows_of({"forget": (X[:2], Y[:2]), "retain": (X[2:5], Y[2:5])}, index=index)
    assert found.parts["forget"].index.tolist() == [7, 3]
    assert found.parts["retain"].gather([2]).index.tolist() == [9]


def test_a_dataset_read_on_access_is_read_again_at_every_access_and_one_in_memory_is_not():
    kept, opened = Pairs(), Pairs()
    held = rows_of({"retain": kept}, in_memory=True).parts["retain"]
    live = rows_of({"retain": opened}, in_memory=False).parts["retain"]
    before = kept.reads, opened.reads
    held.gather([0, 1])
    live.gather([0, 1])
    assert (kept.reads - before[0], opened.reads - before[1]) == (0, 2)


def test_subsets_of_tensors_are_taken_without_reading_items():
    rows = rows_of({"retain": Subset(TensorDataset(X, Y), [5, 2])}).parts["retain"]
    assert torch.equal(rows.gather([0, 1]).inputs["pixel_values"], X[[5, 2]])
    assert rows.decode is None


@pytest.mark.parametrize(
    ("inputs", "modality", "key"),
    [
        (torch.rand(4, 5), "tabular", "features"),
        (torch.ones(4, 5, dtype=torch.int64), "text", "input_ids"),
        (torch.ones(4, 3, 8, 8, dtype=torch.uint8), "image", "pixel_values"),
    ],
)
def test_the_modality_is_read_off_the_inputs(inputs, modality, key):
    found = rows_of({"retain": (inputs, Y[:4])})
    assert (found.modality, found.input_key) == (modality, key)


def test_named_items_keep_their_groups_and_further_inputs():
    mask = torch.ones(12, dtype=torch.int64)
    rows = rows_of({"retain": Named(group=Y, attention_mask=mask)}).parts["retain"]
    assert torch.equal(rows.group, Y)
    assert set(rows.gather([0]).inputs) == {"pixel_values", "attention_mask"}


def test_normalised_pixels_are_restored_and_normalised_again_inside():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    normalised = (X - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = rows_of({"retain": (normalised, Y)}, restore=(mean, std))
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    model = classifier_of(net, found, mean=mean, std=std)
    batch = found.parts["retain"].gather(range(12))
    assert torch.allclose(batch.inputs["pixel_values"], X, atol=1e-6)
    assert model.pixel_domain
    assert torch.allclose(model(**batch.inputs), net(normalised), atol=1e-5)
    with pytest.raises(DataError, match=r"expected pixels that were normalised .* got"):
        rows_of({"retain": (normalised * 4, Y)}, restore=(mean, std))


def test_rows_are_passed_through():
    rows = Rows.of({"features": torch.rand(4, 2)}, Y[:4])
    found = rows_of({"forget": rows})
    assert found.parts["forget"] is rows
    assert (found.modality, found.input_key) == ("tabular", "features")


BAD = {
    "three_items": ([(X, Y, Y)], "expected items .inputs, label. or named items, got 3"),
    "no_labels": (Named("class"), "expected labels under 'labels' or 'label'"),
    "float_labels": ((X, Y.float()), "expected one class number per row"),
    "one_hot": ((X, torch.eye(3)[Y].long()), "expected one class number per row"),
    "negative": ((X, Y - 1), "expected labels 0..K-1, got -1"),
    "lengths": ((X, Y[:5]), "expected one label per row, got lengths"),
    "empty": (TensorDataset(X[:0], Y[:0]), "expected rows, got none"),
    "nothing": ([], "expected rows, got none"),
    "number": (3, "expected a dataset, a loader or a pair .inputs, labels., got int"),
    "series": ((torch.rand(12, 4, 5), Y), "say modality="),
    "ragged": ([(X[:2], Y[:2]), (X[2:4, :, :3], Y[2:4])], "expected batches of one shape"),
    "sizes": ([(X[0], 0), (X[1, :, :3], 1)], "expected items that make one batch, got stack"),
    "text": ([{"text": ["a", "b"], "label": Y[:2]}], "expected tensors beside the labels"),
    "foreign_name": ([{"label": Y, "x": X}], "expected an input called pixel_values or"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_says_what_was_expected(case):
    split, message = BAD[case]
    with pytest.raises(DataError, match=message):
        rows_of({"retain": split})


def test_splits_that_do_not_fit_together_are_refused():
    with pytest.raises(DataError, match="expected retain to look like forget"):
        rows_of({"forget": (X, Y), "retain": (X[:, :, :2], Y)})
    with pytest.raises(DataError, match="expected a position for each of 12 rows"):
        rows_of({"forget": (X, Y)}, index={"forget": torch.arange(3)})
    whole = TensorDataset(X, Y)
    with pytest.raises(ForgetSetError, match="forget and retain share 2 rows"):
        rows_of({"forget": Subset(whole, [0, 1, 2]), "retain": Subset(whole, [1, 2, 3])})


# --------------------------------------------------------------------------- model and task


def test_the_number_of_classes_is_the_width_of_the_logits():
    data = rows_of({"retain": (X, Y)})
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 5))
    found = classifier_of(net, data)
    assert found.num_classes == 5
    assert found.backbone is net
    assert net.training
    assert net[1].num_batches_tracked == 0
    with pytest.raises(DataError, match=r"retain: expected labels 0..1 for a model with 2 outputs"):
        classifier_of(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), data)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(48, 3)

    def forward(self, x):
        return x.flatten(1), self.body(x.flatten(1))


def test_outputs_of_several_tensors_need_a_word():
    data = rows_of({"retain": (X, Y)})
    with pytest.raises(NotApplicable, match=r"say num_classes=.* and output="):
        classifier_of(Several(), data)
    assert classifier_of(Several(), data, output=1).num_classes == 3
    with pytest.raises(ConfigError, match="expected num_classes, or example inputs"):
        wrap(Several(), modality="image")


def test_whole_classes_are_a_class_request():
    data = rows_of({"forget": (X[Y == 1], Y[Y == 1]), "retain": (X[Y != 1], Y[Y != 1])})
    assert scenario_of(data.get("forget"), data.get("retain")) == Scenario.CLASS
    data = rows_of({"forget": (X[:2], Y[:2]), "retain": (X[2:], Y[2:])})
    assert scenario_of(data.get("forget"), data.get("retain")) == Scenario.RANDOM
    assert scenario_of(None, data.get("retain")) == Scenario.CORRECTION


def test_a_fresh_model_has_other_weights_of_the_same_kind_and_the_seed_decides():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    net[1].weight.data.fill_(7)
    before = torch.get_rng_state()
    one, again, other = (fresh_from(net)(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0].weight, again[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight, net[0].weight)
    assert bool((one[1].weight == 1).all())
    net.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(NotApplicable, match="give fresh_model="):
        fresh_from(net)(0)


def test_a_fresh_hugging_face_model_is_made_from_its_configuration():
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, intermediate_size=8, num_labels=3, **small)
    net = BertForSequenceClassification(config)
    ids = torch.ones(4, 5, dtype=torch.int64)
    data = rows_of({"retain": [{"input_ids": ids, "attention_mask": ids, "labels": Y[:4]}]})
    model = classifier_of(net, data)
    fresh = fresh_from(model)(3)
    assert model.num_classes == 3
    assert type(fresh.backbone) is type(net)
    assert not torch.equal(fresh.backbone.classifier.weight, net.classifier.weight)
    assert torch.equal(fresh.backbone.classifier.weight, fresh_from(net)(3).classifier.weight)


def test_weights_make_the_streams_of_the_task():
    data = rows_of({"forget": (X[:2], Y[:2]), "retain": (X[2:], Y[2:])})
    eps = torch.zeros(12, dtype=torch.float64)
    eps[0], eps[5] = -1, -0.5
    task = task_of(data, num_classes=3, fresh_model=lambda seed: nn.Flatten(), weights=Weights(eps))
    assert task.scenario == Scenario.WEIGHTED
    assert task.samples("forget")[0].tolist() == [0, 5]
    assert task.samples("retain")[0].tolist() == list(range(1, 12))


def test_the_task_of_other_inputs_is_another_task():
    def mark(inputs):
        data = rows_of({"forget": (inputs[:2], Y[:2]), "retain": (inputs[2:], Y[2:])})
        return task_of(data, num_classes=3, fresh_model=lambda seed: nn.Flatten()).fingerprint()

    assert mark(X) == mark(X.clone())
    assert mark(X) != mark(X + np.float32(0.5))
