import pytest

from unsc_plugin.errors import UnknownName
from unsc_plugin.metrics import METRICS, lookup
from unsc_plugin.metrics._catalogue import DIRECTIONS, KINDS

NEEDS = {
    "forget", "retain", "test", "nonmembers", "features", "relearn", "original", "pool", "cost",
    "retrain_cost", "board", "groups", "attack",
}  # fmt: skip
EXPECTED = [
    "acc_forget", "acc_retain", "acc_test", "acc_test_retained", "acc_test_forgotten",
    "acc_test_siblings", "delta_forget", "delta_retain", "delta_test", "delta_test_retained",
    "delta_test_forgotten", "delta_test_siblings", "tow", "avg_gap", "js_forget", "js_test",
    "disagree_forget", "umia_auc", "umia_tpr1", "gap_umia_auc", "umia_logistic",
    "relearn_retain_quarter", "relearn_retain_half", "relearn_retain", "gap_relearn", "probe5",
    "gap_probe5", "seconds_prepare", "seconds_unlearn", "peak_bytes", "work", "work_ratio",
    "time_ratio", "mubench.dt_accuracy", "mubench.df_accuracy", "mubench.dr_accuracy",
    "mubench.knowledge_gap", "mubench.zrf", "mubench.unlearn_overall_accuracy",
    "mubench.overall_v1", "mubench.unlearn_time", "acc", "nll", "nll_prior",
    "dp_soft", "dp_diff", "dp_ratio",
    "eop_soft", "eop_diff", "eo_diff", "worst_group_acc", "group_acc_gap", "robust_acc",
    "robust_nll", "transfer_acc", "oracle_js", "oracle_agree", "oracle_gap_diff", "S", "a_J", "a_P",
    "a_L", "a_H", "a_C", "u",
]  # fmt: skip


def test_names_and_order():
    assert list(METRICS) == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_every_entry_is_complete(name):
    spec = METRICS[name]
    assert spec.name == name
    assert spec.direction in DIRECTIONS
    assert spec.unit
    assert spec.summary
    assert spec.tier == ("pool" if name in ("S", "u") or name.startswith("a_") else "default")
    assert spec.needs
    assert set(spec.needs) <= NEEDS
    assert spec.kinds
    assert set(spec.kinds) <= set(KINDS)


def test_numbers_about_the_forget_set_have_no_direction_of_their_own():
    for name in (
        "acc_forget",
        "umia_auc",
        "umia_tpr1",
        "umia_logistic",
        "relearn_retain",
        "probe5",
    ):
        assert lookup(name).direction == "retrain"
    assert lookup("acc_test").direction == "up"


@pytest.mark.parametrize("name", [n for n in EXPECTED if n.startswith(("gap_", "js_", "delta_"))])
def test_distances_to_retraining_need_a_pool(name):
    assert "pool" in METRICS[name].needs


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(UnknownName, match="js_forget"):
        lookup("js_forgot")
