import pytest

from unsc_plugin.errors import DataError, DivergedError
from unsc_plugin.metrics.distance import avg_gap, cost_ratio, delta, gap, mean_of_pool, tow


def test_tug_of_war_known_answers():
    assert tow(0.1, 0.02, 0.05) == pytest.approx(0.8379, abs=1e-12)
    assert tow(-0.1, 0.02, -0.05) == pytest.approx(0.8379, abs=1e-12)
    assert tow(0, 0, 0) == 1.0
    assert tow(1.0, 0.0, 0.0) == 0.0


@pytest.mark.parametrize("difference", [2.39, -1.01, float("nan")])
def test_tug_of_war_refuses_percentage_points(difference):
    with pytest.raises(DataError, match=r"tow on retain: .*divide percentage points by 100"):
        tow(0.0, difference, 0.0)


def test_average_gap_known_answer():
    assert avg_gap(2.39, 0.38, 0.33, 1.51) == pytest.approx(1.1525, abs=1e-12)
    assert avg_gap(-2.0, 1.0) == 1.5


def test_delta_is_signed_and_in_percentage_points():
    assert delta(0.90, [0.92, 0.94]) == pytest.approx(-3.0, abs=1e-12)
    assert type(delta(0.5, [0.5])) is float


def test_gap_is_two_sided_and_against_the_mean():
    assert gap(0.40, [0.45, 0.55]) == pytest.approx(0.10, abs=1e-12)
    assert gap(0.60, [0.45, 0.55]) == pytest.approx(0.10, abs=1e-12)


def test_order_of_the_pool_is_irrelevant():
    values = [0.1, 0.7, 0.30000000000000004, 0.2]
    assert mean_of_pool(values) == pytest.approx(mean_of_pool(sorted(values)), abs=1e-12)


def test_an_empty_or_diverged_pool():
    with pytest.raises(DataError, match="umia_auc of the retrained pool"):
        gap(0.5, [], metric="umia_auc")
    with pytest.raises(DivergedError):
        gap(0.5, [float("nan")])


def test_cost_known_answer():
    assert cost_ratio(30, 300) == 0.1


@pytest.mark.parametrize(
    ("cost", "reference"), [(1, 0), (-1, 1), (1, float("nan")), (float("nan"), 1)]
)
def test_bad_costs(cost, reference):
    with pytest.raises(DataError, match="measure retraining first"):
        cost_ratio(cost, reference)
