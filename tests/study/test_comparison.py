"""Statistics of a study: against enumeration, scipy, statsmodels, published examples and studies whose truth is known."""

from __future__ import annotations

import gc
import importlib.util
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from audiot.study.comparison import Uncorrected, compare, difference, estimate, judge, settings_judged
from audiot.study.findings import BETTER, EQUIVALENT, UNKNOWN, Estimate, Measure, Sample, Setting

ACCURACY = Measure("phone", "Phones", higher_is_better=True, margin=0.01)
ERRORS = Measure("per", "Phone errors", higher_is_better=False, margin=0.01)
PLAIN = Measure("plain", "No margin", higher_is_better=True)
# Hours of sleep gained by ten patients with two drugs ("Student" 1908, "The probable error of a mean").
SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """statsmodels collects garbage at each correction, which takes long beside PyTorch's objects unless they are frozen."""
    gc.freeze()
    yield
    gc.unfreeze()


def runs(values, draws=None, first=0):
    """Samples of seeds `first`, `first` + 1, …"""
    both = zip(values, [None] * len(values) if draws is None else draws, strict=True)
    return [Sample(seed, float(value), some, f"run-{seed}") for seed, (value, some) in enumerate(both, first)]


def measured(figures, tests=200, seed=0):
    """Samples of figures (seeds, units): means over units, and over units drawn anew for each resampled test."""
    units = figures.shape[1]
    shares = np.random.default_rng(seed).multinomial(units, [1 / units] * units, tests).T / units
    return runs(figures.mean(axis=1), figures @ shares)


def ends(found):
    return [found.low, found.high]


def test_an_interval_is_that_of_all_resamples():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=40) + rng.normal(0, 0.5, (3, 40))
    found = estimate(runs([1, 2, 6], draws), resamples=40_000)
    seeds = list(itertools.product(range(3), repeat=3))
    exact = [draws[list(chosen), test].mean() for chosen in seeds for test in range(40)]
    assert found.mean == 3
    assert ends(found) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.05)
    apart = draws[0][:, None, None] + draws[1][:, None] + draws[2]  # a test of its own for each seed: another interval
    assert abs(found.low - np.quantile(apart / 3, 0.025)) > 0.2


def test_figures_without_resampled_tests_vary_over_seeds():
    values = [0.0, 1.0, 5.0, 7.0, 20.0]
    exact = [np.mean(chosen) for chosen in itertools.product(values, repeat=5)]
    assert ends(estimate(runs(values), resamples=40_000)) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.3)
    reference = stats.bootstrap((np.arange(9.0) ** 2,), np.mean, n_resamples=40_000, method="percentile", rng=0)
    assert ends(estimate(runs(np.arange(9) ** 2), 40_000)) == pytest.approx(list(reference.confidence_interval), abs=0.5)


def test_one_seed_varies_over_tests_alone():
    found = estimate(runs([7.0], [np.arange(1000.0)]), resamples=40_000)
    assert ends(found) == pytest.approx([25, 975], abs=5)
    assert found.mean == 7
    assert ends(estimate(runs([7.0]))) == [None, None]


def test_draws_depend_on_the_seed_alone():
    samples = measured(np.random.default_rng(0).normal(size=(5, 20)))
    assert ends(estimate(samples, seed=1)) == ends(estimate(samples, seed=1)) != ends(estimate(samples, seed=2))


def test_a_test_without_a_value_in_one_run_is_left_out_for_all():
    draws = np.random.default_rng(0).normal(size=(3, 300))
    undefined = draws.copy()
    draws[:, [3, 250]] = 50.0  # would move the interval
    undefined[0, 3] = undefined[2, 250] = np.nan
    undefined[1, 3] = undefined[0, 250] = 1e9
    expected = estimate(runs([0, 0, 0], np.delete(draws, [3, 250], axis=1)))
    assert ends(estimate(runs([0, 0, 0], undefined))) == ends(expected)


