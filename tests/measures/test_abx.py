"""ABX errors beside triples that are counted one by one, and beside fastabx."""

import functools
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixed_set import FRAMES, fixed_set, item_file
from test_warping import plain_warp

from audiot.downstream.bootstrap import Bootstrap
from audiot.extraction.extract import Utterance
from audiot.measures import abx, averages
from audiot.measures.abx import Unit, errors, make_cells
from audiot.measures.averages import Average, Errors, choose_unit
from audiot.measures.measure import find_spans
from audiot.measures.warping import Distance

NAMES = {"angular": "angular", "euclidean": "euclidean", "kl": "kl_symmetric"}  # audiot's, fastabx's
FASTABX = {  # error rates by fastabx 0.9.0 without limits
    ("angular", "within", "within"): 0.178511,
    ("angular", "within", "any"): 0.163068,
    ("angular", "across", "within"): 0.231540,
    ("angular", "across", "any"): 0.187446,
    ("euclidean", "within", "within"): 0.149035,
    ("euclidean", "within", "any"): 0.142358,
    ("euclidean", "across", "within"): 0.239458,
    ("euclidean", "across", "any"): 0.178121,
    ("kl", "within", "within"): 0.171296,
    ("kl", "within", "any"): 0.161890,
    ("kl", "across", "within"): 0.166272,
    ("kl", "across", "any"): 0.170312,
}
FRONT_END = SimpleNamespace(
    features=SimpleNamespace(sample_rate=16000, frame_centers=lambda count: torch.arange(count) * 320 + 160), stack=1
)


def spans_of(units, names):
    utterances = [Utterance(name, name, 16000, 16000) for name in names]
    return find_spans(FRONT_END, utterances, units, [FRAMES] * len(names))


def error_of(units, states, distance, speaker, context, **limits):
    frames = torch.cat(list(states.values()))
    frames = frames.softmax(1) if distance == "kl" else frames
    spans = spans_of(units, states)
    cells = make_cells(units, speaker, context, **limits)
    return Average(cells, units, None).whole(errors(cells, frames, spans.firsts, spans.counts, Distance(distance)))


def copies(units, name, draw):
    """The units of the drawn speakers (``name`` is speaker) or contexts (before); each draw is a copy of its own, ``x#1``."""
    return [
        Unit(**{**vars(unit), name: f"{drawn}#{number}"})
        for number, drawn in enumerate(draw)
        for unit in units
        if getattr(unit, name) == drawn
    ]


def counted(units, states, distance, speaker, context):
    """The error, triple by triple, and the number of triples. Copies of a speaker, ``x#1`` and ``x#2``, are no two speakers."""
    spans = spans_of(units, states)
    measure = Distance(distance)
    prepared = measure.prepared(torch.cat(list(states.values())))

    @functools.cache
    def far(one, other):
        first, second = (prepared[first : first + count] for first, count in (one, other))
        return plain_warp(measure.between(first, second).numpy())

    places = list(zip(spans.firsts.tolist(), spans.counts.tolist(), strict=True))
    person = [unit.speaker.partition("#")[0] for unit in units]
    cells, triples = {}, 0
    for a, b, x in permutations(range(len(units)), 3):
        one, two, three = units[a], units[b], units[x]
        if one.phone != three.phone or one.phone == two.phone or one.speaker != two.speaker:
            continue
        if three.speaker != one.speaker if speaker == "within" else person[x] == person[a]:
            continue
        if context == "within" and len({(unit.before, unit.after) for unit in (one, two, three)}) > 1:
            continue
        around = (one.before, one.after) if context == "within" else ()
        to_a, to_b = far(places[x], places[a]), far(places[x], places[b])
        cell = (one.phone, two.phone), one.speaker, (around, three.speaker)
        cells.setdefault(cell, []).append(0.5 if to_a == to_b else float(to_a > to_b))
        triples += 1
    by_speaker, by_pair = {}, {}
    for (pair, speaker, _), found in cells.items():
        by_speaker.setdefault((pair, speaker), []).append(np.mean(found))
    for (pair, _), found in by_speaker.items():
        by_pair.setdefault(pair, []).append(np.mean(found))
    return np.mean([np.mean(found) for found in by_pair.values()]) if cells else np.nan, triples, len(cells)


def some(seed=0, count=26):
    """A few units of the fixed set with contexts that meet."""
    units, states = fixed_set()
    chosen = np.random.RandomState(seed).choice(len(units), count, replace=False)
    context = {unit: "pq"[number % 2] for number, unit in enumerate(units)}
    return [Unit(**{**vars(unit), "before": context[unit], "after": "r"}) for unit in (units[n] for n in chosen)], states


