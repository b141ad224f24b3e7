"""What a folder holds once it is prepared: files, hours, speakers and labels of each split, and what is left out and why."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from audiot.adaptation.labelled import TRANSCRIPTION, Labelled
from audiot.data.labels import speaker_of, values_of
from audiot.data.prepare import ROLES, PreparedCorpus

LISTED = 12  # labels that are listed


@dataclass(frozen=True)
class Survey:
    """What there is.

    Args:
        found: The labels of the folder.
        counts: Role → number of utterances.
        hours: Role → hours of audio.
        labels: Role → label → number of utterances; empty counts for transcription.
        speakers: Role → its speakers; empty where an utterance has none.
        audio: Utterance of the test → its prepared file.
        speaker_of: Utterance of the test → its speaker, None if it has none.
        rejected: Kind of reason → number of files.
        reasons: Path and reason of each file that is left out.
        report: File with them.
    """

    found: Labelled
    counts: Mapping[str, int]
    hours: Mapping[str, float]
    labels: Mapping[str, Counter[str]]
    speakers: Mapping[str, frozenset[str]]
    audio: Mapping[str, str]
    speaker_of: Mapping[str, str | None]
    rejected: Mapping[str, int]
    reasons: tuple[tuple[str, str], ...]
    report: str

    @property
    def new_speakers(self) -> bool:
        """Whether the test's speakers are known, and none of them is in training."""
        return bool(self.speakers["test"] and self.speakers["train"]) and not self.speakers["test"] & self.speakers["train"]

    @property
    def all_labels(self) -> list[str]:
        """All labels in their order; none for transcription."""
        return sorted({label for own in self.labels.values() for label in own})

    @property
    def most_frequent(self) -> str:
        """The most frequent label of training; empty for transcription."""
        return max(sorted(self.labels["train"]), key=lambda label: self.labels["train"][label], default="")

    def majority(self) -> float | None:
        """Accuracy of always saying the most frequent label; None for transcription."""
        if not self.labels["train"]:
            return None
        return self.labels["test"][self.most_frequent] / self.labels["test"].total()

    def check(self) -> None:
        """Refuse splits that can't be trained on or tested.

        Raises:
            ValueError: a label of validation or test does not occur in training.
        """
        for role in ("valid", "test"):
            for label in sorted(self.labels[role].keys() - self.labels["train"].keys()):
                other = "adapt.by_speaker=false lets speakers of training be tested" if self.new_speakers else "move some files"
                raise ValueError(
                    f"{self.found.label} {label!r} is in the {role} split ({self.labels[role][label]} files) and not in "
                    f"training: it can't be learnt; {other}, or leave it blank"
                )

    def in_words(self) -> str:
        """The survey in a few lines."""
        total, hours = sum(self.counts.values()), sum(self.hours.values())
        lines = [f"found   {total:,} usable files, {hours:.2f} h of audio"]
        if self.rejected:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.rejected.items())
            lines.append(f"left    {sum(self.rejected.values()):,} files: {kinds}; {self.report}")
        if self.found.task != TRANSCRIPTION:
            sums: Counter[str] = Counter()
            for own in self.labels.values():
                sums += own
            shown = ", ".join(f"{label} {count:,}" for label, count in sums.most_common(LISTED))
            more = f" and {len(sums) - LISTED:,} more" if len(sums) > LISTED else ""
            lines.append(f"labels  {len(sums):,} in {self.found.label}: {shown}{more}")
        else:
            lines.append(f"labels  transcripts in text, {len(self.found.characters)} characters")
        parts = ", ".join(f"{role} {self.counts[role]:,} files ({self.hours[role]:.2f} h)" for role in ROLES)
        lines.append(f"split   {parts}")
        if self.speakers["test"]:
            kind = "none in training" if self.new_speakers else "some of training"
            speakers = len(self.speakers["test"])
            lines.append(f"        {speakers} speaker{'' if speakers == 1 else 's'} in the test, {kind}")
        return "\n".join(lines)


def survey(corpus: PreparedCorpus, task: str, found: Labelled) -> Survey:
    """What the splits of a task hold.

    Args:
        corpus: The prepared folder.
        task: Task whose splits they are.
        found: The labels of the folder.
    """
    labels: dict[str, Counter[str]] = {role: Counter() for role in ROLES}
    speakers: dict[str, frozenset[str]] = {}
    audio: dict[str, str] = {}
    speaker: dict[str, str | None] = {}
    for role in ROLES:
        names: set[str | None] = set()
        for cut in corpus.cuts(corpus.split_for(task, role)):
            names.add(speaker_of(cut))
            if role == "test":
                audio[cut.id], speaker[cut.id] = cut.recording.sources[0].source, speaker_of(cut)
            if found.task != TRANSCRIPTION:
                labels[role].update(values_of(cut, found.label))
        speakers[role] = frozenset() if None in names else frozenset(str(name) for name in names)
    path = corpus.directory / "rejected.csv"
    reasons: tuple[tuple[str, str], ...] = ()
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as stream:
            reasons = tuple((row["path"], row["reason"]) for row in csv.DictReader(stream))
    kinds = Counter(reason.split(":")[0] for _, reason in reasons)
    split = {role: corpus.split_for(task, role) for role in ROLES}
    return Survey(
        found,
        {role: corpus.counts[name] for role, name in split.items()},
        {role: corpus.hours[name] for role, name in split.items()},
        labels,
        speakers,
        audio,
        speaker,
        dict(kinds.most_common()),
        reasons,
        str(path),
    )
