"""SUPERB's tasks from the command line to the table, on miniature trees."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import mini_superb
import pytest
import torch

from audiot.checkpoint import AudioEncoder, save_encoder
from audiot.cli import main

SMALL_HEADS = {
    "pr": [],
    "asr": ["downstream.head.hidden_dim=8", "downstream.head.projector_dim=8"],
    "ks": [],
    "ic": [],
    "sid": ["data.valid_speakers=2"],
    "asv": [
        "data.valid_speakers=2",
        *("downstream.objective.embedding_dim=8", "downstream.head.projector_dim=8", "downstream.head.channels=8"),
    ],
}
SHORT = ["trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.accumulate_grad_batches=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny):
    """A folder with the corpora where they are looked for, and an untrained encoder."""
    home = tmp_path_factory.mktemp("superb")
    mini_superb.speech_commands(home / "data" / "speech_commands_v0.01")
    torch.manual_seed(0)
    save_encoder(home / "run" / "encoder", AudioEncoder(tiny["features"], tiny["model"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("AUDIOT_DATA", str(home / "data"))
        patch.setattr("sys.argv", ["audiot"])
        yield home


def arguments(names, more=(), **overrides):
    """Of `audiot superb`; the trees are smaller than the published ones."""
    every = ["data.partial=true", "data.num_workers=0"]
    own = [f"overrides.{name}={json.dumps([*every, *SMALL_HEADS[name], *overrides.get(name, ())])}" for name in names]
    return ["superb", "run", f"tasks=[{','.join(names)}]", *own, *SHORT, *more]


def table(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def records(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "results").glob("*.json")}


@pytest.mark.slow
def test_a_task_runs_to_its_row_and_never_again(home, capsys):
    main(arguments(["ks"], ["search.factors=[1.0]"]))
    folder = home / "superb" / "run"
    (row,) = table(folder / "results.csv")
    (path,) = (folder / "results").glob("*.json")
    figures = json.loads(path.read_text())["figures"]
    assert (row["task"], row["figure"], float(row["learning_rate"]), row["seeds"]) == ("ks", "accuracy", 1e-4, "1")
    assert (float(row["validation"]), float(row["test"])) == (figures["validation"], figures["value"])
    assert float(row["low"]) <= float(row["test"]) <= float(row["high"])
    assert capsys.readouterr().out.splitlines()[-1] == "next:   open superb/run/results.md"
    assert "| ks | accuracy | 0.0001 |" in (folder / "results.md").read_text()
    before = records(folder)
    main(arguments(["ks"], ["search.factors=[1.0]"]))
    assert records(folder) == before


@pytest.mark.slow
def test_another_rate_runs_alone_and_only_the_chosen_one_has_a_test(home):
    main(arguments(["ks"], ["folder=rates", "search.factors=[1.0]"]))
    before = records(home / "rates")
    main(arguments(["ks"], ["folder=rates", "search.factors=[1.0,10.0]"]))
    after = records(home / "rates")
    assert len(after) == 2
    assert before.items() < after.items()
    runs = table(home / "rates" / "runs.csv")
    assert [row["test"] != "" for row in runs].count(True) == 1
    assert len(runs) == 2


def test_what_is_missing_is_told_before_anything_runs(home):
    with pytest.raises(SystemExit) as stop:
        main(["superb", "run"])
    words = str(stop.value)
    assert words.startswith("audiot: error: no corpus for pr (phone recognition), asr (speech recognition): ")
    assert "data/LibriSpeech, roots.librispeech=…; ic (intent classification): " in words
    assert words.endswith("or leave them out with tasks=[ks]")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "which encoder? audiot superb RUN, where RUN is a pre-training run's folder; or upstream=features"),
        (["nothing"], "no encoder at nothing: expected the folder of a pre-training run"),
        (["run", "upstream=features"], "upstream=features takes no run, found run: drop one of them"),
        (["run", "tasks=[kss]"], "tasks: no 'kss' (did you mean ks?); there are pr, asr, ks, ic, sid, asv"),
        (["run", "tasks=[ks]", "jobs=some"], "jobs must be auto, a number, or 0 for the table alone, found some"),
        (
            ["run", "tasks=[pr]", "roots.librispeech=data"],
            "phone recognition needs phones: \"overrides.pr=['downstream.labels.lexicon=FILE']\" or data.phones=FILE there",
        ),
    ],
)
def test_what_can_not_be_run_is_told_in_a_line(home, given, words):
    with pytest.raises(SystemExit) as stop:
        main(["superb", *given])
    assert str(stop.value) == f"audiot: error: {words}"


@pytest.mark.slow
def test_all_tasks_run_to_one_table_and_a_failed_run_is_told_after_the_others(home, capsys):
    lexicon = mini_superb.librispeech(home / "data" / "LibriSpeech")
    mini_superb.fluent_speech_commands(home / "data" / "fluent_speech_commands_dataset")
    mini_superb.voxceleb1(home / "data" / "voxceleb1")
    whole = arguments([*SMALL_HEADS], ["folder=whole", "search.factors=[1.0]"], pr=lexicon)
    failing = [each.replace("data.valid_speakers=2", "data.valid_speakers=40", 1) if "sid=" in each else each for each in whole]
    with pytest.raises(SystemExit, match="no result of sid: runs failed, as told above; the same command tries them again"):
        main(failing)
    assert [row["task"] for row in table(home / "whole" / "results.csv")] == ["pr", "asr", "ks", "ic", "asv"]
    assert "failed  superb_sid/lr=0.0001/seed=0: data.valid_speakers=40 of 5" in capsys.readouterr().out
    before = records(home / "whole")
    main(whole)
    rows = {row["task"]: row for row in table(home / "whole" / "results.csv")}
    assert rows.keys() == SMALL_HEADS.keys()
    assert before.items() < records(home / "whole").items()
    for path in (home / "whole" / "runs").iterdir():
        if (path / "metrics.json").is_file():
            metrics = json.loads((path / "metrics.json").read_text())
            name = path.name.split("-lr")[0].removeprefix("superb_")
            assert float(rows[name]["test"]) == metrics[f"test/{metrics['monitor']}"]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(home):
    given = arguments(["ks"], ["folder=killed", "search.factors=[1.0]", "trainer.max_steps=400", "trainer.val_check_interval=5"])
    command = [sys.executable, "-m", "audiot", *given]
    process = subprocess.Popen(command, cwd=home, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while not list((home / "killed").glob("runs/*/checkpoints/*.ckpt")):
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not records(home / "killed")
    main(given)
    (run,) = (home / "killed" / "runs").iterdir()
    assert "resume" in (run / "output.txt").read_text()
    assert json.loads((run / "metrics.json").read_text())["steps"] == 400
    assert len(records(home / "killed")) == 1
