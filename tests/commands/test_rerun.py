"""A run is repeated with its own config, and what differs is told."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from test_cli import TINY, blank, last_line, made, read, run, succeed

from audiot.commands.rerun import compare_curves, compare_weights, distance

__all__ = ["made"]
QUICK = [*TINY, "probe=false", "logger=csv", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"]


@pytest.fixture
def short(made, tmp_path):
    """The folder of a finished pre-training run of four steps."""
    folder = tmp_path / "short"
    if not (made.data / "short").exists():
        succeed("pretrain", *QUICK, f"hydra.run.dir={made.data / 'short'}")
    return shutil.copytree(made.data / "short", folder)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


# Whole commands


@blank
def test_a_run_is_repeated_exactly(short, tmp_path):
    out = succeed("rerun", str(short))
    assert last_line(out) == "repeated exactly"
    assert "made with the same program, machine and data" in out
    repeat = tmp_path / "short-rerun"
    assert (repeat / "config.yaml").read_text() == (short / "config.yaml").read_text()
    first, second = (weights(folder / "checkpoints" / "step=4.ckpt") for folder in (short, repeat))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    speed = ("frames_per_s", "data_wait", "first_step_s", "train_s", "wall_s")
    figures = [
        {name: value for name, value in read(each / "summary.json").items() if name not in speed} for each in (short, repeat)
    ]
    assert figures[0] == figures[1]
    assert "seed=1" not in (repeat / ".hydra" / "overrides.yaml").read_text()
    assert "data.hours=0.01" in (repeat / ".hydra" / "overrides.yaml").read_text()

    again = run("rerun", str(short))
    assert again.code == 1
    assert f"{repeat} is there already: --output FOLDER repeats the run elsewhere, --compare compares with it\n" in again.err
    assert last_line(succeed("rerun", str(short), "--compare")) == "repeated exactly"


@pytest.mark.slow
@blank
def test_another_seed_differs_from_the_first_step_on(short, tmp_path):
    succeed("pretrain", *QUICK, "seed=1", f"hydra.run.dir={tmp_path / 'other'}")
    result = run("rerun", str(short), "--compare", "--output", str(tmp_path / "other"))
    assert result.code == 1
    assert last_line(result.out) == "differs, first at step 0"
    assert result.out.split("made with")[1].splitlines()[1].split() == ["seed", "0", "1"]
    assert succeed("rerun", str(short), "--compare", "--output", str(tmp_path / "other"), "--tolerance", "10")


@blank
def test_first_steps_are_those_of_the_whole_run(short, tmp_path):
    out = succeed("rerun", str(short), "--steps", "2", "--output", str(tmp_path / "two"))
    assert "curve   the same at all 2 steps that were logged" in out
    assert "weights equal bit for bit" in out
    assert last_line(out) == "repeated exactly"
    refused = run("rerun", str(short), "--steps", "5", "--output", str(tmp_path / "five"))
    assert "--steps must be from 1 to the run's 4, found 5" in refused.err
    assert not (tmp_path / "five").exists()


@pytest.mark.slow
@blank
def test_what_resumes_changed_is_in_the_repeat_from_its_start_and_told(short, tmp_path):
    succeed("pretrain", f"resume={short}", "trainer.max_steps=6", "optimizer.lr=0.1")
    result = run("rerun", str(short))
    assert "changed from step 4 on: trainer.max_steps=6 optimizer.lr=0.1: the repeat has that from its start\n" in result.out
    assert read(tmp_path / "short-rerun" / "summary.json")["steps"] == 6
    assert (result.code, last_line(result.out)) == (1, "differs, first at step 0")  # as the learning rates are others


@pytest.mark.slow
def test_fine_tuning_is_repeated_if_its_encoder_is_what_it_was(made, tmp_path):
    encoder = shutil.copytree(made.encoder, tmp_path / "encoder")
    task = ["downstream=phone_linear", f"upstream.path={encoder}", "trainer.max_steps=2", "trainer.val_check_interval=1"]
    small = [each for each in TINY if each.startswith("data.")]
    succeed("finetune", *small, *task, "trainer.accelerator=cpu", "logger=csv", f"hydra.run.dir={tmp_path / 'run'}")
    out = succeed("rerun", str(tmp_path / "run"))
    assert last_line(out) == "repeated exactly"
    assert "test/accuracy" in out
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config, indent=7))
    refused = run("rerun", str(tmp_path / "run"), "--output", str(tmp_path / "second"))
    expected = f"started from upstream.path={encoder}, which has changed since: restore it, or train anew"
    assert expected in refused.err
    shutil.rmtree(encoder)
    assert "which is gone since" in run("rerun", str(tmp_path / "run"), "--output", str(tmp_path / "second")).err
    assert not (tmp_path / "second").exists()


def test_a_run_that_can_not_be_repeated_is_refused_before_training(short, tmp_path):
    other = tmp_path / "other-rerun"

    def refused(*arguments):
        result = run("rerun", str(short), "--output", str(other), *arguments)
        assert result.code == 1
        assert result.err.count("\n") == 1
        assert not other.exists()
        return result.err

    assert "--compare: " in refused("--compare")
    assert "--tolerance must be at least 0" in refused("--tolerance", "-1")
    noted = read(short / "data.json")
    (short / "data.json").write_text(json.dumps(noted | {"content": "of other audio"}))
    assert "has other utterances, labels or audio than the run was trained on" in refused()
    (short / "data.json").write_text(json.dumps(noted))
    config = (short / "config.yaml").read_text()
    (short / "config.yaml").write_text(config.replace("part: optimizer/adamw", "part: os:system"))
    assert "names os:system, which is not audiot's" in refused()
    (short / "config.yaml").write_text(config)
    (short / "summary.json").unlink()
    assert f"{short} is not finished, summary.json is missing: audiot pretrain resume={short} goes on with it" in refused()
    assert "no run there" in run("rerun", str(tmp_path / "nowhere")).err


# What is compared


def test_a_distance_is_a_share_of_large_values():
    assert distance(1.0, 1.0) == distance(math.nan, math.nan) == distance("a", "a") == 0
    assert distance(0.5, 0.25) == 0.25
    assert distance(200.0, 100.0) == 0.5
    assert distance(1.0, None) == distance("a", "b") == distance(1.0, math.nan) == math.inf


def test_the_first_step_that_differs_is_found_and_speed_is_left_out(tmp_path):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("frames_per_s,loss,step\n10,2.5,9\n,,9\n12,2.25,19\n13,2.0,29\n")
    second.write_text("frames_per_s,loss,step\n99,2.5,9\n98,2.75,19\n97,2.0,29\n")
    apart, told = compare_curves(first, second)
    assert [(each.place, each.largest) for each in apart] == [("first at step 19", 0.5 / 2.75)]
    assert told == "differs at 1 of 3 steps that were logged, by 0.182 at most, first at step 19"
    assert compare_curves(first, second, steps=19)[0] == []
    second.write_text("frames_per_s,loss,step\n99,2.5,9\n98,2.25,19\n")
    (apart,), _ = compare_curves(first, second)
    assert (apart.place, apart.largest) == ("first at step 29", math.inf)
    second.write_text("frames_per_s,loss,step\n99,2.5,nine\n")
    with pytest.raises(ValueError, match=r"second.csv is damaged, so the curves can't be compared"):
        compare_curves(first, second)


def test_weights_are_equal_bit_for_bit_or_by_how_much_they_differ_is_told():
    one = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([math.nan, 3.0]), "c": torch.tensor([4, 5])}
    same = {name: weight.clone() for name, weight in one.items()}
    assert compare_weights(one, same) == ([], "equal bit for bit, all 3 tensors")
    same["a"][1] = -2.5
    (apart,), told = compare_weights(one, same)
    assert apart.largest == 0.2  # of 2.5
    assert told == "differ in 1 of 3 tensors, by 0.2 at most, in a"
    assert compare_weights(one, one | {"a": torch.zeros(3)})[0][0].largest == math.inf
    assert compare_weights(None, one)[0] == []
