"""Speaker verification: trials, error rates, the margin."""

from __future__ import annotations

import csv
import itertools
import math
import random

import pytest
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from audiot.downstream.verification import Verification, error_rates, read_trials

SPEAKERS = ["anna", "bert", "carl"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_thresholds(scores, same, p_target):
    """Equal error rate and minimum cost by trying every threshold. Scores of at least the threshold are accepted.

    The equal error rate is computed as in S3PRL's evaluation of SUPERB: a root of 1 − x − hits(x), interpolated.
    """
    targets = [score for score, kind in zip(scores, same, strict=True) if kind]
    others = [score for score, kind in zip(scores, same, strict=True) if not kind]
    points, costs = [], []
    for threshold in [math.inf, *sorted(set(scores), reverse=True)]:
        misses = sum(score < threshold for score in targets) / len(targets)
        alarms = sum(score >= threshold for score in others) / len(others)
        costs.append((p_target * misses + (1 - p_target) * alarms) / min(p_target, 1 - p_target))
        points.append((alarms, 1 - misses))
    hits = interp1d(*zip(*points, strict=True))
    return brentq(lambda alarms: 1 - alarms - hits(alarms), 0, 1), min(costs)


@pytest.mark.parametrize(
    ("scores", "same", "eer", "cost"),
    [
        ([0.9, 0.8, 0.2, -0.1], [1, 1, 0, 0], 0.0, 0.0),  # apart
        ([0.2, -0.1, 0.9, 0.8], [1, 1, 0, 0], 1.0, 1.0),  # the wrong way round
        ([0.9, 0.5, 0.4, 0.1], [1, 0, 1, 0], 0.5, 0.5),  # 1 of 2 missed, no false alarm: 0.01 · 0.5 / 0.01
        ([0.3] * 6, [1, 1, 1, 0, 0, 0], 0.5, 1.0),  # all alike
        ([0.3] * 5, [1, 0, 0, 0, 0], 0.5, 1.0),
        # Misses and false alarms: 1/2 and 1/3 at 0.5, 1/2 and 2/3 at 0.4, equal half way between.
        ([0.9, 0.3, 0.5, 0.4, 0.1], [1, 1, 0, 0, 0], 0.5, 0.5),
        # 1/2 and 0 at 0.9; one of each kind at 0.5: 0 and 1/2; half way 1/4 and 1/4.
        ([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0], 0.25, 0.5),
        # 2/3 and 0 at 0.9; 0 and 1/4 with both others at 0.5; equal after 8/11 of the way.
        ([0.9, 0.5, 0.5, 0.5, 0.2, 0.1, 0.0], [1, 1, 1, 0, 0, 0, 0], 2 / 11, 2 / 3),
        ([7.0, 3.0, -2.0, -5.0], [1, 1, 0, 0], 0.0, 0.0),  # scores of any size
        # 1 of 4 missed and 1 of 4 let in at 0.5; the least cost is at 0.8: 2 of 4 missed, nobody let in.
        ([0.9, 0.8, 0.6, 0.1, 0.7, 0.3, 0.2, 0.0], [1, 1, 1, 1, 0, 0, 0, 0], 0.25, 0.5),
    ],
)
def test_error_rates_of_scores_made_by_hand(scores, same, eer, cost):
    rates = error_rates(torch.tensor(scores), torch.tensor(same))
    assert rates == pytest.approx({"eer": eer, "min_dcf": cost}, abs=1e-12)


@pytest.mark.parametrize("p_target", [0.01, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_error_rates_equal_a_search_over_all_thresholds(seed, p_target):
    rng = random.Random(seed)
    same = [int(rng.random() < 0.3) for _ in range(120)] + [0, 1]
    scores = [max(-1.0, min(1.0, round(rng.gauss(0.3 * kind, 0.3), 2))) for kind in same]  # rounded: with ties
    eer, cost = by_thresholds(scores, same, p_target)
    rates = error_rates(torch.tensor(scores, dtype=torch.float64), torch.tensor(same), p_target)
    assert rates["min_dcf"] == pytest.approx(cost, abs=1e-9)
    assert rates["eer"] == pytest.approx(eer, abs=1e-9)
    alarms, hits, _ = roc_curve(same, scores)
    assert rates["eer"] == pytest.approx(brentq(lambda share: 1 - share - interp1d(alarms, hits)(share), 0, 1), abs=1e-9)


def test_cosines_a_little_above_one_are_scores_like_others():
    scores = torch.tensor([1.0 + 1e-6, 0.2, 0.9, 0.1])
    assert error_rates(scores, torch.tensor([1, 1, 0, 0]))["eer"] == pytest.approx(0.5)


# The loss


def test_the_loss_is_the_additive_margin_softmax():
    torch.manual_seed(0)
    objective = Verification(SPEAKERS, embedding_dim=4, scale=20.0, margin=0.3)
    assert objective.num_outputs == 4
    outputs, labels = draw(5, 4), [0, 2, 1, 1, 0]

    def cosine(one, other):
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))

    total = 0.0
    for output, label in zip(outputs.tolist(), labels, strict=True):
        cosines = [cosine(output, speaker) for speaker in objective.speakers.tolist()]
        own = math.exp(20 * (cosines[label] - 0.3))
        others = sum(math.exp(20 * value) for number, value in enumerate(cosines) if number != label)
        total -= math.log(own / (own + others))
    loss = objective.loss(outputs, torch.ones(5), {"labels": torch.tensor(labels)}).value
    assert loss.item() == pytest.approx(total / 5, rel=1e-4)
    loss.backward()
    assert objective.speakers.grad.abs().sum() > 0


# Trials


def measured(objective, embeddings, speakers, stage="test"):
    """The objective after two batches of utterances ``u00``, ``u01``, …"""
    objective.reset(stage)
    names = [f"u{number:02d}" for number in range(len(embeddings))]
    half = len(embeddings) // 2
    for part in (slice(half, None), slice(0, half)):
        batch = {"ids": names[part], "speakers": speakers[part], "labels": None}
        objective.update(embeddings[part], torch.ones(len(names[part])), batch)
    return objective


def cosine_of(embeddings, one, other):
    return torch.nn.functional.cosine_similarity(embeddings[int(one[1:])], embeddings[int(other[1:])], dim=0).item()


def test_all_pairs_are_tried_where_there_is_no_list():
    embeddings, speakers = draw(7, 4), ["anna", "bert", "anna", "carl", "bert", "bert", "anna"]
    objective = measured(Verification(SPEAKERS, embedding_dim=4), embeddings, speakers)
    trials = objective.scored()
    pairs = [(f"u{one:02d}", f"u{other:02d}") for one, other in itertools.combinations(range(7), 2)]
    assert [(trial["first"], trial["second"]) for trial in trials] == pairs
    for trial, (one, other) in zip(trials, pairs, strict=True):
        assert trial["same"] == (speakers[int(one[1:])] == speakers[int(other[1:])])
        assert trial["score"] == pytest.approx(cosine_of(embeddings, one, other), abs=1e-6)
    eer, cost = by_thresholds([trial["score"] for trial in trials], [trial["same"] for trial in trials], 0.01)
    assert objective.compute() == pytest.approx({"eer": eer, "min_dcf": cost}, abs=1e-6)
    assert next(iter(objective.compute())) == "eer"


@pytest.fixture
def listed(tmp_path):
    """Function of lines: the path of a file of trials."""

    def write(*lines):
        (tmp_path / "trials.txt").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "trials.txt")

    return write


