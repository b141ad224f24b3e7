"""Objectives of the downstream tasks: their loss, metrics and result files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from audiot.analysis.plots import plot_confusion
from audiot.base.devices import at_least_float32
from audiot.base.files import write_csv
from audiot.data.batches import Batch
from audiot.data.labels import IGNORED
from audiot.data.phones import by_phone_class
from audiot.downstream.bootstrap import Measured, Metrics, Sums
from audiot.model import length_mask
from audiot.training.accumulation import Mean

Row = dict[str, Any]


class Objective(nn.Module, ABC):
    """Base class of the objectives.

    ``outputs`` come from a head, (B, frames, C) or (B, C). ``lengths`` (B,) counts frames and is on the CPU. A batch has
    ``labels``, ``ids`` and ``speakers``.

    Args:
        classes: Label names of the task.

    Attributes:
        num_outputs: Number of outputs C that the head needs.
        rows: Measurements of each utterance since `reset`, on this process.
    """

    num_outputs: int

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = list(classes)
        self.rows: list[Row] = []

    def check(self, utterances: Iterable[str]) -> None:
        """Refuse, before training, a test split that cannot be measured.

        Args:
            utterances: Ids of the test split.
        """

    def begin(self, head: nn.Module) -> None:
        """Change what a new head says before it has learned.

        Args:
            head: A head with `num_outputs` outputs.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> Mean:
        """Training loss, and the number of frames or utterances that it is averaged over."""

    @abstractmethod
    def update(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> None:
        """Measure a batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Metrics of all measurements since `reset`, over all processes."""

    @abstractmethod
    def predict(self, outputs: Tensor, lengths: Tensor) -> list[Row]:
        """Prediction for each utterance: ``label`` and ``score``, or ``text``, …"""

    @abstractmethod
    def write(self, folder: Path, title: str, plots: bool = True) -> list[str]:
        """Write the measurements since `reset` to CSV files and pictures.

        Args:
            folder: Where the files go.
            title: Title of the pictures.
            plots: Whether to draw pictures.

        Returns:
            Names of the files.
        """

    def measured(self) -> Measured | None:
        """Measurements of the test over all processes, for confidence intervals; None if the objective gives none.

        Every process must call it.
        """
        return None

    def reset(self, stage: str) -> None:
        """Start measuring ``valid`` or ``test``."""
        self.rows = []

    def all_rows(self) -> list[Row]:
        """Rows of all processes, ordered by utterance id."""
        return gathered(self.rows)


def gathered(rows: list[Row]) -> list[Row]:
    """Rows of all processes, ordered by utterance id. Every process must call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts: list[list[Row]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows, key=lambda row: row["utterance"])


class Classification(Objective):
    """Cross-entropy over classes of utterances or frames. A label of an utterance may also be the label of all its frames."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.num_outputs = len(self.classes)
        self.confusion = MulticlassConfusionMatrix(max(2, len(self.classes)), ignore_index=IGNORED)
        self.stage = "test"
        self.tallies: list[Row] = []  # of the test: counts of each utterance's classes

    def _matched(self, outputs: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Labels in the shape of the outputs, (B,) or (B, frames). Padding is ``IGNORED``."""
        if outputs.ndim == 2:
            return labels
        num_frames = outputs.shape[1]
        if labels.ndim == 1:
            labels = labels[:, None].expand(-1, num_frames)
        labels = nn.functional.pad(labels, (0, max(0, num_frames - labels.shape[1])), value=IGNORED)[:, :num_frames]
        # Frames that are left over by stacking have no hidden state.
        valid = length_mask(lengths, num_frames, labels.device)
        return labels if valid is None else labels.masked_fill(~valid, IGNORED)

    def loss(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> Mean:
        """Mean cross-entropy over labelled frames or utterances; zero if nothing is labelled."""
        labels = self._matched(outputs, lengths, batch["labels"])
        total = nn.functional.cross_entropy(
            at_least_float32(outputs.flatten(0, -2)), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (labels != IGNORED).sum()
        return Mean(total / count.clamp(min=1), count)

    def update(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> None:
        """Update the confusion matrix and store each utterance."""
        labels = self._matched(outputs, lengths, batch["labels"])
        self.confusion.update(outputs.argmax(-1).flatten(), labels.flatten())
        if self.stage == "test":
            self.tallies += self._tallied(
                batch["ids"], *(classes.reshape(len(labels), -1) for classes in (outputs.argmax(-1), labels))
            )
        if outputs.ndim == 2:
            scores, best = (values.tolist() for values in outputs.float().softmax(-1).max(-1))
            for name, label, number, score in zip(batch["ids"], labels.tolist(), best, scores, strict=True):
                known = None if label == IGNORED else self.classes[label]  # open set
                self.rows.append(
                    {"utterance": name, "label": known, "prediction": self.classes[number], "score": round(score, 4)}
                )
        else:
            labelled = (labels != IGNORED).sum(1)
            correct = ((outputs.argmax(-1) == labels) & (labels != IGNORED)).sum(1)
            for name, count, right in zip(batch["ids"], labelled.tolist(), correct.tolist(), strict=True):
                self.rows.append({"utterance": name, "frames": count, "accuracy": round(right / count, 4) if count else None})

    def _tallied(self, ids: Sequence[str], best: Tensor, labels: Tensor) -> list[Row]:
        """Counts of each utterance, for the classes that it has or that were predicted.

        ``right`` has the number of hits and ``either`` that of labels and predictions of a class, which add up to F1.

        Args:
            ids: Utterances of the batch.
            best, labels: Predicted and true classes (B, items).
        """
        count = len(self.classes)
        labelled = labels != IGNORED
        first = count * torch.arange(len(labels), device=labels.device)[:, None]
        true, guessed = ((first + classes)[labelled] for classes in (labels, best))
        right, either = (
            torch.bincount(places, minlength=len(labels) * count).view(-1, count).cpu().numpy()
            for places in (true[true == guessed], torch.cat([true, guessed]))
        )
        rows = []
        for name, hits, found in zip(ids, right, either, strict=True):
            classes = np.flatnonzero(found)
            rows.append({"utterance": name, "classes": classes, "right": hits[classes], "either": found[classes]})
        return rows

    def measured(self) -> Measured:
        """Counts of every class in every utterance with a label."""
        rows = [row for row in gathered(self.tallies) if len(row["classes"])]
        count = len(self.classes)
        utterance = np.repeat(np.arange(len(rows)), [2 * len(row["classes"]) for row in rows])
        column, value = (
            np.concatenate([part for row in rows for part in parts(row)] or [np.zeros(0, dtype=int)])
            for parts in (
                lambda row: (row["classes"], count + row["classes"]),
                lambda row: (row["right"], row["either"]),
            )
        )
        places = torch.from_numpy(np.stack([utterance, column]))
        return Sums([row["utterance"] for row in rows], places, torch.from_numpy(value), 2 * count, self._figures)

    def _figures(self, sums: Tensor) -> Metrics:
        """The metrics of `compute` from the sums (tests, 2 · classes) of ``right`` and ``either``."""
        right, either = sums.split(len(self.classes), dim=1)
        f1 = 2 * right / either  # NaN for a class that a test lacks
        return {"accuracy": 2 * right.sum(1) / either.sum(1), "macro_f1": f1.nanmean(1)}

    def reset(self, stage: str) -> None:
        """Clear the measurements."""
        super().reset(stage)
        self.confusion.reset()
        self.stage, self.tallies = stage, []

    def counts(self) -> Tensor:
        """Confusion matrix (classes, classes). Rows are true, columns predicted."""
        return self.confusion.compute()[: len(self.classes), : len(self.classes)].double().cpu()

    def compute(self) -> dict[str, float]:
        """``accuracy``, and ``macro_f1`` over the classes that occur or were predicted."""
        counts = self.counts()
        seen = (counts.sum(0) + counts.sum(1)) > 0
        return {
            "accuracy": float(counts.diagonal().sum() / counts.sum().clamp(min=1)),
            "macro_f1": float(_f1(counts)[seen].mean()) if seen.any() else 0.0,
        }

    def predict(self, outputs: Tensor, lengths: Tensor) -> list[Row]:
        """Best class of each utterance with its probability and the ``scores`` of all; for frames, segments of equal classes."""
        probabilities = outputs.float().softmax(-1).cpu()
        if outputs.ndim == 2:
            best = [int(row.argmax()) for row in probabilities]
            return [
                {
                    "label": self.classes[number],
                    "score": float(row[number]),
                    "scores": dict(zip(self.classes, row.tolist(), strict=False)),
                }
                for row, number in zip(probabilities, best, strict=True)
            ]
        found = []
        for row, length in zip(probabilities, lengths.tolist(), strict=True):
            scores, classes = row[:length].max(-1)
            segments, at = [], 0
            for number, stretch in groupby(classes.tolist()):
                end = at + len(list(stretch))
                score = float(scores[at:end].mean())
                segments.append({"label": self.classes[number], "start": at, "end": end, "score": score})
                at = end
            found.append({"segments": segments})
        return found

    def write(self, folder: Path, title: str, plots: bool = True) -> list[str]:
        """Write ``per_class.csv``, ``per_utterance.csv`` and ``confusion.png``."""
        counts = self.counts()
        write_csv(folder / "per_class.csv", per_class(counts, self.classes))
        write_csv(folder / "per_utterance.csv", self.all_rows())
        if plots:
            plot_confusion(counts, self.classes, title, folder / "confusion.png", by_phone_class(self.classes))
        return ["per_class.csv", "per_utterance.csv", *(["confusion.png"] if plots else [])]


class Slots(Objective):
    """One classification per slot, trained together. An utterance is correct if all its slots are.

    Args:
        classes: ``slot=value`` of all slots, as `audiot.data.labels.SlotLabels` names them.
        fields: Names of the slots, in the order of the labels.
    """

    def __init__(self, classes: Sequence[str], fields: Sequence[str]) -> None:
        super().__init__(classes)
        self.num_outputs = len(self.classes)
        self.fields = list(fields)
        # Vocabularies are sorted, so the values of a slot are adjacent.
        self.first = [next(place for place, name in enumerate(self.classes) if name.startswith(f"{field}=")) for field in fields]
        values = [[name.split("=", 1)[1] for name in self.classes if name.startswith(f"{field}=")] for field in fields]
        self.slots = nn.ModuleList(Classification(names) for names in values)

    def _parts(self, outputs: Tensor) -> list[tuple[str, int, Classification, Tensor]]:
        """Name, first class, objective and outputs (B, values) of each slot."""
        parts = []
        for field, first, slot in zip(self.fields, self.first, self.slots, strict=True):
            assert isinstance(slot, Classification)
            parts.append((field, first, slot, outputs[:, first : first + slot.num_outputs]))
        return parts

    def loss(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> Mean:
        """Sum of the slots' cross-entropies, averaged over utterances. Every utterance has a label for every slot."""
        columns = batch["labels"].unbind(1)
        parts = zip(self._parts(outputs), columns, strict=True)
        losses = [slot.loss(own, lengths, {"labels": column - first}) for (_, first, slot, own), column in parts]
        return Mean(torch.stack([loss.value for loss in losses]).sum(), losses[0].scored)

    def update(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> None:
        """Update each slot and store each utterance."""
        rows: list[Row] = [{"utterance": name} for name in batch["ids"]]
        for (field, first, slot, own), column in zip(self._parts(outputs), batch["labels"].unbind(1), strict=True):
            true, best = column - first, own.argmax(1)
            slot.confusion.update(best, true)
            for row, label, number in zip(rows, true.tolist(), best.tolist(), strict=True):
                row |= {field: slot.classes[label], f"{field} predicted": slot.classes[number]}
        for row in rows:
            row["correct"] = all(row[field] == row[f"{field} predicted"] for field in self.fields)
        self.rows += rows

    def reset(self, stage: str) -> None:
        """Clear the measurements."""
        super().reset(stage)
        for slot in self.slots:
            assert isinstance(slot, Classification)
            slot.reset(stage)

    def compute(self) -> dict[str, float]:
        """``accuracy`` of whole utterances, and ``accuracy_SLOT`` of each slot."""
        rows = self.all_rows()
        metrics = {"accuracy": sum(row["correct"] for row in rows) / max(1, len(rows))}
        for field, slot in zip(self.fields, self.slots, strict=True):
            assert isinstance(slot, Classification)
            metrics[f"accuracy_{field}"] = slot.compute()["accuracy"]
        return metrics

    def measured(self) -> Measured:
        """Which slots of every utterance are right."""
        rows = self.all_rows()
        right = [[1, row["correct"], *(row[field] == row[f"{field} predicted"] for field in self.fields)] for row in rows]
        names = ["accuracy", *(f"accuracy_{field}" for field in self.fields)]

        def figures(sums: Tensor) -> Metrics:
            return {name: total / sums[:, 0] for name, total in zip(names, sums[:, 1:].unbind(1), strict=True)}

        return Sums.of([row["utterance"] for row in rows], right, figures)

    def predict(self, outputs: Tensor, lengths: Tensor) -> list[Row]:
        """``label`` (the values of all slots), ``score`` (the product of theirs), and ``slots``: label and score of each."""
        predictions = {field: slot.predict(own, lengths) for field, _, slot, own in self._parts(outputs)}
        found = []
        for number in range(len(outputs)):
            slots = {field: rows[number] for field, rows in predictions.items()}
            score = 1.0
            for slot in slots.values():
                score *= slot["score"]
            found.append({"label": " ".join(slot["label"] for slot in slots.values()), "score": score, "slots": slots})
        return found

    def write(self, folder: Path, title: str, plots: bool = True) -> list[str]:
        """Write ``per_class.csv``, ``per_utterance.csv`` and ``confusion-SLOT.png``."""
        slots: dict[str, tuple[Tensor, Sequence[str]]] = {}
        for field, slot in zip(self.fields, self.slots, strict=True):
            assert isinstance(slot, Classification)
            slots[field] = slot.counts(), slot.classes
        table = [{"slot": field, **row} for field, (counts, classes) in slots.items() for row in per_class(counts, classes)]
        write_csv(folder / "per_class.csv", table)
        write_csv(folder / "per_utterance.csv", self.all_rows())
        pictures = []
        for field, (counts, classes) in slots.items() if plots else ():
            pictures.append(f"confusion-{field}.png")
            plot_confusion(counts, classes, f"{title}, {field}", folder / pictures[-1])
        return ["per_class.csv", "per_utterance.csv", *pictures]


def per_class(counts: Tensor, classes: Sequence[str]) -> list[Row]:
    """Count, precision, recall and F1 of each class, from a confusion matrix (rows true)."""
    right = counts.diagonal()
    precision, recall = right / counts.sum(0).clamp(min=1), right / counts.sum(1).clamp(min=1)
    return [
        {
            "class": name,
            "count": int(counts[number].sum()),
            "precision": round(float(precision[number]), 4),
            "recall": round(float(recall[number]), 4),
            "f1": round(float(f1), 4),
        }
        for number, (name, f1) in enumerate(zip(classes, _f1(counts), strict=True))
    ]


def _f1(counts: Tensor) -> Tensor:
    return 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1)).clamp(min=1)
