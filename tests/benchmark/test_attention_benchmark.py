"""Measuring side by side, its tables and pictures, and the attention cases; nothing here depends on how long anything takes."""

from __future__ import annotations

import csv
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from matplotlib.figure import Figure
from matplotlib.image import imread
from omegaconf import OmegaConf

from audiot.attention import names
from audiot.attention.query_key import QueryKey
from audiot.attention.synthesizer_random import SynthesizerRandom
from audiot.base.config import plain
from audiot.benchmark import measure as benchmark
from audiot.benchmark.attention import AttentionBenchmark, Entry, main
from audiot.benchmark.measure import Failed, Measured, MismatchError, Panel, Row, as_graph, crossing, measure, rows_of, standing

CPU = torch.device("cpu")
PANEL = Panel("fp32", False, "layer", "training")
SMALL = {
    "mechanisms": ["synthesizer_random"],
    "lengths": [6, 12],
    "frames": 24,
    "embed_dim": 16,
    "num_heads": 2,
    "precisions": ["fp32"],
    "scopes": ["operator", "layer"],
    "directions": ["inference", "training"],
    "compile": [False],
    "graphs": False,
    "positions": "none",
    "padded": 0.0,
    "dropout": 0.0,
    "rounds": 2,
    "seconds": 0.0,
    "device": "cpu",
    "seed": 0,
}


def run(**changes):
    return [row for rows in AttentionBenchmark(**SMALL | changes).run() for row in rows]


