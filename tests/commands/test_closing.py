"""The closing lines of a pre-training run."""

from __future__ import annotations

import json

import pytest

from audiot.commands import closing

SUMMARY = {
    **{"pretrain/val_l1": 0.5, "pretrain/zero_l1": 0.8, "pretrain/interpolation_l1": 0.6},
    **{"frames_per_s": 1000, "steps": 4, "parameters": 10_000, "wall_s": 3.0},
    **{"probe/phone/encoder": 0.57, "probe/phone/random": 0.541, "finetune/phone/encoder": 0.632},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run with two probes."""
    monkeypatch.setattr(closing, "finetune_command", lambda run: "audiot finetune")
    for name in ("probe-phone-encoder", "finetune-phone-encoder"):
        (tmp_path / "probes" / name).mkdir(parents=True)
        (tmp_path / "probes" / name / "metrics.json").write_text(json.dumps({"monitor": "accuracy", "train_utterances": 932}))
    return tmp_path


def rows(run, summary):
    (run / "summary.json").write_text(json.dumps(summary))
    return [line for line in closing.report(run).splitlines() if line.startswith(("test ", "phone"))]


def test_figures_of_probes_stand_in_columns(run):
    assert rows(run, SUMMARY) == [
        "test accuracy, %                           pre-trained       untrained",
        "phone, frozen, 932 utterances                     57.0            54.1",
        "phone, fine-tuned, 932 utterances                 63.2                ",
    ]


def test_figures_of_probes_stand_before_their_intervals(run):
    intervals = {"probe/phone/encoder": [0.561, 0.579], "finetune/phone/encoder": [0.6, 1.0]}
    assert rows(run, SUMMARY | {"intervals": intervals}) == [
        "test accuracy, % (95% interval)               pre-trained          untrained",
        "phone, frozen, 932 utterances            57.0 (56.1–57.9)               54.1",
        "phone, fine-tuned, 932 utterances       63.2 (60.0–100.0)                   ",
    ]


@pytest.mark.parametrize("name", ["frames_per_s", "steps", "parameters", "wall_s", "pretrain/val_l1"])
def test_a_summary_that_lacks_something_is_named(run, name):
    (run / "summary.json").write_text(json.dumps({key: value for key, value in SUMMARY.items() if key != name}))
    with pytest.raises(ValueError, match=rf"summary.json has no '{name}', which the results of a run have"):
        closing.report(run)
