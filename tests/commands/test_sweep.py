"""The final table of a sweep, from artificial runs."""

from __future__ import annotations

import csv
import json
import statistics
import sys

import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from audiot.analysis.sweeps import Point, pareto_front
from audiot.commands.sweep import SweepTable, collect, failure_noted, planes, summarise

PRETRAINED = {
    ("attention=query_key", 0): {"pretrain/val_l1": 0.50, "probe/phone/encoder": 0.40, "frames_per_s": 1000, "wall_s": 3.0},
    ("attention=query_key", 1): {"pretrain/val_l1": 0.52, "probe/phone/encoder": 0.43, "frames_per_s": 1200, "wall_s": 4.0},
    ("attention=query_key", 2): {"pretrain/val_l1": 0.57, "probe/phone/encoder": 0.49, "frames_per_s": 1400, "wall_s": 5.0},
    ("attention=none model=large", 0): {"pretrain/val_l1": 0.7, "finetune/phone/random": 0.3, "steps": 9},
}


def run(folder, overrides, results, name="summary.json"):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    (folder / name).write_text(json.dumps(results))


@pytest.fixture
def sweep(tmp_path):
    for number, ((setting, seed), results) in enumerate(PRETRAINED.items()):
        run(tmp_path / str(number + 8), [*setting.split(), f"seed={seed}"], results)  # 8, 9, 10, 11
    return tmp_path


def spread(*values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_table_has_mean_and_deviation_of_every_setting(sweep):
    header, lines = summarise(collect(sweep))
    assert header == ["setting", "runs", "pretrain/val_l1", "probe/phone/encoder", "frames_per_s", "finetune/phone/random"]
    assert lines == [
        ["attention=query_key", "3", "0.530 ± 0.036", spread(40, 43, 49), "1200 ± 200", ""],
        ["attention=none model=large", "1", "0.700", "", "", "30.0"],
    ]


def test_runs_are_in_the_order_of_their_numbers(sweep):
    assert [row["run"].split()[0] for row in collect(sweep)] == ["8", "9", "10", "11"]


def test_other_folders_are_no_runs(sweep):
    (sweep / "notes").mkdir()
    (sweep / "notes" / "summary.json").write_text("{}")
    (sweep / "multirun.yaml").write_text("{}")
    assert [row["run"].split()[0] for row in collect(sweep)] == ["8", "9", "10", "11"]


def test_a_setting_is_what_sets_runs_apart_but_for_the_seed(tmp_path):
    for number, overrides in enumerate(
        [["steps=9", "lr=1", "seed=0"], ["steps=9", "lr=1", "seed=1"], ["steps=9", "lr=2", "wd=3"]]
    ):
        run(tmp_path / str(number), overrides, {"pretrain/val_l1": number})
    assert [row["setting"] for row in collect(tmp_path)] == ["lr=1", "lr=1", "lr=2 wd=3"]


def test_runs_that_differ_by_seed_alone_are_one_setting(tmp_path):
    for number, overrides in enumerate([["seed=0"], ["seed=1"], []]):
        run(tmp_path / str(number), overrides, {"pretrain/val_l1": number})
    ((setting, runs, l1),) = summarise(collect(tmp_path))[1]
    assert (runs, l1) == ("3", "1.000 ± 1.000")
    assert "seed" not in setting


def test_only_seed_itself_is_no_part_of_a_setting(tmp_path):
    for seed in (3, 4):
        run(tmp_path / str(seed), [f"data.corpus.seed={seed}", f"seed={seed}"], {"pretrain/val_l1": 1.0})
    assert [row["setting"] for row in collect(tmp_path)] == ["data.corpus.seed=3", "data.corpus.seed=4"]


def test_downstream_runs_give_their_test_figures(tmp_path):
    for seed, accuracy in enumerate([0.5, 0.6]):
        results = {
            "test/accuracy": accuracy,
            "test/macro_f1": 0.5,
            "valid/accuracy": 0.9,
            "task": "phone",
            "layer_weights": [0.1],
        }
        run(tmp_path / str(seed), ["layers=last", f"seed={seed}"], results, "metrics.json")
    header, lines = summarise(collect(tmp_path))
    assert header == ["setting", "runs", "test/accuracy", "test/macro_f1"]
    assert [line[1:] for line in lines] == [["2", spread(50, 60), spread(50, 50)]]


def end(folder):
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))


