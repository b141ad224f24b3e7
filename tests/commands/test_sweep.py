"""The final table of a sweep, from artificial runs."""

from __future__ import annotations

import csv
import json
import statistics
import sys

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from audiot.commands.sweep import SweepTable, collect, failure_noted, summarise

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
