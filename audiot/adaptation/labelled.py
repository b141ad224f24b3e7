"""What the labels of a folder are, before any audio is decoded: which of them a model is to learn, and of how many files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from audiot.base.quoting import argument
from audiot.data.corpora.folder import FolderCorpus

CLASSIFICATION, SPEAKERS, TRANSCRIPTION = "classification", "speakers", "transcription"
TASKS = (CLASSIFICATION, SPEAKERS, TRANSCRIPTION)
SPLIT = "split"  # column that names the split of a file
SPLITS = {  # what it may hold
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
USUAL = ("label", "class", "keyword", "category", "target", "word", "emotion", "intent", "language")  # names of label columns
FEWEST_FILES = 3  # of a label: one for each split
LISTED = 8  # labels that an error names


@dataclass(frozen=True)
class Labelled:
    """The labels of a folder.

    Args:
        task: One of `TASKS`.
        label: Field that is learnt; of transcription it is ``text``.
        why: How it was found, in words.
        counts: Number of files by value of the label; empty for transcription.
        files: Number of files with a label.
        speakers: Number of speakers; 0 where a file has none.
        splits: Role → its values in the column ``split``; empty without such a column.
        characters: All characters of the transcripts; empty for other tasks.
    """

    task: str
    label: str
    why: str
    counts: Mapping[str, int]
    files: int
    speakers: int
    splits: Mapping[str, Sequence[str]]
    characters: str = ""


def look(corpus: FolderCorpus, task: str = "auto", label: str = "auto") -> Labelled:
    """The label to learn.

    Args:
        corpus: The folder.
        task: One of `TASKS`, or ``auto``.
        label: Name of the field to learn, or ``auto``.

    Raises:
        FileNotFoundError: there is no audio.
        ValueError: no label or no split can be used; the message says what is wrong, where, and what to do.
    """
    where = str(corpus.texts[0]) if corpus.texts else f"data.pattern {corpus.pattern.pattern!r}" if corpus.pattern else ""
    if not where:
        given = argument("data.pattern", "{label}_{take}")
        raise ValueError(f"no labels: labels=FILE names a table with a column path and a column of labels, {given} takes names")
    labels_of, _, left_out = corpus.labelled()
    if not labels_of:
        some = f"; the first, {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"{where} has a label for none of the audio in {corpus.root}: its paths count from there{some}")
    fields = [name for name in corpus.fields if name != SPLIT]
    values = {name: Counter(row[name] for row in labels_of.values() if row.get(name)) for name in fields}
    if label not in ("auto", *fields):
        raise ValueError(f"{where} has no label {label!r} (adapt.label): it has {', '.join(fields) or 'none'}")
    task, label, why = _chosen(where, values, task, label)
    counts = values[label]
    if task != TRANSCRIPTION:
        _check_counts(where, label, counts)
    with_label = [row for row in labels_of.values() if row.get(label)]
    speakers = {row.get("speaker") for row in with_label}
    return Labelled(
        task,
        label,
        why,
        {} if task == TRANSCRIPTION else dict(sorted(counts.items())),
        len(with_label),
        0 if speakers & {None, ""} else len(speakers),
        _splits(where, [row[SPLIT] for row in with_label]) if SPLIT in corpus.fields else {},
        "".join(sorted({character for text in counts for character in text})) if task == TRANSCRIPTION else "",
    )


def _chosen(where: str, values: Mapping[str, Counter[str]], task: str, label: str) -> tuple[str, str, str]:
    """Task, label and how they were found."""
    if label == "text" or task == TRANSCRIPTION:
        if label not in ("auto", "text") or task not in ("auto", TRANSCRIPTION):
            raise ValueError(f"adapt.task={task} and adapt.label={label} exclude each other: transcripts are the label text")
        if not values.get("text"):
            raise ValueError(f"{where} has no transcripts: adapt.task={TRANSCRIPTION} learns those of a column text")
        return TRANSCRIPTION, "text", "as adapt.task or adapt.label says"
    if label == "speaker" or task == SPEAKERS:
        if label not in ("auto", "speaker") or task not in ("auto", SPEAKERS):
            raise ValueError(f"adapt.task={task} and adapt.label={label} exclude each other: speakers are the label speaker")
        if not values.get("speaker"):
            raise ValueError(f"{where} has no speakers: adapt.task={SPEAKERS} learns those of a column speaker")
        return SPEAKERS, "speaker", "as adapt.task or adapt.label says"
    if label != "auto":
        return CLASSIFICATION, label, "as adapt.label says"
    own = {name: counts for name, counts in values.items() if name not in ("text", "speaker")}
    able = [name for name, counts in own.items() if 2 <= len(counts) <= counts.total() / 2]  # values that occur again
    for name in USUAL:
        if name in able:
            return CLASSIFICATION, name, f"one label per file, in {name}"
    if len(able) > 1:
        raise ValueError(f"{where} has several labels, {', '.join(able)}: choose one, adapt.label={able[0]}")
    if able:
        return CLASSIFICATION, able[0], f"one label per file, in {able[0]}"
    if named := next((name for name in USUAL if own.get(name)), None):  # whose values can't be used: told by `_check_counts`
        return CLASSIFICATION, named, f"one label per file, in {named}"
    if values.get("text"):
        return TRANSCRIPTION, "text", "transcripts in text, and no label whose values occur again"
    if len(own) == 1:
        (only,) = own
        return CLASSIFICATION, only, f"one label per file, in {only}"
    if values.get("speaker"):
        return SPEAKERS, "speaker", "speakers, and no other label whose values occur again"
    raise ValueError(
        f"{where} has no label to learn: a column must have two values or more, each of several files; "
        f"it has {', '.join(values) or 'no column but path'}"
    )


def _check_counts(where: str, label: str, counts: Counter[str]) -> None:
    if len(counts) < 2:
        found = f"all {counts.total()} files have {next(iter(counts))!r}" if counts else "all files are without"
        raise ValueError(f"{where}: fewer than two labels in {label}: {found}; two are the fewest to tell apart")
    if few := [f"{value!r} ({count})" for value, count in counts.items() if count < FEWEST_FILES]:
        more = f" and {len(few) - LISTED} more" if len(few) > LISTED else ""
        raise ValueError(
            f"{where}: too few files in {label} of {', '.join(few[:LISTED])}{more}: each label needs {FEWEST_FILES}, one each "
            "for training, validation and test; add files, or leave these labels blank"
        )


def _splits(where: str, found: Sequence[str]) -> dict[str, list[str]]:
    """Role → the values of the column ``split`` that stand for it."""
    known = {word: role for role, words in SPLITS.items() for word in words}
    splits: dict[str, list[str]] = {}
    for value in dict.fromkeys(found):
        role = known.get(value.lower())
        if role is None:
            raise ValueError(f"{where}: {value!r} in the column {SPLIT} is no split: expected train, valid or test in every row")
        splits.setdefault(role, []).append(value)
    if "train" not in splits:
        raise ValueError(f"{where}: no file is for training, according to the column {SPLIT}: it has {', '.join(splits)}")
    return splits
