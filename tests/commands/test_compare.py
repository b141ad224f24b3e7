"""Runs, sweeps and pre-trainings side by side in one table."""

from __future__ import annotations

import csv
import json

import pytest
from test_cli import run

from audiot.commands.arguments import parse
from audiot.commands.compare import main
from audiot.commands.finetune import figures

PROBE = {
    "test/accuracy": 0.61234,
    "test/macro_f1": 0.5,
    "valid/accuracy": 0.7,
    "task": "phone",
    "monitor": "accuracy",
    "upstream": "checkpoint",
    "layers": "weighted_sum",
    "fine_tuned": False,
    "train_utterances": 160,
    "classes": 40,
    "steps": 400,
    "layer_weights": [0.5, 0.5],
}
RECOGNISER = PROBE | {
    "test/wer": 0.25,
    "test/cer": 0.0999,
    "task": "asr",
    "layers": [0, 2],
    "fine_tuned": 2,
}
VERIFIER = PROBE | {"test/eer": 0.0512, "test/min_dcf": 0.43219, "task": "speaker_verification"}
for made in (RECOGNISER, VERIFIER):
    del made["test/accuracy"], made["test/macro_f1"]
PRETRAINING = {"pretrain/val_l1": 0.51239, "pretrain/zero_l1": 0.8, "probe/phone/encoder": 0.6, "finetune/phone/encoder": 0.625}
PRETRAINING |= {"frames_per_s": 12345.0, "parameters": 1000, "steps": 4}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The current folder, with runs in it: ``probe``, ``asr``, ``sweep`` of three, ``pretrained``; and an empty one."""
    monkeypatch.chdir(tmp_path)
    sweep = {f"sweep/{number}": PROBE | {"test/accuracy": 0.01 * number} for number in (0, 2, 10)}
    folders = {"probe": PROBE, "asr": RECOGNISER, "verifier": VERIFIER, **sweep}
    for name, metrics in folders.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "sweep" / "logs").mkdir()
    (tmp_path / "sweep" / "sweep.csv").write_text("setting,runs\n")
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "summary.json").write_text(json.dumps(PRETRAINING))
    (tmp_path / "empty").mkdir()
    return tmp_path


def table(folder):
    """Rows of comparison.csv, which comparison.md must hold too."""
    with (folder / "comparison.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    lines = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:1] + lines[2:]] == rows
    assert lines[1] == "| --- |" + " ---: |" * (len(rows[0]) - 1)
    return rows


def test_all_kinds_of_runs_stand_in_one_table(runs, capsys):
    main(parse("compare", ["probe", "asr", "verifier", "pretrained"]))
    header, *rows = table(runs)
    figures = ["accuracy, %", "macro_f1, %", "wer, %", "cer, %", "eer, %", "min_dcf"]
    figures += ["pretrain/val_l1", "pretrain/zero_l1", "probe/phone/encoder, %", "finetune/phone/encoder, %"]
    assert header == ["run", "task", "upstream", "layers", "fine tuned", "train utterances", *figures]
    none = [""]
    assert rows == [
        ["probe", "phone", "checkpoint", "weighted_sum", "False", "160", "61.2", "50.0", *none * 8],
        ["asr", "asr", "checkpoint", "[0, 2]", "2", "160", *none * 2, "25.0", "10.0", *none * 6],
        ["verifier", "speaker_verification", "checkpoint", "weighted_sum", "False", "160", *none * 4, "5.1", "0.432", *none * 4],
        ["pretrained", *none * 5, *none * 6, "0.512", "0.800", "60.0", "62.5"],
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "wrote   comparison.csv, comparison.md"
    assert len(out) == 1 + 4 + 1
    assert len(set(map(len, out[:-1]))) == 1  # aligned
    assert out[2].split() == ["asr", "asr", "checkpoint", "[0,", "2]", "2", "160", "25.0", "10.0"]


def test_intervals_have_columns_of_their_own(runs, capsys):
    bounded = PROBE | {"intervals": {"test/accuracy": [0.5904, 0.63]}, "bootstrap": {"unit": "speaker", "units": 12}}
    (runs / "probe" / "metrics.json").write_text(json.dumps(bounded))
    (runs / "pretrained" / "summary.json").write_text(
        json.dumps(PRETRAINING | {"intervals": {"probe/phone/encoder": [0.58, 0.62]}})
    )
    main(parse("compare", ["probe", "sweep/2", "pretrained"]))
    header, *rows = table(runs)
    assert header[6:] == [
        *("accuracy, %", "accuracy low, %", "accuracy high, %", "macro_f1, %", "pretrain/val_l1", "pretrain/zero_l1"),
        *("probe/phone/encoder, %", "probe/phone/encoder low, %", "probe/phone/encoder high, %", "finetune/phone/encoder, %"),
    ]
    assert [row[6:] for row in rows] == [
        ["61.2", "59.0", "63.0", "50.0", *[""] * 6],
        ["2.0", "", "", "50.0", *[""] * 6],  # made before there were intervals
        [*[""] * 4, "0.512", "0.800", "60.0", "58.0", "62.0", "62.5"],
    ]
    capsys.readouterr()


def test_a_figure_stands_before_its_interval():
    metrics = {"test/wer": 0.1234, "valid/wer": 0.2, "test/min_dcf": 0.5, "test/cer": 0.04}
    metrics["intervals"] = {"test/wer": [0.1, 0.15], "test/min_dcf": [0.45, 0.5678]}
    assert figures(metrics) == "wer 12.3% (10.0–15.0), min_dcf 0.500 (0.450–0.568), cer 4.0%"


def test_a_sweep_is_its_runs_in_order(runs):
    main(parse("compare", ["sweep", "probe", "--output", "out"]))
    header, *rows = table(runs / "out")
    assert header == ["run", "accuracy, %", "macro_f1, %"]  # nothing else sets these apart
    assert rows == [
        ["sweep/0", "0.0", "50.0"],
        ["sweep/2", "2.0", "50.0"],
        ["sweep/10", "10.0", "50.0"],
        ["probe", "61.2", "50.0"],
    ]
    assert not (runs / "comparison.csv").exists()


def test_what_is_no_run_is_named(runs):
    for arguments, expected in (
        (["probe", "nowhere"], "no run at nowhere: there is no such folder"),
        (["probe/metrics.json"], "no run at probe/metrics.json: there is no such folder"),
        (["empty"], "no run at empty: it has neither metrics.json nor summary.json, nor has a folder in it"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{expected}$"):
            main(parse("compare", arguments))
    (runs / "asr" / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"^asr/metrics.json is not a readable results: "):
        main(parse("compare", ["probe", "asr"]))
    assert not (runs / "comparison.csv").exists()


def test_the_command_line_compares_and_tells_errors_in_one_line(runs):
    done = run("compare", "probe", "sweep")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "wrote   comparison.csv, comparison.md"
    failed = run("compare", "nowhere")
    assert failed.code == 1
    assert failed.err == "audiot: error: no run at nowhere: there is no such folder\n"
    assert run("compare").code == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"test/accuracy": "high"}, "test/accuracy is 'high': expected a number"),
        ({"test/accuracy": [0.5]}, "test/accuracy is '[0.5]': expected a number"),
        ({"train_utterances": True}, "train_utterances is 'True': expected a number"),
        ({"monitor": 3}, "monitor is '3': expected the name of a figure"),
        ({"intervals": [0, 1]}, "intervals is '[0, 1]': expected the two ends of each figure"),
        ({"intervals": {"test/accuracy": [0.5]}}, "intervals.test/accuracy is '[0.5]': expected two numbers"),
        ({"probe/phone": 0.5}, "no probe is called 'probe/phone': expected probe/TASK/UPSTREAM or finetune/TASK/UPSTREAM"),
    ],
)
def test_results_that_are_no_figures_are_named(tmp_path, changed, words):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(PROBE | changed))
    with pytest.raises(ValueError) as caught:
        main(parse("compare", [str(tmp_path), "--output", str(tmp_path)]))
    assert str(caught.value) == f"{path}: {words}"