@pytest.mark.parametrize("lost", [3, 4])
def test_more_than_one_per_cent_of_tests_without_a_value_leave_no_interval(lost):
    draws = np.random.default_rng(0).normal(size=(2, 300))
    draws[0, :lost] = np.nan
    found = estimate(runs([1, 2], draws))
    assert (found.low is None, found.high is None) == (lost == 4,) * 2
    assert found.mean == 1.5


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        ([], "no run has the figure"),
        (runs([1.0, float("nan")]), "run-1: the figure is nan, expected a finite number: leave the run out"),
        ([*runs([1.0]), Sample(0, 2.0)], "run-0 and the run of seed 0 both have seed 0: leave one out"),
        (runs([1, 2], [np.ones(3), np.ones(4)]), "run-0 has 3 resampled tests, but run-1 has 4: test both"),
        (runs([1, 2], [None, np.ones(4)]), "run-0 has 0 resampled tests, but run-1 has 4: test both"),
    ],
)
def test_samples_that_make_no_mean_are_named(samples, line):
    with pytest.raises(ValueError, match=line) as caught:
        estimate(samples)
    assert "\n" not in str(caught.value)


def test_pairs_that_were_not_resampled_alike_are_named():
    with pytest.raises(ValueError, match=r"run-3 has 0 resampled tests, but run-3 has 4"):
        difference(runs([1.0], first=3), runs([1.0], [np.ones(4)], first=3))
    with pytest.raises(ValueError, match=r"no seed is common: the setting has 1, 2, the baseline 3, 4"):
        difference(runs([1, 2], first=1), runs([1, 2], first=3))


def test_a_difference_is_that_of_the_seeds_that_both_have():
    draws = np.random.default_rng(0).normal(size=(2, 3, 50))
    found = difference(runs([5, 7, 9], draws[0], first=1), runs([4, 4, 1], draws[1]))  # seeds 1, 2, 3 and 0, 1, 2
    assert [(sample.seed, sample.value, sample.run) for sample in found.samples] == [(1, 1, "run-1"), (2, 6, "run-2")]
    assert np.array_equal(np.stack([sample.draws for sample in found.samples]), draws[0, :2] - draws[1, 1:])
    assert ends(found) == ends(estimate(runs([1, 6], draws[0, :2] - draws[1, 1:])))
    assert found.mean == 3.5


def test_what_runs_share_is_not_in_the_interval_of_their_difference():
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(0, 10, (5, 1)) + rng.normal(0, 10, 30), rng.normal(0, 0.1, (2, 5, 30))
    found = difference(measured(shared + noise[0] + 1), measured(shared + noise[1]))
    assert 0.9 < found.low < 1 < found.high < 1.1


def contains_the_truth(rng, seeds, units, over_seeds, over_units, noise):
    """Whether the interval of a study whose true mean is 0 contains it."""
    effects = rng.normal(0, over_seeds, (seeds, 1)) + rng.normal(0, over_units, units)
    samples = measured(effects + rng.normal(0, noise, (seeds, units)), seed=rng.integers(1 << 30))
    found = estimate(samples, 400, rng.integers(1 << 30))
    return found.low <= 0 <= found.high


@pytest.mark.parametrize(("seeds", "over_seeds", "share"), [(5, 1.0, 0.93), (10, 1.0, 0.94), (5, 50.0, 0.84), (10, 50.0, 0.90)])
def test_intervals_contain_the_truth_as_often_as_documented(seeds, over_seeds, share):
    """40 units move the mean by 0.95, five seeds of 1.0 by 0.45. Seeds of 50 are all that varies."""
    rng = np.random.default_rng(0)
    found = np.mean([contains_the_truth(rng, seeds, 40, over_seeds, 6.0, 3.0) for _ in range(800)])
    assert found == pytest.approx(share, abs=0.03)


def test_the_t_test_of_student_himself():
    found = compare(runs(SLEEP[0]), runs(SLEEP[1]), PLAIN)
    assert found.difference.mean == pytest.approx(-1.58)
    assert found.p_different == pytest.approx(0.00283289, abs=1e-8)  # R's t.test(extra ~ group, sleep, paired)
    assert found.p_equivalent is None


def test_two_one_sided_tests_reject_at_5_per_cent_where_the_90_per_cent_interval_ends():
    # The differences' mean is -1.58 and its standard error 0.388959. Student's t of 0.95 and 9 degrees of freedom is 1.833113.
    end = 1.58 + 1.833113 * 0.388959
    for margin, smaller in ((end + 1e-4, True), (end - 1e-4, False)):
        p = compare(runs(SLEEP[0]), runs(SLEEP[1]), Measure("sleep", "", True, margin)).p_equivalent
        assert p == pytest.approx(0.05, abs=1e-4)
        assert (p < 0.05) is smaller


