"""From records to what a report says. The records are made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra import initialize_config_module
from test_design import made

from audiot.study.gathering import HELD, gather, methods
from audiot.study.records import Record, Records

SEEDS = [0, 1, 2, 3, 4]
WORTH = {"query_key": 0.8, "local": 0.6, "none": 0.8, "untrained": 0.5, "features": 0.55}  # of each mechanism and control


@pytest.fixture(autouse=True)
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield


def finished(study):
    """Records of all runs: a figure is its mechanism's worth, but for noise that seeds and test speakers have in common."""
    records = {}
    for _ in range(4):
        for job in study.jobs(records):
            mechanism = job.name.split("/")[1 if job.name.startswith("mockingjay") else 0]
            seed = int(job.name.split("seed=")[1].split("/")[0])
            own = np.random.default_rng(int(job.key, 16) % 2**32).normal(0, 0.002)
            value = WORTH[mechanism] + 0.01 * seed + own
            draws = value + np.random.default_rng(1).normal(0, 0.02, 200)
            is_task = job.task != ""
            figures = (
                {"value": value} if is_task else {"validation": 1.0, "frames_per_s": 1000.0, "steps": 100.0, "parameters": 4e6}
            )
            if job.alone:
                figures |= {"s_per_mframe": 1000.0, "parameters": 5e6, "steps": 9.0}
            records[job.key] = Record(
                job.name, job.folder, (), figures, {"value": draws.tolist()} if is_task else {}, {"torch": "2"}
            )
    return records


def study_of(**changes):
    tasks = {"phone_linear": {"title": "Phones", "margin": 0.02, "overrides": ["downstream=phone_linear"], "features": []}}
    given = {"seeds": SEEDS, "tasks": tasks, "control_mechanisms": [], "learning_rates": [1e-3], "resamples": 400}
    return made(**(given | changes))


def test_the_sentences_and_verdicts_follow_from_the_records():
    study = study_of()
    found = gather(study, finished(study), {}, "audiot study")
    verdicts = {
        (each.mechanism, each.budget): (comparison.verdict, comparison.winner)
        for each in found.settings
        for comparison in each.comparisons.values()
    }
    assert verdicts == {
        ("local", "steps"): ("better", "query_key"),
        ("local", "time"): ("better", "query_key"),
        ("none", "steps"): ("equivalent", ""),
        ("none", "time"): ("equivalent", ""),
    }
    assert found.summary == (
        "Equal steps: no mechanism is better than query_key. Of 2 comparisons, query_key is better in 1, 1 are equivalent, and 0 "
        "can't be told.",
        "Equal time: no mechanism is better than query_key. Of 2 comparisons, query_key is better in 1, 1 are equivalent, and 0 "
        "can't be told.",
        "Each verdict rests on 5 pairs of runs, and the probability of a wrong one is at most 5% for each measure.",
    )
    assert not found.unfinished
    assert found.environment == {"torch": "2"}


def test_a_task_whose_record_lacks_its_figure_is_named():
    study = study_of()
    records = finished(study)
    job = next(job for job in study.jobs(records) if job.task)
    records[job.key] = Record(job.name, job.folder, (), {}, path=Path("results/x.json"))
    with pytest.raises(ValueError, match=r"^results/x.json lacks the figure value of .*: delete that file to run it again$"):
        gather(study, records, {}, "audiot study")


def test_resampled_tests_without_a_value_travel_in_a_record(tmp_path):
    Records(tmp_path).write("key", Record("a run", "runs/a", (), {"value": 0.5}, {"value": [0.25, float("nan"), 0.75]}))
    found = Records(tmp_path).load()["key"]
    assert np.array_equal(found.draws["value"], [0.25, np.nan, 0.75], equal_nan=True)


