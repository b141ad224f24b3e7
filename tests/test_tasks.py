"""Every task of conf/downstream, from its config to its files, on demo speech."""

from __future__ import annotations

import csv
import logging
import os
import signal
from itertools import combinations
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from test_cli import DATA, REPOSITORY, read, run, succeed

from audiot.checkpoint import AudioEncoder, load_encoder, save_encoder
from audiot.commands.evaluate import evaluate_downstream
from audiot.commands.finetune import finetune
from audiot.commands.rerun import SPEED
from audiot.downstream.module import DownstreamModule

SPEAKERS = ["data.corpus.num_valid_speakers=2", "data.corpus.num_test_speakers=2"]  # of one alone, nothing is to be verified
SHORT = [given for given in DATA if given.split("=")[0] not in {pair.split("=")[0] for pair in SPEAKERS}] + SPEAKERS
SHORT += ["trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1", "logger=none"]

ACCURACY = {"accuracy", "macro_f1"}
LSTM = ["downstream.head.hidden_dim=8", "downstream.head.projector_dim=8"]
CLASSIFIED = {"per_class.csv", "per_utterance.csv", "confusion.png"}
WEIGHTED = {"layer_weights.png"}
# Task: small sizes of its parts; the test's metrics; its files.
TASKS = {
    "phone_linear": ([], ACCURACY, CLASSIFIED),
    "phone_1hidden": ([], ACCURACY, CLASSIFIED),
    "phone_concat": ([], ACCURACY, CLASSIFIED),
    "speaker_frame": ([], ACCURACY, CLASSIFIED),
    "speaker_utterance": ([], ACCURACY, CLASSIFIED),
    "speaker_identification": ([], ACCURACY, CLASSIFIED | WEIGHTED),
    "keyword": ([], ACCURACY, CLASSIFIED),
    "intent": (
        ["downstream.labels.fields=[keyword,accent]"],  # what demo speech has
        {"accuracy", "accuracy_keyword", "accuracy_accent"},
        CLASSIFIED - {"confusion.png"} | {"confusion-keyword.png", "confusion-accent.png"} | WEIGHTED,
    ),
    "speaker_verification": (
        [
            *("downstream.objective.embedding_dim=8", "downstream.head.projector_dim=8", "downstream.head.channels=8"),
            "optimizer.lr=0.1",  # with less, scores lie so close together after a few steps that rounding ranks them
        ],
        {"eer", "min_dcf"},
        {"trials.csv", "per_class.csv", "scores.png"} | WEIGHTED,
    ),
    "phone_recognition": ([], {"per"}, CLASSIFIED | WEIGHTED),
    "asr": (LSTM, {"wer", "cer"}, CLASSIFIED | WEIGHTED),
}
MEASURED_AGAIN = ("phone_linear", "intent", "speaker_verification", "asr")  # one of each objective
FILES = sorted(path.stem for path in (REPOSITORY / "conf" / "downstream").glob("*.yaml") if path.name[0] != "_")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny):
    """A folder for ``AUDIOT_DATA``, and an untrained encoder."""
    pytest.importorskip("espeakng_loader")
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("tasks")
    save_encoder(base / "encoder", AudioEncoder(tiny["features"], tiny["model"]))
    return SimpleNamespace(data=base / "data", encoder=base / "encoder")


@pytest.fixture
def made(folders, tmp_path, monkeypatch):
    """The folders, the corpus in ``AUDIOT_DATA``; the current folder is an empty one."""
    monkeypatch.setenv("AUDIOT_DATA", str(folders.data))
    monkeypatch.chdir(tmp_path)
    return folders


def without_speed(folder):
    """Metrics of a run but for how long it took."""
    return {name: value for name, value in read(folder / "metrics.json").items() if name not in SPEED}