@given(values=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_tests_are_those_of_scipy_and_statsmodels(values):
    one, other = np.array(values).T
    found = compare(runs(one), runs(other), ACCURACY, resamples=10)
    if np.ptp(one - other) > 1e-6:
        assert found.p_different == pytest.approx(stats.ttest_rel(one, other).pvalue)
        assert found.p_equivalent == pytest.approx(ttost_paired(one, other, -0.01, 0.01)[0])
    else:
        assert found.p_equivalent is None


def test_one_pair_has_no_tests_but_an_interval():
    draws = np.random.default_rng(0).normal(size=(2, 100))
    found = compare(runs([1.0], draws[:1]), runs([2.0, 5.0], draws), ACCURACY)
    assert (found.difference.mean, found.p_different, found.p_equivalent) == (-1, None, None)
    assert ends(found.difference) == [0, 0]
    assert compare(runs([1.0]), runs([1.0]), ACCURACY).p_different is None
    assert judge([found], ["local"], "full", ACCURACY)[0].verdict == UNKNOWN


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], 1.0),  # not different at all
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1.0),  # such as a phone error rate of 100% everywhere
        ([0.6, 0.7, 0.8], [0.5, 0.6, 0.7], None),  # always 0.1, but not to the last bit
        (np.float32([0.6, 0.7, 0.8]), np.float32([0.5, 0.6, 0.7]), None),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
    ],
)
def test_differences_without_spread_make_no_verdict(one, other, p):
    draws = [np.full(20, value) for value in one], [np.full(20, value) for value in other]
    found = compare(runs(one, draws[0]), runs(other, draws[1]), ACCURACY)
    assert (found.p_different, found.p_equivalent) == (p, None)
    assert judge([found], ["local"], "full", ACCURACY)[0].verdict == UNKNOWN


def uncorrected(mean, low, high, p_different, p_equivalent):
    return Uncorrected(Estimate(mean, low, high, ()), p_different, p_equivalent)


