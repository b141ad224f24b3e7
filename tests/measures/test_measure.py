"""Where units lie among frames, and the measures of whole upstreams."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from audiot.downstream.upstream import FeaturesUpstream, untrained_encoder
from audiot.extraction.extract import Utterance
from audiot.measures.abx import Unit
from audiot.measures.measure import Settings, encode, find_spans, measure

CPU = torch.device("cpu")


def front_end(hop, stack):
    """Frames around hop, 2·hop, … at 1000 Hz."""
    features = SimpleNamespace(sample_rate=1000, frame_centers=lambda count: torch.arange(1, count + 1) * hop)
    return SimpleNamespace(features=features, stack=stack)


def unit(onset, offset, phone="a", utterance="u", silent=False):
    return Unit(utterance, onset, offset, phone, "", "", "s", silent)


def utterances(*names):
    return [Utterance(name, name, 1000, 1000) for name in names]


def test_a_frame_is_a_units_if_its_middle_lies_in_it_both_ends_included():
    units = [unit(0.015, 0.03), unit(0.03, 0.05), unit(0.031, 0.039), unit(0.095, 0.2), unit(0.01, 0.02, utterance="v")]
    spans = find_spans(front_end(10, 1), utterances("u", "v"), units, [10, 4])
    assert list(zip(spans.firsts.tolist(), spans.counts.tolist(), strict=True)) == [(1, 2), (2, 3), (3, 0), (9, 1), (10, 2)]


def test_a_label_is_that_of_the_one_interval_which_holds_the_middle():
    units = [unit(0, 0.03, "b"), unit(0.03, 0.05, "a"), unit(0.06, 0.09, "c", silent=True)]
    spans = find_spans(front_end(10, 1), utterances("u"), units, [10])
    assert spans.labels.tolist() == [1, 1, 0, 0, -1, 2, 2, 2, -1, -1]


def test_a_state_of_several_frames_lies_in_their_middle():
    spans = find_spans(front_end(10, 3), utterances("u"), [unit(0.02, 0.049), unit(0.02, 0.05)], [3])  # 20, 50, 80 ms
    assert spans.counts.tolist() == [1, 2]
    spans = find_spans(front_end(10, 2), utterances("u"), [unit(0.015, 0.034), unit(0.015, 0.035)], [3])  # 15, 35, 55 ms
    assert spans.counts.tolist() == [1, 2]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Eight recordings of two speakers, of different lengths; three phones are three tones."""
    folder = tmp_path_factory.mktemp("tones")
    draw = np.random.default_rng(0)
    found, units = [], []
    for number in range(8):
        phones = draw.permutation([0, 1, 2] * (2 + number % 2))
        tones = [np.sin(2 * np.pi * (300 + 400 * phone + 60 * (number % 2)) * np.arange(1600) / 16000) for phone in phones]
        samples = 0.2 * np.concatenate(tones) + 0.02 * draw.normal(size=1600 * len(phones))
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        found.append(Utterance(str(number), str(folder / f"{number}.wav"), len(samples), 16000))
        for place, phone in enumerate(phones):
            times = 0.1 * place, 0.1 * place + 0.1
            units.append(Unit(str(number), *times, "abc"[phone], "", "", f"s{number % 2}"))
    return found, units


def test_tones_are_told_apart(spoken, tiny):
    settings = Settings(context="any", codes=6)
    found = measure(FeaturesUpstream(tiny["features"], context=1), *spoken, [0], settings, CPU)
    rows = found.layers
    assert found.compared == {"utterances": 8, "frames": sum(60 * (1 + n % 2 / 2) - 2 for n in range(8)), "units": 60} | {
        "units_without_frames": 0
    }
    assert rows[0]["within"]["error"] < 0.05
    assert rows[0]["across"]["error"] < 0.05
    assert rows[0]["pnmi"] > 0.5
    assert list(rows[0]) == ["layer", "within", "across", "pnmi", "phone_purity", "cluster_purity", "perplexity"]


def test_passes_over_the_audio_and_batches_change_nothing(spoken, tiny):
    upstream = untrained_encoder(tiny["features"], tiny["model"])
    settings = {"context": "any", "codes": 4}
    rows = measure(upstream, *spoken, [0, 2, 1], Settings(**settings), CPU).layers
    again = measure(upstream, *spoken, [0, 2, 1], Settings(**settings, memory_gb=1e-9), CPU).layers
    assert [row["layer"] for row in rows] == [0, 2, 1]
    assert rows == again
    alone = measure(upstream, *spoken, [1], Settings(**settings, batch_s=0.5), CPU).layers
    assert alone[0]["within"]["error"] == pytest.approx(rows[2]["within"]["error"], abs=0.01)
    states = encode(upstream, spoken[0], [2], 60.0, CPU)
    expected, _ = upstream(torch.from_numpy(spoken[0][3].read(16000))[None], torch.tensor([spoken[0][3].num_samples]))
    torch.testing.assert_close(states[3][0], expected[2, 0].detach(), rtol=1e-4, atol=1e-4)


