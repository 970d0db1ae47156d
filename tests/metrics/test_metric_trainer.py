import numpy as np
import pytest
import torch
from torch.nn import functional

from unsc_plugin.errors import DataError
from unsc_plugin.metrics import Accuracy, Confidence, MembershipAUC, trainer_metrics
from unsc_plugin.metrics.accuracy import accuracy

ROWS, CLASSES, FORGET = 45, 3, np.arange(12)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows, index):
        self.rows, self.index = rows, index
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 5, generator=generator)
        self.y = torch.randint(CLASSES, (ROWS,), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        row = self.rows[at]
        return {"x": self.x[row], "labels": self.y[row], "index": torch.tensor(self.index[row])}


class Tiny(torch.nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 5 * CLASSES).reshape(5, CLASSES))

    def forward(self, x, labels=None, index=None):
        logits = x @ self.weight
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, **({"hidden": x} if self.hidden else {})}


def trainer(tmp_path, metrics, rows, label_names, *, hidden=False):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=8,  # 45 rows: the last batch has 5
        label_names=label_names,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        model=Tiny(hidden), args=args, eval_dataset=rows, compute_metrics=trainer_metrics(metrics)
    )


def split(where):
    index = np.r_[np.arange(30), -1 - np.arange(15)]
    return Rows(np.flatnonzero(where(index)), index)


@pytest.fixture
def everything():
    return split(lambda index: index < 1000)


@pytest.fixture
def logits(everything):
    return (everything.x @ Tiny(False).weight).detach()


@pytest.mark.parametrize("hidden", [False, True])
def test_ragged_last_batch_equals_the_functions(tmp_path, everything, logits, hidden):
    indexed = [Accuracy(), MembershipAUC(FORGET)]
    run = trainer(tmp_path, indexed, everything, ["labels", "index"], hidden=hidden)
    result = run.evaluate()
    direct = MembershipAUC(FORGET).compute(
        predictions=logits, references=everything.y, index=everything.index
    )
    assert result["eval_accuracy"] == accuracy(logits, everything.y)
    assert result["eval_umia_auc"] == pytest.approx(direct["umia_auc"], abs=1e-5)
    assert "eval_umia_tpr1" not in result


def test_labels_alone_serve_labelled_metrics(tmp_path, everything, logits):
    run = trainer(tmp_path, {"a": Accuracy(), "c": Confidence()}, everything, ["labels"])
    assert run.evaluate()["eval_accuracy"] == accuracy(logits, everything.y)


def test_each_set_of_a_dict_is_measured(tmp_path, everything, logits):
    parts = {"forget": split(lambda i: np.isin(i, FORGET)), "test": split(lambda i: i < 0)}
    result = trainer(tmp_path, [Accuracy()], parts, ["labels", "index"]).evaluate()
    for name, part in parts.items():
        rows = part.rows
        assert result[f"eval_{name}_accuracy"] == accuracy(logits[rows], everything.y[rows])


def test_indexed_metrics_without_an_index_say_so(tmp_path, everything):
    run = trainer(tmp_path, [MembershipAUC(FORGET)], everything, ["labels"])
    with pytest.raises(ValueError, match="index"):
        run.evaluate()


def test_one_set_without_nonmembers_is_an_error_not_a_number(tmp_path):
    forget = split(lambda i: np.isin(i, FORGET))
    with pytest.raises(DataError, match="got none of test"):
        trainer(tmp_path, [MembershipAUC(FORGET)], forget, ["labels", "index"]).evaluate()