def test_listed_trials_are_those_of_the_test_and_validation_takes_all_pairs(listed):
    embeddings, speakers = draw(5, 4), ["anna", "bert", "anna", "carl", "bert"]
    objective = Verification(SPEAKERS, embedding_dim=4, trials=listed("1 u02 u00", "0 u03.wav u04.WAV", "1 u01 u04"))
    trials = measured(objective, embeddings, speakers).scored()
    assert [(trial["same"], trial["first"], trial["second"]) for trial in trials] == [
        (1, "u02", "u00"),
        (0, "u03", "u04"),
        (1, "u01", "u04"),
    ]
    for trial in trials:
        assert trial["score"] == pytest.approx(cosine_of(embeddings, trial["first"], trial["second"]), abs=1e-6)
    assert len(measured(objective, embeddings, speakers, "valid").scored()) == 10


def test_a_list_of_trials_is_read_as_voxcelebs(listed):
    path = listed(
        "1 id10270/5r0dW/00001.wav id10270/8jEAj/00008.wav", "", "0 id10270/5r0dW/00001.wav id10300/a.b/3.flac", "1 x y.m4a"
    )
    assert read_trials(path) == [
        (True, "id10270/5r0dW/00001", "id10270/8jEAj/00008"),
        (False, "id10270/5r0dW/00001", "id10300/a.b/3"),
        (True, "x", "y"),
    ]


@pytest.mark.parametrize("line", ["u00 u01", "2 u00 u01", "1 u00", "1 u00 u01 u02", "target u00 u01", "1.0 u00 u01", "true a b"])
def test_a_line_that_is_no_trial_is_named(listed, line):
    path = listed("1 u00 u01", line)
    with pytest.raises(ValueError, match=rf"{path}:2: expected 1 or 0 and two utterances, found '{line}'"):
        Verification(SPEAKERS, trials=path)


def test_trials_that_contradict_each_other_are_refused_and_repeated_ones_count_twice(listed):
    assert len(read_trials(listed("1 a b", "1 b a", "0 a c", "1 a b"))) == 4
    with pytest.raises(ValueError, match=r"trials\.txt:4: c and a have the same speaker either here or in line 1: correct one"):
        read_trials(listed("1 a c", "", "0 a b", "0 c.wav a"))


