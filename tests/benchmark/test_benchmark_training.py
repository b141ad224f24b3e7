"""The benchmark of training: what it counts, what its parts add up to, and a tiny run of all its scopes; no time is asserted."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from matplotlib.image import imread
from omegaconf import OmegaConf
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import audiot.commands.launch  # noqa: F401  its resolver
from audiot.analysis.plots import log_slope, plot_lengths, plot_roofline, plot_step_parts
from audiot.base.config import plain
from audiot.benchmark import costs as training_costs
from audiot.benchmark import measure as benchmark
from audiot.benchmark.attention import main
from audiot.benchmark.costs import Ceilings, Row, Stopwatch, by_length, grid, products, shares_of, with_speedups
from audiot.benchmark.features import FeatureBenchmark
from audiot.benchmark.measure import Results, comparison, read_results
from audiot.benchmark.training import TrainingBenchmark
from audiot.pretraining import build

CPU = torch.device("cpu")
TINY = ["model.embed_dim=16", "model.num_heads=2", "model.ffn_dim=32", "model.num_layers=2", "features.n_mels=8"]


@pytest.fixture
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield


def settings(**changes):
    """Of ``benchmark=training``, to be changed."""
    config = plain(compose("benchmark", ["benchmark=training", "run_dir=run", "data_dir=data"]).benchmark)
    config.pop("compare")
    return {**config, "device": "cpu", **changes}


def made(**changes):
    return instantiate(settings(**changes), seed=0)


# A tiny run


@pytest.fixture
def speech(tmp_path):
    """A tree of noise, longer than a crop."""
    rng = np.random.default_rng(0)
    for number in range(14):
        path = tmp_path / "audio" / f"{number:02d}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(6400), 16000)
    return tmp_path


def test_every_scope_has_a_row_and_all_files_are_written(speech, hydra_started):
    run = speech / "run"
    run.mkdir()
    data = [
        "data=folder",
        f"data.root={speech / 'audio'}",
        "data.valid_fraction=0.2",
        "data.num_workers=0",
        "data.prepare.num_jobs=1",
    ]
    what = made(
        attentions=["query_key"],
        shapes=[{"frames": 8, "batch": 2}],
        dropouts=[{"hidden": 0.1, "attention": 0.0}],
        steps=2,
        rounds=1,
        program_steps=2,
        warmup_steps=1,
        utterances=None,
        overrides=[*data, *TINY, "callbacks.progress.refresh_rate=0"],
        data_dir=str(speech / "data"),
    )
    machine = {"device": "a CPU", "threads": 1, "torch": "2.11", "command": "audiot benchmark"}
    what.report(run, machine)
    with (run / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["attention"], row["positions"], row["scope"], row["note"]) for row in rows] == [
        ("query_key", "rotary", scope, "") for scope in ("inference", "encoder", "step", "program")
    ]
    for row in rows:
        assert float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert float(row["tflops"]) == pytest.approx(
            float(row["share_of_peak"]) * machine["ceilings"]["flops_per_s"] / 1e12, rel=1e-3
        )
        assert row["steps"] == "2"
        shares = [float(value) for name, value in row.items() if name.startswith("share_") and name != "share_of_peak" and value]
        assert sum(shares) == (0 if row["scope"] in ("inference", "encoder") else pytest.approx(1, abs=0.02))
    forward, whole = (float(row["tflops"]) * float(row["median_ms"]) for row in rows[:2])
    assert whole == pytest.approx(3 * forward, rel=1e-3)
    for row in rows[:3]:  # B · T frames of the encoder, three spectrogram frames each
        assert float(row["frames_per_s"]) * float(row["median_ms"]) / 1000 == pytest.approx(48, rel=0.02)
    assert 0 < float(rows[3]["wall_frames_per_s"]) < float(rows[3]["frames_per_s"]) * 1.5
    assert float(rows[3]["validation_s"]) > 0
    report = (run / "table.md").read_text()
    assert "| small | query_key | 2 × 8 | 0.1/0 | program |" in report
    assert "12·T·d·layers" in report
    files = {"results.csv", "table.md", "steps.png", "roofline.png"}
    assert {path.name for path in run.iterdir()} == files  # the program's own folders are gone


def test_what_is_refused_and_what_crashes_are_rows_with_their_reason(hydra_started, tmp_path, monkeypatch):
    attentions = ["query_key", {"name": "synthesizer_random", "max_length": 4}]
    what = made(attentions=attentions, shapes=[{"frames": 8, "batch": 2}], scopes=["encoder"], steps=1, rounds=1, overrides=TINY)
    what.ceilings = Ceilings(1e9, 1e9, 8)
    ((query_key, synthesizer),) = what.run(tmp_path)
    assert (query_key.note, synthesizer.note) == ("", "refused: longer than max_length 4")
    assert synthesizer.frames_per_s is None

    def crash(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(what, "_encoder", crash)
    ((query_key, _),) = what.run(tmp_path)
    assert query_key.note == "failed: RuntimeError: no such kernel"
    monkeypatch.setattr(what, "_ceilings", lambda: Ceilings(1e9, 1e9, 8))
    machine = {"device": "a CPU", "threads": 1, "torch": "2.11", "command": "audiot benchmark"}
    with pytest.raises(ValueError, match=r"1 of 2 measurements failed, see .*table.md; the first: small query_key 2 × 8"):
        what.report(tmp_path, machine)
    assert "no such kernel" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["bass"]}, r"benchmark.models: no 'bass' \(did you mean base\?\)"),
        (
            {"models": [{"name": "base", "shape": []}]},
            "is neither a name nor a mapping with name, overrides, shapes, dropouts, scopes",
        ),
        ({"attentions": ["query_kye"]}, r"benchmark.attentions: no attention 'query_kye' \(did you mean query_key\?\)"),
        ({"attentions": ["query_key"] * 2}, "2 entries are called 'query_key': give each a label"),
        ({"attentions": []}, "benchmark.attentions is empty"),
        ({"shapes": []}, "benchmark.shapes or benchmark.dropouts is empty"),
        ({"shapes": [{"frames": 8}]}, r"benchmark.shapes: \{'frames': 8\} is no mapping with frames and batch"),
        ({"shapes": [{"frames": 0, "batch": 1}]}, "benchmark.shapes: frames=0: expected at least 1"),
        ({"dropouts": [{"hidden": 1.0, "attention": 0}]}, "hidden=1.0: expected at least 0 and less than 1"),
        ({"precision": "bf16"}, r"benchmark.precision: no 'bf16'.*; there are 32-true, bf16-mixed"),
        ({"compile": "yes"}, "benchmark.compile=yes: expected auto, true or false"),
        ({"steps": 0}, "benchmark.steps must be at least 1, found 0"),
        ({"scopes": ["steps"]}, r"benchmark.scopes: no 'steps' \(did you mean step\?\)"),
        ({"experiment": "demo"}, "benchmark.experiment: no 'demo'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(hydra_started, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainingBenchmark(**{name: value for name, value in settings(**changes).items() if name[0] != "_"}, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "places"), [("training", 1), ("training_gpu", 7), ("training_length", 6)])
def test_the_presets_compose_the_training_that_they_name(hydra_started, option, places):
    config = plain(compose("benchmark", [f"benchmark={option}", "run_dir=run", "data_dir=data"]).benchmark)
    config.pop("compare")
    what = instantiate({**config, "device": "cpu"}, seed=3)
    assert len(what.places) == places
    for place, _ in (what.places[0], what.places[-1]):
        cfg, positions = what._config(what.entries[-1], place, CPU)
        features = instantiate(plain(cfg.features))
        assert features.num_tokens(round(cfg.data.crop_s * features.sample_rate)) == place.frames == cfg.model.max_frames
        assert cfg.data.batch_s / cfg.data.crop_s == pytest.approx(place.batch)
        assert (cfg.model.dropout, cfg.attention.dropout) == (place.dropout, place.attention_dropout)
        assert (cfg.trainer.precision, cfg.seed, cfg.probe) == (what.precision, 3, False)
        assert cfg.model.num_layers == (12 if place.model.name == "large" else 3)
        assert positions == "sinusoid"
        steps = cfg.trainer.max_steps
        assert what.warmup_steps < cfg.trainer.val_check_interval == cfg.checkpoint.every_n_steps < steps
        assert steps < 2 * cfg.trainer.val_check_interval  # one of each


# What it counts


def encoder(attention, *overrides):
    chosen = ["model=small", f"attention={attention}", "features.stack=1", "data.crop_s=0.4", "run_dir=run", "data_dir=data"]
    return build(compose("pretrain", [*chosen, *overrides]))


@pytest.mark.parametrize("attention", ["query_key", "synthesizer_random"])
def test_products_are_those_of_the_formula_and_of_pytorchs_counter(hydra_started, attention):
    model = encoder(attention).model.encoder
    batch, frames, channels, width, ffn, layers = 3, 24, 80, 192, 768, 3
    work = products(model, batch, frames, channels)
    projections, scores = (4, 2) if attention == "query_key" else (2, 1)
    a_frame = 2 * (layers * (projections * width**2 + 2 * width * ffn) + channels * width) + 2 * scores * frames * width * layers
    assert work.flops == batch * frames * a_frame
    values = [*model.named_parameters(), *model.named_buffers()]
    meta = {name: torch.empty_like(value, device="meta", requires_grad=value.requires_grad) for name, value in values}
    with FlopCounterMode(display=False) as counter:
        functional_call(model, meta, (torch.empty(batch, frames, channels, device="meta"),))[-1].sum().backward()
    # Forward and backward, which needs no gradient of the features; fused attention is made of its products there.
    assert counter.get_total_flops() == 3 * work.flops - 2 * batch * frames * channels * width


@pytest.mark.parametrize("attention", ["query_key", "synthesizer_random"])
def test_each_product_moves_its_operands_and_its_result_once(hydra_started, attention):
    model = encoder(attention).model.encoder
    batch, frames, channels, width, ffn, heads, layers = 3, 24, 80, 192, 768, 6, 3
    rows = batch * frames

    def linear(before, after):
        return rows * before + before * after + after + rows * after

    attended = 4 * rows * width  # queries, keys, values and the result
    if attention == "synthesizer_random":
        attended = 2 * rows * width + heads * frames**2
    projected = 3 if attention == "query_key" else 1  # in one product
    a_layer = linear(width, projected * width) + linear(width, width) + linear(width, ffn) + linear(ffn, width) + attended
    assert products(model, batch, frames, channels).elements == linear(channels, width) + layers * a_layer


def test_a_step_has_the_head_on_the_frames_that_it_may_have_to_predict(hydra_started):
    what = made(overrides=["features.stack=1"])
    module = encoder("query_key")
    place = SimpleNamespace(batch=3, frames=38)
    assert module.objective.max_masked(38) == 6  # two spans of three frames
    head = what._work(module, place, "step").flops - what._work(module, place, "encoder").flops
    assert head == 2 * 3 * 6 * (192 * 192 + 192 * 80)


def test_mechanisms_that_choose_keys_by_value_are_told_apart(hydra_started):
    counted = benchmark.attempt(lambda: products(encoder("routing").model.encoder, 1, 24, 80))
    assert isinstance(counted, benchmark.Failed)


# Parts of a step


class Clock:
    def __init__(self, *times):
        self.times = iter(times)

    def perf_counter(self):
        return next(self.times)


def test_parts_of_a_name_add_up_and_what_lies_before_a_beginning_is_left_out(monkeypatch):
    watch = Stopwatch(CPU, "optimiser")
    monkeypatch.setattr(training_costs, "time", Clock(0, 1, 3, 6, 100, 104, 109, 110, 111, 120))
    watch.mark("early")  # not begun
    watch.begin()
    for part in ("forward", "backward", "optimiser"):
        watch.mark(part)
    watch.stop()
    watch.mark("between turns")
    watch.begin()
    for part in ("forward", "optimiser", "between", "between", "optimiser"):
        watch.mark(part)
    assert watch.steps() == [
        {"forward": 1, "backward": 2, "optimiser": 3},
        {"forward": 4, "optimiser": 5},
        {"between": 2, "optimiser": 9},
    ]


def test_shares_add_up_and_masking_is_a_part_of_forward():
    steps = [{"features": 1.0, "forward": 4.0, "backward": 3.0, "optimiser": 1.0, "between": 1.0}, {"forward": 10.0}]
    found = shares_of(steps, 2.0, data_wait=0.02)
    expected = {"features": 1, "masking": 4, "forward": 10, "backward": 3, "optimiser": 1, "data": 0.4, "other": 0.6}
    assert found == pytest.approx({f"share_{part}": value / 20 for part, value in expected.items()})
    assert "share_data" not in shares_of(steps, 2.0)
    assert shares_of(steps, 99.0)["share_forward"] == 0


# Rows and pictures


def row(attention, frames=128, scope="step", **changes):
    what = {"median_ms": 2.0, "frames_per_s": 1000, "tflops": 100.0, "share_of_peak": 0.2, "flops_per_byte": 300.0}
    return Row("base", attention, "own", frames, 4, 0.1, 0.0, scope, True, "bf16-mixed", **(what | changes))


def test_speedups_are_over_query_key_at_the_same_place():
    rows = [
        row("query_key"),
        row("fast", frames_per_s=1500),
        row("fast", 64),
        row("query_key", scope="encoder", frames_per_s=500),
    ]
    rows += [row("fast", scope="encoder"), row("none", note="refused: x", frames_per_s=None, median_ms=None)]
    assert [each.speedup for each in with_speedups(rows)] == [1, 1.5, None, 1, 2, None]
    lines = grid(with_speedups(rows))
    assert lines[2][:8] == ["base", "fast", "4 × 128", "0.1/0", "step", "2.00", "1,500", ""]
    assert lines[-1][5:] == ["refused", "", "", "", "100", "20.0%", "", ""]
    assert len({len(line) for line in lines}) == 1


def test_lengths_are_drawn_from_three_on():
    rows = [row("query_key", frames, frames_per_s=10**6 // frames, peak_mib=frames) for frames in (64, 32, 128)]
    panels = by_length(rows)
    assert {title.split(": ")[1] for title in panels} == {"ms a 1,000 frames", "peak memory, MiB a 1,000 frames"}
    times, peaks = panels.values()
    assert times["query_key"] == [(32, pytest.approx(32)), (64, pytest.approx(64)), (128, pytest.approx(128, rel=1e-3))]
    assert peaks["query_key"] == [(frames, 1000 * frames / (4 * frames)) for frames in (32, 64, 128)]
    assert by_length(rows[:2]) == {}


def test_slope_is_that_of_the_longer_half():
    assert log_slope([1, 2, 4, 8, 16], [7, 7, 7, 14, 28]) == pytest.approx(1)
    assert log_slope([10, 1000], [3, 300]) == pytest.approx(1)
    assert log_slope([10], [3]) is None


def test_bars_are_as_long_as_the_parts_and_stand_one_behind_the_other(tmp_path, drawn):
    plot_step_parts(
        {"one": {"forward": 2.0, "backward": 3.0}, "two": {"forward": 1.0}},
        ("data", "forward", "backward"),
        "t",
        tmp_path / "a.png",
    )
    bars = [(bar.get_x(), bar.get_width()) for bar in drawn[0].axes[0].patches]
    assert bars == [(0, 2), (2, 3), (0, 1), (1, 0)]
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["forward", "backward"]
    assert imread(tmp_path / "a.png").shape[1] == 1320


def test_the_roof_is_the_lower_of_both_ceilings(tmp_path, drawn):
    points = [("a", "query_key", "step", 500.0, 300.0), ("b", "fast", "encoder", 40.0, 90.0)]
    plot_roofline(points, 700.0, 2.8, "t", tmp_path / "a.png")
    roof, *marks = drawn[0].axes[0].lines
    assert roof.get_xdata()[1] == pytest.approx(250)
    np.testing.assert_allclose(roof.get_ydata(), np.minimum(700, 2.8 * np.asarray(roof.get_xdata())))
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(500, 300), (40, 90)]
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert "a: 300 TFLOP/s, 43%" in texts


def test_curves_have_their_slopes_in_the_legend(tmp_path, drawn):
    lines = {"query_key": [(1, 1.0), (2, 2.0), (4, 4.0)], "local": [(1, 1.0), (2, 1.0), (4, 1.0)]}
    plot_lengths({"ms": lines, "MiB": {"local": lines["local"]}}, "query_key", "t", tmp_path / "a.png")
    first, second = ([text.get_text() for text in axis.get_legend().get_texts()] for axis in drawn[0].axes)
    assert first == ["query_key: slope +1.00", "local: slope +0.00"]
    assert second == ["local: slope +0.00"]


# Beside an earlier run


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


def test_a_second_run_is_set_beside_the_first_whatever_fails(tmp_path, monkeypatch, caplog):
    task = SimpleNamespace(overrides=SimpleNamespace(task=[]))
    monkeypatch.setattr("audiot.benchmark.attention.HydraConfig", SimpleNamespace(get=lambda: task))

    def measure(folder, compare, milliseconds, broken=False):
        def report(self, run, machine):
            header, line = ",".join([*self.key, self.figure]), ",".join([*self.key, str(milliseconds)])
            (run / "results.csv").write_text(f"{header}\n{line}\n")
            if broken:
                raise ValueError("1 of 1 measurements failed")

        monkeypatch.setattr(FeatureBenchmark, "report", report)
        target = "audiot.benchmark.features.FeatureBenchmark"
        settings = {"_target_": target, "features": ["mfcc"], "utterances": 1, "duration_s": 0.1, "rounds": 1, "device": "cpu"}
        (tmp_path / folder).mkdir()
        settings |= {"compare": compare}
        with caplog.at_level("INFO"):
            main(OmegaConf.create({"run_dir": str(tmp_path / folder), "seed": 0, "benchmark": settings}))

    measure("first", None, 4)
    assert not (tmp_path / "first" / "comparison.md").exists()
    with pytest.raises(ValueError, match="1 of 1 measurements failed"):
        measure("second", str(tmp_path / "first" / "results.csv"), 3, broken=True)
    text = (tmp_path / "second" / "comparison.md").read_text()
    assert "0.750 |" in text
    assert text in caplog.text
    (tmp_path / "other.csv").write_text("mechanism,median_ms\na,1\n")
    with pytest.raises(ValueError, match="no column features, channels, audiot_ms"):
        measure("third", str(tmp_path / "other.csv"), 3)
    assert not list((tmp_path / "third").iterdir())
