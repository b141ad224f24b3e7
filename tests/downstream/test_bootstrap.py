"""Confidence intervals: against enumeration, scipy and tests that are written out copy by copy."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import jiwer
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score
from some import some

from audiot.data.labels import IGNORED
from audiot.downstream.bootstrap import Bootstrap, Sums, drawn, in_words, read_draws, write_draws
from audiot.downstream.ctc import CTC
from audiot.downstream.objectives import Classification, Objective, Slots
from audiot.downstream.verification import Trials, Verification, error_rates

CLASSES = ["ah", "b", "sil", "zh"]
UTTERANCES = Bootstrap("utterance", "as it is", 1000, 0, {})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def accuracy_of(rights, totals, names=None):
    names = names or [f"u{number:03d}" for number in range(len(rights))]
    table = list(zip(rights, totals, strict=True))
    return Sums.of(names, table, lambda sums: {"accuracy": sums[:, 0] / sums[:, 1]})


def interval(measured, bootstrap=UTTERANCES, name="accuracy"):
    return bootstrap.intervals(measured, {f"test/{name}": 0.5})["intervals"][f"test/{name}"]


def frame_batches():
    """Outputs, lengths and batches of 24 utterances of 3 to 12 frames, labels of which the outputs know something."""
    rng = np.random.default_rng(0)
    batches = []
    for first in range(0, 24, 4):
        lengths = torch.tensor(rng.integers(3, 13, 4))
        labels = torch.tensor(rng.integers(0, 4, (4, 12)))
        outputs = 1.5 * torch.nn.functional.one_hot(labels, 4) + draw(4, 12, 4, seed=first)
        labels[torch.arange(12) >= lengths[:, None]] = IGNORED
        labels[0, 1] = IGNORED
        ids = [f"utt{number:02d}" for number in range(first, first + 4)]
        batches.append((outputs, lengths, {"labels": labels, "ids": ids, "speakers": [name[:4] for name in ids]}))
    return batches


def filled(objective, batches):
    objective.reset("test")
    for outputs, lengths, batch in batches:
        objective.update(outputs, lengths, batch)
    return objective


def classification(batches=None):
    return filled(Classification(CLASSES), batches or frame_batches())


def slots():
    names = sorted(["action=off", "action=on", "object=heat", "object=lights"])
    labels = torch.tensor([[number % 2, 2 + number // 2 % 2] for number in range(30)])
    ids = [f"utt{number:02d}" for number in range(30)]
    return filled(Slots(names, ["action", "object"]), [(draw(30, 4), torch.ones(30), {"labels": labels, "ids": ids})])


TEXTS = [("ABBA", "ABA"), ("A CAD", "A CAB D"), ("DAD", "DAD"), ("BAD CAB", "BAD CAB"), ("A B C", "A C"), ("DAB", "BAD A")] * 3


def recogniser(unit):
    objective = CTC([" ", *"ABCD"], unit=unit)
    for number, texts in enumerate(TEXTS):
        reference, hypothesis = (" ".join(text.replace(" ", "")) if unit == "phone" else text for text in texts)
        objective.rows.append({"utterance": f"utt{number:02d}", "reference": reference, "hypothesis": hypothesis})
    return objective


def verifier(speakers=6, each=3, seed=0):
    objective = Verification(["x"], embedding_dim=4)
    ids = [f"s{speaker}-{number}" for speaker in range(speakers) for number in range(each)]
    embeddings = draw(speakers, 1, 4, seed=seed).expand(-1, each, -1).reshape(-1, 4) + 0.7 * draw(len(ids), 4, seed=seed + 1)
    return filled(objective, [(embeddings, torch.ones(len(ids)), {"ids": ids, "speakers": [name[:2] for name in ids]})])


OBJECTIVES = {
    "frames": classification,
    "slots": slots,
    "phones": lambda: recogniser("phone"),
    "characters": lambda: recogniser("character"),
    "verification": verifier,
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_test_of_every_unit_once_has_the_metrics_themselves(kind):
    objective = OBJECTIVES[kind]()
    measured = objective.measured()
    count = len(measured.utterances)
    assert measured.utterances == sorted(measured.utterances)
    found = measured.metrics(torch.arange(count), torch.ones(2, count, dtype=torch.float64))
    assert {name: values.tolist() for name, values in found.items()} == {
        name: pytest.approx([value, value], abs=1e-6) for name, value in objective.compute().items()
    }


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_intervals_contain_their_metric(kind):
    objective = OBJECTIVES[kind]()
    metrics = {f"test/{name}": value for name, value in objective.compute().items()}
    found = UTTERANCES.intervals(objective.measured(), metrics)
    assert found["intervals"].keys() == metrics.keys()
    for name, (low, high) in found["intervals"].items():
        assert low <= metrics[name] <= high
        assert low < high
    how = {"level": 0.95, "method": "percentile", "samples": 1000, "unit": "utterance", "why": "as it is"}
    names = objective.measured().utterances
    lines = "\n".join(f"{name}\t{name}" for name in names)  # every utterance is its own unit
    tests = {"seed": UTTERANCES.seed, "test": hashlib.sha256(lines.encode()).hexdigest()[:16]}
    assert found["bootstrap"] == how | {"units": len(names)} | tests


def test_draws_are_read_as_they_were_written(tmp_path):
    written = {
        "test/accuracy": torch.tensor([0.25, float("nan")], dtype=torch.float64),
        "test/macro_f1": torch.tensor([1 / 3, 1]),
    }
    write_draws(tmp_path / "draws.csv", written)
    found = read_draws(tmp_path / "draws.csv")
    assert found.keys() == written.keys()
    for name, values in written.items():
        np.testing.assert_array_equal(found[name], values)


def test_three_units_have_27_resampled_tests():
    rights, totals = [1, 3, 0], [2, 3, 4]
    everything = list(itertools.product(range(3), repeat=3))
    counts = torch.tensor([[float(chosen.count(unit)) for unit in range(3)] for chosen in everything], dtype=torch.float64)
    values = accuracy_of(rights, totals).metrics(torch.arange(3), counts)["accuracy"].tolist()
    expected = [sum(rights[unit] for unit in chosen) / sum(totals[unit] for unit in chosen) for chosen in everything]
    assert values == pytest.approx(expected)
    # Each has a probability of 1/27 = 0.037, more than a tail's 0.025: the ends are the worst and the best test.
    assert interval(accuracy_of(rights, totals)) == [0.0, 1.0]
    # Drawn tests have these values as often as the 27 do.
    exact = sorted(sum([1, 3, 0][unit] for unit in chosen) / 9 for chosen in everything)
    many = Bootstrap("utterance", "", 50_000, 0, {})
    values = many._values(accuracy_of([1, 3, 0], [3, 3, 3]), torch.arange(3), 3)["accuracy"]
    for value, count in Counter(exact).items():
        assert (values - value).abs().lt(1e-12).double().mean().item() == pytest.approx(count / 27, abs=0.006)


def test_draws_are_as_many_as_units_and_depend_on_the_key_alone():
    keys = torch.tensor([7, -3, 11])
    counts = drawn(keys, 40)
    assert counts.sum(1).tolist() == [40, 40, 40]
    assert drawn(keys[1:], 40).equal(counts[1:])
    assert counts.unique(dim=0).shape == (3, 40)
    # The number of times that a unit is drawn is binomial.
    many = drawn(torch.arange(3000), 5)
    for times in range(6):
        assert (many == times).double().mean().item() == pytest.approx(stats.binom.pmf(times, 5, 0.2), abs=0.01)


def by_scipy(statistic, count):
    found = stats.bootstrap(
        (np.arange(count),),
        statistic,
        vectorized=False,
        method="percentile",
        n_resamples=3000,
        rng=np.random.default_rng(1),
    )
    return [found.confidence_interval.low, found.confidence_interval.high]


MANY = Bootstrap("utterance", "", 4000, 3, {})


@pytest.mark.parametrize("score", some(["accuracy", "macro_f1"], ["accuracy"]))
def test_intervals_of_frames_are_those_of_scipy(score):
    batches = frame_batches()
    pairs = {}
    for outputs, _, batch in batches:
        for name, best, labels in zip(batch["ids"], outputs.argmax(-1), batch["labels"], strict=True):
            pairs[name] = (labels[labels != IGNORED].numpy(), best[labels != IGNORED].numpy())
    names = sorted(pairs)

    def by_sklearn(places):
        true, guessed = (np.concatenate([pairs[names[place]][side] for place in places]) for side in (0, 1))
        return np.equal(true, guessed).mean() if score == "accuracy" else f1_score(true, guessed, average="macro")

    assert interval(classification(batches).measured(), MANY, score) == pytest.approx(by_scipy(by_sklearn, 24), abs=0.012)


def test_macro_f1_of_a_resampled_test_leaves_out_the_classes_that_it_lacks():
    true, guessed = np.array([0, 1, 2, 0, 1]), np.array([0, 1, 0, 1, 1])
    outputs = torch.nn.functional.one_hot(torch.tensor(guessed), 4).float()
    batch = {"labels": torch.tensor(true), "ids": list("abcde")}
    counts = torch.tensor([[2.0, 0, 0, 3, 0], [0, 5, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 5, 0, 0]], dtype=torch.float64)
    measured = filled(Classification(CLASSES), [(outputs, torch.ones(5), batch)]).measured()
    found = measured.metrics(torch.arange(5), counts)["macro_f1"].tolist()
    repeated = [np.repeat(np.arange(5), row.int().numpy()) for row in counts]
    assert found == pytest.approx([f1_score(true[places], guessed[places], average="macro") for places in repeated])


def test_intervals_of_word_errors_are_those_of_scipy():
    measures = [jiwer.process_words(*texts) for texts in TEXTS]
    errors = np.array([one.substitutions + one.deletions + one.insertions for one in measures])
    words = np.array([len(reference.split()) for reference, _ in TEXTS])
    expected = by_scipy(lambda places: errors[places].sum() / words[places].sum(), len(TEXTS))
    assert interval(recogniser("character").measured(), MANY, "wer") == pytest.approx(expected, abs=0.02)


def written_out(trials, unit_of, counts):
    """Scores and kinds of a resampled test with a name for each copy of a unit, trial by trial."""
    scores, same = [], []
    for trial in trials:
        first, second = unit_of[trial["first"]], unit_of[trial["second"]]
        for one in range(counts[first]):
            for other in range(counts[second]):
                if first != second or one == other:
                    scores.append(trial["score"])
                    same.append(trial["same"])
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(same)


@pytest.mark.parametrize("unit", ["speaker", "utterance"])
@pytest.mark.parametrize("digits", [1, 6])  # with ties and without
def test_error_rates_of_resampled_trials_are_those_of_tests_written_out(unit, digits):
    trials = [{**trial, "score": round(trial["score"], digits)} for trial in verifier(speakers=4).scored()]
    measured = Trials(trials, 0.05)
    unit_of = {name: name[:2] if unit == "speaker" else name for name in measured.utterances}
    names = sorted(set(unit_of.values()))
    counts = drawn(torch.arange(12), len(names))
    counts[0] = torch.eye(len(names))[0] * len(names)  # one unit alone
    found = measured.metrics(torch.tensor([names.index(unit_of[name]) for name in measured.utterances]), counts)
    for number, row in enumerate(counts.int().tolist()):
        scores, same = written_out(trials, unit_of, dict(zip(names, row, strict=True)))
        if len(same.unique()) < 2:
            assert np.isnan([values[number].item() for values in found.values()]).all()
            continue
        expected = error_rates(scores, same, 0.05)
        assert {name: values[number].item() for name, values in found.items()} == pytest.approx(expected, abs=1e-5)
    assert any(values.isnan().any() for values in found.values())


def test_utterances_of_a_speaker_are_drawn_together():
    rights, totals = [1, 2, 2, 0, 1, 3], [3, 3, 2, 2, 3, 3]
    names = ["a1", "a2", "b1", "b2", "c1", "c2"]
    by_speaker = Bootstrap("speaker", "", 1000, 0, {name: name[0] for name in names})
    sums = [
        [rights[place] + rights[place + 1] for place in (0, 2, 4)],
        [totals[place] + totals[place + 1] for place in (0, 2, 4)],
    ]
    found = by_speaker.intervals(accuracy_of(rights, totals, names), {"test/accuracy": 0.5})
    assert found["intervals"]["test/accuracy"] == interval(accuracy_of(*sums))
    assert (found["bootstrap"]["unit"], found["bootstrap"]["units"]) == ("speaker", 3)


def test_about_95_of_100_intervals_contain_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for number in range(300):
        chances = rng.beta(6, 3, 40)  # of each utterance to have a frame right; on average 2/3
        frames = rng.integers(5, 15, 40)
        low, high = interval(
            accuracy_of(rng.binomial(frames, chances).tolist(), frames.tolist()), Bootstrap("utterance", "", 400, number, {})
        )
        inside += low <= 2 / 3 <= high
    assert 0.91 <= inside / 300 <= 0.98


@pytest.mark.parametrize("unit", ["utterance", "speaker"])
def test_neither_the_order_of_batches_nor_their_share_over_processes_matters(unit, monkeypatch):
    batches = frame_batches()
    speakers = {name: name[:4] for _, _, batch in batches for name in batch["ids"]}  # utt0, utt1, utt2
    bootstrap = Bootstrap(unit, "", 200, 0, speakers)
    metrics = {"test/accuracy": 0.5, "test/macro_f1": 0.5}
    expected = bootstrap.intervals(classification(batches).measured(), metrics)
    assert bootstrap.intervals(classification(batches[::-1]).measured(), metrics) == expected
    ranks = [classification(batches[rank::2]) for rank in (0, 1)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(into, rows):
        into[:] = [rank.tallies for rank in ranks]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in ranks:
        assert bootstrap.intervals(rank.measured(), metrics) == expected
    other = Bootstrap(unit, "", 200, 1, speakers).intervals(ranks[0].measured(), metrics)
    assert other["intervals"] != expected["intervals"]  # of another seed


def test_utterances_without_a_label_are_not_drawn():
    outputs, labels = draw(4, 4), torch.tensor([0, IGNORED, 2, 1])
    objective = filled(Classification(CLASSES), [(outputs, torch.ones(4), {"labels": labels, "ids": list("dcba")})])
    assert objective.measured().utterances == ["a", "b", "d"]


def test_validation_keeps_no_counts():
    objective = Classification(CLASSES)
    objective.reset("valid")
    objective.update(draw(4, 4), torch.ones(4), {"labels": torch.tensor([0, 1, 2, 3]), "ids": list("abcd")})
    assert objective.tallies == []


# No interval


def without(measured, bootstrap=UTTERANCES, metrics=("accuracy",)):
    found = bootstrap.intervals(measured, {f"test/{name}": 0.5 for name in metrics})
    assert found["intervals"] == {}
    return found["bootstrap"]["without"]


def test_one_unit_has_no_interval():
    reason = "the test has one utterance, and two are the fewest that differ"
    assert without(accuracy_of([1], [2])) == {"test/accuracy": reason}
    one_speaker = Bootstrap("speaker", "", 1000, 0, {"u000": "a", "u001": "a"})
    reason = "the test has one speaker, and two are the fewest that differ"
    assert without(accuracy_of([1, 0], [2, 2]), one_speaker) == {"test/accuracy": reason}


@pytest.mark.parametrize(
    "empty", [Classification(CLASSES), Slots(["a=x", "a=y"], ["a"]), CTC(["A"]), CTC(["A"], unit="character")]
)
def test_nothing_measured_has_no_interval(empty):
    assert without(empty.measured()) == {"test/accuracy": "the test has no utterance, and two are the fewest that differ"}


def test_a_test_without_an_error_has_no_interval():
    reason = "all resampled tests have the same value of it: how much it may be off can't be seen from this test"
    assert without(accuracy_of([2, 3, 1], [2, 3, 1])) == {"test/accuracy": reason}


def test_trials_of_few_speakers_have_no_interval():
    # Of two speakers, half of the resampled tests have one alone, and so no trial of different speakers.
    measured = Trials(verifier(speakers=2).scored(), 0.01)
    two = Bootstrap("speaker", "", 1000, 0, {name: name[:2] for name in measured.utterances})
    for reason in without(measured, two, ("eer", "min_dcf")).values():
        share, rest = reason.split("%")
        assert int(share) == pytest.approx(50, abs=5)
        assert rest == " of the resampled tests have no value of it: the test is too small"


def test_an_objective_without_measurements_has_no_interval():
    assert Objective.measured(None) is None
    assert without(None) == {"test/accuracy": "the objective gives no measurements of utterances"}
    found = UTTERANCES.intervals(accuracy_of([1, 0], [2, 2]), {"test/accuracy": 0.25, "test/other": 1.0, "valid/accuracy": 0.5})
    assert found["intervals"].keys() == {"test/accuracy"}
    assert found["bootstrap"]["without"] == {"test/other": "the objective gives no measurements of utterances"}


def test_no_samples_mean_no_intervals():
    assert Bootstrap("utterance", "", 0, 0, {}).intervals(accuracy_of([1, 0], [2, 2]), {"test/accuracy": 0.25}) == {}


# What is drawn

EIGHT = {f"u{number}": f"s{number % 8}" for number in range(16)}


@pytest.mark.parametrize(
    ("speakers", "training", "unit", "why"),
    [
        (EIGHT, ["x", None], "speaker", "the test has at least 8, and training none of them"),
        (EIGHT, ["x", "s3"], "utterance", "training has speakers of the test (s3)"),
        (EIGHT | {"u9": None}, ["x"], "utterance", "u9 has no speaker, or several"),
        (
            {name: speaker for name, speaker in EIGHT.items() if speaker != "s0"},
            ["x"],
            "utterance",
            "the test has fewer than 8 speakers (7)",
        ),
    ],
)
def test_speakers_are_drawn_where_the_test_has_enough_new_ones(speakers, training, unit, why):
    for settings in (None, {"unit": "auto", "samples": 1000}):
        chosen = Bootstrap.choose(settings, 5, speakers, lambda: training)
        assert (chosen.unit, chosen.why, chosen.samples, chosen.seed) == (unit, why, 1000, 5)


def test_a_unit_that_is_given_is_drawn():
    for unit in ("speaker", "utterance"):
        chosen = Bootstrap.choose({"unit": unit, "samples": 200}, 0, {"u": "s"}, lambda: pytest.fail("nobody asks"))
        assert (chosen.unit, chosen.why, chosen.samples) == (unit, "as downstream.bootstrap.unit says", 200)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "frame"}, "downstream.bootstrap.unit must be auto, utterance or speaker, found 'frame'"),
        ({"samples": 99}, "downstream.bootstrap.samples must be at least 100, or 0 for no intervals, found 99"),
        ({"samples": -1}, "downstream.bootstrap.samples must be at least 100, or 0 for no intervals, found -1"),
        ({"samples": 1e3}, "downstream.bootstrap.samples must be at least 100, or 0 for no intervals, found 1000.0"),
        ({"level": 0.9}, "downstream.bootstrap has no setting 'level'; there are keep, samples, seed, unit"),
        ({"seed": 1.5}, "downstream.bootstrap.seed must be null, which is the run's, or at least 0, found 1.5"),
        ({"keep": 1}, "downstream.bootstrap.keep must be true or false, and false without samples, found 1"),
        ({"samples": 0, "keep": True}, "downstream.bootstrap.keep must be true or false, and false without samples, found True"),
        (
            {"unit": "speaker"},
            "downstream.bootstrap.unit=speaker: utterance u2 of the test has no speaker, or several: set it to",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}".replace("(", r"\(")):
        Bootstrap.choose(settings, 0, {"u1": "a", "u2": None}, lambda: [])


def test_runs_of_different_seeds_can_draw_the_same_tests_and_keep_their_metrics():
    """So that two runs can be compared test by test."""
    measured = accuracy_of([3, 2, 4, 0, 1], [4, 4, 4, 4, 4])
    kept = []
    for seed in (0, 1):
        chosen = Bootstrap.choose({"seed": 7, "keep": True, "samples": 200, "unit": "utterance"}, seed, {}, list)
        found = chosen.intervals(measured, {"test/accuracy": 0.5})
        assert np.quantile(found["draws"]["test/accuracy"], [0.025, 0.975]) == pytest.approx(found["intervals"]["test/accuracy"])
        kept.append(found["draws"]["test/accuracy"])
    assert kept[0].tolist() == kept[1].tolist()
    assert len(kept[0]) == 200
    assert "draws" not in UTTERANCES.intervals(measured, {"test/accuracy": 0.5})
    all_right = chosen.intervals(accuracy_of([4, 4], [4, 4]), {"test/accuracy": 1.0, "test/other": 0.5})  # has no interval
    assert all_right["draws"].keys() == {"test/accuracy"}
    assert all_right["draws"]["test/accuracy"].tolist() == [1.0] * 200


def test_a_line_says_what_was_drawn_and_what_has_no_interval():
    how = {"level": 0.95, "samples": 1000, "unit": "speaker", "units": 40, "why": "they are new"}
    assert in_words(how, {"test/per": [0, 1]}) == "95%, 40 speakers resampled 1,000 times: they are new"
    how["without"] = {"test/eer": "too few", "test/min_dcf": "too few"}
    assert in_words(how, {}) == "none for eer, min_dcf: too few"
    assert in_words(how, {"test/per": [0, 1]}).endswith(": they are new; none for eer, min_dcf: too few")
