"""The front of quality against cost: the settings that nothing beats in both."""

from __future__ import annotations

from collections.abc import Sequence

from audiot.study.findings import Measure, Setting


def on_front(settings: Sequence[Setting], measure: Measure, cost: Measure) -> set[int]:
    """Places of the settings on the front of a measure and a cost, among those that have both.

    A setting is on it unless another is at least as good in both and better in one.
    """

    def worth(setting: Setting) -> tuple[float, float]:
        quality, price = setting.figures[measure.name].mean, setting.costs[cost.name].mean
        return (quality if measure.higher_is_better else -quality), (price if cost.higher_is_better else -price)

    worths = {
        place: worth(setting)
        for place, setting in enumerate(settings)
        if measure.name in setting.figures and cost.name in setting.costs
    }
    return {
        place
        for place, (quality, price) in worths.items()
        if not any(other != (quality, price) and other[0] >= quality and other[1] >= price for other in worths.values())
    }