def table(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def figures(folder, file="metrics.json"):
    return {name: value for name, value in read(folder / file).items() if name.startswith("test/")}


@pytest.mark.parametrize("task", FILES)
@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
def test_every_task_is_trained_and_measured(made, tmp_path, caplog, task):
    options, metrics, files = TASKS[task]
    folder = tmp_path / "run"
    with initialize_config_module("audiot.conf", version_base="1.3"):
        given = [*SHORT, f"downstream={task}", f"upstream.path={made.encoder}", *options]
        cfg = compose("finetune", [*given, f"run_dir={folder}"])
    with caplog.at_level(logging.INFO, "audiot"):
        assert finetune(cfg) == read(folder / "metrics.json")
    found = read(folder / "metrics.json")
    assert {name.removeprefix("test/") for name in figures(folder)} == metrics
    assert all(0 <= value <= 1 or name in ("test/wer", "test/cer", "test/per") for name, value in figures(folder).items())
    assert found["monitor"] in metrics
    assert f"valid/{found['monitor']}" in found
    bounds, how = found["intervals"], found["bootstrap"]
    assert bounds.keys() | how.get("without", {}).keys() == {f"test/{name}" for name in metrics}
    assert (how["unit"], how["samples"], how["level"]) == ("utterance", 1000, 0.95)  # of two speakers
    assert all(low < high for low, high in bounds.values())
    for name, (low, high) in bounds.items():
        if name not in ("test/macro_f1", "test/min_dcf"):  # may lie elsewhere in tests of few utterances
            assert low <= found[name] <= high
    assert found["classes"] > 1
    assert found["frames_per_s"] > 0
    assert found["parameters"] > sum(parameter.numel() for parameter in load_encoder(made.encoder).parameters())
    assert {path.name for path in folder.glob("*.csv")} | {path.name for path in folder.glob("*.png")} == files
    assert all(name in caplog.messages[-1] for name in files)
    rows = table(folder / ("trials.csv" if "trials.csv" in files else "per_utterance.csv"))
    split = "speaker_test" if task in ("speaker_frame", "speaker_utterance", "speaker_identification", "intent") else "test"
    names = {name for row in rows for name in ([row["utterance"]] if "utterance" in row else [row["first"], row["second"]])}
    assert len(names) == {"speaker_test": 2 * 2, "test": 2 * 4}[split]  # speakers, utterances of each
    assert len(rows) == len(names) if "trials.csv" not in files else len(list(combinations(names, 2)))
    assert table(folder / "per_class.csv")
    if task in MEASURED_AGAIN:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        again = evaluate_downstream(trainer, cfg, folder, [])
        assert {name: again[name] for name in figures(folder)} == pytest.approx(figures(folder), abs=1e-4)
        assert again["bootstrap"] == how
        assert again["intervals"].keys() == bounds.keys()
        for name, ends in bounds.items():
            assert again["intervals"][name] == pytest.approx(ends, abs=1e-4)


@pytest.mark.slow
def test_compare_sets_a_run_beside_its_controls(made, tmp_path):
    folder = tmp_path / "run"
    options = ["downstream=speaker_utterance", "downstream.layers=weighted_sum", f"upstream.path={made.encoder}", "compare=true"]
    out = succeed("finetune", *SHORT, *options, f"hydra.run.dir={folder}")
    assert out.strip().splitlines()[-1].startswith(f"next:   audiot predict {folder} /")
    rows = table(folder / "comparison.csv")
    assert [row["run"] for row in rows] == ["encoder", "random", "features"]
    assert [row["upstream"] for row in rows] == ["checkpoint", "untrained_upstream", "FeaturesUpstream"]
    assert [row["layers"] for row in rows] == ["weighted_sum", "weighted_sum", "last"]
    assert (folder / "comparison.md").is_file()
    for row, place in zip(rows, (folder, folder / "random", folder / "features"), strict=True):
        metrics = figures(place)
        for name in ACCURACY:
            assert row[f"{name}, %"] == f"{100 * metrics[f'test/{name}']:.1f}"
        assert (place / "confusion.png").is_file()
        assert " ".join(row.values()) in " ".join(out.split())
        if place != folder:  # a control is a run like any other
            succeed("evaluate", f"run={place}")
            assert figures(place, "evaluation.json") == pytest.approx(metrics, abs=1e-4)
    control = torch.load(folder / "features" / "checkpoints" / "best.ckpt", weights_only=False)["hyper_parameters"]
    assert (control["head"]["pooling"], control["upstream"]["cmvn"], control["upstream"]["context"]) == (
        "statistics",
        "global",
        1,
    )


def test_comparing_features_with_themselves_is_refused_before_training(made, tmp_path):
    failed = run("finetune", *SHORT, "upstream=features", "compare=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert failed.code == 1
    assert failed.err.strip().splitlines()[-1] == (
        "audiot: error: compare=true sets an encoder beside features and itself untrained: choose another upstream"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_loggers_get_the_pictures_of_a_task(made, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = [*SHORT[:-1], "logger=tensorboard", f"upstream.path={made.encoder}"]
    succeed("finetune", *given, f"hydra.run.dir={tmp_path / 'run'}")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [image.step for image in found.Images("confusion")] == [2]


def test_fine_tuning_the_top_layer_is_a_setting(made, tmp_path):
    options = ["downstream=phone_linear", f"upstream.path={made.encoder}", "downstream.train_encoder=true"]
    succeed(
        "finetune", *SHORT, *options, "downstream.top_layers=1", "downstream.layers=[1,2]", f"hydra.run.dir={tmp_path / 'run'}"
    )
    metrics = read(tmp_path / "run" / "metrics.json")
    assert (metrics["fine_tuned"], metrics["layers"]) == (1, [1, 2])
    assert sum(metrics["layer_weights"]) == pytest.approx(1, abs=1e-3)


def test_a_list_of_trials_is_checked_before_training(made, tmp_path):
    (tmp_path / "trials.txt").write_text("1 test000-test-0000 test000-test-0001\n0 test000-test-0000 nobody\n")
    options = ["downstream=speaker_verification", f"upstream.path={made.encoder}", *TASKS["speaker_verification"][0]]
    failed = run("finetune", *SHORT, *options, "downstream.objective.trials=trials.txt", f"hydra.run.dir={tmp_path / 'run'}")
    assert "audiot: error: trials.txt names 1 utterances that the test split lacks, nobody of line 2 first" in failed.err
    assert not (tmp_path / "run" / "checkpoints").exists()


# Fine-tuning that is stopped

STOPPED = {
    "cached": ["downstream=phone_linear", "downstream.layers=weighted_sum", "downstream.batch_size=5"],
    "trained": ["downstream=speaker_utterance", "downstream.train_encoder=true", "data.num_workers=1", "data.batch_s=4"],
}


@pytest.fixture
def stop(monkeypatch):
    """A function that has the next run get a signal in its n-th training step."""

    def at(step, number=signal.SIGTERM):
        done, training_step = [], DownstreamModule.training_step

        def counted(*arguments):
            done.append(0)
            if len(done) == step:
                os.kill(os.getpid(), number)
            return training_step(*arguments)

        monkeypatch.setattr(DownstreamModule, "training_step", counted)

    return at


def losses(folder):
    return {row["step"]: row["train/loss"] for row in table(folder / "metrics.csv") if row["train/loss"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", pytest.param("trained", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
def test_fine_tuning_that_was_stopped_goes_on_as_if_it_had_not_been(made, tmp_path, stop, kind):
    given = [each for each in SHORT if each != "logger=none"] + ["trainer.max_steps=9", "trainer.val_check_interval=3"]
    given += [f"upstream.path={made.encoder}", "trainer.log_every_n_steps=1", "model.dropout=0.1", *STOPPED[kind]]
    succeed("finetune", *given, "hydra.run.dir=unbroken")
    stop(6)
    stopped = run("finetune", *given, "hydra.run.dir=stopped")
    assert stopped.code == 130
    saved, resume = stopped.err.strip().splitlines()
    assert saved == f"audiot: interrupted after step 6; saved {tmp_path}/stopped/checkpoints/step=6.ckpt"
    assert resume == f"resume:  audiot finetune resume={tmp_path}/stopped"
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()].count("best.ckpt") == 1
    again = resume.removeprefix("resume:  audiot ").split()
    stop(-1)
    out = succeed(*again)
    assert out.startswith(f"resume  {tmp_path}/stopped/checkpoints/step=6.ckpt\n")
    assert f"next:   audiot predict {tmp_path}/stopped " in out
    one, other = tmp_path / "unbroken", tmp_path / "stopped"
    assert without_speed(other) == without_speed(one)
    assert losses(other) == losses(one)
    assert len(losses(one)) == 9
    for name in ("best.ckpt", "step=9.ckpt"):
        first, second = (torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"] for folder in (one, other))
        assert all(second[key].equal(value) for key, value in first.items())
    assert "is finished: nothing to resume" in succeed(*again)
    assert "trainer.max_steps=12" in succeed(*again, "trainer.max_steps=12").splitlines()[0]
    assert read(other / "metrics.json")["steps"] == 12
    refused = run("finetune", *given, "hydra.run.dir=stopped")
    assert "stopped holds a run already: resume=stopped goes on with it, another hydra.run.dir starts anew" in refused.err
    refused = run("pretrain", "resume=stopped")
    assert "resume=stopped: a run of audiot finetune: audiot finetune resume=stopped goes on with it" in refused.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
def test_a_comparison_that_was_stopped_goes_on_with_the_control_that_it_was_at(made, tmp_path, stop):
    given = [*SHORT, "downstream=speaker_utterance", "compare=true", f"upstream.path={made.encoder}"]
    succeed("finetune", *given, "hydra.run.dir=unbroken")
    stop(3)  # the first of the second training
    stopped = run("finetune", *given, "hydra.run.dir=stopped")
    assert stopped.err.strip().splitlines()[-1] == f"resume:  audiot finetune resume={tmp_path}/stopped"
    assert (tmp_path / "stopped" / "random" / "checkpoints" / "step=1.ckpt").is_file()
    stop(-1)
    tested = (tmp_path / "stopped" / "metrics.json").stat().st_mtime_ns
    succeed("finetune", "resume=stopped")
    assert (tmp_path / "stopped" / "metrics.json").stat().st_mtime_ns == tested
    for name in ("", "random", "features"):
        assert without_speed(tmp_path / "stopped" / name) == without_speed(tmp_path / "unbroken" / name)
    compared = [table(tmp_path / name / "comparison.csv") for name in ("stopped", "unbroken")]
    one, other = ([{**row, **dict.fromkeys(SPEED, "")} for row in rows] for rows in compared)
    assert one == other


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
def test_the_best_checkpoint_moves_with_its_run(made, tmp_path, stop):
    given = [*SHORT, "downstream=speaker_utterance", f"upstream.path={made.encoder}", "trainer.max_steps=4"]
    succeed("finetune", *given, "hydra.run.dir=unbroken")
    stop(3)
    run("finetune", *given, "hydra.run.dir=stopped")
    stop(-1)
    (tmp_path / "stopped").rename(tmp_path / "moved")
    succeed("finetune", "resume=moved")
    assert without_speed(tmp_path / "moved") == without_speed(tmp_path / "unbroken")


@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
def test_fine_tuning_that_stops_early_tests_the_average_says_so_and_goes_on_with_more_patience(made, tmp_path, monkeypatch):
    given = [*SHORT, f"upstream.path={made.encoder}", "callbacks=[ema,early_stopping]", "callbacks.early_stopping.min_delta=1"]
    given += ["trainer.max_steps=9", "plots=false", "hydra.run.dir=stopped"]
    line = "stopped  early, at step {}: no better validation in {} in a row"
    assert line.format(3, 2) in succeed("finetune", *given, "callbacks.early_stopping.patience=2")
    metrics = read(tmp_path / "stopped" / "metrics.json")
    assert (metrics["steps"], metrics["stopped_patience"]) == (3, 2)
    again = succeed("finetune", "resume=stopped")
    assert "is finished: nothing to resume" in again
    assert line.format(3, 2) in again
    assert again.splitlines()[-1].startswith("next:   audiot predict stopped ")
    with monkeypatch.context() as patch:
        patch.setattr("audiot.commands.finetune.corpus_folder", lambda cfg: (tmp_path / "gone", {}, {}))
        assert "next:" not in succeed("finetune", "resume=stopped")
    succeed("evaluate", "run=stopped")
    evaluated = read(tmp_path / "stopped" / "evaluation.json")
    assert evaluated["test/accuracy"] == metrics["test/accuracy"]
    assert line.format(4, 3) in succeed("finetune", "resume=stopped", "callbacks.early_stopping.patience=3")
