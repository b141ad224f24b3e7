"""Numbers and verdicts of a study in words, the same in every table and picture."""

from __future__ import annotations

from collections.abc import Iterable

from audiot.reporting.elements import compact
from audiot.study.findings import BETTER, EQUIVALENT, Comparison, Estimate, Measure, Setting

BUDGETS = {"steps": "Equal steps", "time": "Equal time"}
UP, DOWN, EQUAL, OPEN = "▲", "▼", "=", "?"  # signs of a verdict: this one is better, the baseline is, neither, not known


def scale(measure: Measure) -> int:
    """What a value is multiplied with before it is shown."""
    return 100 if measure.is_rate else 1


def unit(measure: Measure, difference: bool = False) -> str:
    """Unit of the numbers shown; empty for a bare number."""
    if measure.is_rate:
        return "points" if difference else "%"
    return measure.unit


def number(value: float, measure: Measure, signed: bool = False) -> str:
    """A value without its unit: rates in per cent with one digit, others with three digits that count, such as ``4.10 G``."""
    text = f"{100 * value:.1f}" if measure.is_rate else compact(value, "#.3g")
    if not text.strip("-0."):
        return text.lstrip("-")
    return f"+{text}" if signed and value > 0 else text.replace("-", "−")


def interval(estimate: Estimate, measure: Measure, signed: bool = False) -> str:
    """The ends of the 95% interval; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    between = " to " if signed or estimate.low < 0 else "–"
    return number(estimate.low, measure, signed) + between + number(estimate.high, measure, signed)


def margin(measure: Measure) -> str:
    """The margin of equivalence with its unit; empty where there is none."""
    if measure.margin is None:
        return ""
    return f"±{scale(measure) * measure.margin:.3g} {unit(measure, difference=True)}".strip()


def direction(measure: Measure) -> str:
    """Which values are better."""
    return "↑ higher is better" if measure.higher_is_better else "↓ lower is better"


def probability(value: float | None) -> str:
    """A p value; a dash where there is none."""
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def sign(setting: Setting, comparison: Comparison) -> str:
    """The sign of a verdict, seen from the setting."""
    if comparison.verdict == BETTER:
        return UP if comparison.winner == setting.mechanism else DOWN
    return EQUAL if comparison.verdict == EQUIVALENT else OPEN


def verdict(comparison: Comparison) -> str:
    """A verdict in words, with the winner."""
    return f"{comparison.verdict}: {comparison.winner}" if comparison.winner else comparison.verdict


def best(measure: Measure, estimates: Iterable[Estimate | None]) -> str | None:
    """The best mean as `number` shows it, so that means that look alike are marked alike; None where all look alike."""
    means = [estimate.mean for estimate in estimates if estimate]
    if len({number(mean, measure) for mean in means}) < 2:
        return None
    return number((max if measure.higher_is_better else min)(means), measure)
