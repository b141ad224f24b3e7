"""Results beside those of an earlier run."""

from __future__ import annotations

import json

import pytest

from audiot.benchmark.comparison import Results, comparison, read_results


def results(tmp_path, name, lines, device="a GPU"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "results.csv").write_text("\n".join(["model,T,ms,note", *lines]) + "\n")
    (folder / "machine.json").write_text(json.dumps({"device": device}))
    return read_results(folder / "results.csv", ("model", "T"), "ms")


def test_measurements_are_compared_with_the_same_ones_and_the_others_listed(tmp_path):
    old = results(tmp_path, "old", ["a,8,4,", "b,8,,out of memory", "gone,8,1,"], "an old GPU")
    new = results(tmp_path, "new", ["b,8,3,", "a,8,2,", "a,16,5,"])
    text = comparison(old, new)
    assert f"- before: {tmp_path / 'old' / 'results.csv'} (an old GPU)\n- now: {tmp_path / 'new' / 'results.csv'} (a GPU)" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == "| model | T | before | now | now / before |"
    assert table[2:] == ["| b | 8 | out of memory | 3 |  |", "| a | 8 | 4 | 2 | 0.500 |"]
    assert text.endswith("Only before:\n\n- gone, 8\n\nOnly now:\n\n- a, 16\n")


def test_what_is_alike_everywhere_stands_above_the_table(tmp_path):
    text = comparison(results(tmp_path, "old", ["a,8,4,"]), results(tmp_path, "new", ["a,8,6,"]))
    assert "In all: model a, T 8\n\n| before | now | now / before |\n" in text
    assert "| 4 | 6 | 1.500 |" in text


def test_without_a_common_measurement_there_is_no_table(tmp_path):
    text = comparison(results(tmp_path, "old", ["a,8,4,"]), results(tmp_path, "new", ["a,9,6,"]))
    assert "No measurement is in both." in text


def test_results_of_another_benchmark_are_refused_in_one_line(tmp_path):
    path = results(tmp_path, "old", ["a,8,4,"]).path
    with pytest.raises(ValueError, match=r"results\.csv:1: no column attention, frames_per_s; found model, T, ms"):
        read_results(path, ("model", "attention"), "frames_per_s")
    with pytest.raises(ValueError, match=r"results\.csv:4: ms must be a number, or nothing, found '4 ms'"):
        results(tmp_path, "edited", ["a,8,4.5e-05,", "a,9,,", "b,8,4 ms,"])
    with pytest.raises(FileNotFoundError, match="no results of a benchmark at"):
        read_results(tmp_path / "nowhere.csv", ("model",), "ms")
    assert isinstance(read_results(path, ("model",), "ms"), Results)
