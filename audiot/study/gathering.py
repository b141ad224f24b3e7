"""From the records of a study's runs to what its report says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from audiot.study.comparison import estimate, settings_judged
from audiot.study.design import CONTROLS, Job, Study, Task
from audiot.study.findings import EQUIVALENT, UNKNOWN, Estimate, Factor, Findings, Measure, Sample, Setting
from audiot.study.learning import learning
from audiot.study.records import Arrays, Record

COSTS = (
    Measure("s_per_mframe", "Training time", False, is_rate=False, unit="s per million frames"),
    Measure("peak_gib", "Peak memory", False, is_rate=False, unit="GiB"),
    Measure("wh_per_mframe", "Energy", False, is_rate=False, unit="Wh per million frames"),
    Measure("gflops", "Matrix products", False, is_rate=False, unit="GFLOP per second of audio"),
    Measure("parameters", "Parameters", False, is_rate=False, unit=""),
)
STEPS = Measure("steps", "Steps", False, is_rate=False, unit="")

# Number of seeds → of 100 studies, how many 95% intervals of `estimate` hold the truth where seeds alone vary, by a normal
# distribution: 20,000 simulated studies each.
HELD = {2: 50, 3: 75, 4: 81, 5: 84, 6: 86, 7: 87, 8: 89, 9: 90, 10: 90}


def gather(
    study: Study,
    records: Mapping[str, Record],
    failed: Mapping[str, tuple[Job, str]],
    command: str,
    arrays: Callable[[str], Arrays | None] = lambda key: None,
) -> Findings:
    """All that the report says.

    Args:
        study: The study.
        records: Its finished runs.
        failed: Key of each run that failed → the run and why.
        command: The command that repeats it.
        arrays: Function from the key of a run to the arrays beside its record.
    """
    settings = [*_trained(study, records), *_controls(study, records)]
    judged = settings_judged(settings, study.measures, study.baseline, study.alpha, study.resamples)
    costs = tuple(cost for cost in (*COSTS, STEPS) if any(cost.name in setting.costs for setting in judged))
    unfinished = {job.name: why for job, why in failed.values()}
    for job in study.jobs(records):
        if job.key not in records and job.name not in unfinished:
            unfinished[job.name] = "it has not run"
    first = next(iter(records.values()), None)
    return Findings(
        study.title,
        study.rehearsal,
        summary(study, judged),
        study.baseline,
        study.measures,
        costs,
        tuple(judged),
        methods(study),
        (command,),
        {} if first is None else first.environment,
        unfinished,
        *learning(study, records, arrays),
        study.factor,
    )


def _trained(study: Study, records: Mapping[str, Record]) -> list[Setting]:
    found = []
    for budget in study.budgets:
        for objective in study.objectives:
            for mechanism in study.mechanisms:
                is_control = mechanism in study.control_mechanisms
                if is_control and budget == "time":
                    continue
                runs = {seed: study.training(objective, mechanism, seed, budget, records) for seed in study.seeds}
                jobs = {seed: job for seed, job in runs.items() if job is not None}
                figures = {name: {seed: study.task(name, job, seed) for seed, job in jobs.items()} for name in study.tasks}
                found.append(
                    Setting(
                        objective,
                        mechanism,
                        budget,
                        is_control,
                        study.learning_rate(objective, mechanism, records),
                        _estimates(study, figures, records),
                        _costs(study, study.costs(objective, mechanism), jobs, records),
                    )
                )
    return found


def _controls(study: Study, records: Mapping[str, Record]) -> list[Setting]:
    found = []
    for control in (name for name in CONTROLS if name in study.controls):
        tasks = {}
        for name in study.tasks:
            jobs = {seed: study.control(name, control, seed, records) for seed in study.seeds}
            tasks[name] = {seed: job for seed, job in jobs.items() if job is not None}
        found.append(Setting("", control, "steps", True, None, _estimates(study, tasks, records)))
    return found


def _estimates(study: Study, tasks: Mapping[str, Mapping[int, Job]], records: Mapping[str, Record]) -> dict[str, Estimate]:
    found = {name: _estimate(study, jobs, records, "value") for name, jobs in tasks.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def _costs(study: Study, alone: Job, jobs: Mapping[int, Job], records: Mapping[str, Record]) -> dict[str, Estimate]:
    """What the run that measures them has found, and the steps of the trainings themselves."""
    found = {cost.name: _estimate(study, {study.seeds[0]: alone}, records, cost.name) for cost in COSTS}
    found[STEPS.name] = _estimate(study, jobs, records, STEPS.name)
    return {name: figure for name, figure in found.items() if figure is not None}


def _estimate(study: Study, jobs: Mapping[int, Job], records: Mapping[str, Record], figure: str) -> Estimate | None:
    """The estimate of a figure; None where no run of these has it."""
    found = {seed: records[job.key] for seed, job in jobs.items() if job.key in records}
    needed = figure == "value"  # a run without a GPU lacks some costs
    samples = [_sample(seed, record, figure) for seed, record in found.items() if needed or figure in record.figures]
    return estimate(samples, study.resamples) if samples else None


def _sample(seed: int, record: Record, figure: str) -> Sample:
    draws = record.draws.get(figure)
    return Sample(seed, record.figure(figure), None if draws is None else np.array(draws), record.run)


def summary(study: Study, settings: Sequence[Setting]) -> tuple[str, ...]:
    """Three sentences: what was found by equal steps, by equal time, and how sure that is."""
    found = [_verdicts(study, settings, budget) for budget in study.budgets]
    pairs = len(study.seeds)
    sure = (
        f"Each verdict rests on {pairs} pairs of runs, and the probability of a wrong one is at most {study.alpha:.0%} for each "
        "measure."
    )
    return (*(sentence for sentence in found if sentence), sure if pairs > 1 else "One seed allows no verdict.")


def _verdicts(study: Study, settings: Sequence[Setting], budget: str) -> str:
    """A sentence on the comparisons of a budget; empty where there is none."""
    rivals = [each for each in settings if each.budget == budget and not each.is_control]
    found = [(each, name, comparison) for each in rivals for name, comparison in each.comparisons.items()]
    if not found:
        return ""
    won = [
        f"{each.mechanism} ({study.tasks[name].measure.title}, {each.objective})"
        for each, name, comparison in found
        if comparison.winner == each.mechanism
    ]
    lost = sum(comparison.winner == study.baseline for _, _, comparison in found)
    equal, unknown = (sum(comparison.verdict == word for _, _, comparison in found) for word in (EQUIVALENT, UNKNOWN))
    ahead = f"better than {study.baseline}: {', '.join(won)}" if won else f"no mechanism is better than {study.baseline}"
    return (
        f"Equal {budget}: {ahead}. Of {len(found)} comparisons, {study.baseline} is better in {lost}, {equal} are equivalent, "
        f"and {unknown} can't be told."
    )


def methods(study: Study) -> tuple[str, ...]:
    """Paragraphs that say all that repeats the study."""
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    return (
        f"Mechanisms: {', '.join(study.mechanisms)}. Objectives: {', '.join(study.objectives)}. Seeds: "
        f"{', '.join(map(str, study.seeds))}. Runs of one seed have the same batches and masks.",
        *(() if study.factor is None else (_on_factor(study.factor),)),
        f"Every run: audiot pretrain {' '.join([*study.data, *study.pretrain])}. The learning rates {rates} were tried for each "
        f"mechanism and objective on seed {study.seeds[0]}. All seeds have the one with the best validation loss. Runs of equal "
        "time have as many steps as fit in the baseline's time at the mechanism's time per frame. Controls train "
        "equal steps only.",
        "Costs: those of a short training that has its device to itself, without waiting for data: "
        f"{' '.join(study.cost) or 'the same command'}. Matrix products: those of the encoder's forward pass on an input as long "
        "as the longest training crop.",
        f"Tasks: {'; '.join(map(_described, study.tasks.values()))}. All runs are tested on the same resampled tests.",
        f"Intervals (95%) are percentiles of a bootstrap over seeds and test units together. {_how_narrow(len(study.seeds))} "
        "Differences are tested by a paired t test over seeds, and equivalence by two one-sided tests against the margin that "
        f"the config states beforehand. Both are corrected by Holm over all comparisons of a measure, at {study.alpha:g}.",
        "Better: the corrected test says so, and the interval of the difference excludes zero. Equivalent: the corrected tests "
        "say so, and the interval lies within the margins. Else it can't be told.",
    )


def _how_narrow(seeds: int) -> str:
    """How far the intervals of a number of seeds can be trusted."""
    if seeds == 1:
        return "With one seed they are those of the test units alone, and say nothing of other seeds."
    held = HELD.get(seeds)
    often = f"{held} of 100 studies" if held else f"more than {HELD[max(HELD)]} of 100 studies"
    return f"With {seeds} seeds they are too narrow: where seeds alone vary, they hold the truth in {often}."


def _on_factor(factor: Factor) -> str:
    levels = dict.fromkeys(f"{level.value:g}" for level in factor.levels.values())
    return (
        f"Factor: {factor.title}, {', '.join(levels)} {factor.unit}, by {' '.join(factor.overrides)} in pre-training. Each "
        "mechanism has a learning rate of its own at each level, and is compared with the baseline at the same level."
    )


def _described(task: Task) -> str:
    margin = task.measure.margin
    words = "" if margin is None else f", equivalent within {100 * margin:g} points"
    return f"{task.measure.title} (audiot {' '.join([task.command, *task.overrides])}{words})"
