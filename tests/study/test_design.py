"""What a study runs, and what of it runs again when something changes. Nothing is trained here."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_module
from hydra.utils import instantiate

from audiot.attention import build_mechanism
from audiot.base.config import compose_command, plain
from audiot.base.groups import options
from audiot.base.parts import make
from audiot.benchmark.entries import Entry
from audiot.checkpoint import AudioEncoder
from audiot.commands import launch
from audiot.study.design import Study, fingerprint
from audiot.study.records import Record, Records


@pytest.fixture(autouse=True)
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield


@functools.cache
def rehearsal():
    return plain(compose_command("study", ["run_dir=run", "folder=study"]))["study"]


def settings(**changes):
    """Settings of the rehearsal with changes."""
    return rehearsal() | changes


def made(**changes) -> Study:
    few = {"mechanisms": ["query_key", "local", "none"], "control_mechanisms": []}
    few |= {"objectives": ["mockingjay"], "seeds": [0, 1, 2]}
    return instantiate(settings(**(few | changes)))


def record(**figures) -> Record:
    return Record("a run", "runs/a", (), figures)


def finished(study, times=None):
    """Records of all runs, made up: 0.003 is the better learning rate. `times` are those of mechanisms for a million frames."""
    records = {}
    for _ in range(4):  # learning rates, then all seeds, then equal times
        for job in study.jobs(records):
            mechanism = job.name.split("/")[1]
            loss = 1.0 if "lr=0.003" in job.name else 2.0
            time = {"s_per_mframe": (times or {}).get(mechanism, 10.0)} if job.alone else {}
            records[job.key] = record(validation=loss, steps=100.0, value=0.5, **time)
    return records


def names(study, records):
    return [job.name for job in study.jobs(records)]


SMALL = {"embed_dim": 24, "num_heads": 6, "ffn_dim": 24, "num_layers": 1}


@functools.cache
def of_the_config(option, *overrides):
    return plain(compose_command("study", [f"study={option}", *overrides, "run_dir=run", "folder=study"]))["study"]


@pytest.mark.parametrize("option", options("study"))
def test_every_study_of_the_config_is_made_and_its_mechanisms_fit_into_its_encoder(option):
    given = of_the_config(option)
    study = make(given)
    assert study.searched(next(iter(study.objectives)), study.baseline)
    own = [
        entry if isinstance(entry, str) else {key: entry[key] for key in entry if key != "pretrain"}
        for entry in given["mechanisms"]
    ]
    with torch.device("meta"):
        for entry in Entry.all_of(own):
            build_mechanism(entry.name, 768, 12, 199, **entry.overrides)


@pytest.mark.slow
@pytest.mark.parametrize("option", options("study"))
def test_every_command_of_every_study_composes_and_every_encoder_is_built(option):
    study = make(of_the_config(option))
    trainings = [study.searched(objective, mechanism)[0] for objective in study.objectives for mechanism in study.mechanisms]
    for job in trainings:
        arguments = [*job.arguments(Path("study")), "run_dir=run", "data_dir=data"]
        launch._check_run(job.command, arguments, complete=True)
        config = plain(compose_command(job.command, arguments))
        with torch.device("meta"):
            AudioEncoder(config["features"], config["model"])
    records = {job.key: record(validation=1.0) for job in study.searched(next(iter(study.objectives)), study.baseline)}
    for name in study.tasks:
        jobs = [study.task(name, trainings[0], 0), *(study.control(name, control, 0, records) for control in study.controls)]
        for job in filter(None, jobs):
            launch._check_run(job.command, [*job.arguments(Path("study")), "run_dir=run", "data_dir=data"], complete=True)


@pytest.mark.parametrize(("option", "pieces"), [("voice", 132), ("full", None)])
def test_encoders_of_a_chunked_study_take_audio_of_any_length_in_pieces(option, pieces):
    study = make(of_the_config(option))
    for mechanism in ("query_key", "synthesizer_random"):
        job = study.searched(next(iter(study.objectives)), mechanism)[0]
        model = plain(compose_command("pretrain", [*job.arguments(Path("study")), "run_dir=run", "data_dir=data"]))["model"]
        assert model["chunk_frames"] == pieces  # 4 s of 30 ms: longer tables than a crop are never trained
    if pieces:
        encoder = AudioEncoder({"_target_": "audiot.features.LogMel", "n_mels": 20, "stack": 3}, model | SMALL)
        hidden, lengths = encoder(torch.zeros(1, 14 * 16000))
        assert hidden.shape[2] == lengths.item() > 3 * pieces


def test_a_command_of_the_study_of_layers_starts():
    job = make(of_the_config("layers")).searched("clusters", "query_key in layer 2")[0]
    launch._check_run(job.command, [*job.arguments(Path("study")), "run_dir=run", "data_dir=data"], complete=True)


@pytest.mark.parametrize("option", ["depth", "length"])
def test_one_word_shrinks_a_study_to_the_size_of_the_rehearsal(option):
    small, whole = of_the_config(option, "size=rehearsal"), of_the_config(option)
    assert small["rehearsal"]
    assert small["seeds"] == [0, 1]
    assert "experiment=demo_gpu" not in small["pretrain"]
    assert (small["mechanisms"], small["factor"], small["tasks"]) == (whole["mechanisms"], whole["factor"], whole["tasks"])
    shared = make(small).data
    assert shared.index("data.hours=25") < shared.index("data.hours=1")


def test_without_a_factor_the_overrides_are_those_that_they_always_were():
    """Keys are digests of them: another order would run finished studies again."""
    (job, _) = made().searched("mockingjay", "local")
    assert job.shared == (
        "data=demo",
        "plots=false",
        "trainer.max_steps=100",
        "trainer.val_check_interval=100",
        "objective=mockingjay",
        "attention=local",
        "probe=false",
    )
    assert job.own == ("optimizer.lr=0.001", "seed=0")
    assert made().task("phone_linear", job, 0).shared == (
        "data=demo",
        "plots=false",
        "data.label_fraction=0.2",
        "trainer.max_steps=200",
        "trainer.val_check_interval=200",
        "logger=none",
        "downstream.bootstrap.seed=0",
        "downstream.bootstrap.keep=true",
        "downstream=phone_linear",
        "downstream.layers=weighted_sum",
        "upstream=checkpoint",
    )


DEPTH = {"title": "Depth", "unit": "layers", "levels": [1, 2.5], "overrides": ["model.num_layers={level}", "data.crop_s=2"]}


def test_a_factor_crosses_the_objectives_and_touches_pre_training_alone():
    study = made(factor=DEPTH, objectives=["mockingjay", {"name": "clusters", "label": "codes"}])
    assert list(study.objectives) == ["mockingjay, 1 layers", "mockingjay, 2.5 layers", "codes, 1 layers", "codes, 2.5 layers"]
    assert {name: (level.objective, level.value) for name, level in study.factor.levels.items()} == {
        "mockingjay, 1 layers": ("mockingjay", 1.0),
        "mockingjay, 2.5 layers": ("mockingjay", 2.5),
        "codes, 1 layers": ("codes", 1.0),
        "codes, 2.5 layers": ("codes", 2.5),
    }
    training = study.searched("codes, 2.5 layers", "local")[0]
    assert training.name == "codes, 2.5 layers/local/lr=0.001/seed=0"
    place = training.shared.index("objective=clusters")
    assert training.shared[place + 1 : place + 3] == ("model.num_layers=2.5", "data.crop_s=2")
    assert "model.num_layers=2.5" not in study.task("phone_linear", training, 0).shared


def test_another_level_adds_its_runs_and_reruns_none():
    fewer, more = (made(factor=DEPTH | {"levels": levels}, seeds=[0]) for levels in ([1], [1, 2]))
    found = changed(fewer, more)
    assert found
    assert all(name.startswith("mockingjay, 2 layers/") for name in found)


def test_a_task_that_is_null_is_left_out():
    assert list(made(tasks=settings()["tasks"] | {"abx": None}).tasks) == ["phone_linear", "speaker_utterance"]


def test_a_mechanism_may_have_other_overrides_of_its_pre_training():
    entries = ["query_key", {"name": "query_key", "label": "sinusoid", "pretrain": ["positions=sinusoid"]}]
    study = made(mechanisms=entries, control_mechanisms=[])
    plainly, other = (study.searched("mockingjay", name)[0].shared for name in ("query_key", "sinusoid"))
    assert set(other) - set(plainly) == {"positions=sinusoid"}


def test_first_costs_are_measured_and_learning_rates_tried_on_one_seed():
    study = made()
    found = names(study, {})
    trained = [name for name in found if not name.startswith("features/")]
    assert trained == [f"mockingjay/{name}/cost/seed=0" for name in ("query_key", "local", "none")] + [
        f"mockingjay/{name}/lr={rate}/seed=0" for name in ("query_key", "local", "none") for rate in ("0.001", "0.003")
    ]
    assert sum(name.startswith("features/") for name in found) == 9  # three tasks, three seeds


def test_all_seeds_take_the_learning_rate_of_the_best_validation():
    study = made()
    records = finished(study)
    assert study.learning_rate("mockingjay", "local", records) == 0.003
    others = [name for name in names(study, records) if name.startswith("mockingjay/local/") and "seed=0" not in name]
    assert others
    assert all("/lr=0.003/" in name for name in others)


def test_equal_time_is_as_long_as_the_baseline_takes_for_its_steps():
    """One that is half as fast takes half as many steps, and the baseline itself runs once for both."""
    study = made()
    records = finished(study, {"query_key": 10.0, "local": 20.0, "none": 4.0})
    steps = {name: study.training("mockingjay", name, 1, "time", records) for name in ("query_key", "local", "none")}
    assert steps["query_key"] == study.training("mockingjay", "query_key", 1, "steps", records)
    assert "trainer.max_steps=50" in steps["local"].own
    assert "trainer.max_steps=250" in steps["none"].own


def test_a_control_trains_equal_steps_only_and_costs_are_measured_alone():
    study = made(control_mechanisms=["local"])
    records = finished(study)
    assert study.training("mockingjay", "local", 1, "time", records) is None
    assert [job.name for job in study.jobs(records) if job.alone] == [
        f"mockingjay/{name}/cost/seed=0" for name in ("query_key", "local", "none")
    ]


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ({}, "lacks the figure validation"),
        ({"validation": float("nan")}, "has nan for the figure validation"),
        ({"validation": 1.0}, "lacks the figure steps"),
        ({"validation": 1.0, "steps": float("inf")}, "has inf for the figure steps"),
    ],
)
def test_a_record_from_elsewhere_that_lacks_what_the_study_needs_is_named(tmp_path, figures, found):
    study = made()
    records, kept = finished(study), Records(tmp_path)
    job = study.searched("mockingjay", "local")[0]
    kept.write(job.key, record())
    path = tmp_path / "results" / f"{job.key}.json"
    path.write_text(path.read_text().replace('"figures": {}', f'"figures": {json.dumps(figures)}'))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {found} of a run: delete that file to run it again$"):
        list(study.jobs(records | kept.load()))


def test_every_job_is_there_once_and_after_what_it_needs():
    study = made()
    jobs = list(study.jobs(finished(study)))
    place = {job.key: number for number, job in reversed(list(enumerate(jobs)))}
    assert all(job.encoder is None or place[job.encoder.key] < place[job.key] for job in jobs)
    # 3 mechanisms: costs and one more learning rate each; 3 seeds, and 3 of equal time for two of them; 3 tasks of each, and what
    # those of equal steps have learned.
    assert len(place) == 6 + 15 + 3 * 15 + 2 * 9 + 9


def test_what_was_learned_is_measured_of_every_encoder_of_equal_steps():
    study = made()
    records = finished(study)
    jobs = [job for job in study.jobs(records) if job.command == "analyze"]
    assert [job.name for job in jobs] == [
        f"mockingjay/{name}/lr=0.003/seed={seed}/learned" for name in ("query_key", "local", "none") for seed in (0, 1, 2)
    ]
    assert jobs[0].arguments(Path("study")) == ["plots=false", f'run="study/{jobs[0].encoder.folder}"']
    without = {job.key for job in made(learned=False).jobs(records)}
    assert without == {job.key for job in study.jobs(records)} - {job.key for job in jobs}


def changed(before, after):
    """Names of the runs of two studies that differ."""
    old = {job.key for job in before.jobs(finished(before))}
    return {job.name for job in after.jobs(finished(after)) if job.key not in old}


def test_all_tasks_are_tested_alike_and_no_run_draws_pictures():
    study = made(mechanisms=["query_key"], control_mechanisms=[], controls=[])
    composed = {(job.command, job.shared) for job in study.jobs(finished(study))}
    assert len(composed) == 2 + 3 + 1  # costs, training, tasks, what is learned
    for command, shared in composed:
        config = compose_command(command, [*shared, "run_dir=run", "data_dir=data"])
        assert config.plots is False
        if command not in ("pretrain", "analyze"):
            resampled = config.bootstrap if command == "abx" else config.downstream.bootstrap
            assert (resampled.seed, resampled.keep) == (0, True)


def test_pictures_change_no_key():
    assert changed(made(), made(pretrain=[*settings()["pretrain"], "plots=true"])) == set()


def test_what_is_the_same_has_the_same_key():
    assert changed(made(), made(title="another", alpha=0.01)) == set()


def test_where_the_corpus_lies_and_who_loads_it_change_nothing():
    here, there = ([f"data.root={place}", f"data.num_workers={number}"] for place, number in (("a", 0), ("b", 2)))
    digits = {"data": "fsdd", "tasks": {}}
    assert changed(made(shared=here, **digits), made(shared=there, **digits)) == set()
    assert changed(made(shared=here, **digits), made(shared=[*there, "data.partial=true"], **digits))


def test_a_changed_task_runs_again_and_nothing_else():
    tasks = settings()["tasks"]
    other = tasks | {"phone_linear": tasks["phone_linear"] | {"overrides": ["downstream=phone_linear", "downstream.layers=last"]}}
    found = changed(made(), made(tasks=other))
    assert found
    assert all(name.endswith("/phone_linear") or name.startswith("untrained/phone_linear") for name in found)


def test_a_changed_training_runs_again_with_its_tasks_and_the_features_do_not():
    found = changed(made(), made(pretrain=["trainer.max_steps=50", "trainer.val_check_interval=50"]))
    assert not any(name.startswith("features/") for name in found)
    assert len(found) == 3 + 15 + 3 * 15 + 9 + 9  # costs have steps of their own


def test_another_mechanism_or_seed_adds_its_runs():
    more = changed(made(), made(mechanisms=["query_key", "local", "none", "uniform"]))
    assert more
    assert all(name.startswith("mockingjay/uniform/") for name in more)
    more = changed(made(), made(seeds=[0, 1, 2, 3]))
    assert more
    assert all("seed=3" in name for name in more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "query_kee"}, r"study.baseline: no 'query_kee' \(did you mean query_key\?\)"),
        ({"mechanisms": ["query_kee"]}, r"study.mechanisms: no attention 'query_kee'"),
        ({"objectives": ["cluster"]}, r"study.objectives: no objective 'cluster' \(did you mean clusters\?\)"),
        ({"seeds": [1, 1]}, r"study.seeds is \[1, 1\]: expected one or more, each once"),
        ({"learning_rates": []}, r"study.learning_rates is \[\]: expected one or more"),
        ({"budgets": ["time"]}, "study.budgets lacks steps"),
        ({"budgets": ["steps", "hours"]}, "study.budgets: no 'hours'"),
        ({"controls": ["nothing"]}, "study.controls: no 'nothing'"),
        ({"factor": DEPTH | {"scale": "log"}}, "study.factor: no key 'scale'; keys: title, unit, levels, overrides"),
        ({"factor": {"title": "Depth"}}, "study.factor lacks unit; keys: title"),
        ({"factor": DEPTH | {"levels": [3, 0]}}, r"study.factor.levels is \[3, 0\]: expected positive numbers, each once"),
        ({"factor": DEPTH | {"levels": [3, 3]}}, r"study.factor.levels is \[3, 3\]: expected positive numbers, each once"),
        ({"factor": DEPTH | {"overrides": ["data.hours=1"]}}, r"study.factor.overrides is .*: write \{level\} where"),
        ({"alpha": 5}, "study.alpha is 5: expected a probability"),
        ({"tasks": {"phone": {"overides": []}}}, r"study.tasks.phone: no key 'overides' \(did you mean overrides\?\)"),
        ({"tasks": {"phone": {"command": "predict"}}}, "study.tasks.phone.command is 'predict': expected finetune or abx"),
    ],
)
def test_what_makes_no_study_is_refused_in_one_line(changes, message):
    with pytest.raises(Exception, match=message):
        made(**changes)


def test_callbacks_that_change_figures_make_other_runs_and_a_progress_bar_does_not():
    plain_run = fingerprint("pretrain", ())
    assert fingerprint("pretrain", ("callbacks.progress.refresh_rate=3",)) == plain_run
    others = {
        fingerprint("pretrain", (each,))
        for each in ("callbacks=ema", "callbacks=swa", "callbacks=[ema]", "callbacks=early_stopping")
    }
    assert len(others) == 3
    assert plain_run not in others
