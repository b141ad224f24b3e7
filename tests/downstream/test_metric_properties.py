"""Losses and metrics of any predictions beside scikit-learn, jiwer and a sum by hand."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support, roc_curve

from audiot.data.labels import IGNORED
from audiot.downstream.bootstrap import Bootstrap
from audiot.downstream.ctc import CTC
from audiot.downstream.objectives import Classification, per_class
from audiot.downstream.verification import error_rates

CLASSES = ["a", "b", "c", "d", "e"]
PHONES = ["AA", "B", "K", "S"]
CLASS = st.integers(0, len(CLASSES) - 1)
UTTERANCES = st.lists(st.tuples(CLASS, CLASS), min_size=1, max_size=60)
PHONE = st.integers(0, len(PHONES) - 1)
TEXTS = st.lists(st.tuples(st.lists(PHONE, min_size=1, max_size=8), st.lists(PHONE, max_size=8)), min_size=1, max_size=12)


def measured(pairs, sizes=(7, 3, 60)):
    """The objective after batches of utterances of a class that were taken for one."""
    objective, first = Classification(CLASSES), 0
    objective.reset("test")
    while first < len(pairs):
        some = pairs[first : first + sizes[first % len(sizes)]]
        outputs = torch.nn.functional.one_hot(torch.tensor([guess for _, guess in some]), len(CLASSES)).float()
        batch = {
            "labels": torch.tensor([label for label, _ in some]),
            "ids": [f"utt{first + number:03d}" for number in range(len(some))],
        }
        objective.update(outputs, torch.ones(len(some)), batch)
        first += len(some)
    return objective


@given(pairs=UTTERANCES)
def test_accuracy_and_f1_are_those_of_scikit_learn(pairs):
    true, guessed = zip(*pairs, strict=True)
    objective = measured(pairs)
    expected = {"accuracy": accuracy_score(true, guessed), "macro_f1": f1_score(true, guessed, average="macro", zero_division=0)}
    assert objective.compute() == pytest.approx(expected)
    figures = precision_recall_fscore_support(true, guessed, labels=range(len(CLASSES)), zero_division=0)
    for row, *values in zip(per_class(objective.counts(), CLASSES), *figures, strict=True):
        assert [row[name] for name in ("precision", "recall", "f1", "count")] == pytest.approx(values, abs=5.1e-5)


@given(pairs=UTTERANCES, seed=st.integers(0, 1000))
def test_an_interval_lies_about_its_accuracy(pairs, seed):
    objective = measured(pairs)
    accuracy = objective.compute()["accuracy"]
    found = Bootstrap("utterance", "", 400, seed, {}).intervals(objective.measured(), {"test/accuracy": accuracy})
    assume("test/accuracy" in found["intervals"])  # else all resampled tests are alike
    low, high = found["intervals"]["test/accuracy"]
    assert 0 <= low <= accuracy <= high <= 1
    spread = (accuracy * (1 - accuracy) / len(pairs)) ** 0.5  # of a mean of independent utterances
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.4, abs=1.5 / len(pairs))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), data=st.data())
def test_the_loss_of_frames_is_the_mean_over_those_with_a_label(lengths, data):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    labels = torch.from_numpy(draw.integers(0, len(CLASSES), (len(lengths), max(lengths))))
    labels[torch.from_numpy(draw.random(labels.shape) < 0.2)] = IGNORED
    outputs = torch.from_numpy(3 * draw.standard_normal((*labels.shape, len(CLASSES))))
    losses = [
        np.log(np.exp(outputs[row, t].numpy()).sum()) - float(outputs[row, t, labels[row, t]])
        for row, length in enumerate(lengths)
        for t in range(length)
        if labels[row, t] != IGNORED
    ]
    loss = Classification(CLASSES).loss(outputs, torch.tensor(lengths), {"labels": labels})
    assert loss.scored == len(losses)
    assert float(loss.value) == pytest.approx(np.mean(losses) if losses else 0.0)


@given(texts=TEXTS)
def test_error_rates_are_those_of_jiwer_and_the_measurements_add_up_to_them(texts):
    said, heard = ([" ".join(PHONES[number] for number in side) for side in sides] for sides in zip(*texts, strict=True))
    phones = CTC(PHONES)
    sides = zip(range(len(said)), said, heard, strict=True)
    phones.rows = [{"utterance": f"{number:02d}", "reference": one, "hypothesis": other} for number, one, other in sides]
    assert phones.compute() == pytest.approx({"per": jiwer.wer(said, heard)})
    words = CTC([" ", *"ABKS"], "character")
    words.rows = phones.rows
    assert words.compute() == pytest.approx({"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)})
    for objective in (phones, words):
        count = len(texts)
        once = objective.measured().metrics(torch.arange(count), torch.ones(1, count, dtype=torch.float64))
        assert {name: float(value) for name, value in once.items()} == pytest.approx(objective.compute())


@given(
    trials=st.lists(st.tuples(st.booleans(), st.integers(-20, 20)), min_size=2, max_size=80),
    p_target=st.sampled_from([0.01, 0.05, 0.5, 0.9]),
)
def test_verification_errors_are_those_of_scikit_learns_roc(trials, p_target):
    same, scores = (np.array(each) for each in zip(*trials, strict=True))
    assume(same.any() and not same.all())
    alarms, hits, _ = roc_curve(same, scores, drop_intermediate=False)
    costs = (p_target * (1 - hits) + (1 - p_target) * alarms) / min(p_target, 1 - p_target)
    found = error_rates(torch.from_numpy(scores / 20), torch.from_numpy(same).long(), p_target)
    assert found["min_dcf"] == pytest.approx(costs.min())
    missed_more = 1 - hits - alarms  # from 1 to -1 along the curve, which is linear between its points
    after = int((missed_more > 0).sum())
    way = missed_more[after - 1] / (missed_more[after - 1] - missed_more[after])
    assert found["eer"] == pytest.approx(alarms[after - 1] + way * (alarms[after] - alarms[after - 1]))
