"""From the records of a study's runs to what its report says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from audiot.study.design import CONTROLS, Job, Study
from audiot.study.findings import BETTER, EQUIVALENT, UNKNOWN, Estimate, Findings, Measure, Sample, Setting
from audiot.study.records import Record
from audiot.study.statistics import estimate, settings_judged

COSTS = {
    "train_s": Measure("train_s", "training time", False, is_rate=False, unit="s"),
    "frames_per_s": Measure("frames_per_s", "frames per second of training", True, is_rate=False, unit="1/s"),
    "peak_gib": Measure("peak_gib", "peak memory of the GPU", False, is_rate=False, unit="GiB"),
    "parameters": Measure("parameters", "parameters", False, is_rate=False, unit=""),
    "steps": Measure("steps", "steps", False, is_rate=False, unit=""),
}


def gather(study: Study, records: Mapping[str, Record], failed: Mapping[str, tuple[Job, str]], command: str) -> Findings:
    """All that the report says.

    Args:
        study: The study.
        records: Its finished runs.
        failed: Key of each run that failed → the run and why.
        command: The command that repeats it.
    """
    settings = [*_trained(study, records), *_controls(study, records)]
    judged = settings_judged(settings, study.measures, study.baseline, study.alpha, study.resamples)
    costs = tuple(cost for name, cost in COSTS.items() if any(name in setting.costs for setting in judged))
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
    )


def _trained(study: Study, records: Mapping[str, Record]) -> list[Setting]:
    found = []
    for budget in study.budgets:
        for objective in study.objectives:
            for mechanism in study.mechanisms:
                runs = {seed: study.training(objective, mechanism, seed, budget, records) for seed in study.seeds}
                jobs = {seed: job for seed, job in runs.items() if job is not None}
                figures = {name: {seed: study.task(name, job, seed) for seed, job in jobs.items()} for name in study.tasks}
                found.append(
                    Setting(
                        objective,
                        mechanism,
                        budget,
                        mechanism in study.control_mechanisms,
                        study.learning_rate(objective, mechanism, records),
                        _estimates(study, figures, records),
                        _costs(study, jobs, records),
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
    found = {}
    for name, jobs in tasks.items():
        samples = [_sample(seed, records[job.key], "value") for seed, job in jobs.items() if job.key in records]
        if samples:
            found[name] = estimate(samples, study.resamples)
    return found


def _costs(study: Study, jobs: Mapping[int, Job], records: Mapping[str, Record]) -> dict[str, Estimate]:
    found = {}
    for name in COSTS:
        samples = [
            _sample(seed, records[job.key], name)
            for seed, job in jobs.items()
            if job.key in records and name in records[job.key].figures
        ]
        if samples:
            found[name] = estimate(samples, study.resamples)
    return found


def _sample(seed: int, record: Record, figure: str) -> Sample:
    draws = record.draws.get(figure)
    return Sample(seed, record.figures[figure], None if draws is None else np.array(draws), record.run)


def summary(study: Study, settings: list[Setting]) -> tuple[str, ...]:
    """Three sentences: what was found by equal steps, by equal time, and how sure that is."""
    sentences = []
    for budget, words in (("steps", "equal steps"), ("time", "equal time")):
        rivals = [each for each in settings if each.budget == budget and each.comparisons and not each.is_control]
        if not rivals:
            continue
        verdicts = [(each, name, found) for each in rivals for name, found in each.comparisons.items()]
        count = {word: sum(found.verdict == word for _, _, found in verdicts) for word in (EQUIVALENT, UNKNOWN)}
        won = sorted(
            {
                f"{each.mechanism} ({each.objective}, {_title(study, name)})"
                for each, name, found in verdicts
                if found.winner == each.mechanism
            }
        )
        lost = sum(found.verdict == BETTER and found.winner == study.baseline for _, _, found in verdicts)
        ahead = (
            f"{', '.join(won)} {'is' if len(won) == 1 else 'are'} better than {study.baseline}"
            if won
            else f"no mechanism is better than {study.baseline}"
        )
        sentences.append(
            f"By {words}, {ahead}; of {len(verdicts)} comparisons {study.baseline} is better in {lost}, {count[EQUIVALENT]} are "
            f"equivalent, and {count[UNKNOWN]} can't be told."
        )
    pairs = len(study.seeds)
    sentences.append(
        f"Each verdict rests on {pairs} pairs of one seed and holds for other seeds and other test speakers with a "
        f"probability of a wrong one of at most {study.alpha:.0%} per measure."
        if pairs > 1
        else "One seed allows no verdict."
    )
    return tuple(sentences)


def _title(study: Study, name: str) -> str:
    return study.tasks[name].measure.title


def methods(study: Study) -> tuple[str, ...]:
    """Paragraphs that say all that repeats the study."""
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    tasks = "; ".join(
        f"{task.measure.title} (audiot {task.command} {' '.join(task.overrides)}"
        + (f"; equivalence margin {100 * task.measure.margin:g} points" if task.measure.margin is not None else "")
        + ")"
        for task in study.tasks.values()
    )
    return (
        f"Mechanisms: {', '.join(study.mechanisms)}. Objectives: {', '.join(study.objectives)}. Seeds: "
        f"{', '.join(map(str, study.seeds))}; runs of one seed have the same batches and masks.",
        f"Every run: audiot pretrain {' '.join([*study.data, *study.pretrain])}. Learning rates {rates} were tried for each mechanism "
        f"and objective on seed {study.seeds[0]}, and the one with the best validation loss was taken for all seeds. For equal time, the "
        "number of steps is that of equal steps times the ratio of the median frames per second to the baseline's.",
        f"Tasks: {tasks}. The same resampled tests serve all runs.",
        "Intervals are percentiles (95%) of a bootstrap over seeds and test units together. A difference is tested by a paired t test "
        "over seeds, equivalence by two one-sided tests against the margin that the config states; both are corrected by Holm over all "
        f"comparisons of a measure at {study.alpha:g}. Better: the corrected test says so and the interval excludes zero. Equivalent: the "
        "corrected tests say so and the interval lies within the margins.",
    )