@pytest.mark.parametrize("speaker", ["within", "across"])
@pytest.mark.parametrize("context", ["within", "any"])
@pytest.mark.parametrize("budget", [2**24, 200])
def test_errors_are_those_of_triples_counted_one_by_one(monkeypatch, speaker, context, budget):
    monkeypatch.setitem(abx.BUDGET, "cpu", budget)
    monkeypatch.setattr(abx, "ROWS", budget)
    units, states = some()
    expected, triples, cells = counted(units, states, "euclidean", speaker, context)
    assert error_of(units, states, "euclidean", speaker, context) == pytest.approx(expected, abs=1e-6)
    found = make_cells(units, speaker, context)
    assert (found.num_triples(), len(found.a)) == (triples, cells)


@pytest.mark.parametrize(("distance", "speaker", "context"), FASTABX)
def test_errors_are_those_that_fastabx_gave(distance, speaker, context):
    found = error_of(*fixed_set(), distance, speaker, context)
    assert 100 * found == pytest.approx(100 * FASTABX[distance, speaker, context], abs=0.01)


def by_fastabx(folder, distance, speaker, context):
    fastabx = pytest.importorskip("fastabx")
    units, states = fixed_set()
    for name, frames in states.items():
        torch.save(frames.softmax(1) if distance == "kl" else frames, folder / f"{name}.pt")
    (folder / "x.item").write_text(item_file(units))
    choice = {"speaker": speaker, "context": context, "distance": NAMES[distance]}
    limits = {"max_size_group": None, "max_x_across": None}
    return fastabx.zerospeech_abx(folder / "x.item", folder, frequency=50, device="cpu", progress=False, **choice, **limits)


@pytest.mark.parametrize(("distance", "speaker", "context"), FASTABX)
def test_errors_are_those_of_fastabx_that_is_installed(tmp_path, distance, speaker, context):
    expected = by_fastabx(tmp_path, distance, speaker, context)
    found = error_of(*fixed_set(), distance, speaker, context)
    assert 100 * found == pytest.approx(100 * expected, abs=0.01)


def one_frame(*phones_and_values, speaker="s", before="", name="file0"):
    return [Unit(name, 0.02 * n, 0.02 * n + 0.015, phone, before, "", speaker) for n, (phone, _) in enumerate(phones_and_values)]


def test_an_error_by_hand():
    """A at 0 and 1, B at 0.4: 1 is nearer to 0.4 than to 0, 0 is nearer to 0.4 than to 1. B alone has no X."""
    rows = [("a", 0.0), ("a", 1.0), ("b", 0.4)]
    states = {"file0": torch.tensor([[value] for _, value in rows] + [[9.0]] * (FRAMES - 3))}
    assert error_of(one_frame(*rows), states, "euclidean", "within", "any") == 1
    states["file0"][2] = 0.9  # 1 is nearer to 0.9, and so is 0
    assert error_of(one_frame(*rows), states, "euclidean", "within", "any") == 1
    states["file0"][2] = 2.0  # 1 is as near to 2 as to 0
    assert error_of(one_frame(*rows), states, "euclidean", "within", "any") == 0.25
    states["file0"][2] = 0.0  # 0 is nearer to 0, its like; 1 is as near to both
    assert error_of(one_frame(*rows), states, "euclidean", "within", "any") == 0.75