def test_units_without_a_frame_are_left_out_and_counted(spoken, tiny):
    found, units = spoken
    short = [*units, Unit("0", 0.001, 0.002, "z", "", "", "s0"), Unit("1", 0.001, 0.002, "z", "", "", "s1")]
    settings = Settings(context="any", codes=None, bootstrap={"samples": 0})
    upstream = FeaturesUpstream(tiny["features"], context=1)
    measured = measure(upstream, found, short, [0], settings, CPU)
    assert measured.compared["units_without_frames"] == 2
    assert measured.layers == measure(upstream, found, units, [0], settings, CPU).layers
    assert (measured.bootstrap, measured.draws) == ({}, {})


def test_what_cannot_be_compared_is_told(spoken, tiny, caplog):
    found, units = spoken
    upstream = FeaturesUpstream(tiny["features"], context=1)
    alone = [unit for unit in units if unit.speaker == "s0"]
    settings = {"context": "any", "codes": None}
    with caplog.at_level("INFO"):
        rows = measure(upstream, found, alone, [0], Settings(**settings), CPU).layers
    assert "across" not in rows[0]
    assert "no triple across speakers" in caplog.text
    with pytest.raises(ValueError, match="no triple across speakers: two speakers must say one phone twice"):
        measure(upstream, found, alone, [0], Settings(**settings, speaker="across"), CPU)
    for wrong, message in (
        ({"speaker": "all"}, "speaker must be within, across or both, found 'all'"),
        ({"distance": "dot"}, "distance must be one of"),
        ({"codes": 0}, "codes must be at least 1, found 0"),
        ({"bootstrap": {"samples": 20}}, "bootstrap.samples must be at least 100, or 0 for no intervals, found 20"),
        ({"bootstrap": {"unit": "speaker"}}, "bootstrap has no setting 'unit'; there are keep, samples, seed"),
        ({"memory_gb": 0}, "memory_gb must be above 0, found 0"),
        ({"max_units": 1}, "max_units must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)


def test_all_layers_and_runs_of_one_seed_are_tested_on_the_same_resampled_tests(spoken, tiny):
    found, units = spoken
    several = [Unit(**{**vars(unit), "speaker": f"{unit.speaker}{number % 5}"}) for number, unit in enumerate(units)]
    kept = {"context": "any", "codes": None, "max_units": None, "max_speakers": None}
    kept["bootstrap"] = {"samples": 200, "seed": 3, "keep": True}
    torch.manual_seed(0)
    upstream = untrained_encoder(tiny["features"], tiny["model"])
    measured = measure(upstream, found, several, [0, 1], Settings(**kept), CPU)
    how = {name: measured.bootstrap[name] for name in ("unit", "units", "samples", "why")}
    assert how == {"unit": "speaker", "units": 10, "samples": 200, "why": "the test has at least 8"}
    assert set(measured.draws) == {"0/within", "0/across", "1/within", "1/across"}
    for row in measured.layers:
        ends = np.quantile(measured.draws[f"{row['layer']}/across"], [0.025, 0.975])
        assert [row["across"]["low"], row["across"]["high"]] == pytest.approx(ends)
        assert row["across"]["low"] < row["across"]["error"] < row["across"]["high"]
    alone = measure(upstream, found, several, [1], Settings(**kept, speaker="across", seed=1), CPU)
    assert torch.equal(alone.draws["1/across"], measured.draws["1/across"])
    other = measure(upstream, found, several, [1], Settings(**kept | {"bootstrap": kept["bootstrap"] | {"seed": 4}}), CPU)
    assert not torch.equal(other.draws["1/across"], measured.draws["1/across"])


def test_where_nothing_can_be_resampled_there_is_no_interval_and_the_reason_is_there(spoken, tiny):
    settings = Settings(context="any", codes=None, speaker="within", bootstrap={"keep": True})
    measured = measure(FeaturesUpstream(tiny["features"], context=1), *spoken, [0], settings, CPU)
    assert (measured.layers[0]["within"]["low"], measured.layers[0]["within"]["high"]) == (None, None)
    why = "the test has fewer than 8 speakers (2), and with context=any there are no contexts to resample instead"
    assert measured.bootstrap == {"without": {"0/within": why}}
    assert not measured.draws