def test_callback_writes_and_prints_the_table(sweep, capsys):
    end(sweep)
    with (sweep / "sweep.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert (header, lines) == summarise(collect(sweep))
    printed = capsys.readouterr().out
    for cell in [*header, *(cell for line in lines for cell in line)]:
        assert cell in printed
    assert str(sweep / "sweep.csv") in printed


def test_failed_runs_are_left_out_of_the_table_and_named(sweep):
    run(sweep / "12", ["attention=broken", "seed=0"], {"pretrain/val_l1": 9.0})
    (sweep / "12" / "error.txt").write_text("audiot: error: no\n")
    with pytest.raises(SystemExit, match=r"1 of 5 runs failed: 12 \(attention=broken"):
        end(sweep)
    assert "attention=query_key,3," in (sweep / "sweep.csv").read_text()
    assert "broken" not in (sweep / "sweep.csv").read_text()


def test_a_sweep_without_results_writes_no_table(tmp_path):
    end(tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_have_a_row_of_numbers_each(tmp_path):
    run(
        tmp_path / "0",
        ["attention=none", "+x.y=2", "hydra.job.num=1", "seed=0"],
        {"pretrain/val_l1": 0.123456789, "monitor": "a"},
    )
    run(tmp_path / "1", ["attention=none", "lr=1e-3", "seed=1"], {"pretrain/val_l1": 0.5, "train_s": 12.5, "parameters": 1000})
    run(tmp_path / "2", ["attention=none", "seed=2"], {"pretrain/val_l1": 0.5})
    (tmp_path / "2" / "error.txt").write_text("audiot: error: no\n")
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        end(tmp_path)
    assert (tmp_path / "runs.csv").read_text().splitlines() == [
        "run,attention,x.y,seed,lr,pretrain/val_l1,train_s,parameters",
        "0,none,2,0,,0.123456789,,",
        "1,none,,1,1e-3,0.5,12.5,1000",
    ]


def logged(folder, *rows):
    (folder / "metrics.csv").write_text("".join(f"{row}\n" for row in ("step,pretrain/train_l1,pretrain/val_l1", *rows)))


def test_curves_of_all_runs_are_in_one_picture(sweep, drawn, capsys):
    for number in (8, 9, 11):
        logged(sweep / str(number), "0,0.9,", f"5,,0.{number}", f"9,,0.{number - 2}")
    end(sweep)
    (figure,) = drawn
    (axis,) = figure.axes
    assert axis.get_ylabel() == "pretrain/val_l1"
    curves = [line for line in axis.lines if len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in curves] == [[0.8, 0.6], [0.9, 0.7], [0.11, 0.9]]
    assert all(line.get_xdata().tolist() == [5, 9] for line in curves)
    colours = [line.get_color() for line in curves]
    assert colours[0] == colours[1] != colours[2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["attention=query_key", "attention=none model=large"]
    assert f"wrote   {sweep / 'sweep.csv'}, {sweep / 'runs.csv'}, {sweep / 'curves.png'}\n" in capsys.readouterr().out


def test_quality_stands_against_the_costs_that_differ(tmp_path, drawn):
    """Setting 2 is dearer and worse than setting 1. Means are over seeds."""
    given = {1: (10, 0.4), 2: (20, 0.3), 3: (40, 0.6)}
    for setting, (seconds, accuracy) in given.items():
        for seed, away in enumerate((-0.1, 0.1)):
            results = {"probe/phone/encoder": accuracy + away, "probe/phone/random": 0.2, "pretrain/val_l1": 0.5}
            costs = {"train_s": seconds + 10 * away, "parameters": 7}
            run(tmp_path / f"{setting}{seed}", [f"lr={setting}", f"seed={seed}"], results | costs)
    end(tmp_path)
    (axis,) = drawn[0].axes  # all have as many parameters, and the control is no result
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("training time, s", "probe/phone/encoder (higher is better)")
    front, *points = [line.get_xydata() for line in axis.lines if len(line.get_xdata())]
    np.testing.assert_allclose(front, [(10, 0.4), (40, 0.6)])
    np.testing.assert_allclose(points[1::2], [[pair] for pair in given.values()])
    np.testing.assert_allclose(points[0], [(9, 0.3), (11, 0.5)])


def test_a_quality_of_a_few_settings_may_differ_in_fewer_costs(tmp_path, drawn):
    for number, size in enumerate((5, 5, 6)):
        quality = {"test/accuracy": 0.1 * number} | ({"test/wer": 0.3} if number < 2 else {})
        run(tmp_path / str(number), [f"lr={number}"], quality | {"train_s": number, "parameters": size}, "metrics.json")
    end(tmp_path)
    assert [axis.get_xlabel() for axis in drawn[0].axes if axis.get_visible()] == [
        *("training time, s", "parameters", "training time, s")
    ]


def test_of_losses_and_error_rates_less_is_better(tmp_path):
    for number, (loss, error) in enumerate([(0.5, 0.2), (0.4, 0.3)]):
        run(tmp_path / "a" / str(number), [f"lr={number}"], {"pretrain/val_l1": loss, "train_s": number})
        run(tmp_path / "b" / str(number), [f"lr={number}"], {"test/wer": error, "train_s": number}, "metrics.json")
    assert list(planes(tmp_path / "a", collect(tmp_path / "a"))) == [("training time, s", "pretrain/val_l1", False)]
    assert list(planes(tmp_path / "b", collect(tmp_path / "b"))) == [("training time, s", "test/wer", False)]
    points = [Point("a", 1, 0.5, [], []), Point("b", 2, 0.6, [], []), Point("c", 2, 0.4, [], []), Point("d", 3, 0.4, [], [])]
    assert [point.setting for point in pareto_front(points, higher_is_better=False)] == ["a", "c"]
    assert [point.setting for point in pareto_front(points, higher_is_better=True)] == ["a", "b"]


def test_pictures_of_a_sweep_can_be_left_out_and_one_that_fails_is_told(sweep, drawn, monkeypatch, capsys):
    for number in (8, 9):
        logged(sweep / str(number), "5,,0.8", "9,,high")
    SweepTable().on_multirun_end(OmegaConf.create({"plots": False, "hydra": {"sweep": {"dir": str(sweep)}}}))
    assert "failed" not in capsys.readouterr().out
    end(sweep)
    path = sweep / "8" / "metrics.csv"
    assert f"failed  curves.png: {path}: a row of pretrain/val_l1 has no step or no number: " in capsys.readouterr().out
    assert not drawn


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Folder of a running job of a sweep."""
    config = OmegaConf.create({"job": {"num": 3}, "runtime": {"output_dir": str(tmp_path)}})
    monkeypatch.setattr(HydraConfig, "get", lambda: config)
    return tmp_path


def test_a_failed_run_notes_its_error_and_lets_the_others_go_on(job, capsys):
    with failure_noted():
        sys.exit("audiot: error: data.batch_s must be positive")
    assert (job / "error.txt").read_text() == "audiot: error: data.batch_s must be positive\n"
    assert "run 3 of the sweep failed: data.batch_s must be positive" in capsys.readouterr().err
    with failure_noted():
        pass
    assert not (job / "error.txt").exists()  # it has been mended


def test_an_interrupt_ends_the_whole_sweep(job):
    with pytest.raises(SystemExit), failure_noted():
        sys.exit(130)
    with pytest.raises(KeyboardInterrupt), failure_noted():
        raise KeyboardInterrupt
    assert not (job / "error.txt").exists()
