"""Runs, sweeps and pre-trainings side by side in one table."""

from __future__ import annotations

import csv
import json

import numpy as np
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
    costs = ["frames_per_s", "parameters"]
    assert header == ["run", "task", "upstream", "layers", "fine tuned", "train utterances", *figures, *costs]
    none = [""]
    assert rows == [
        ["probe", "phone", "checkpoint", "weighted_sum", "False", "160", "61.2", "50.0", *none * 10],
        ["asr", "asr", "checkpoint", "[0, 2]", "2", "160", *none * 2, "25.0", "10.0", *none * 8],
        ["verifier", "speaker_verification", "checkpoint", "weighted_sum", "False", "160", *none * 4, "5.1", "0.432", *none * 6],
        ["pretrained", *none * 5, *none * 6, "0.512", "0.800", "60.0", "62.5", "12345", "1000"],
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
        *("frames_per_s", "parameters"),
    ]
    assert [row[6:] for row in rows] == [
        ["61.2", "59.0", "63.0", "50.0", *[""] * 8],
        ["2.0", "", "", "50.0", *[""] * 8],  # made before there were intervals
        [*[""] * 4, "0.512", "0.800", "60.0", "58.0", "62.0", "62.5", "12345", "1000"],
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


def started(folder, overrides, results, name="metrics.json", draws=None):
    """A run of a known command line. ``draws``: accuracies of resampled tests, kept."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    (folder / name).write_text(json.dumps(results))
    if draws is not None:
        (folder / "draws.csv").write_text("".join(f"{line}\n" for line in ("test/accuracy", *draws)))


def bootstrapped(accuracy, seed=0, test="abc"):
    how = {"unit": "speaker", "samples": 400, "seed": seed, "test": test, "why": "x"}
    return {"test/accuracy": accuracy, "intervals": {"test/accuracy": [accuracy - 0.1, accuracy + 0.1]}, "bootstrap": how}


def test_runs_that_differ_by_the_seed_alone_are_one_line_of_means(runs):
    for number, (loss, rate) in enumerate([(0.5, 1000), (0.7, 3000), (0.6, 2000)]):
        seed = [f"seed={number}"] if number else []  # without it, it is 0
        results = {"pretrain/val_l1": loss, "pretrain/zero_l1": 0.8, "frames_per_s": rate, "train_s": 2.25, "peak_gib": 1.5}
        started(runs / "s" / str(number), ["attention=none", "hydra.run.dir=x", *seed], results, "summary.json")
    started(runs / "other", ["attention=query_key"], {"pretrain/val_l1": 0.4}, "summary.json")
    main(parse("compare", ["s", "other"]))
    header, first, second = table(runs)
    figures = ["pretrain/val_l1", "pretrain/val_l1 low", "pretrain/val_l1 high", "pretrain/zero_l1"]
    assert header == ["run", "setting", "seeds", *figures, "frames_per_s", "train_s", "peak_gib"]
    assert first[:4] == ["s/0,1,2", "attention=none", "3", "0.600"]
    assert 0.5 <= float(first[4]) < 0.6 < float(first[5]) <= 0.7
    assert first[6:] == ["0.800", "2000", "2.2", "1.50"]  # all have one zero_l1: it has no interval
    assert second == ["other", "attention=query_key", "1", "0.400", *[""] * 6]


def test_tasks_on_encoders_of_several_seeds_are_averaged_and_those_of_other_encoders_are_not(runs):
    for number, attention in enumerate(["none", "none", "query_key"]):
        started(runs / f"p{number}", [f"attention={attention}", f"seed={number}"], {}, "summary.json")
        started(runs / f"t{number}", [f"upstream.path=p{number}/encoder", "downstream=x"], {"test/accuracy": 0.1 * number})
    main(parse("compare", ["t0", "t1", "t2"]))
    assert [row[:3] for row in table(runs)] == [["run", "seeds", "accuracy, %"], ["t0,t1", "2", "5.0"], ["t2", "1", "20.0"]]


def test_a_run_and_its_repeat_are_two_lines(runs):
    for name in ("a", "b"):
        started(runs / name, ["seed=3"], {"test/accuracy": 0.5})
    main(parse("compare", ["a", "b"]))
    assert [row[0] for row in table(runs)] == ["run", "a", "b"]


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_runs_with_draws_of_the_same_tests_are_told_apart_or_not(runs, capsys):
    """The runs go up and down together from test to test, so a difference much smaller than their intervals can be seen."""
    generator = np.random.default_rng(0)
    common, noise = 0.5 + 0.1 * generator.standard_normal(400), 0.01 * generator.standard_normal(400)
    started(runs / "base", ["x=0"], bootstrapped(0.5), draws=common)
    started(runs / "better", ["x=1", "seed=7"], bootstrapped(0.53), draws=common + 0.03 + noise)  # another seed of training
    started(runs / "same", ["x=2"], bootstrapped(0.505), draws=common + 0.005 + noise)
    started(runs / "elsewhere", ["x=3"], bootstrapped(0.9, test="other"), draws=common + 0.4)
    started(runs / "redrawn", ["x=4"], bootstrapped(0.9, seed=1), draws=common + 0.4)
    main(parse("compare", ["base", "better", "same", "elsewhere", "redrawn"]))
    header, *rows = rows_of(runs / "differences.csv")
    assert header == ["run", "less", "figure", "difference", "low", "high", "pairs", "verdict"]
    assert [(*row[:4], *row[6:]) for row in rows] == [
        ("better", "base", "accuracy, %", "3.0", "1", "differs"),
        ("same", "base", "accuracy, %", "0.5", "1", "can't be told apart"),
    ]
    for row, away in zip(rows, (3, 0.5), strict=True):
        ends = [float(end) for end in row[4:6]]
        np.testing.assert_allclose(ends, away + 100 * np.quantile(noise, [0.025, 0.975]), atol=0.15)
    assert "can't be told apart" in capsys.readouterr().out
    main(parse("compare", ["base", "elsewhere"]))
    assert not (runs / "differences.csv").exists()


def test_seeds_are_pairs_on_each_resampled_test(runs):
    noise = 0.001 * np.random.default_rng(1).standard_normal(400)
    for seed, level in enumerate((0.2, 0.8)):  # seeds differ by much more than settings
        started(runs / f"a{seed}", ["x=0", f"seed={seed}"], bootstrapped(level), draws=level + noise)
        started(runs / f"b{seed}", ["x=1", f"seed={seed}"], bootstrapped(level - 0.02), draws=level - 0.02 - noise)
    started(runs / "c", ["x=2", "seed=5"], bootstrapped(0.1), draws=noise)  # no pair with two others
    main(parse("compare", ["a0", "a1", "b0", "b1", "c"]))
    _, (*about, low, high, pairs, verdict) = rows_of(runs / "differences.csv")
    assert about == ["b0,b1", "a0,a1", "accuracy, %", "-2.0"]
    assert -2.6 < float(low) < -2 < float(high) < -1.4
    assert (pairs, verdict) == ("2", "differs")


def test_draws_that_are_no_numbers_are_named(runs):
    started(runs / "a", ["x=0"], bootstrapped(0.5), draws=[0.5, "high"])
    with pytest.raises(
        ValueError, match=r"^a/draws.csv: expected a number in every row and column \(.*'high'\): test the run again$"
    ):
        main(parse("compare", ["a"]))