def test_the_correction_of_holm():
    """The example of R's and Wikipedia's pages: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02."""
    p = [0.01, 0.04, 0.03, 0.005]
    family = [uncorrected(1.0, 0.5, 1.5, one, other) for one, other in zip(p, [None, 0.04, None, 0.01], strict=True)]
    found = judge(family, list("abcd"), "full", PLAIN)
    assert [one.p_different for one in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [one.verdict for one in found] == [BETTER, UNKNOWN, UNKNOWN, BETTER]
    assert [one.p_equivalent for one in found] == [None, pytest.approx(0.04), None, pytest.approx(0.02)]  # a family of its own
    assert [one.verdict for one in judge(family, list("abcd"), "full", PLAIN, alpha=0.025)] == [UNKNOWN] * 3 + [BETTER]
    assert judge([], [], "full", PLAIN) == []


@given(p=st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_tests_without_a_value_do_not_count_in_the_correction(p):
    found = judge([uncorrected(0.0, -1.0, 1.0, one, None) for one in p], ["local"] * len(p), "full", PLAIN)
    known = [one for one in p if one is not None]
    expected = iter(multipletests(known, method="holm")[1].tolist() if known else [])
    assert [one.p_different for one in found] == [None if one is None else pytest.approx(next(expected)) for one in p]


@pytest.mark.parametrize(
    ("mean", "low", "high", "p_different", "p_equivalent", "verdict", "sign"),
    [
        (0.05, 0.02, 0.08, 0.01, 0.9, BETTER, 1),
        (-0.05, -0.08, -0.02, 0.01, 0.9, BETTER, -1),
        (0.05, 0.02, 0.08, 0.01, None, BETTER, 1),
        (0.05, 0.02, 0.08, 0.05, 0.9, UNKNOWN, 0),  # new seeds may show none
        (0.05, -0.001, 0.11, 0.01, 0.9, UNKNOWN, 0),  # new speakers may show none
        (0.05, 0.0, 0.1, 0.01, 0.9, UNKNOWN, 0),
        (-0.05, -0.11, 0.001, 0.01, 0.9, UNKNOWN, 0),
        (-0.05, 0.02, 0.08, 0.01, 0.9, UNKNOWN, 0),  # seeds and speakers disagree on the side
        (0.05, -0.08, -0.02, 0.01, 0.9, UNKNOWN, 0),
        (0.05, None, None, 0.01, 0.01, UNKNOWN, 0),
        (0.05, 0.02, 0.08, None, None, UNKNOWN, 0),
        (0.001, -0.004, 0.006, 0.7, 0.01, EQUIVALENT, 0),
        (0.005, 0.002, 0.008, 0.001, 0.01, EQUIVALENT, 0),  # real, but smaller than the margin
        (0.001, -0.004, 0.006, 0.7, 0.05, UNKNOWN, 0),
        (0.001, -0.004, 0.01, 0.7, 0.01, UNKNOWN, 0),
        (-0.001, -0.01, 0.004, 0.7, 0.01, UNKNOWN, 0),
        (0.007, 0.002, 0.012, 0.01, 0.01, BETTER, 1),  # may be larger than the margin for new speakers
        (0.05, 0.02, 0.08, float("nan"), float("nan"), UNKNOWN, 0),
    ],
)
def test_a_verdict_needs_both_conditions(mean, low, high, p_different, p_equivalent, verdict, sign):
    for measure, winners in ((ACCURACY, ("", "local", "full")), (ERRORS, ("", "full", "local"))):
        found = judge([uncorrected(mean, low, high, p_different, p_equivalent)], ["local"], "full", measure)[0]
        assert (found.verdict, found.winner) == (verdict, winners[sign])


FIGURES = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=2, max_size=6
)  # thousandths, whose differences are exact or clearly apart


def paired(values, seed=0):
    """Setting and baseline with resampled tests about the values."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (2, len(values), 60))
    columns = np.array(values).T / 1000
    return [runs(column, column[:, None] + some) for column, some in zip(columns, noise, strict=True)]


def judged(setting, baseline, measure=ACCURACY, mechanism="local", against="full"):
    return judge([compare(setting, baseline, measure, resamples=200)], [mechanism], against, measure)[0]


def p_of(comparison):
    return [-1.0 if p is None else p for p in (comparison.p_different, comparison.p_equivalent)]


@given(values=FIGURES, order=st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(values, order):
    setting, baseline = paired(values)
    mixed = order.sample(setting, len(setting)), order.sample(baseline, len(baseline))
    expected, found = judged(setting, baseline), judged(*mixed)
    assert repr(found) == repr(expected)


@given(values=FIGURES, constant=st.floats(-5, 5))
def test_a_constant_that_is_added_to_both_changes_nothing(values, constant):
    setting, baseline = paired(values)
    moved = [[Sample(one.seed, one.value + constant, one.draws + constant) for one in some] for some in (setting, baseline)]
    expected, found = judged(setting, baseline), judged(*moved)
    assert p_of(found) == pytest.approx(p_of(expected), rel=1e-6)
    assert ends(found.difference) == pytest.approx(ends(expected.difference), abs=1e-9)
    assert (found.verdict, found.winner) == (expected.verdict, expected.winner)


@given(values=FIGURES)
def test_setting_and_baseline_swapped_mirror_the_comparison(values):
    setting, baseline = paired(values)
    expected, found = judged(setting, baseline), judged(baseline, setting, mechanism="full", against="local")
    assert p_of(found) == pytest.approx(p_of(expected))
    assert ends(found.difference) == pytest.approx([-expected.difference.high, -expected.difference.low])
    assert (found.verdict, found.winner) == (expected.verdict, expected.winner)


def study(rng, truths, units=20, over_units=0.0, seeds=5):
    """Settings of two objectives, each with mechanisms of these true figures; the first is the baseline."""
    settings = []
    for objective in ("one", "two"):
        shared = rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 3, units)
        for number, truth in enumerate(truths):
            own = rng.normal(0, over_units, units) + rng.normal(0, 0.5, (seeds, 1)) + rng.normal(0, 1, (seeds, units))
            samples = measured(truth + shared + own, tests=100)
            settings.append(Setting(objective, f"m{number}", figures={"plain": Estimate(0.0, None, None, tuple(samples))}))
    return settings


def verdicts(settings):
    return [
        (one.comparisons["plain"].verdict, one.comparisons["plain"].winner)
        for one in settings_judged(settings, [PLAIN], "m0", resamples=100)
        if one.mechanism != "m0"
    ]


def test_a_study_without_a_difference_finds_one_in_at_most_5_per_cent():
    rng = np.random.default_rng(0)
    wrong = np.mean([any(verdict == BETTER for verdict, _ in verdicts(study(rng, [0.0] * 5))) for _ in range(200)])
    assert wrong <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5


def test_a_large_difference_is_found_for_the_right_side():
    found = verdicts(study(np.random.default_rng(0), [0.0, 9.0, -9.0, 0.0, 12.0]))
    expected = [(BETTER, "m1"), (BETTER, "m0"), (UNKNOWN, ""), (BETTER, "m4")]
    assert found == expected * 2


def test_the_luck_of_few_speakers_is_no_difference_though_all_seeds_agree():
    """Mechanisms suit some speakers and not others; over all speakers there are they are equally good."""
    rng = np.random.default_rng(0)
    settings = settings_judged(study(rng, [0.0] * 5, units=40, over_units=20.0, seeds=10), [PLAIN], "m0", resamples=400)
    found = [one.comparisons["plain"] for one in settings if one.comparisons]
    assert sum(one.p_different < 0.05 for one in found) >= 6
    assert sum(one.verdict == BETTER for one in found) <= 1


def figures(**values):
    return {name: estimate(runs(some), 10) for name, some in values.items()}


def test_settings_are_compared_with_the_baseline_of_their_objective_and_budget():
    rng = np.random.default_rng(0)
    a, b, c, d, e, f, g = rng.normal(size=(7, 5))
    settings = [
        Setting("one", "full", figures=figures(phone=a, plain=b)),
        Setting("one", "local", figures=figures(phone=c, plain=d)),
        Setting("one", "frozen", is_control=True, figures=figures(phone=e)),
        Setting("one", "local", budget="time", figures=figures(phone=f)),
        Setting("one", "full", budget="time", figures=figures(phone=g)),
        Setting("two", "local", figures=figures(phone=a)),  # its baseline has not run
        Setting("", "fbank", is_control=True, figures=figures(phone=b)),
        Setting("", "full", is_control=True, figures=figures(phone=c)),
    ]
    found = settings_judged(settings, [ACCURACY, PLAIN], "full", resamples=50)
    assert [list(one.comparisons) for one in found] == [[], ["phone", "plain"], ["phone"], ["phone"], [], [], [], []]
    pairs = [(c, a), (e, a), (f, g)]
    expected = [stats.ttest_rel(one, other).pvalue for one, other in pairs]  # one family: objectives and budgets and controls
    p = [one.comparisons["phone"].p_different for one in found if "phone" in one.comparisons]
    assert p == pytest.approx(multipletests(expected, method="holm")[1])
    p = [one.comparisons["phone"].p_equivalent for one in found if "phone" in one.comparisons]
    assert p == pytest.approx(multipletests([ttost_paired(*pair, -0.01, 0.01)[0] for pair in pairs], method="holm")[1])
    assert found[1].comparisons["plain"].p_different == pytest.approx(stats.ttest_rel(d, b).pvalue)
    assert found[1].figures is settings[1].figures


def test_an_unfinished_setting_is_not_compared():
    settings = [
        Setting("one", "full", figures=figures(plain=[1, 2])),
        Setting("one", "local", figures={"plain": estimate(runs([1, 2], first=2))}),
        Setting("one", "hash"),
    ]
    assert [one.comparisons for one in settings_judged(settings, [PLAIN], "full")] == [{}, {}, {}]


def test_a_missing_statsmodels_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^the study needs statsmodels: pip install 'audiot\[study\]'$"):
        compare(runs([1, 2, 4]), runs([1, 1, 1]), PLAIN)
    with pytest.raises(ModuleNotFoundError, match="the study needs statsmodels"):
        judge([uncorrected(0.0, 0.0, 0.0, 0.5, None)], ["local"], "full", PLAIN)


def test_a_figure_that_no_seed_changes_has_an_interval_over_resampled_tests_alone():
    """So has that of features: five equal figures say nothing of other tests."""
    alike = [Sample(seed, 0.25) for seed in range(5)]
    found = estimate(alike)
    assert (found.mean, found.low, found.high) == (0.25, None, None)
    drawn = [Sample(seed, 0.25, np.array([0.2, 0.3] * 50)) for seed in range(5)]
    assert (estimate(drawn).low, estimate(drawn).high) == (pytest.approx(0.2), pytest.approx(0.3))
