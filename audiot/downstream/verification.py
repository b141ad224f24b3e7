"""Speaker verification: do two utterances have the same speaker?"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from audiot.analysis.plots import plot_scores
from audiot.base.devices import at_least_float32
from audiot.base.files import write_csv
from audiot.base.streams import key
from audiot.data.batches import Batch
from audiot.data.text import lines
from audiot.downstream.bootstrap import Measured, Metrics
from audiot.downstream.objectives import Objective, Row
from audiot.training.accumulation import Mean

WEIGHTED = 1_000_000  # weights of trials that are computed at once
Trial = tuple[bool, str, str]  # same speaker, utterance, utterance


class Verification(Objective):
    """Speaker embeddings, trained by classifying the training speakers and compared by cosine.

    The loss is the additive-margin softmax (Wang et al. 2018, arXiv:1801.05599). The metrics are the equal error rate, computed
    as in SUPERB (see `error_rates`), and the minimum of the normalised detection cost (NIST; both errors cost 1).

    Args:
        classes: Names of the training speakers.
        embedding_dim: Width of the head's output.
        scale, margin: Parameters s and m of the loss.
        trials: File with the test's trials, lines ``1|0 UTTERANCE UTTERANCE`` (1: same speaker; .wav may follow). None takes all
            pairs of test utterances, as validation always does.
        max_trials: Most pairs; more are sampled.
        p_target: Prior probability of the same speaker, in the detection cost.
    """

    def __init__(
        self,
        classes: Sequence[str],
        embedding_dim: int = 512,
        scale: float = 30.0,
        margin: float = 0.4,
        trials: str | Path | None = None,
        max_trials: int = 200_000,
        p_target: float = 0.01,
    ) -> None:
        super().__init__(classes)
        if not 0 < p_target < 1:
            raise ValueError(f"downstream.objective.p_target must be between 0 and 1, found {p_target}")
        self.num_outputs = embedding_dim
        self.speakers = nn.Parameter(torch.empty(len(self.classes), embedding_dim))
        nn.init.xavier_uniform_(self.speakers)
        self.scale, self.margin, self.p_target = scale, margin, p_target
        self.max_trials = max_trials
        self.trials = None if trials is None else read_trials(trials)
        self.path = trials
        self.stage = "test"

    def loss(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> Mean:
        """Cross-entropy over training speakers, with the margin subtracted from the true one's cosine; a mean over utterances."""
        embeddings, speakers = (nn.functional.normalize(at_least_float32(vectors)) for vectors in (outputs, self.speakers))
        cosines = embeddings @ speakers.T
        margins = nn.functional.one_hot(batch["labels"], len(self.classes)) * self.margin
        loss = nn.functional.cross_entropy(self.scale * (cosines - margins), batch["labels"])
        return Mean(loss, loss.new_full((), len(outputs)))

    def update(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> None:
        """Store the embeddings."""
        embeddings = nn.functional.normalize(outputs.float()).cpu()
        for name, speaker, embedding in zip(batch["ids"], batch["speakers"], embeddings, strict=True):
            self.rows.append({"utterance": name, "speaker": speaker, "embedding": embedding})

    def reset(self, stage: str) -> None:
        """Clear the stored embeddings."""
        super().reset(stage)
        self.stage = stage

    def check(self, utterances: Iterable[str]) -> None:
        """Refuse trials with utterances that the test split lacks."""
        missing = {name for _, *pair in self.trials or () for name in pair} - set(utterances)
        if missing:
            assert self.path is not None
            number, name = next(
                (number, name) for number, (_, *pair) in _numbered_trials(self.path) for name in pair if name in missing
            )
            raise ValueError(
                f"{self.path} names {len(missing)} utterances that the test split lacks, {name} of line {number} first: were "
                "they rejected by preparation? Correct them, or leave their trials out"
            )

    def scored(self) -> list[Row]:
        """Every trial with its cosine.

        Raises:
            ValueError: an utterance of a trial was not measured, or all trials are of one kind.
        """
        rows = {row["utterance"]: row for row in self.all_rows()}
        if self.trials is not None and self.stage == "test":
            self.check(rows)
            trials = self.trials
        else:
            trials = _pairs(list(rows.values()), self.max_trials)
        if len({same for same, _, _ in trials}) < 2:
            raise ValueError(
                "all trials are of one kind: verification needs trials with the same speaker and with different speakers"
            )
        embeddings = torch.stack([row["embedding"] for row in rows.values()])
        place = {name: number for number, name in enumerate(rows)}
        first, second = (torch.tensor([place[trial[side]] for trial in trials]) for side in (1, 2))
        cosines = torch.cat(
            [
                (embeddings[one] * embeddings[two]).sum(1)
                for one, two in zip(first.split(50_000), second.split(50_000), strict=True)
            ]
        )
        return [
            {"same": int(same), "first": one, "second": two, "score": cosine}
            for (same, one, two), cosine in zip(trials, cosines.tolist(), strict=True)
        ]

    def compute(self) -> dict[str, float]:
        """``eer`` and ``min_dcf``."""
        trials = self.scored()
        scores = torch.tensor([trial["score"] for trial in trials])
        same = torch.tensor([trial["same"] for trial in trials])
        return error_rates(scores, same, self.p_target)

    def measured(self) -> Measured:
        """All trials with their scores."""
        return Trials(self.scored(), self.p_target)

    def predict(self, outputs: Tensor, lengths: Tensor) -> list[Row]:
        """The ``embedding`` of each utterance, normalised to length 1. The score of two utterances is their cosine."""
        return [{"embedding": embedding} for embedding in nn.functional.normalize(outputs.float()).cpu().tolist()]

    def write(self, folder: Path, title: str, plots: bool = True) -> list[str]:
        """Write ``trials.csv``, ``per_class.csv`` (mean scores of each speaker) and ``scores.png``."""
        trials = self.scored()
        speaker_of = {row["utterance"]: row["speaker"] for row in self.all_rows()}
        write_csv(folder / "trials.csv", [{**trial, "score": round(trial["score"], 4)} for trial in trials])
        scores: dict[tuple[str, int], list[float]] = defaultdict(list)
        for trial in trials:
            for speaker in {speaker_of[trial["first"]], speaker_of[trial["second"]]}:
                scores[speaker, trial["same"]].append(trial["score"])
        table = []
        for speaker in sorted(set(speaker_of.values())):
            row: Row = {"speaker": speaker}
            for name, kind in (("same", 1), ("other", 0)):
                own = scores[speaker, kind]
                row |= {f"{name} trials": len(own), f"{name} mean": round(sum(own) / len(own), 4) if own else None}
            table.append(row)
        write_csv(folder / "per_class.csv", table)
        kinds = {
            name: [trial["score"] for trial in trials if trial["same"] == kind]
            for name, kind in (("same speaker", 1), ("different speakers", 0))
        }
        if plots:
            plot_scores(kinds, title, folder / "scores.png")
        return ["trials.csv", "per_class.csv", *(["scores.png"] if plots else [])]


class Trials(Measured):
    """Trials of which speakers or utterances can be resampled.

    A unit that is drawn k times stands for k different speakers (or utterances). A trial within a unit then counts k times, and
    a trial between two units as often as the product of their numbers says, as in Owen (2007, "The pigeonhole bootstrap"), where
    rows and columns of a table are drawn. Here both sides are the same speakers. Two copies of a unit have no trial with each
    other.

    Args:
        trials: Rows of `Verification.scored`.
        p_target: Prior probability of the same speaker.
    """

    def __init__(self, trials: Sequence[Row], p_target: float) -> None:
        super().__init__(sorted({trial[side] for trial in trials for side in ("first", "second")}))
        place = {name: number for number, name in enumerate(self.utterances)}
        trials = sorted(trials, key=lambda trial: -trial["score"])
        self.sides = torch.tensor([[place[trial[side]] for trial in trials] for side in ("first", "second")])
        self.scores = torch.tensor([trial["score"] for trial in trials], dtype=torch.float64)
        self.same = torch.tensor([trial["same"] for trial in trials])
        self.p_target = p_target

    def metrics(self, units: Tensor, counts: Tensor) -> Metrics:
        """``eer`` and ``min_dcf`` of each test; NaN if it has trials of one kind alone."""
        first, second = units[self.sides]
        counts = counts.float()  # exact up to 2²⁴ trials, and twice as fast
        parts = []
        for some in counts.split(max(1, WEIGHTED // len(self.same))):
            weights = some.index_select(1, first) * some.index_select(1, second).where(first != second, 1)
            parts.append(_error_rates(self.scores, self.same, weights, self.p_target))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def error_rates(scores: Tensor, same: Tensor, p_target: float = 0.01) -> dict[str, float]:
    """Equal error rate and minimum detection cost of scored trials.

    The receiver operating characteristic (ROC) has a point for each different score: the shares of false alarms and hits when
    this and all larger scores are accepted. It also has a point where nothing is accepted, and is linear between points. The
    equal error rate is the share of false alarms at the point of the curve where as large a share is missed. The minimum
    detection cost is taken over all points.

    Args:
        scores: Scores (trials,), larger for the same speaker.
        same: Truth (trials,): 1 for the same speaker, 0 for different ones.
        p_target: Prior probability of the same speaker.

    Returns:
        ``eer`` and ``min_dcf``, normalised by the cost of a decision without scores.
    """
    scores, order = scores.double().sort(descending=True)
    rates = _error_rates(scores, same[order], torch.ones(1, len(same), dtype=torch.float64), p_target)
    return {name: float(value) for name, value in rates.items()}


def _error_rates(scores: Tensor, same: Tensor, weights: Tensor, p_target: float) -> Metrics:
    """`error_rates` of several tests (tests,), in each of which the trials have other weights.

    Args:
        scores: Scores (trials,), the largest first.
        same: Truth (trials,), 1 or 0.
        weights: How often each trial counts, (tests, trials).
        p_target: Prior probability of the same speaker.

    Returns:
        ``eer`` and ``min_dcf``. They are NaN for a test in which all trials of a kind have weight 0.
    """
    last = nn.functional.pad(scores[1:] != scores[:-1], (0, 1), value=True).nonzero()[:, 0]  # of the trials with equal scores
    same = same.to(weights.dtype)
    accepted = (nn.functional.pad((weights * kind).cumsum(1).index_select(1, last), (1, 0)) for kind in (same, 1 - same))
    hits, false_alarms = (number / number[:, -1:] for number in accepted)
    cost = p_target * (1 - hits) + (1 - p_target) * false_alarms
    return {"eer": _crossing(false_alarms, hits), "min_dcf": cost.amin(1) / min(p_target, 1 - p_target)}


def _crossing(false_alarms: Tensor, hits: Tensor) -> Tensor:
    """Share of false alarms where each curve, piecewise linear from (0, 0) to (1, 1), meets false alarms = 1 − hits.

    Args:
        false_alarms, hits: Points of the curves, (tests, points).
    """
    excess = 1 - hits - false_alarms  # decreases from 1 to −1
    after = (excess > 0).sum(1, keepdim=True).clamp(min=1)  # 0 where there is no curve
    (excess_before, excess_after), (before, later) = (
        (values.gather(1, after - 1), values.gather(1, after)) for values in (excess, false_alarms)
    )
    way = excess_before / (excess_before - excess_after)
    return (before + way * (later - before)).squeeze(1)


def read_trials(path: str | Path) -> list[Trial]:
    """Read trials from lines ``1|0 UTTERANCE UTTERANCE``, as in VoxCeleb. Audio suffixes are removed.

    A repeated trial counts twice, as in the published lists.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line has another form, two lines contradict each other, or there is no trial.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"downstream.objective.trials: there is no file {path}")
    trials: list[Trial] = []
    found: dict[frozenset[str], tuple[bool, int]] = {}
    for number, (same, first, second) in _numbered_trials(path):
        before, line = found.setdefault(frozenset((first, second)), (same, number))
        if before != same:
            raise ValueError(
                f"{path}:{number}: {first} and {second} have the same speaker either here or in line {line}: correct one of them"
            )
        trials.append((same, first, second))
    if not trials:
        raise ValueError(f"{path} has no trial: expected lines of 1 or 0 and two utterances")
    return trials


def _numbered_trials(path: str | Path) -> Iterator[tuple[int, Trial]]:
    for number, line in lines(path):
        words = line.split()
        if len(words) != 3 or words[0] not in ("0", "1"):
            raise ValueError(f"{path}:{number}: expected 1 or 0 and two utterances, found {line[:80]!r}")
        names = [word.rpartition(".")[0] if word.lower().endswith((".wav", ".flac", ".m4a")) else word for word in words[1:]]
        yield number, (words[0] == "1", names[0], names[1])


def _pairs(rows: Sequence[Row], limit: int) -> list[Trial]:
    """All pairs of utterances, or ``limit`` of them chosen by a hash."""
    count = len(rows) * (len(rows) - 1) // 2
    pairs = list(combinations(range(len(rows)), 2)) if count <= limit else _sampled(len(rows), limit)
    return [(rows[one]["speaker"] == rows[two]["speaker"], rows[one]["utterance"], rows[two]["utterance"]) for one, two in pairs]


def _sampled(count: int, limit: int) -> list[tuple[int, int]]:
    """``limit`` different pairs among ``count`` utterances."""
    drawn = sorted(random.Random(key("verification trials", count)).sample(range(count * (count - 1) // 2), limit))
    later = [(1 + isqrt(1 + 8 * number)) // 2 for number in drawn]  # pair (one, two) has number two · (two − 1) / 2 + one
    return [(number - two * (two - 1) // 2, two) for number, two in zip(drawn, later, strict=True)]