def test_a_factor_is_compared_within_each_level():
    factor = {"title": "Depth", "unit": "layers", "levels": [3, 12], "overrides": ["model.num_layers={level}"]}
    study = study_of(factor=factor, budgets=["steps"], seeds=SEEDS[:2])
    found = gather(study, finished(study), {}, "audiot study")
    means = {
        (each.mechanism, each.objective): comparison.difference.mean
        for each in found.settings
        for comparison in each.comparisons.values()
    }
    assert means.keys() == {(name, f"mockingjay, {level} layers") for name in ("local", "none") for level in (3, 12)}
    assert all(mean == pytest.approx(-0.2 if name == "local" else 0, abs=0.02) for (name, _), mean in means.items())
    assert found.factor == study.factor
    assert any("Factor: Depth, 3, 12 layers, by model.num_layers={level} in pre-training." in text for text in found.methods)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (1, "With one seed they are those of the test units alone, and say nothing of other seeds."),
        (2, "With 2 seeds they are too narrow: where seeds alone vary, they hold the truth in 50 of 100 studies."),
        (5, "With 5 seeds they are too narrow: where seeds alone vary, they hold the truth in 84 of 100 studies."),
        (12, "they hold the truth in more than 90 of 100 studies."),
    ],
)
def test_the_methods_say_how_narrow_intervals_of_so_many_seeds_are(seeds, words):
    assert sum(words in text for text in methods(study_of(seeds=list(range(seeds))))) == 1


def test_controls_stand_apart_and_costs_are_those_of_the_run_that_is_alone():
    study = study_of()
    found = gather(study, finished(study), {}, "audiot study")
    controls = {each.mechanism: each for each in found.settings if each.is_control}
    assert controls.keys() == {"untrained", "features"}
    assert all(not each.objective and not each.comparisons for each in controls.values())
    assert controls["untrained"].figures["phone_linear"].mean == pytest.approx(0.5 + 0.02, abs=0.005)
    local = next(each for each in found.settings if each.mechanism == "local")
    assert {name: cost.mean for name, cost in local.costs.items()} == {
        "s_per_mframe": 1000.0,
        "parameters": 5e6,
        "steps": 100.0,
    }
    assert [cost.name for cost in found.costs] == ["s_per_mframe", "parameters", "steps"]


def test_a_mechanism_that_is_a_control_has_no_setting_of_equal_time():
    study = study_of(control_mechanisms=["local"])
    found = gather(study, finished(study), {}, "audiot study")
    assert [each.budget for each in found.settings if each.mechanism == "local"] == ["steps"]
    assert [each.budget for each in found.settings if each.mechanism == "none"] == ["steps", "time"]


def test_what_has_not_run_is_listed_with_its_reason():
    study = study_of(budgets=["steps"])
    records = finished(study)
    jobs = {job.name: job for job in study.jobs(records)}
    lost, broken = "mockingjay/local/lr=0.001/seed=3/phone_linear", "mockingjay/none/lr=0.001/seed=4/phone_linear"
    for name in (lost, broken):
        del records[jobs[name].key]
    found = gather(study, records, {jobs[broken].key: (jobs[broken], "no room")}, "audiot study")
    assert found.unfinished == {broken: "no room", lost: "it has not run"}
    local = next(each for each in found.settings if each.mechanism == "local")
    assert len(local.figures["phone_linear"].samples) == 4  # the others are compared in their pairs
    assert local.comparisons["phone_linear"].winner == "query_key"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", HELD)
def test_so_many_intervals_hold_the_truth_where_seeds_alone_vary(seeds):
    """By simulation: studies with normal figures whose true mean is zero, 1,000 draws of the bootstrap each."""
    noise = np.random.default_rng(seeds)
    held = 0
    for _ in range(20):
        draws = np.stack([np.bincount(row, minlength=seeds) for row in noise.integers(0, seeds, (1000, seeds))]) / seeds
        low, high = np.quantile(noise.standard_normal((250, seeds)) @ draws.T, [0.025, 0.975], axis=1)
        held += ((low < 0) & (high > 0)).sum()
    assert held / 5000 == pytest.approx(HELD[seeds] / 100, abs=0.02)
