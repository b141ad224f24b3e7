"""Findings of a study that never took place: six mechanisms under two objectives, five seeds, two budgets, and controls."""

from __future__ import annotations

import numpy as np

from audiot.study.findings import (
    BETTER,
    CODE_FIGURES,
    EQUIVALENT,
    HEAD_FIGURES,
    UNKNOWN,
    Comparison,
    Estimate,
    Findings,
    Learned,
    Measure,
    Moved,
    Picture,
    Sample,
    Setting,
    Similarity,
)

BASELINE = "query_key"
MECHANISMS = (BASELINE, "synthesizer_dense", "synthesizer_random", "linear_elu", "lsh_simple", "fourier")
OBJECTIVES = ("mockingjay", "clusters_visible")
SEEDS = range(1, 6)
MEASURES = (
    Measure("phone_linear", "Phone accuracy, linear", True, 0.01),
    Measure("phone_hidden", "Phone accuracy, one hidden layer", True, 0.01),
    Measure("speaker", "Speaker accuracy", True, 0.005),
    Measure("per", "Phone error rate", False, 0.01),
    Measure("abx", "ABX error", False),
)
COSTS = (
    Measure("hours", "Training time", False, is_rate=False, unit="h"),
    Measure("memory", "Peak memory", False, is_rate=False, unit="GiB"),
    Measure("products", "Products per frame", False, is_rate=False),
    Measure("energy", "Energy", False, is_rate=False, unit="kWh"),
)
LEVELS = dict(zip((measure.name for measure in MEASURES), (0.712, 0.748, 0.961, 0.192, 0.087), strict=True))


def estimate(values, runs, draws=None):
    """A mean over seeds with a rough interval."""
    mean, half = float(np.mean(values)), 2.78 * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    samples = (
        Sample(seed, float(value), None if draws is None else value + draws, run)
        for seed, value, run in zip(SEEDS, values, runs, strict=True)
    )
    return Estimate(mean, mean - half, mean + half, tuple(samples))


def comparison(values, others, measure, mechanism, baseline):
    """A verdict as a rule of thumb gives it, which is enough to be shown."""
    differences = np.array(values) - np.array(others)
    found = estimate(differences, [""] * len(differences))
    apart = found.low > 0 or found.high < 0
    alike = measure.margin is not None and -measure.margin < found.low and found.high < measure.margin
    verdict = BETTER if apart else EQUIVALENT if alike else UNKNOWN
    winner = mechanism if (found.mean > 0) == measure.higher_is_better else baseline
    p_equivalent = None if measure.margin is None else 0.0123 if alike else 0.41
    return Comparison(found, 0.0004 if apart else 0.2468, p_equivalent, verdict, winner if apart else "")


def learned(objective, names):
    """What the mechanisms have learned under an objective: two layers of two heads, the third mechanism with tables."""

    def spread(mean):
        return Estimate(mean, 0.9 * mean, 1.1 * mean, ())

    found = []
    for place, mechanism in enumerate(names):
        has_weights, has_tables = place != 5, place == 2
        heads = {name: (spread(0.1 + 0.01 * place), spread(0.2)) for name in HEAD_FIGURES} if has_weights else {}
        untrained = {name: (spread(0.3), spread(0.3)) for name in heads}
        removed = tuple(spread(2 + 0.1 * number + 0.01 * place) for number in range(5))
        moved = tuple(
            Moved(layer, pattern, spread(0.2 * layer + 0.1 * bool(pattern)), 0.5, 0.75, 6 - layer, 5)
            for layer in (1, 2)
            for pattern in ("current", "")
        )
        pictures = tuple(Picture(layer, head, ("f0", f"{layer}a")) for layer in range(3) for head in ("1 current", "2"))
        codes = {name: spread(0.4 + 0.01 * place) for name in CODE_FIGURES if place != 1}
        tables = {"moved": moved, "pictures": pictures} if has_tables else {}
        found.append(Learned(objective, mechanism, heads, untrained, removed, codes=codes, **tables))
    return found


