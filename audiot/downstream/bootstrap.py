"""Confidence intervals of the test's metrics by the bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap").

Tests of the same size are drawn from the test's own utterances, or from its speakers with all their utterances, with
replacement. The interval is that of the percentiles of the metric over these tests. Bisani and Ney (2004, "Bootstrap estimates
for confidence intervals in ASR performance evaluation") do so for word error rates, and Peng and Liu (2019, arXiv:1912.09508)
draw speakers, whose utterances depend on each other. So do the frames of an utterance: no frame is drawn alone.

The bias-corrected interval (BCa) would need the metric without each unit in turn, which for speaker verification takes longer
than the bootstrap. It also has no value where all tests lie on one side of the metric. Percentiles serve every metric alike.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiot.base.files import write_csv
from audiot.base.streams import bits, key

LEVEL = 0.95
FEWEST_SPEAKERS = 8  # ``auto`` resamples so many speakers or more
FEWEST_SAMPLES = 100
MOST_UNDEFINED = 0.01  # share of the resampled tests that may have no value: the tails hold 0.025 each
DRAWN = 4_000_000  # units that are drawn at once
UNITS = ("utterance", "speaker")
NO_MEASUREMENTS = "the objective gives no measurements of utterances"
DEFAULTS = {"unit": "auto", "samples": 1000, "seed": None, "keep": False}

Metrics = dict[str, Tensor]


class Measured(ABC):
    """The measurements of a test, from which the metrics of resampled tests can be computed.

    Args:
        utterances: Ids of the utterances that were measured, sorted.
    """

    def __init__(self, utterances: Sequence[str]) -> None:
        self.utterances = list(utterances)

    @abstractmethod
    def metrics(self, units: Tensor, counts: Tensor) -> Metrics:
        """Metrics of resampled tests, (tests,) each, NaN where a test has no value.

        Args:
            units: Number of the unit (utterances,) that each utterance belongs to.
            counts: How often each unit is in each test, (tests, units), float64.
        """


class Sums(Measured):
    """Metrics that are functions of sums over utterances: accuracies, F1 and error rates.

    Args:
        utterances: Ids of the utterances, sorted.
        places: Utterance and column (2, n) of every number in a table (utterances, columns). The others are zero.
        numbers: These numbers (n,).
        columns: Number of columns.
        figures: Function from the columns' sums (tests, columns), float64, to metrics (tests,).
    """

    def __init__(
        self, utterances: Sequence[str], places: Tensor, numbers: Tensor, columns: int, figures: Callable[[Tensor], Metrics]
    ) -> None:
        super().__init__(utterances)
        self.places, self.numbers, self.columns, self.figures = places, numbers.double(), columns, figures

    @classmethod
    def of(cls, utterances: Sequence[str], table: Sequence[Sequence[float]], figures: Callable[[Tensor], Metrics]) -> Sums:
        """Metrics of a table with a row for each utterance."""
        whole = torch.tensor(table, dtype=torch.float64).view(len(utterances), -1 if table else 0)
        places = whole.nonzero().T
        return cls(utterances, places, whole[tuple(places)], whole.shape[1], figures)

    def metrics(self, units: Tensor, counts: Tensor) -> Metrics:
        """Metrics of the sums over the utterances of each test."""
        utterance, column = self.places
        with torch.sparse.check_sparse_tensor_invariants():  # PyTorch warns of tensors that nobody has chosen to check or not
            size = (self.columns, counts.shape[1])
            of_units = torch.sparse_coo_tensor(torch.stack([column, units[utterance]]), self.numbers, size)
        return self.figures(torch.sparse.mm(of_units, counts.T.contiguous()).T)


@dataclass(frozen=True)
class Bootstrap:
    """A way to resample a test.

    Args:
        unit: What is drawn, ``utterance`` or ``speaker``.
        why: Reason for this unit.
        samples: Number of resampled tests; 0 for no intervals.
        seed: Seed of the draws. Runs with one seed and one test draw the same tests.
        speakers: Id of each utterance of the test → its speaker.
        keep: Whether the metrics of the resampled tests are wanted themselves, to compare runs test by test.
    """

    unit: str
    why: str
    samples: int
    seed: int
    speakers: Mapping[str, str | None]
    keep: bool = False

    @classmethod
    def choose(
        cls,
        settings: Mapping[str, Any] | None,
        seed: int,
        speakers: Mapping[str, str | None],
        training: Callable[[], Iterable[str | None]],
    ) -> Bootstrap:
        """The bootstrap that the settings ask for.

        ``auto`` draws speakers if every utterance of the test has a speaker, there are at least 8, and none is in training. The
        interval then says what other new speakers may give. Otherwise it draws utterances: if training has the speakers, the
        question is what other utterances of theirs may give, and of few speakers no spread can be estimated.

        Args:
            settings: ``downstream.bootstrap``: ``unit``, ``samples``, ``seed`` and ``keep``. What is missing has its default.
            seed: Seed of the run, which is that of the draws unless they have their own.
            speakers: Id of each utterance of the test → its speaker, None if it has none or several.
            training: Function that gives the speakers of training. It is called only if the choice depends on them.

        Raises:
            ValueError: a setting is not one of those that exist, or an utterance has no speaker and ``unit`` is ``speaker``.
        """
        given = checked(settings or {}, "downstream.bootstrap", DEFAULTS)
        unit, samples, own, keep = (given[name] for name in ("unit", "samples", "seed", "keep"))
        if unit not in ("auto", *UNITS):
            raise ValueError(f"downstream.bootstrap.unit must be auto, utterance or speaker, found {unit!r}")
        nameless = next((name for name, speaker in speakers.items() if speaker is None), None)
        if unit == "speaker" and nameless is not None:
            raise ValueError(
                f"downstream.bootstrap.unit=speaker: utterance {nameless} of the test has no speaker, or several: set it to "
                "utterance"
            )
        why = "as downstream.bootstrap.unit says"
        if unit == "auto":
            unit, why = _automatic(speakers, nameless, training)
        return cls(unit, why, samples, seed if own is None else own, speakers, keep)

    def intervals(self, measured: Measured | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Intervals of the test's metrics, as they go to ``metrics.json``.

        Args:
            measured: Measurements of the test, of all processes; None if the objective gives none.
            metrics: Metrics of the test by name, ``test/…``.

        Returns:
            ``intervals``: name of each metric → ``[low, high]``; and ``bootstrap``: how they were computed, with a digest of the
            utterances and units in ``test``, and in ``without`` the names of metrics that have no interval, each with the reason.
            Runs that agree in ``unit``, ``samples``, ``seed`` and ``test`` have drawn the same tests. Empty if ``samples`` is 0.
            With `keep` also ``draws``: name of each metric → its values in all resampled tests, (samples,), NaN where it has
            none.
        """
        if self.samples == 0:
            return {}
        names = [name for name in metrics if name.startswith("test/")]
        intervals: dict[str, list[float]] = {}
        how: dict[str, Any] = {"level": LEVEL, "method": "percentile", "samples": self.samples, "unit": self.unit}
        if measured is None:
            return {"intervals": intervals, "bootstrap": how | {"without": dict.fromkeys(names, NO_MEASUREMENTS)}}
        owners = [str(self.speakers[name]) if self.unit == "speaker" else name for name in measured.utterances]
        place = {owner: number for number, owner in enumerate(sorted(set(owners)))}
        units = torch.tensor([place[owner] for owner in owners], dtype=torch.long)
        tests = sha256("\n".join(f"{name}\t{owner}" for name, owner in zip(measured.utterances, owners, strict=True)).encode())
        how |= {"units": len(place), "why": self.why, "seed": self.seed, "test": tests.hexdigest()[:16]}
        if len(place) < 2:
            few = f"the test has {'one' if place else 'no'} {self.unit}, and two are the fewest that differ"
            return {"intervals": intervals, "bootstrap": how | {"without": dict.fromkeys(names, few)}}
        values = self._values(measured, units, len(place))
        without = {}
        for name in names:
            value = values.get(name.removeprefix("test/"))
            reason = NO_MEASUREMENTS if value is None else _no_interval(value)
            if value is None or reason:
                without[name] = reason
            else:
                intervals[name] = value[~value.isnan()].quantile(value.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])).tolist()
        found = {"intervals": intervals, "bootstrap": how | ({"without": without} if without else {})}
        if self.keep:  # also where there is no interval: runs are compared test by test, and others may have one
            found["draws"] = {name: values[name.removeprefix("test/")] for name in names if name.removeprefix("test/") in values}
        return found

    def _values(self, measured: Measured, units: Tensor, number: int) -> Metrics:
        """Each metric of all resampled tests, (samples,)."""
        keys = torch.tensor([key("bootstrap", self.seed, sample) for sample in range(self.samples)])
        parts = [measured.metrics(units, drawn(some, number)) for some in keys.split(max(1, DRAWN // number))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def checked(settings: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a bootstrap: ``samples``, ``seed``, ``keep``, and others that the caller checks.

    Args:
        settings: The settings. What is missing has its default.
        where: Their key in the config, for errors.
        defaults: All settings that there are.

    Raises:
        ValueError: a setting is not one of those that exist.
    """
    given = {**defaults, **settings}
    if unknown := given.keys() - defaults.keys():
        raise ValueError(f"{where} has no setting {min(unknown)!r}; there are {', '.join(sorted(defaults))}")
    samples, seed, keep = given["samples"], given["seed"], given["keep"]
    if type(samples) is not int or 0 < samples < FEWEST_SAMPLES or samples < 0:
        raise ValueError(f"{where}.samples must be at least {FEWEST_SAMPLES}, or 0 for no intervals, found {samples!r}")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise ValueError(f"{where}.seed must be null, which is the run's, or at least 0, found {seed!r}")
    if type(keep) is not bool or (keep and not samples):
        raise ValueError(f"{where}.keep must be true or false, and false without samples, found {keep!r}")
    return given


def in_words(how: Mapping[str, Any], intervals: Mapping[str, Any]) -> str:
    """A line about the intervals: what was resampled and why, and which metrics have none.

    Args:
        how, intervals: ``bootstrap`` and ``intervals`` of ``metrics.json``.
    """
    without: dict[str, list[str]] = {}
    for name, reason in how.get("without", {}).items():
        without.setdefault(reason, []).append(name.removeprefix("test/"))
    missing = [f"none for {', '.join(names)}: {reason}" for reason, names in without.items()]
    if not intervals:
        return "; ".join(missing)
    resampled = f"{how['level']:.0%}, {how['units']:,} {how['unit']}s resampled {how['samples']:,} times: {how['why']}"
    return "; ".join([resampled, *missing])


def write_draws(path: Path, draws: Mapping[str, Tensor]) -> None:
    """Write the metrics of the resampled tests, a column for each and a row for each test.

    Args:
        path: The CSV file.
        draws: ``draws`` of `Bootstrap.intervals`.
    """
    rows = zip(*(values.tolist() for values in draws.values()), strict=True)
    write_csv(path, (dict(zip(draws, row, strict=True)) for row in rows))


def read_draws(path: Path) -> dict[str, list[float]]:
    """Name of each metric → its values in the resampled tests, as `write_draws` wrote them.

    Raises:
        ValueError: a value is no number.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    try:
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a number in every row and column ({error}): test the run again") from error


def drawn(keys: Tensor, number: int) -> Tensor:
    """How often each unit is in each resampled test, (tests, units), float64. Every test has as many units as there are.

    Args:
        keys: Key of each test, see `audiot.base.streams`.
        number: Number of units.
    """
    places = bits(keys, number) % number + number * torch.arange(len(keys))[:, None]
    return torch.bincount(places.flatten(), minlength=number * len(keys)).view(len(keys), number).double()


def _automatic(
    speakers: Mapping[str, str | None], nameless: str | None, training: Callable[[], Iterable[str | None]]
) -> tuple[str, str]:
    """The unit of ``auto``, and the reason for it."""
    if nameless is not None:
        return "utterance", f"{nameless} has no speaker, or several"
    different = set(speakers.values())
    if len(different) < FEWEST_SPEAKERS:
        return "utterance", f"the test has fewer than {FEWEST_SPEAKERS} speakers ({len(different)})"
    known = next((speaker for speaker in training() if speaker in different), None)
    if known is not None:
        return "utterance", f"training has speakers of the test ({known})"
    return "speaker", f"the test has at least {FEWEST_SPEAKERS}, and training none of them"


def _no_interval(values: Tensor) -> str:
    """The reason why a metric has no interval, empty if it has one.

    Args:
        values: The metric of each resampled test, NaN where it has no value.
    """
    undefined = values.isnan().double().mean().item()
    if undefined > MOST_UNDEFINED:
        return f"{100 * undefined:.0f}% of the resampled tests have no value of it: the test is too small"
    defined = values[~values.isnan()]
    if defined.min() == defined.max():
        return "all resampled tests have the same value of it: how much it may be off can't be seen from this test"
    return ""
