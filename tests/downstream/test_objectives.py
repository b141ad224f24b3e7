"""Losses, metrics and files of classification, against loops over single items."""

from __future__ import annotations

import csv
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score

from audiot.base.files import write_csv
from audiot.data.labels import IGNORED
from audiot.downstream.objectives import Classification, Slots, per_class

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # of nothing measured
CLASSES = ["ah", "b", "sil", "zh"]
LENGTHS = torch.tensor([6, 3, 4])


def draw(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes_of(*shape, count=4, seed=0):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def batch_of(labels):
    names = ["utt-b", "utt-a", "utt-c", "utt-d", "utt-e"][: len(labels)]
    return {"labels": labels, "ids": names, "speakers": [None] * len(labels)}


def frames():
    """Outputs (3, 6, 4) of utterances of 6, 3 and 4 frames, labels (3, 8): two frames of the first have no output."""
    labels = classes_of(3, 8)
    labels[0, 2] = IGNORED
    labels[1, 4:] = IGNORED  # frame 3 has a label and no output
    labels[2, 4:] = IGNORED
    return draw(3, 6, 4), labels


def items(outputs, labels, lengths):
    """Scores and class of every labelled frame, one at a time."""
    found = []
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            label = int(labels[row, t] if labels.ndim == 2 else labels[row])
            if label != IGNORED:
                found.append((outputs[row, t], label))
    return found


def mean_cross_entropy(pairs):
    losses = [math.log(sum(math.exp(score) for score in scores.tolist())) - float(scores[label]) for scores, label in pairs]
    return sum(losses) / len(losses)


def table(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def expected_figures(pairs, names):
    """Accuracy, macro F1 and one row per class, by counting."""
    counts = Counter((label, int(scores.argmax())) for scores, label in pairs)
    rows, scores = [], []
    for number, name in enumerate(names):
        right = counts[number, number]
        true = sum(count for (label, _), count in counts.items() if label == number)
        guessed = sum(count for (_, guess), count in counts.items() if guess == number)
        f1 = 2 * right / (true + guessed) if true + guessed else 0.0
        if true + guessed:
            scores.append(f1)
        precision, recall = right / guessed if guessed else 0.0, right / true if true else 0.0
        rows.append({"class": name, "count": true, "precision": precision, "recall": recall, "f1": f1})
    hits = sum(count for (label, guess), count in counts.items() if label == guess)
    return hits / len(pairs), sum(scores) / len(scores), rows


def assert_rows(found, expected):
    assert [row["class"] for row in found] == [row["class"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("count", "precision", "recall", "f1"):
            assert float(one[name]) == pytest.approx(other[name], abs=5.1e-5)


# Frames


def test_the_loss_of_frames_is_a_mean_over_frames_with_output_and_label():
    outputs, labels = frames()
    objective = Classification(CLASSES)
    assert objective.num_outputs == 4
    loss = objective.loss(outputs, LENGTHS, batch_of(labels)).value.item()
    assert loss == pytest.approx(mean_cross_entropy(items(outputs, labels, LENGTHS)), rel=1e-5)


def test_more_outputs_than_labels_count_as_if_padded():
    outputs, labels = frames()
    narrow = labels[:, :5]
    objective = Classification(CLASSES)
    loss = objective.loss(outputs, LENGTHS, batch_of(narrow)).value.item()
    padded = torch.nn.functional.pad(narrow, (0, 3), value=IGNORED)
    assert loss == pytest.approx(mean_cross_entropy(items(outputs, padded, LENGTHS)), rel=1e-5)


def test_metrics_of_frames_are_counts_over_all_batches():
    objective = Classification(CLASSES)
    objective.reset("test")
    pairs = []
    for seed in (0, 1):
        outputs, labels = draw(3, 6, 4, seed=seed), classes_of(3, 8, seed=seed)
        objective.update(outputs, LENGTHS, batch_of(labels))
        pairs += items(outputs, labels, LENGTHS)
    accuracy, macro_f1, rows = expected_figures(pairs, CLASSES)
    assert objective.compute() == pytest.approx({"accuracy": accuracy, "macro_f1": macro_f1})
    assert objective.counts().sum() == len(pairs) == 26
    assert_rows(per_class(objective.counts(), CLASSES), rows)


def test_macro_f1_leaves_out_what_neither_occurs_nor_is_predicted():
    outputs, labels = draw(50, 4), classes_of(50, count=3)
    outputs[:, 3] = -1e3
    objective = Classification(CLASSES)
    objective.update(outputs, torch.ones(50), {"labels": labels, "ids": list(map(str, range(50)))})
    _, macro_f1, rows = expected_figures(list(zip(outputs, labels.tolist(), strict=True)), CLASSES)
    assert objective.compute()["macro_f1"] == pytest.approx(macro_f1)
    assert macro_f1 == pytest.approx(sum(row["f1"] for row in rows) / 3)
    assert_rows(per_class(objective.counts(), CLASSES), rows)


def test_macro_f1_is_that_of_torchmetrics_where_every_class_occurs():
    outputs, labels = draw(200, 4), classes_of(200)
    objective = Classification(CLASSES)
    objective.update(outputs, torch.ones(200), {"labels": labels, "ids": list(map(str, range(200)))})
    expected = multiclass_f1_score(outputs, labels, 4, average="macro")
    assert objective.compute()["macro_f1"] == pytest.approx(expected.item(), abs=1e-6)


def test_the_speaker_of_every_frame_never_counts_padding():
    outputs, labels = draw(3, 6, 4), torch.tensor([1, 3, IGNORED])
    noisy = outputs.clone()
    noisy[torch.arange(6) >= LENGTHS[:, None]] = 1e4
    objective = Classification(CLASSES)
    pairs = items(outputs, labels, LENGTHS)
    assert len(pairs) == 6 + 3
    assert objective.loss(noisy, LENGTHS, batch_of(labels)).value.item() == pytest.approx(mean_cross_entropy(pairs), rel=1e-5)
    objective.update(noisy, LENGTHS, batch_of(labels))
    accuracy, _, _ = expected_figures(pairs, CLASSES)
    assert objective.compute()["accuracy"] == pytest.approx(accuracy)
    assert objective.counts().sum() == 9
    assert [(row["utterance"], row["frames"]) for row in objective.all_rows()] == [("utt-a", 3), ("utt-b", 6), ("utt-c", 0)]


def test_rows_of_frames_are_each_utterances_own_accuracy():
    outputs, labels = frames()
    objective = Classification(CLASSES)
    objective.update(outputs, LENGTHS, batch_of(labels))
    for row, name in ((0, "utt-b"), (1, "utt-a"), (2, "utt-c")):
        pairs = items(outputs[row : row + 1], labels[row : row + 1], LENGTHS[row : row + 1])
        right = sum(int(scores.argmax()) == label for scores, label in pairs)
        (found,) = (entry for entry in objective.rows if entry["utterance"] == name)
        assert found == {"utterance": name, "frames": len(pairs), "accuracy": round(right / len(pairs), 4)}


def test_a_batch_without_any_label_teaches_nothing():
    outputs = draw(3, 6, 4).requires_grad_()
    loss = Classification(CLASSES).loss(outputs, LENGTHS, batch_of(torch.full((3, 8), IGNORED))).value
    loss.backward()
    assert loss == 0
    assert not outputs.grad.any()


# Utterances


def test_loss_metrics_and_rows_of_utterances():
    outputs, labels = draw(5, 4), torch.tensor([0, 3, 2, 2, 1])
    objective = Classification(CLASSES)
    batch = batch_of(labels)
    pairs = list(zip(outputs, labels.tolist(), strict=True))
    assert objective.loss(outputs, LENGTHS, batch).value.item() == pytest.approx(mean_cross_entropy(pairs), rel=1e-5)
    objective.update(outputs, LENGTHS, batch)
    accuracy, macro_f1, _ = expected_figures(pairs, CLASSES)
    assert objective.compute() == pytest.approx({"accuracy": accuracy, "macro_f1": macro_f1})
    assert [row["utterance"] for row in objective.all_rows()] == sorted(batch["ids"])
    for row, (scores, label) in zip(objective.rows, pairs, strict=True):
        share = math.exp(scores.max()) / sum(math.exp(score) for score in scores.tolist())
        assert row["score"] == pytest.approx(share, abs=5.1e-5)
        assert row["score"] == round(row["score"], 4)
        assert (row["label"], row["prediction"]) == (CLASSES[label], CLASSES[int(scores.argmax())])


def test_an_utterance_of_an_unknown_class_is_listed_and_not_counted():
    outputs, labels = draw(3, 4), torch.tensor([0, IGNORED, 2])
    objective = Classification(CLASSES)
    objective.update(outputs, LENGTHS, batch_of(labels))
    assert objective.counts().sum() == 2
    assert [row["label"] for row in objective.rows] == ["ah", None, "sil"]


def test_a_task_of_one_class_can_be_measured():
    objective = Classification(["only"])
    objective.update(draw(3, 1), LENGTHS, batch_of(torch.zeros(3, dtype=torch.long)))
    assert objective.compute() == {"accuracy": 1.0, "macro_f1": 1.0}


def test_reset_forgets_what_was_measured():
    objective = Classification(CLASSES)
    objective.update(draw(3, 4), LENGTHS, batch_of(torch.tensor([0, 1, 2])))
    objective.reset("valid")
    assert objective.rows == []
    assert objective.counts().sum() == 0


def test_rows_of_all_processes_come_together(monkeypatch):
    objective = Classification(CLASSES)
    objective.update(draw(3, 4), LENGTHS, batch_of(torch.tensor([0, 1, 2])))
    elsewhere = [{"utterance": "utt-aa", "label": "b", "prediction": "b", "score": 0.5}]

    def gather(into, rows):
        into[:] = [elsewhere, rows]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert [row["utterance"] for row in objective.all_rows()] == ["utt-a", "utt-aa", "utt-b", "utt-c"]
    assert len(objective.rows) == 3


# Predictions


def test_predictions_of_utterances_have_scores_of_all_classes():
    outputs = draw(3, 4)
    for row, said in zip(outputs, Classification(CLASSES).predict(outputs, LENGTHS), strict=True):
        powers = [math.exp(score) for score in row.tolist()]
        shares = {name: power / sum(powers) for name, power in zip(CLASSES, powers, strict=True)}
        assert said["scores"] == pytest.approx(shares, rel=1e-5)
        assert said["label"] == max(shares, key=shares.get)
        assert said["score"] == pytest.approx(max(shares.values()), rel=1e-5)


def test_predictions_of_frames_are_stretches_of_equal_classes():
    best = [[0, 0, 2, 2, 2, 0], [1, 1, 1, 3, 3, 3], [3, 2, 2, 3, 0, 0]]
    outputs = torch.nn.functional.one_hot(torch.tensor(best), 4).float() * torch.tensor([2.0, 1.0, 3.0, 1.5, 2.5, 4.0])[:, None]
    said = Classification(CLASSES).predict(outputs, LENGTHS)
    for row, (answer, length) in enumerate(zip(said, LENGTHS.tolist(), strict=True)):
        segments = answer["segments"]
        spread = [segment["label"] for segment in segments for _ in range(segment["start"], segment["end"])]
        assert spread == [CLASSES[number] for number in best[row][:length]]
        assert segments[0]["start"] == 0
        assert all(one["end"] == other["start"] for one, other in pairwise(segments))
        assert all(one["label"] != other["label"] for one, other in pairwise(segments))
        for segment in segments:
            shares = [
                math.exp(outputs[row, t].max()) / sum(math.exp(score) for score in outputs[row, t].tolist())
                for t in range(segment["start"], segment["end"])
            ]
            assert segment["score"] == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert [len(answer["segments"]) for answer in said] == [3, 1, 3]


# Files


@pytest.mark.parametrize("kind", ["frames", "utterances"])
def test_files_hold_every_class_and_every_utterance(tmp_path, kind):
    objective = Classification(CLASSES)
    outputs, labels = frames() if kind == "frames" else (draw(5, 4), torch.tensor([0, 3, 2, 2, 1]))
    batch = batch_of(labels)
    objective.update(outputs, LENGTHS, batch)
    pairs = items(outputs, labels, LENGTHS) if kind == "frames" else list(zip(outputs, labels.tolist(), strict=True))
    names = objective.write(tmp_path / "run", "phone")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(names)
    assert sorted(names) == ["confusion.png", "per_class.csv", "per_utterance.csv"]
    assert objective.write(tmp_path / "tables", "phone", plots=False) == ["per_class.csv", "per_utterance.csv"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["per_class.csv", "per_utterance.csv"]
    assert_rows(table(tmp_path / "run" / "per_class.csv"), expected_figures(pairs, CLASSES)[2])
    rows = table(tmp_path / "run" / "per_utterance.csv")
    assert [row["utterance"] for row in rows] == sorted(batch["ids"])
    assert list(rows[0]) == ["utterance", *(["frames", "accuracy"] if kind == "frames" else ["label", "prediction", "score"])]


def test_a_table_without_rows_is_an_empty_file(tmp_path):
    write_csv(tmp_path / "none.csv", [])
    assert (tmp_path / "none.csv").read_text().strip() == ""
    write_csv(tmp_path / "some.csv", [{"a": 'x,"y"', "b": None}, {"a": "ü\n", "b": 1}])
    assert table(tmp_path / "some.csv") == [{"a": 'x,"y"', "b": ""}, {"a": "ü\n", "b": "1"}]


# Slots


SLOTS = ["action=off", "action=on", "location=none", "object=heat", "object=lights", "object=music"]  # sorted, as a survey gives
FIELDS = ["object", "action", "location"]  # another order
OWN = {"object": slice(3, 6), "action": slice(0, 2), "location": slice(2, 3)}
SAID = [("lights", "on", "none"), ("music", "off", "none"), ("heat", "on", "none"), ("lights", "off", "none")]


def slot_batch():
    labels = [[SLOTS.index(f"{field}={value}") for field, value in zip(FIELDS, said, strict=True)] for said in SAID]
    return batch_of(torch.tensor(labels))


def heard_by_loop(outputs):
    return [{field: SLOTS[own.start + int(row[own].argmax())].split("=")[1] for field, own in OWN.items()} for row in outputs]


def test_the_loss_of_slots_is_the_sum_of_theirs():
    outputs, objective = draw(4, 6), Slots(SLOTS, FIELDS)
    assert objective.num_outputs == 6
    total = 0.0
    for place, field in enumerate(FIELDS):
        own = OWN[field]
        pairs = [(outputs[row, own], SLOTS.index(f"{field}={said[place]}") - own.start) for row, said in enumerate(SAID)]
        total += mean_cross_entropy(pairs)
    assert objective.loss(outputs, LENGTHS, slot_batch()).value.item() == pytest.approx(total, rel=1e-5)


def test_an_utterance_is_right_when_all_its_slots_are():
    objective = Slots(SLOTS, FIELDS)
    objective.reset("test")
    heard, said = [], []
    for seed in range(8):
        outputs = draw(4, 6, seed=seed)
        batch = slot_batch() | {"ids": [f"{seed}-{number}" for number in range(4)]}
        objective.update(outputs, LENGTHS, batch)
        heard += heard_by_loop(outputs)
        said += [dict(zip(FIELDS, values, strict=True)) for values in SAID]
    metrics = objective.compute()
    expected = {"accuracy": sum(one == other for one, other in zip(heard, said, strict=True)) / 32}
    for field in FIELDS:
        expected[f"accuracy_{field}"] = sum(one[field] == other[field] for one, other in zip(heard, said, strict=True)) / 32
    assert metrics == pytest.approx(expected)
    assert next(iter(metrics)) == "accuracy"
    assert 0 < metrics["accuracy"] < metrics["accuracy_action"] < metrics["accuracy_location"] == 1
    for row, one, other in zip(objective.rows, heard, said, strict=True):
        assert {field: row[field] for field in FIELDS} == other
        assert {field: row[f"{field} predicted"] for field in FIELDS} == one
        assert row["correct"] == (one == other)
    objective.reset("test")
    assert objective.compute()["accuracy"] == 0
    assert not any(slot.counts().any() for slot in objective.slots)


def test_predictions_of_slots_have_each_ones_label_and_score():
    outputs = draw(4, 6)
    for row, answer, heard in zip(outputs, Slots(SLOTS, FIELDS).predict(outputs, LENGTHS), heard_by_loop(outputs), strict=True):
        assert answer["label"] == " ".join(heard[field] for field in FIELDS)
        product = 1.0
        for field, own in OWN.items():
            share = math.exp(row[own].max()) / sum(math.exp(score) for score in row[own].tolist())
            assert answer["slots"][field]["label"] == heard[field]
            assert answer["slots"][field]["score"] == pytest.approx(share, rel=1e-5)
            product *= share
        assert answer["score"] == pytest.approx(product, rel=1e-5)


def test_files_of_slots_hold_every_value_of_every_slot(tmp_path):
    outputs, objective = draw(4, 6), Slots(SLOTS, FIELDS)
    objective.update(outputs, LENGTHS, slot_batch())
    names = objective.write(tmp_path, "intent")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert sorted(names) == [*(f"confusion-{field}.png" for field in sorted(FIELDS)), "per_class.csv", "per_utterance.csv"]
    assert objective.write(tmp_path / "tables", "intent", plots=False) == ["per_class.csv", "per_utterance.csv"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["per_class.csv", "per_utterance.csv"]
    rows = table(tmp_path / "per_class.csv")
    assert [(row["slot"], row["class"]) for row in rows] == [
        (field, name.split("=")[1]) for field in FIELDS for name in SLOTS if name.startswith(field)
    ]
    assert [int(row["count"]) for row in rows] == [1, 2, 1, 2, 2, 4]  # heat, lights, music; off, on; none
    written = table(tmp_path / "per_utterance.csv")
    assert [row["utterance"] for row in written] == ["utt-a", "utt-b", "utt-c", "utt-d"]
    assert {row["object"] for row in written} == {"lights", "music", "heat"}


def test_names_that_begin_alike_are_slots_of_their_own():
    names = sorted(["a=x", "a=y", "a b=x", "ab=x", "ab=z", "a!=q"])
    objective = Slots(names, ["ab", "a", "a b"])
    assert [slot.classes for slot in objective.slots] == [["x", "z"], ["x", "y"], ["x"]]
    assert [names[first] for first in objective.first] == ["ab=x", "a=x", "a b=x"]
