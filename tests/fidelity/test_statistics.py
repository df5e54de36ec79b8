import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowmem.fidelity import statistics

VALUES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=20)


@given(st.data(), VALUES)
def test_correlation_is_that_of_scipy(data: st.DataObject, values: list[float]) -> None:
    size = len(values)
    others = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=size, max_size=size))
    found = statistics.correlation(np.array(values), np.array(others))
    if len(set(values)) < 2 or len(set(others)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(values, others).statistic, abs=1e-12)


def test_the_interval_of_a_mean_is_about_that_of_the_normal_law() -> None:
    differences = np.random.default_rng(1).normal(0.1, 1.0, 400)
    low, high = statistics.interval_of_mean(differences)
    error = differences.std(ddof=1) / np.sqrt(400)
    # 10 000 resamples place a 2.5 % quantile within about 0.03 standard errors
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_equal_differences_leave_no_doubt() -> None:
    assert statistics.interval_of_mean(np.full(7, -0.25)) == (-0.25, -0.25)


def test_equal_figures_give_equal_intervals() -> None:
    differences = np.random.default_rng(2).normal(size=50)
    assert statistics.interval_of_mean(differences) == statistics.interval_of_mean(differences)


def test_blocks_change_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(2).normal(size=50)
    monkeypatch.setattr(statistics, "RESAMPLES", 900)
    whole = statistics.interval_of_mean(differences)
    monkeypatch.setattr(statistics, "_BLOCK_ITEMS", 1000)
    assert statistics.interval_of_mean(differences) == whole


def test_the_interval_of_correlations_holds_their_difference_and_is_paired() -> None:
    generator = np.random.default_rng(5)
    truth = generator.normal(size=200)
    reference = truth + generator.normal(size=200)
    worse = reference + generator.normal(size=200)
    found = statistics.interval_of_correlations(truth, reference, worse)
    assert found is not None
    before, now = (statistics.correlation(truth, side) for side in (reference, worse))
    assert before is not None
    assert now is not None
    assert found[0] < now - before < found[1] < 0
    assert statistics.interval_of_correlations(truth, reference, 2 * reference) == (0, 0)


def test_the_interval_of_undefined_correlations_is_none() -> None:
    flat = np.zeros(5)
    assert statistics.interval_of_correlations(flat, np.arange(5.0), np.arange(5.0)) is None
