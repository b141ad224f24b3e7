"""What `audiot superb` runs, and which of it becomes a result; no run is made."""

from __future__ import annotations

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from audiot.base.groups import options
from audiot.study.records import Record
from audiot.study.superb import CORPORA, TASKS, TITLES, Superb

GIVEN = ["upstream=checkpoint", "upstream.path=RUN/encoder"]


def superb(*names, factors=(0.1, 1, 10), steps=None, seeds=(0,), failed=(), encoder="digest"):
    tasks = {name: [f"experiment=superb_{name}", *GIVEN] for name in names or TASKS}
    return Superb(tasks, encoder, factors, steps, seeds, failed)


def record(job, validation, test, draws=()):
    return Record(
        job.name, job.folder, (), {"validation": validation, "value": test}, {"value": list(draws)} if len(draws) else {}
    )


def test_the_tasks_are_those_that_have_presets_and_their_figures_and_corpora_are_the_presets():
    assert {f"superb_{name}" for name in TASKS} == {name for name in options("experiment") if name.startswith("superb_")}
    assert TASKS.keys() == TITLES.keys() == CORPORA.keys()
    with initialize_config_module("audiot.conf", version_base="1.3"):
        for name, (figure, _) in TASKS.items():
            cfg = compose("finetune", [f"experiment=superb_{name}", *GIVEN, "run_dir=run"])
            assert (cfg.data.name, f"test/{cfg.downstream.monitor}") == (CORPORA[name], figure)


def test_the_rates_are_factors_of_the_presets_and_each_runs_as_the_preset_says():
    plan = superb()
    rates = {name: plan.presets[name].rates for name in TASKS}
    assert rates["pr"] == (1e-3, 1e-2, 1e-1)  # SUPERB's 1e-2
    assert {rates[name] for name in ("asr", "ks", "ic", "sid", "asv")} == {(1e-5, 1e-4, 1e-3)}  # its 1e-4
    jobs = list(plan.jobs({}))
    assert len(jobs) == len({job.key for job in jobs}) == 18
    assert not any("max_steps" in override for job in jobs for override in (*job.shared, *job.own))


@pytest.mark.parametrize(("name", "best"), [("ks", 1e-3), ("pr", 1e-3)])
def test_validation_chooses_the_rate_by_its_own_direction_and_the_test_has_no_say(name, best):
    plan = superb(name)
    low, middle, high = plan.searched(name)
    records = {low.key: record(low, 0.2, 0.9), middle.key: record(middle, 0.3, 0.1)}
    assert plan.learning_rate(name, records) is None
    assert plan.results(name, records) == []
    records[high.key] = record(high, 0.6, 0.5)
    assert plan.learning_rate(name, records) == best  # of accuracies the last, of error rates the first
    chosen = high if name == "ks" else low
    assert [job.key for job in plan.results(name, records)] == [chosen.key]  # it has run already
    (row,) = plan.rows(records, 100)
    assert (row["learning_rate"], row["validation"], row["test"]) == (best, *records[chosen.key].figures.values())
    assert [each["test"] for each in plan.trials(records)] == [
        each["test"] if each["run"] == chosen.folder else ""
        for each in [{"run": job.folder, "test": records[job.key].figure("value")} for job in (low, middle, high)]
    ]


def test_a_short_search_is_followed_by_the_whole_run():
    plan = superb("sid", steps=100)
    searched = plan.searched("sid")
    own = {"trainer.max_steps=100", "trainer.val_check_interval=400"}  # batches: four make a step
    assert all(own <= set(job.own) for job in searched)
    records = {job.key: record(job, value, 0.0) for job, value in zip(searched, (0.1, 0.3, 0.2), strict=True)}
    (result,) = plan.results("sid", records)
    assert result.key not in records
    assert not own & set(result.own)
    assert plan.rows(records, 100) == []
    assert len(plan.trials(records)) == 3
    records[result.key] = record(result, 0.5, 0.4)
    assert plan.rows(records, 100)[0]["test"] == 0.4


def test_a_rate_whose_run_failed_is_not_chosen_and_the_others_are():
    failed = {}
    plan = superb("ks", failed=failed)
    low, middle, high = plan.searched("ks")
    records = {low.key: record(low, 0.2, 0.2), middle.key: record(middle, 0.7, 0.6)}
    failed[high.key] = high, "the loss is not finite"
    assert plan.learning_rate("ks", records) == 1e-4
    assert [row["validation"] for row in plan.trials(records)] == [0.2, 0.7, "failed"]
    failed.update({low.key: low, middle.key: middle})
    assert plan.learning_rate("ks", {}) is None


def test_a_result_is_the_mean_over_seeds_with_the_interval_of_resampled_tests():
    plan = superb("ks", factors=[1.0], seeds=[3, 5])
    first = plan.searched("ks")[0]
    assert first.own[1] == "seed=3"
    generator = np.random.default_rng(0)
    records = {first.key: record(first, 0.5, 0.6, generator.normal(0.6, 0.01, 500))}
    one, two = plan.results("ks", records)
    assert one.key == first.key
    assert plan.rows(records, 500) == []  # the second seed is not there yet
    records[two.key] = record(two, 0.7, 0.8, generator.normal(0.8, 0.01, 500))
    (row,) = plan.rows(records, 500)
    assert (row["validation"], row["test"], row["seeds"]) == (pytest.approx(0.6), pytest.approx(0.7), 2)
    assert 0.57 < row["low"] < 0.62 < 0.78 < row["high"] < 0.83


def test_another_encoder_runs_anew_and_another_place_of_it_does_not():
    def keys(encoder, *more):
        tasks = {"ks": ["experiment=superb_ks", "upstream=checkpoint", *more]}
        return [job.key for job in Superb(tasks, encoder, [1.0], None, [0]).jobs({})]

    assert keys("a", "upstream.path=RUN/encoder", "data.root=here") == keys("a", "upstream.path=OTHER", "data.root=there")
    assert keys("a", "upstream.path=RUN/encoder") != keys("b", "upstream.path=RUN/encoder")
    assert keys("a") != keys("a", "downstream.layers=last")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ["kss"]}, r"^tasks: no 'kss' \(did you mean ks\?\); there are pr, asr, ks, ic, sid, asv$"),
        ({"factors": []}, r"^search\.factors is \[\]: expected one or more, each once$"),
        ({"factors": [0.0, 1.0]}, r"^search\.factors is \[0\.0, 1\.0\]: expected positive numbers$"),
        ({"seeds": [0, 0]}, r"^seeds is \[0, 0\]: expected one or more, each once$"),
        ({"steps": 0}, r"^search\.steps is 0: expected a number of steps"),
    ],
)
def test_what_is_no_setting_is_refused(options, words):
    names = options.pop("names", ["ks"])
    with pytest.raises(ValueError, match=words):
        superb(*names, **options)