def similar(objective, layer, names):
    """Similarities that fall with the distance in the list; the last mechanism has no second seed."""
    means = [[0.9 - 0.1 * abs(one - other) for other in range(len(names))] for one in range(len(names))]
    means[-1][-1] = None
    return Similarity(objective, layer, tuple(names), tuple(map(tuple, means)))


def example(names=MECHANISMS, rehearsal=""):
    """The findings. `names` renames the mechanisms."""
    noise = np.random.default_rng(7)
    settings = []
    for budget in ("steps", "time"):
        for objective in OBJECTIVES:
            base = {}
            for place, mechanism in enumerate(names):
                runs = [f"runs/{objective}/mechanism {place}/{budget}/seed-{seed}" for seed in SEEDS]
                figures, comparisons = {}, {}
                for measure in MEASURES:
                    sense = 1 if measure.higher_is_better else -1
                    loss = (0, 0.002, -0.03, 0.012, -0.006, -0.045)[place] + 0.03 * (objective == OBJECTIVES[1])
                    level = LEVELS[measure.name] + sense * loss * (0.4 if measure.name in ("speaker", "abx") else 1)
                    values = [float(level + 0.004 * noise.standard_normal()) for _ in SEEDS]
                    draws = 0.001 * noise.standard_normal(20)
                    figures[measure.name] = estimate(values, runs, draws)
                    if place:
                        comparisons[measure.name] = comparison(values, base[measure.name], measure, mechanism, names[0])
                    else:
                        base[measure.name] = values
                scale = (1.0, 0.94, 0.78, 0.55, 1.6, 0.41)[place] * (1 if objective == OBJECTIVES[0] else 1.2)
                costs = {
                    name: estimate([level * scale * (1 + 0.01 * noise.standard_normal()) for _ in SEEDS], runs)
                    for name, level in (("hours", 3.2), ("memory", 21.0), ("products", 4.1e9), ("energy", 1.9))
                }
                rate = (1e-3, 5e-4)[place % 2]
                settings.append(Setting(objective, mechanism, budget, False, rate, figures, costs, comparisons))
    for control, loss in (("untrained encoder", 0.2), ("features alone", 0.26)):
        figures = {
            measure.name: estimate(
                [LEVELS[measure.name] - (1 if measure.higher_is_better else -1) * (loss + 0.003 * seed) for seed in SEEDS],
                [f"controls/{control}/{seed}" for seed in SEEDS],
            )
            for measure in MEASURES
        }
        settings.append(Setting("", control, "steps", True, None, figures))
    return Findings(
        "Which attention for self-supervised speech? Six mechanisms under two objectives",
        rehearsal,
        (
            "linear_elu tells phones better than query_key under both objectives, by 1.2 points, at 55% of its time.",
            "synthesizer_dense is equivalent to query_key within 1 point; fourier is worse by 4.5 points and the cheapest.",
            "Five seeds each; one run of 120 is missing, and no verdict depends on it.",
        ),
        names[0],
        MEASURES,
        COSTS,
        tuple(settings),
        (
            "Every setting pre-trains a transformer of 6 layers and 384 dimensions on 25 hours of speech. Its learning rate "
            "is the best of four on validation, with a seed that the study does not use.",
            "Probes are trained on frozen representations. A figure is the mean over five seeds. Its interval covers seeds and "
            "test utterances: both are resampled together 2,000 times.",
        ),
        ("audiot study study=attention folder=studies/attention", "audiot study report=studies/attention > report.txt && ls"),
        {"audiot": "0.1.0", "torch": "2.11.0+cpu", "python": "3.12.1", "machine": "2 × NVIDIA H200, driver 570.86"},
        {"runs/mockingjay/lsh_simple/time/seed-4": "out of memory at step 3,200: lower data.batch_s (500 now)"},
        tuple(learned(OBJECTIVES[1], names)),
        tuple(similar(OBJECTIVES[1], layer, names) for layer in (1, 2)),
    )