def test_limits_take_a_part_by_seed():
    units, states = fixed_set()
    cells = make_cells(units, "across", "any", 3, 1)
    everything = make_cells(units, "across", "any")
    assert cells.sizes.max() == 3 < everything.sizes.max()
    pairs = list(zip(cells.a.tolist(), cells.b.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) == len(set(zip(everything.a.tolist(), everything.b.tolist(), strict=True)))
    assert (cells.phones[cells.a] == cells.phones[cells.x]).all()
    assert (cells.speakers[cells.a] != cells.speakers[cells.x]).all()
    again, other = make_cells(units, "across", "any", 3, 1), make_cells(units, "across", "any", 3, 1, seed=1)
    assert (again.members == cells.members).all()
    assert (again.x == cells.x).all()
    assert (other.members != cells.members).any()
    # What is chosen does not depend on the order of the units.
    turned = make_cells(units[::-1], "across", "any", 3, 1)
    assert {units[::-1][n] for n in turned.members} == {units[n] for n in cells.members}
    whole = error_of(units, states, "angular", "across", "any", max_units=100, max_speakers=9)
    assert whole == error_of(units, states, "angular", "across", "any")


def test_silences_are_in_no_triple():
    units, _ = fixed_set()
    quiet = [Unit(**{**vars(unit), "silent": unit.phone == "a"}) for unit in units]
    cells = make_cells(quiet, "within", "any")
    assert {quiet[n].phone for n in cells.members} == {"b", "c", "d"}
    assert len(make_cells([], "within", "any").a) == 0


def test_wrong_limits_are_refused():
    for wrong, message in (
        ({"speaker": "between"}, "speaker must be one of within, across, found 'between'"),
        ({"context": "wide"}, "context must be one of within, any, found 'wide'"),
        ({"max_units": 1}, "max_units must be at least 2, or null for no limit, found 1"),
        ({"max_speakers": 0}, "max_speakers must be at least 1, or null for no limit, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cells([], **{"speaker": "within", "context": "any", **wrong})


def resampled_as_counted(units, states, speaker, context, kind, draws):
    """Compare the errors of draws with those of corpora that are written out and counted triple by triple."""
    spans = spans_of(units, states)
    cells = make_cells(units, speaker, context)
    found = errors(cells, torch.cat(list(states.values())), spans.firsts, spans.counts, Distance("euclidean"))
    average = Average(cells, units, kind)
    name = {"speaker": "speaker", "context": "before"}[kind]
    names = sorted({getattr(unit, name) for unit in units})
    counts = torch.tensor([[draw.count(one) for one in names] for draw in draws], dtype=torch.float64)
    expected = [counted(copies(units, name, draw), states, "euclidean", speaker, context)[0] for draw in draws]
    assert average.resampled(found, counts).tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    return expected


@pytest.mark.parametrize("speaker", ["within", "across"])
@pytest.mark.parametrize("context", ["within", "any"])
@pytest.mark.parametrize("entries", [4_000_000, 1])
def test_errors_of_drawn_speakers_are_those_of_a_corpus_of_them(monkeypatch, speaker, context, entries):
    monkeypatch.setattr(averages, "ENTRIES", entries)
    units, states = some(count=34)
    names = sorted({unit.speaker for unit in units})
    draws = [[names[0]] * 2 + names[1:2], [names[0]] + [names[1]] * 3, [names[2]] * 2, names]
    expected = resampled_as_counted(units, states, speaker, context, "speaker", draws)
    assert len(set(expected)) == len(draws)
    assert np.isnan(expected).any() == (speaker == "across"), "of one speaker alone"


@pytest.mark.parametrize("speaker", ["within", "across"])
def test_errors_of_drawn_contexts_are_those_of_a_corpus_of_them(speaker):
    units, states = some(count=34)
    expected = resampled_as_counted(units, states, speaker, "within", "context", [["p", "p"], ["p", "q", "q"], ["q", "p"]])
    assert len(set(expected)) == 3


def test_the_interval_is_that_of_resampled_speakers():
    """Cells of one pair of phones in both orders, of ten speakers: the mean's own interval, by its standard error."""
    units = [unit for number in range(10) for unit in one_frame(("a", 0), ("a", 0), ("b", 0), ("b", 0), speaker=str(number))]
    cells = make_cells(units, "within", "any")
    draw = np.random.default_rng(0).random(10)
    of_cells = draw[cells.speakers[cells.a]]
    average = Average(cells, units, "speaker")
    assert average.whole(of_cells) == pytest.approx(draw.mean())
    bootstrap = Bootstrap("speaker", "", 4000, 0, {str(number): str(number) for number in range(10)}, keep=True)
    found = bootstrap.intervals(Errors({"0/within": (average, of_cells)}), ["test/0/within"])
    (low, high), deviation = found["intervals"]["test/0/within"], draw.std() / 10**0.5
    assert low == pytest.approx(draw.mean() - 1.96 * deviation, abs=0.2 * deviation)
    assert high == pytest.approx(draw.mean() + 1.96 * deviation, abs=0.2 * deviation)
    assert found["draws"]["test/0/within"].std() == pytest.approx(deviation, rel=0.1)


def test_eight_speakers_are_resampled_and_of_fewer_their_contexts():
    def units(speakers, contexts):
        rows = [("a", 0), ("b", 0)]
        named = [{"speaker": str(one), "before": str(around)} for one in range(speakers) for around in range(contexts)]
        return [unit for names in named for unit in one_frame(*rows, **names)]

    assert choose_unit(units(8, 1), "any") == ("speaker", "the test has at least 8")
    few = "the test has fewer than 8 speakers (7)"
    assert choose_unit(units(7, 8), "within") == ("context", few)
    assert choose_unit(units(7, 7), "within") == (None, f"{few}, and fewer than 8 contexts (7)")
    assert choose_unit(units(7, 8), "any") == (None, f"{few}, and with context=any there are no contexts to resample instead")
    silent = [Unit(**{**vars(unit), "silent": unit.speaker == "7"}) for unit in units(8, 8)]
    assert choose_unit(silent, "within")[1] == few
