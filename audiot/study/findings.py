"""What a study has measured and found: what its runs give to its statistics, and these to its report."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BUDGETS = ("steps", "time")  # what runs have equally much of
BETTER, EQUIVALENT, UNKNOWN = "better", "equivalent", "can't be told"  # the only words for a comparison


@dataclass(frozen=True)
class Measure:
    """A figure by which a study compares.

    Args:
        name: Its key in the study's config, such as ``phone_linear``.
        title: What it is called in tables and pictures.
        higher_is_better: Whether a larger value is better.
        margin: Difference below which two settings count as equivalent, in the figure's own unit; None: no equivalence is tested.
        is_rate: Whether it is a share, shown in per cent.
        unit: Unit where it is no share, such as ``s`` or ``GiB``.
    """

    name: str
    title: str
    higher_is_better: bool
    margin: float | None = None
    is_rate: bool = True
    unit: str = ""


@dataclass(frozen=True)
class Sample:
    """A figure of one run.

    Args:
        seed: Seed of the run.
        value: The figure on the whole test.
        draws: The figure on resampled tests (tests,), NaN where it has no value; runs of a study resample alike, so that number
            `i` is one test for all. None where the figure has none, as costs.
        run: Folder of the run, relative to the study's, with slashes.
    """

    seed: int
    value: float
    draws: np.ndarray | None = None
    run: str = ""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval.

    Args:
        mean: The mean.
        low, high: Ends of the interval; None where one seed, or several that do not differ, allow none without resampled tests,
            or where the figure has no value on more than 1% of the resampled tests.
        samples: The runs' figures.
    """

    mean: float
    low: float | None
    high: float | None
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Comparison:
    """A setting against the baseline, in pairs of one seed.

    Args:
        difference: The setting less the baseline.
        p_different: Probability of such a difference if there were none, corrected by Holm; None with fewer than two pairs, or if
            all pairs differ by the same.
        p_equivalent: Probability of so small a difference if it were as large as the margin (TOST), corrected by Holm; None also
            without a margin.
        verdict: ``better``, ``equivalent`` or ``can't be told``.
        winner: Name of the better one where the verdict is ``better``, else empty.
    """

    difference: Estimate
    p_different: float | None
    p_equivalent: float | None
    verdict: str
    winner: str = ""


@dataclass(frozen=True)
class Setting:
    """A mechanism under an objective: the figures of its runs.

    Args:
        objective: Name of the objective; empty for a control that is not trained.
        mechanism: Name of the mechanism or of the control.
        budget: ``steps`` where all train equally many, ``time`` where all train equally long.
        is_control: Whether it is a control, such as the untrained encoder or the features.
        learning_rate: The one that validation chose.
        figures: Name of each measure → its estimate.
        costs: Name of each cost → its estimate.
        comparisons: Name of each measure → the comparison with the baseline of the same objective and budget; empty for that
            itself.
    """

    objective: str
    mechanism: str
    budget: str = "steps"
    is_control: bool = False
    learning_rate: float | None = None
    figures: dict[str, Estimate] = field(default_factory=dict)
    costs: dict[str, Estimate] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True)
class Moved:
    """How far the heads of a layer that began alike have moved from where they began, in runs of all seeds.

    Args:
        layer: The layer, counted from 1.
        pattern: The pattern that they began with; empty for those that began at random.
        moved: Total variation between the rows of the tables then and now, 0 to 1.
        entropy_before, entropy_after: Mean entropy of the rows in nats.
        survivors: How many still have half of their mass where they began.
        heads: How many there are, over all seeds.
    """

    layer: int
    pattern: str
    moved: Estimate
    entropy_before: float
    entropy_after: float
    survivors: int
    heads: int


@dataclass(frozen=True)
class Picture:
    """A table of attention, drawn small.

    Args:
        layer: The layer, counted from 1; 0 for an untrained table.
        head: The head, counted from 1, with its pattern if it began with one.
        rows: Rows of the picture, a hexadecimal digit for each cell: 0 for no weight, f for the table's most.
    """

    layer: int
    head: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Learned:
    """What the encoders of a mechanism have learned under an objective, by equal steps.

    Args:
        objective: Name of the objective.
        mechanism: Name of the mechanism.
        heads: Figure of heads, of `HEAD_FIGURES` → its estimate in each layer, of the mean over the layer's heads. Empty where
            the mechanism has no weights.
        untrained: The same of encoders that were not trained.
        removed: Validation loss without the first 0, 1, … heads, from the least important on.
        moved: The heads of tables.
        pictures: The tables of the first seed.
        codes: Figure of codes, of `CODE_FIGURES` → its estimate. Empty where the objective has no codes.
    """

    objective: str
    mechanism: str
    heads: dict[str, tuple[Estimate, ...]] = field(default_factory=dict)
    untrained: dict[str, tuple[Estimate, ...]] = field(default_factory=dict)
    removed: tuple[Estimate, ...] = ()
    moved: tuple[Moved, ...] = ()
    pictures: tuple[Picture, ...] = ()
    codes: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Similarity:
    """How alike the states of mechanisms are in one layer, by linear CKA on the same frames.

    Args:
        objective: Name of the objective.
        layer: The layer, counted from 1.
        mechanisms: Names of the mechanisms.
        means: Row for each mechanism, with its mean CKA to each: between runs of one seed, and with itself between runs of two
            seeds. None where there are no two such runs.
    """

    objective: str
    layer: int
    mechanisms: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]


HEAD_FIGURES = ("distance_s", "diagonality", "entropy_share")
CODE_FIGURES = ("targets/pnmi", "targets/phone_purity", "predicted/pnmi", "predicted/phone_purity")


@dataclass(frozen=True)
class Level:
    """An objective at a level of a factor.

    Args:
        objective: Name of the objective.
        value: The level.
    """

    objective: str
    value: float


@dataclass(frozen=True)
class Factor:
    """What a study varies for all mechanisms alike.

    Args:
        title: What it is called.
        unit: Unit of its levels.
        overrides: Overrides of pre-training, in which ``{level}`` stands for the level.
        levels: Objective of a setting, which names the level too → both apart.
    """

    title: str
    unit: str
    overrides: tuple[str, ...]
    levels: dict[str, Level]


@dataclass(frozen=True)
class Findings:
    """All that a study's report says.

    Args:
        title: Its title.
        rehearsal: Why nothing may be concluded from it, a sentence; empty for a study that counts.
        summary: Three sentences: what was found, and how sure it is.
        baseline: Name of the mechanism that the others are compared with.
        measures: What is compared.
        costs: What it costs: time, memory, parameters, products, energy.
        settings: Rows of the tables.
        methods: Paragraphs that say all that repeats the study.
        commands: Commands that repeat it.
        environment: Versions and machine, by name.
        unfinished: Runs that failed or are missing, each with its reason.
        learned: What the encoders have learned.
        similarities: How alike their layers are.
        factor: What is varied for all mechanisms alike; None: nothing.
    """

    title: str
    rehearsal: str
    summary: tuple[str, ...]
    baseline: str
    measures: tuple[Measure, ...]
    costs: tuple[Measure, ...]
    settings: tuple[Setting, ...]
    methods: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)
    learned: tuple[Learned, ...] = ()
    similarities: tuple[Similarity, ...] = ()
    factor: Factor | None = None