class Clock:
    """Stands in for `time`: it moves when told to."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, seconds):
        """A call that takes so long."""

        def call():
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    return clock


# Measuring


def test_time_of_is_the_mean_of_the_calls(clock):
    durations = iter([1.0, 2.0, 6.0])

    def call():
        clock.now += next(durations)

    assert benchmark.time_of(call, 3, CPU) == 3.0


def test_calls_take_turns_and_run_as_often_as_the_time_allows(clock):
    order = []

    def named(name, call):
        def noted():
            order.append(name)
            call()

        return noted

    calls = {name: named(name, clock.taking(seconds)) for name, seconds in (("a", 1.0), ("b", 0.4), ("c", 9.0))}
    results = measure(calls, CPU, rounds=3, seconds=3.0)
    assert {name: result.seconds for name, result in results.items()} == {
        "a": pytest.approx([1.0] * 3),
        "b": pytest.approx([0.4] * 3),
        "c": pytest.approx([9.0] * 3),
    }
    assert [result.peak_bytes for result in results.values()] == [None] * 3  # not known on a CPU
    assert "".join(order) == "aabbcc" + "abbc" + "cbba" + "abbc"  # warm-up, then a second a round or once


def test_what_fails_is_told_with_its_reason_and_the_rest_is_measured(clock):
    raised = {
        "memory": torch.OutOfMemoryError("tried to allocate 3 GiB"),
        "cpu memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "refusal": ValueError("sequence has 9 frames but max_frames is 8"),
        "wrong": MismatchError("off by one"),
        "crash": RuntimeError("size mismatch\nin line 3"),
    }

    def failing(error):
        def call():
            raise error

        return call

    steps = []
    calls = {"before": clock.taking(1), **{name: failing(error) for name, error in raised.items()}, "after": clock.taking(2)}
    results = measure(calls, CPU, 2, 0.0, lambda name, done: steps.append(done))
    assert results["before"] == Measured([1, 1], None)
    assert results["after"] == Measured([2, 2], None)
    assert {name: results[name] for name in raised} == {
        "memory": Failed("out of memory"),
        "cpu memory": Failed("out of memory"),
        "refusal": Failed("refused: sequence has 9 frames but max_frames is 8"),
        "wrong": Failed("wrong: off by one"),
        "crash": Failed("failed: RuntimeError: size mismatch in line 3"),
    }
    assert sum(steps) == len(calls) * (2 + 1)


def test_what_fails_later_loses_its_place_only(clock):
    left = iter(range(3))

    def call():
        if next(left, None) is None:
            raise torch.OutOfMemoryError

    steps = []
    results = measure({"good": clock.taking(1), "bad": call}, CPU, 4, 0.0, lambda name, done: steps.append(done))
    assert results == {"good": Measured([1] * 4, None), "bad": Failed("out of memory")}
    assert sum(steps) == 2 * (4 + 1)


def test_a_gpu_is_timed_by_its_events_and_its_memory_counted_above_what_was_there(clock, monkeypatch):
    gpu = torch.device("cuda", 0)
    allocated = {"now": 100, "peak": 900}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)  # ms

    def call():
        clock.now += 2
        allocated["peak"] = max(allocated["peak"], allocated["now"] + 70)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(peak=allocated["now"]))
    assert benchmark.time_of(call, 3, gpu) == 2
    assert benchmark.peak_memory(call, gpu) == 70


def test_an_unknown_device_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^benchmark.device=gpu is not here: .+$"):
        benchmark.find_device("gpu")
    assert benchmark.find_device("cpu") == CPU


# Rows and tables


def row(mechanism, length, median, spread=0.0, **changes):
    where = {**PANEL._asdict(), "length": length, "batch": 2}
    times = {"rounds": 5, "median_ms": median, "q25_ms": median - spread, "q75_ms": median + spread}
    return Row(mechanism, **where | times | changes)


def test_rows_hold_quartiles_speedup_and_real_frames_a_second():
    results = {
        "query_key": Measured([0.004, 0.002, 0.001, 0.003, 0.010], None),
        "fast": Measured([0.001] * 5, 3 * 2**20),
        "big": Failed("out of memory"),
    }
    base, fast, big = rows_of(results, "query_key", PANEL, 8, 4, 30, {"fast": {"parameters": 7}})
    assert (base.q25_ms, base.median_ms, base.q75_ms) == pytest.approx((2, 3, 4))
    assert (base.rounds, fast.rounds, big.rounds) == (5, 5, None)
    assert (base.speedup, base.frames_per_s) == pytest.approx((1, 10_000))
    assert (fast.speedup, fast.frames_per_s, fast.peak_mib, fast.parameters) == pytest.approx((3, 30_000, 3, 7))
    assert big == Row("big", "layer", "training", 8, 4, "fp32", False, note="out of memory")


def test_without_the_baseline_there_is_no_speedup():
    results = {"query_key": Failed("out of memory"), "fast": Measured([0.001], None)}
    _, fast = rows_of(results, "query_key", PANEL, 8, 4, 30, {})
    assert fast.median_ms == 1
    assert fast.speedup is None


def test_csv_has_a_line_a_measurement_and_blanks_for_what_is_not_known(tmp_path):
    rows = [row("query_key", 8, 1.5, speedup=1.0), Row("a, b", "layer", "training", 8, 2, "bf16", True, note="refused: x")]
    benchmark.write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["median_ms"], first["speedup"], first["peak_mib"], first["note"]) == ("1.5", "1", "", "")
    assert (second["mechanism"], second["compiled"], second["median_ms"], second["note"]) == ("a, b", "True", "", "refused: x")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_grid_has_mechanisms_down_and_lengths_across():
    rows = [
        row("query_key", 512, 123.4, speedup=1.0),
        row("a", 512, 10.24, speedup=12.05, recall=0.86, peak_mib=1234.6),
        row("query_key", 2048, 2000.0, speedup=1.0),
        Row("a", "layer", "training", 2048, 2, "fp32", False, note="refused: too long"),
    ]
    assert benchmark.grid(rows) == [
        ["mechanism", "T=512", "T=2,048"],
        ["query_key", "123 (×1.00)", "2,000 (×1.00)"],
        ["a", "10.2 (×12.1, recall 0.86)", "refused"],
    ]
    assert benchmark.memory_grid(rows)[1:] == [["query_key", "", ""], ["a", "1,235", ""]]
    assert benchmark.memory_grid(rows[:1]) == []
    assert benchmark.notes(rows) == ["a, T = 2,048: refused: too long"]
    assert benchmark.markdown([["m", "T=1"], ["a", "2"]]) == "| m | T=1 |\n| --- | ---: |\n| a | 2 |"
    assert benchmark.aligned([["m", "T=1"], ["abc", "2"]]) == "m    T=1\nabc    2"


def test_crossing_is_where_the_speedup_is_one_on_logarithmic_axes():
    assert crossing([100, 400], [0.5, 2.0]) == pytest.approx(200)
    assert crossing([400, 100], [2.0, 0.5]) == pytest.approx(200)
    assert crossing([100, 1000], [0.1, 10**0.5]) == pytest.approx(10 ** (2 + 2 / 3))
    assert crossing([10, 100, 1000], [0.1, 1.0, 2.0]) == pytest.approx(100)
    with pytest.raises(ValueError, match="do not pass 1"):
        crossing([10, 100], [2.0, 3.0])


def line(mechanism, medians, spread=0.0):
    return [row(mechanism, length, median, spread) for length, median in zip([100, 400, 1600], medians, strict=True)]


@pytest.mark.parametrize(
    ("medians", "spread", "sentence", "words"),
    [
        ([4, 1, 1], 0, "fast passes query_key at about T = 200", "faster from T ≈ 200"),
        ([1, 4, 4], 0, "fast falls behind query_key at about T = 200", "slower from T ≈ 200"),
        (
            [4, 1, 4],
            0,
            "fast passes query_key at about T = 200 and falls behind query_key at about T = 800",
            "faster from T ≈ 200, slower from T ≈ 800",
        ),
        ([1, 1, 1], 0, "fast is faster than query_key at T = 100, 400, 1,600", "faster"),
        ([1, 2, 1], 0, "fast is faster than query_key at T = 100, 1,600; level at T = 400", "faster at T = 100, 1,600"),
        ([4, 4, 4], 0, "fast never passes query_key within the lengths measured (100, 400, 1,600)", "slower"),
        (
            [4, 4, 2],
            0,
            "fast never passes query_key within the lengths measured (100, 400, 1,600); level at T = 1,600",
            "slower",
        ),
        # Level at 400, a little above 1 there: it is passed between 100 and 400, where the speed-up is 1.
        ([4, 1.999, 0.5], 0.01, "fast passes query_key at about T = 400", "faster from T ≈ 400"),
        ([2.1, 1.9, 2.1], 0.5, "fast and query_key are level: they differ by less than the measurements spread", "level"),
    ],
)
def test_standing_says_where_the_baseline_is_passed_and_makes_nothing_of_noise(medians, spread, sentence, words):
    found = standing(line("fast", medians, spread), line("query_key", [2, 2, 2]))
    assert found.sentence("fast", "query_key") == sentence
    assert found.words() == words


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_make_no_comparison_however_far_apart(rounds):
    fast, base = (
        [Row(**{**vars(row), "rounds": rounds}) for row in line(*of)] for of in (("fast", [4, 1, 1]), ("base", [2] * 3))
    )
    found = standing(fast, base)
    assert (found.crossings, found.faster, found.slower) == ((), (), ())
    assert found.sentence("fast", "base") == "fast and base: too few rounds to compare (at least 3)"
    assert found.words() == "too few rounds to compare"
    enough = [[Row(**{**vars(row), "rounds": 3}) for row in rows] for rows in (fast, base)]
    assert standing(*enough).words() == "faster from T ≈ 200"


def test_lengths_without_a_result_do_not_count():
    own = [Row("fast", "layer", "training", 100, 2, "fp32", False, note="skipped"), *line("fast", [4, 4, 1])[1:]]
    base = line("query_key", [2, 2, 2])
    assert standing(own, base).crossings == ((pytest.approx(800), True),)
    assert standing(own[:1], base).sentence("fast", "query_key") == "fast was not measured"
    assert standing(own, base[:1]).words() == "not measured"


def pictured(rows, tmp_path):
    names = benchmark.draw(rows, "query_key", "Attention", tmp_path)
    pictures = [imread(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for pixels in pictures:
        assert len(np.unique(pixels[::3, ::3, :3].reshape(-1, 3), axis=0)) > 50
    return names, [pixels.shape[:2] for pixels in pictures]


def everywhere(rows):
    """The rows in all four tables of a precision."""
    places = [{"scope": scope, "direction": kind} for scope in ("operator", "layer") for kind in ("inference", "training")]
    return [Row(**{**vars(row), **place}) for place in places for row in rows]


def test_a_picture_has_a_panel_a_table_and_another_for_memory(tmp_path):
    rows = [*line("query_key", [2, 2, 2]), *line("fast", [4, 1, 1])]
    rows = [Row(**{**vars(row), "frames_per_s": 1000 / row.median_ms}) for row in rows]
    assert pictured(everywhere(rows), tmp_path) == (["benchmark.png"], [(int(110 * 8.9), 2200)])
    rows = [Row(**{**vars(row), "peak_mib": 3.0 if row.mechanism == "fast" else 0.0}) for row in rows]
    rows.append(Row("never", "layer", "training", 100, 2, "fp32", False, note="out of memory"))
    assert pictured(everywhere(rows), tmp_path) == (["benchmark.png"], [(int(110 * 17.3), 2200)])


def test_rings_lie_where_the_curves_of_a_mechanism_and_the_baseline_meet(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig

    def remember(figure, *args, **options):
        figures.append(figure)
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    rows = [*line("query_key", [2, 2, 4]), *line("fast", [4, 1, 1]), *line("nothing", [1e-6] * 3)]
    rows = [Row(**{**vars(row), "frames_per_s": 1e6 / row.median_ms}) for row in rows]
    benchmark.draw(rows, "query_key", "Attention", tmp_path)
    (axis,) = figures[0].axes
    lines = {line.get_label(): line for line in axis.lines}
    assert {"query_key", "fast: faster from T ≈ 200", "nothing: faster"} <= lines.keys()
    assert lines["query_key"].get_ydata().tolist() == pytest.approx([2, 2, 4])
    (ring,) = (line for line in axis.lines if line.get_markersize() == 10)
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((200, 2))
    assert ring.get_color() == lines["fast: faster from T ≈ 200"].get_color()
    assert axis.get_ylim()[0] == pytest.approx(2 / 50)  # what costs nothing is out of sight


def test_each_precision_has_a_picture_of_its_own(tmp_path):
    rows = [row("query_key", length, 2.0, frames_per_s=1000.0) for length in (100, 400)]
    rows += [Row(**{**vars(row), "precision": "bf16", "compiled": True}) for row in rows]
    assert pictured(rows, tmp_path) == (["benchmark.png", "benchmark-bf16-compiled.png"], [(517, 1100)] * 2)


def test_the_report_has_every_table(tmp_path):
    rows = [*line("query_key", [2, 2, 2]), *line("fast", [4, 1, 1])]
    rows.append(Row("fast", "layer", "training", 6400, 2, "fp32", False, note="refused: long"))
    text = benchmark.report(everywhere(rows), "query_key", ["What it is."])
    for title in ("operator, inference", "operator, training", "layer, inference", "layer, training"):
        assert f"## {title}, fp32, ms\n\n| mechanism | T=100 | T=400 | T=1,600 | T=6,400 |\n" in text
    assert text.count("- fast passes query_key at about T = 200\n") == 4
    assert text.count("- fast, T = 6,400: refused: long\n") == 4


# Attention


def test_every_mechanism_length_scope_and_direction_has_a_row():
    rows = run()
    places = [(row.scope, row.direction, row.length, row.mechanism) for row in rows]
    expected = {
        (scope, direction, length, mechanism)
        for scope in ("operator", "layer")
        for direction in ("inference", "training")
        for length in (6, 12)
        for mechanism in ("query_key", "synthesizer_random")
    }
    assert set(places) == expected
    assert len(places) == len(expected)
    assert not [row for row in rows if row.note]
    for row in rows:
        assert row.batch == 24 // row.length
        assert row.q25_ms <= row.median_ms <= row.q75_ms
        assert row.frames_per_s * row.median_ms == pytest.approx(1000 * 24)
        table = 2 * row.length**2 if row.mechanism == "synthesizer_random" else 0
        linear = 0 if row.scope == "operator" else (16 * 16 + 16) * (2 if row.mechanism == "synthesizer_random" else 4)
        assert row.parameters == table + linear
        (base,) = (
            other for other in rows if (other.panel, other.length, other.mechanism) == (row.panel, row.length, "query_key")
        )
        assert row.speedup == pytest.approx(base.median_ms / row.median_ms)


def test_real_frames_count_where_frames_are_padded():
    for row in run(padded=0.5, scopes=["layer"]):
        assert row.frames_per_s * row.median_ms == pytest.approx(1000 * 12)


def test_a_batch_has_a_sequence_at_least():
    assert {row.batch for row in run(lengths=[100], directions=["inference"])} == {1}


def test_a_mechanism_that_computes_something_else_is_not_timed(monkeypatch):
    attend = SynthesizerRandom.attend
    monkeypatch.setattr(SynthesizerRandom, "attend", lambda self, value, valid: 1.02 * attend(self, value, valid))
    rows = run()
    wrong = [row for row in rows if row.mechanism == "synthesizer_random"]
    assert all(row.note.startswith("wrong: its output in fp32 differs from weights() @ value by ") for row in wrong)
    assert all(row.median_ms is None for row in wrong)
    assert all(row.median_ms for row in rows if row.mechanism == "query_key")


def test_a_mistake_in_training_or_with_padding_only_is_seen_too(monkeypatch):
    attend = SynthesizerRandom.attend

    def mistaken(self, value, valid):
        wrong = torch.is_grad_enabled() if valid is None else True
        return attend(self, value, valid).flip(2) if wrong else attend(self, value, valid)

    monkeypatch.setattr(SynthesizerRandom, "attend", mistaken)
    assert not [row for row in run(directions=["inference"]) if row.note]
    for changes in ({"directions": ["training"]}, {"directions": ["inference"], "padded": 0.3}):
        assert len([row for row in run(**changes) if row.note.startswith("wrong: ")]) == 4


def test_a_refusal_is_a_row_with_its_reason():
    rows = run(positions="rotary", scopes=["layer"])
    refused = [row for row in rows if row.mechanism == "synthesizer_random"]
    expected = "refused: rotary positions turn queries and keys but SynthesizerRandom has none: set positions=sinusoid"
    assert [row.note for row in refused] == [expected] * 4
    assert all(row.median_ms for row in rows if row.mechanism == "query_key")


def test_running_out_of_memory_is_a_row_and_the_rest_goes_on(monkeypatch):
    attend = SynthesizerRandom.attend

    def large(self, value, valid):
        if value.shape[2] == 12 and value.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return attend(self, value, valid)

    monkeypatch.setattr(SynthesizerRandom, "attend", large)
    notes = {(row.scope, row.direction, row.length, row.mechanism): row.note for row in run() if row.note}
    assert notes == {(scope, "training", 12, "synthesizer_random"): "out of memory" for scope in ("operator", "layer")}


def test_long_sequences_are_skipped_where_an_entry_says_so():
    mechanisms = [{"name": "synthesizer_random", "label": "table", "max_length": 6}]
    rows = run(mechanisms=mechanisms, scopes=["layer"], directions=["training"])
    assert [(row.mechanism, row.length, row.note) for row in rows] == [
        ("query_key", 6, ""),
        ("table", 6, ""),
        ("query_key", 12, ""),
        ("table", 12, "skipped: longer than max_length 6"),
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scope", ["operator", "layer"])
@pytest.mark.parametrize("name", ["query_key", "synthesizer_dense"])
def test_training_computes_every_gradient_in_the_precision_of_training(name, scope, precision):
    what = AttentionBenchmark(**SMALL | {"precisions": [precision]})
    layer = what._layer(Entry(name, name), 6)
    panel = Panel(precision, False, scope, "training")
    inputs = what._inputs(4, 6, panel)
    gradients = what._call(layer, inputs, panel)()
    module = layer if scope == "layer" else layer.mechanism
    taken = ["hidden"] if scope == "layer" else sorted(layer.mechanism.inputs)
    assert [tuple(gradient.shape) for gradient in gradients] == [
        *(tuple(inputs[name].shape) for name in taken),
        *(tuple(parameter.shape) for parameter in module.parameters()),
    ]
    low = torch.float32 if scope == "layer" else {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {gradient.dtype for gradient in gradients[: len(taken)]} == {low}
    assert {gradient.dtype for gradient in gradients[len(taken) :]} <= {torch.float32}
    assert all(parameter.grad is None for parameter in module.parameters())
    with torch.no_grad():
        output = what._call(layer, inputs, panel._replace(direction="inference"))()
    assert output.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert not output.requires_grad


def test_hashing_has_a_recall_at_every_length():
    mechanisms = [
        {"name": "lsh_simple", "label": "all", "overrides": {"search": {"attended_keys": 64}, "num_bits": 4}},
        {"name": "lsh_simple", "label": "few", "overrides": {"search": {"attended_keys": 1}, "num_bits": 4}, "max_length": 12},
        "synthesizer_random",
    ]
    rows = run(mechanisms=mechanisms, lengths=[12, 64], directions=["inference"])
    recalls = {(row.mechanism, row.length): set() for row in rows}
    for each in rows:
        recalls[each.mechanism, each.length].add(each.recall)
    assert recalls["all", 12] == recalls["all", 64] == {1}  # every key is attended to
    (found,) = recalls["few", 12]
    assert found == pytest.approx(1 / 12)  # one of twelve, all of which are among the 32 best
    assert recalls["few", 64] == recalls["query_key", 12] == recalls["synthesizer_random", 64] == {None}


def test_dropout_is_that_of_the_config_not_of_the_mechanisms_file():
    for dropout in (0.0, 0.25):
        what = AttentionBenchmark(**SMALL | {"dropout": dropout})
        assert {what._layer(entry, 6).mechanism.dropout for entry in what.entries} == {dropout}


def test_own_positions_are_those_of_the_mechanisms_file():
    what = AttentionBenchmark(**SMALL | {"positions": "own"})
    kinds = {entry.name: type(what._positions(entry, (16, 2, 6))).__name__ for entry in what.entries}
    assert kinds == {"query_key": "Rotary", "synthesizer_random": "Sinusoid"}


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_compiled_forms_are_compiled_for_the_length_and_compared_with_the_eager_ones(monkeypatch, factor):
    asked = []

    def compile(module, **options):
        asked.append(options)
        return lambda **arguments: factor * module(**arguments)

    monkeypatch.setattr(torch, "compile", compile)
    rows = run(compile=[False, True], scopes=["layer"], lengths=[6])
    assert asked == [{"dynamic": False, "fullgraph": True}] * 4
    notes = {row.note for row in rows if row.compiled}
    assert notes == ({""} if factor == 1 else {"wrong: its output in fp32 differs from the eager form by 50.0% of the norm"})
    assert {row.note for row in rows if not row.compiled} == {""}


def test_entries_are_names_or_mappings():
    assert Entry.of("query_key") == Entry("query_key", "query_key")
    given = {"name": "synthesizer_random", "overrides": {"init": "normal"}}
    assert Entry.of(given) == Entry("synthesizer_random", "synthesizer_random init=normal", {"init": "normal"})
    assert Entry.of(given | {"label": "mine", "max_length": 9}) == Entry("synthesizer_random", "mine", {"init": "normal"}, 9)
    what = AttentionBenchmark(**SMALL | {"mechanisms": ["synthesizer_random", "query_key", given]})
    assert [entry.label for entry in what.entries] == ["query_key", "synthesizer_random", "synthesizer_random init=normal"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanisms": ["query_kye"]}, r"no attention 'query_kye' \(did you mean query_key\?\); there are .*synthesizer_dense"),
        ({"mechanisms": [{"name": "query_key", "lable": "x"}]}, r"no key 'lable' \(did you mean label\?\)"),
        ({"mechanisms": ["synthesizer_dense"] * 2}, "2 entries are called 'synthesizer_dense': give each a label"),
        ({"precisions": ["fp8"]}, r"benchmark.precisions: no 'fp8'.*; there are fp32, bf16, fp16"),
        ({"scopes": []}, "benchmark.scopes is empty"),
        ({"lengths": []}, "benchmark.lengths is empty"),
        ({"lengths": [6, 0]}, "benchmark.lengths must be at least 1, found 0"),
        ({"embed_dim": 15}, "benchmark.embed_dim=15 is no multiple of benchmark.num_heads=2"),
        ({"padded": 1.0}, "benchmark.padded=1.0: expected at least 0 and less than 1"),
        ({"positions": "rotery"}, r"no 'rotery' \(did you mean rotary\?\)"),
        ({"device": "cuda:99"}, "device=cuda:99 is not here"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        AttentionBenchmark(**SMALL | changes)
    assert "\n" not in str(error.value)


def test_what_to_run_next_is_the_fastest_mechanism_that_learns_attention():
    given = {"name": "synthesizer_random", "label": "mine", "overrides": {"init": "normal"}}
    what = AttentionBenchmark(**SMALL | {"mechanisms": [given, "uniform"]})
    rows = [*line("query_key", [1, 1, 3]), *line("mine", [2, 2, 2]), *line("uniform", [1, 1, 1])]
    assert what.next_command(rows) == "audiot pretrain attention=synthesizer_random attention.init=normal"
    assert what.next_command(line("uniform", [1, 1, 1])) == "audiot benchmark --help"
    hashed = {
        "name": "lsh_simple",
        "label": "hashed",
        "overrides": {"search": {"name": "chunked", "chunk_size": 8}, "num_bits": 4},
    }
    what = AttentionBenchmark(**SMALL | {"mechanisms": [hashed]})
    expected = "audiot pretrain attention=lsh_simple attention/search=chunked attention.search.chunk_size=8 attention.num_bits=4"
    assert what.next_command(line("hashed", [1, 1, 1])) == expected


@pytest.mark.parametrize("option", ["attention", "attention_gpu"])
def test_the_presets_name_every_mechanism_and_build_them(option):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        config = plain(compose("benchmark", [f"benchmark={option}", "run_dir=run", "data_dir=data"]).benchmark)
    config.pop("compare")
    what = instantiate(config | {"device": "cpu", "graphs": False}, seed=0)
    assert {entry.name for entry in what.entries} == set(names())
    for entry in what.entries:
        layer = what._layer(entry, 16)
        assert layer(torch.zeros(1, 16, what.embed_dim)).shape == (1, 16, what.embed_dim)
    assert math.prod(what.lengths) > 1


def test_the_baseline_is_checked_like_every_other(monkeypatch):
    monkeypatch.setattr(QueryKey, "attend", lambda self, query, key, value, valid, positions: value)
    rows = run(scopes=["layer"], directions=["inference"])
    assert all(row.note.startswith("wrong") for row in rows if row.mechanism == "query_key")
    assert [row.speedup for row in rows] == [None] * 4


def test_cuda_graphs_need_a_cuda_device():
    with pytest.raises(ValueError, match=r"graphs=true needs a CUDA device, found cpu: set benchmark\.graphs=false"):
        run(graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_computes_what_the_call_computes():
    result = torch.zeros(3, device="cuda")
    call = as_graph(lambda: result.add_(1), torch.device("cuda"))
    result.zero_()
    call()
    call()
    assert result.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mechanisms": [{"name": "local", "overrides": {"windw": 3}}]},
            "local has no parameter 'windw' (did you mean window?); there are ",
        ),
        ({"mechanisms": [{"name": "local", "overrides": 3}]}, "overrides of local are 3: expected {parameter: value}"),
        ({"mechanisms": [{"name": "local", "max_length": "x"}]}, "max_length of local is 'x': set it to a whole number"),
        ({"mechanisms": [{"name": "local", "max_length": 0}]}, "max_length of local is 0: set it to at least 1"),
        ({"mechanisms": [3]}, "3 is neither a name nor"),
        ({"lengths": [1.5]}, "benchmark.lengths: one is 1.5: set it to a whole number"),
        ({"lengths": [True]}, "benchmark.lengths: one is True: set it to a whole number"),
        ({"lengths": ["a"]}, "benchmark.lengths: one is 'a': set it to a whole number"),
        ({"compile": [1]}, "benchmark.compile: one is 1: set it to true or false"),
        ({"seconds": -1.0}, "benchmark.seconds is -1.0: set it to 0 or more"),
        ({"graphs": 0}, "benchmark.graphs is 0: set it to true or false"),
        ({"seconds": math.inf}, "benchmark.seconds is inf: set it to 0 or more, and finite"),
        ({"seconds": math.nan}, "benchmark.seconds is nan: set it to 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        AttentionBenchmark(**SMALL | changes)
    assert str(error.value).startswith("benchmark.")
    assert "\n" not in str(error.value)


def test_a_picture_without_any_value_is_not_drawn(tmp_path):
    rows = run(embed_dim=4, num_heads=4, positions="rotary", scopes=["layer"])  # heads of one element can't turn
    assert all(row.median_ms is None and "even head size" in row.note for row in rows if row.mechanism == "query_key")
    assert benchmark.draw([row for row in rows if row.median_ms is None], "query_key", "", tmp_path) == []


def test_reasons_are_printed_before_anything_is_drawn(tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(benchmark, "draw", fail)
    task = SimpleNamespace(overrides=SimpleNamespace(task=[]))
    monkeypatch.setattr("audiot.benchmark.attention.HydraConfig", SimpleNamespace(get=lambda: task))
    settings = SMALL | {"embed_dim": 4, "num_heads": 4, "positions": "rotary", "scopes": ["layer"]}
    del settings["seed"]
    target = {"_target_": "audiot.benchmark.attention.AttentionBenchmark"}
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="no picture"):
        main(OmegaConf.create({"run_dir": str(tmp_path), "seed": 0, "benchmark": target | settings}))
    assert "query_key, T = 6, 12: refused: " in caplog.text