def test_a_list_without_trials_is_refused(listed):
    with pytest.raises(ValueError, match=r"trials\.txt has no trial: expected lines of 1 or 0 and two utterances"):
        read_trials(listed("", " "))


def test_a_missing_list_of_trials_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"downstream.objective.trials: there is no file {tmp_path}/none.txt"):
        Verification(SPEAKERS, trials=str(tmp_path / "none.txt"))


def test_trials_of_utterances_that_are_not_there_are_refused_before_training_and_after(listed):
    path = listed("1 u00 u01", "0 u00 u77", "0 u66 u01")
    objective = Verification(SPEAKERS, embedding_dim=4, trials=path)
    message = rf"{path} names 2 utterances that the test split lacks, u77 of line 2 first: were they rejected by preparation\?"
    with pytest.raises(ValueError, match=message):
        objective.check(["u00", "u01"])
    objective.check(["u00", "u01", "u66", "u77", "u99"])
    with pytest.raises(ValueError, match=message):
        measured(objective, draw(2, 4), ["anna", "anna"]).compute()
    Verification(SPEAKERS).check([])


@pytest.mark.parametrize("speakers", [["anna", "anna", "anna"], ["anna", "bert", "carl"]])
def test_trials_of_one_kind_are_refused(speakers):
    objective = measured(Verification(SPEAKERS, embedding_dim=4), draw(3, 4), speakers)
    with pytest.raises(ValueError, match="all trials are of one kind: verification needs trials with the same speaker and"):
        objective.compute()


def test_more_pairs_than_wanted_are_sampled_without_repeats_and_always_the_same():
    embeddings, speakers = draw(30, 4), [SPEAKERS[number % 3] for number in range(30)]

    def pairs(limit):
        objective = measured(Verification(SPEAKERS, embedding_dim=4, max_trials=limit), embeddings, speakers)
        trials = objective.scored()
        assert all(trial["same"] == (speakers[int(trial["first"][1:])] == speakers[int(trial["second"][1:])]) for trial in trials)
        return [(trial["first"], trial["second"]) for trial in trials]

    everything = pairs(435)
    assert len(everything) == 30 * 29 / 2
    for limit in (434, 400, 40):  # all but one, most, few
        chosen = pairs(limit)
        assert len(set(chosen)) == limit
        assert set(chosen) < set(everything)
        assert pairs(limit) == chosen
    assert len({name for pair in pairs(100) for name in pair}) == 30  # from all over


def test_a_prior_must_be_a_probability():
    for p_target in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"downstream.objective.p_target must be between 0 and 1, found {p_target}"):
            Verification(SPEAKERS, p_target=p_target)


def test_predictions_are_embeddings_of_length_one():
    outputs = draw(3, 4)
    for row, said in zip(outputs, Verification(SPEAKERS, embedding_dim=4).predict(outputs, torch.ones(3)), strict=True):
        length = math.sqrt(sum(value * value for value in row.tolist()))
        assert said["embedding"] == pytest.approx([value / length for value in row.tolist()], rel=1e-5)


def test_files_hold_every_trial_and_every_speaker(tmp_path):
    embeddings, speakers = draw(7, 4), ["anna", "bert", "anna", "dora", "bert", "bert", "anna"]
    objective = measured(Verification(SPEAKERS, embedding_dim=4), embeddings, speakers)
    names = objective.write(tmp_path, "verification")
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir()) == ["per_class.csv", "scores.png", "trials.csv"]
    assert sorted(objective.write(tmp_path / "tables", "verification", plots=False)) == ["per_class.csv", "trials.csv"]
    assert not list((tmp_path / "tables").glob("*.png"))
    trials = list(csv.DictReader((tmp_path / "trials.csv").open(newline="")))
    assert len(trials) == 21
    for trial in trials:
        assert float(trial["score"]) == pytest.approx(cosine_of(embeddings, trial["first"], trial["second"]), abs=5.1e-5)
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open(newline="")))
    assert [row["speaker"] for row in rows] == ["anna", "bert", "dora"]
    for row in rows:
        for kind in ("same", "other"):
            scores = [
                cosine_of(embeddings, f"u{one:02d}", f"u{other:02d}")
                for one, other in itertools.combinations(range(7), 2)
                if row["speaker"] in (speakers[one], speakers[other]) and (speakers[one] == speakers[other]) == (kind == "same")
            ]
            assert int(row[f"{kind} trials"]) == len(scores)
            assert (
                row[f"{kind} mean"] == ""
                if not scores
                else float(row[f"{kind} mean"]) == pytest.approx(sum(scores) / len(scores), abs=1e-4)
            )
