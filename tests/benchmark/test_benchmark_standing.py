"""Where a mechanism passes the baseline."""

from __future__ import annotations

import pytest
from timed_rows import line

from audiot.benchmark.attention_results import Row
from audiot.benchmark.standing import crossing, standing


def test_crossing_is_where_the_speedup_is_one_on_logarithmic_axes():
    assert crossing([100, 400], [0.5, 2.0]) == pytest.approx(200)
    assert crossing([400, 100], [2.0, 0.5]) == pytest.approx(200)
    assert crossing([100, 1000], [0.1, 10**0.5]) == pytest.approx(10 ** (2 + 2 / 3))
    assert crossing([10, 100, 1000], [0.1, 1.0, 2.0]) == pytest.approx(100)
    with pytest.raises(ValueError, match="do not pass 1"):
        crossing([10, 100], [2.0, 3.0])


@pytest.mark.parametrize(
    ("medians", "spread", "sentence", "words"),
    [
        ([4, 1, 1], 0, "fast passes query_key at about T = 200", "faster from T ≈ 200"),
        ([1, 4, 4], 0, "fast falls behind query_key at about T = 200", "slower from T ≈ 200"),
        (
            [4, 1, 4],
            0,
            "fast passes query_key at about T = 200 and falls behind query_key at about T = 800",
            "faster from T ≈ 200, slower from T ≈ 800",
        ),
        ([1, 1, 1], 0, "fast is faster than query_key at T = 100, 400, 1,600", "faster"),
        ([1, 2, 1], 0, "fast is faster than query_key at T = 100, 1,600; level at T = 400", "faster at T = 100, 1,600"),
        ([4, 4, 4], 0, "fast never passes query_key within the lengths measured (100, 400, 1,600)", "slower"),
        (
            [4, 4, 2],
            0,
            "fast never passes query_key within the lengths measured (100, 400, 1,600); level at T = 1,600",
            "slower",
        ),
        # Level at 400, a little above 1 there: it is passed between 100 and 400, where the speed-up is 1.
        ([4, 1.999, 0.5], 0.01, "fast passes query_key at about T = 400", "faster from T ≈ 400"),
        ([2.1, 1.9, 2.1], 0.5, "fast and query_key are level: they differ by less than the measurements spread", "level"),
    ],
)
def test_standing_says_where_the_baseline_is_passed_and_makes_nothing_of_noise(medians, spread, sentence, words):
    found = standing(line("fast", medians, spread), line("query_key", [2, 2, 2]))
    assert found.sentence("fast", "query_key") == sentence
    assert found.words() == words


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_make_no_comparison_however_far_apart(rounds):
    fast, base = (
        [Row(**{**vars(row), "rounds": rounds}) for row in line(*of)] for of in (("fast", [4, 1, 1]), ("base", [2] * 3))
    )
    found = standing(fast, base)
    assert (found.crossings, found.faster, found.slower) == ((), (), ())
    assert found.sentence("fast", "base") == "fast and base: too few rounds to compare (at least 3)"
    assert found.words() == "too few rounds to compare"
    enough = [[Row(**{**vars(row), "rounds": 3}) for row in rows] for rows in (fast, base)]
    assert standing(*enough).words() == "faster from T ≈ 200"


def test_lengths_without_a_result_do_not_count():
    own = [Row("fast", "layer", "training", 100, 2, "fp32", False, note="skipped"), *line("fast", [4, 4, 1])[1:]]
    base = line("query_key", [2, 2, 2])
    assert standing(own, base).crossings == ((pytest.approx(800), True),)
    assert standing(own[:1], base).sentence("fast", "query_key") == "fast was not measured"
    assert standing(own, base[:1]).words() == "not measured"
