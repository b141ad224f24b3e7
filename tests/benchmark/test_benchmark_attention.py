"""The attention benchmark: what it measures, what it checks and what it refuses. No time is asserted."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from small_settings import SMALL
from timed_rows import line

import audiot.benchmark.attention
from audiot.attention import names
from audiot.attention.query_key import QueryKey
from audiot.attention.synthesizer_random import SynthesizerRandom
from audiot.base.config import plain
from audiot.benchmark.attention import AttentionBenchmark
from audiot.benchmark.attention_report import draw
from audiot.benchmark.attention_results import Panel
from audiot.benchmark.entries import Entry


def run(**changes):
    return [row for rows in AttentionBenchmark(**SMALL | changes).run() for row in rows]


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


def test_the_plain_baseline_comes_first_and_once():
    given = {"name": "synthesizer_random", "overrides": {"init": "normal"}}
    what = AttentionBenchmark(**SMALL | {"mechanisms": ["synthesizer_random", "query_key", given]})
    assert [entry.label for entry in what.entries] == ["query_key", "synthesizer_random", "synthesizer_random init=normal"]


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
    assert draw([row for row in rows if row.median_ms is None], "query_key", "", tmp_path) == []


def test_reasons_are_printed_before_anything_is_drawn(tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(audiot.benchmark.attention, "draw", fail)
    what = AttentionBenchmark(**SMALL | {"embed_dim": 4, "num_heads": 4, "positions": "rotary", "scopes": ["layer"]})
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="no picture"):
        what.report(tmp_path, {"device": "a CPU", "threads": 1, "torch": "2.11", "command": "audiot benchmark"})
    assert "query_key, T = 6, 12: refused: " in caplog.text
