"""Fluent Speech Commands: spoken commands whose intents have three slots."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path, PurePosixPath

from audiot.data.corpora.published import ROLES, Utterance, check_complete, labelled_manifests
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources, files_below
from audiot.data.text import rows

COUNTS = {"train": 23132, "valid": 3118, "test": 3793}
SLOTS = ("action", "object", "location")
COLUMNS = ("path", "speakerId", "transcription", *SLOTS)
REMEDY = (
    "get it from https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research and set data.root"
)


class FluentSpeechCommandsCorpus:
    """Fluent Speech Commands (Lugosch et al. 2019, arXiv:1904.03670): 30,043 household commands, 97 speakers, 31 intents.

    Splits ``train``, ``valid`` and ``test`` are the official ones, with 77, 10 and 10 speakers. Supervisions have speaker, text
    and the custom fields ``action``, ``object``, ``location`` and ``intent``. The intent joins the other three:
    ``activate|lights|kitchen``. The id of an utterance is ``SPEAKER/FILE``.

    Args:
        root: Unpacked folder ``fluent_speech_commands_dataset``, with ``data`` and ``wavs``.
        partial: Whether recordings or rows of the tables may be missing.
    """

    def __init__(self, root: str | Path, partial: bool = False) -> None:
        self.root, self.partial = Path(root), partial

    def manifests(self, progress: bool = True) -> Manifests:
        """Cuts of all splits.

        Raises:
            FileNotFoundError: a table or recordings are missing.
            ValueError: a table is broken, or an utterance or a speaker is in two tables.
        """
        splits = {split: self._read(split) for split in COUNTS}
        listed = {name: utterance for split in splits.values() for name, utterance in split.items()}
        absent = {name for name, utterance in listed.items() if not utterance.path.is_file()}
        names = (os.path.relpath(listed[name].path, self.root) for name in listed if name in absent)
        check_complete("Fluent Speech Commands", self.root, len(absent), len(listed), names, REMEDY, self.partial)
        there = {
            split: {name: utterance for name, utterance in found.items() if name not in absent} for split, found in splits.items()
        }
        manifests = labelled_manifests("Fluent Speech Commands", there, {"intent": ROLES}, (), progress)
        self._check_speakers(splits)  # last, because an utterance in two tables is the more precise error
        return manifests

    def sources(self) -> Sources:
        """The tables, and the recordings below ``wavs``."""
        return Sources(files_below(self.root / "wavs", ".wav"), [self._table(split) for split in COUNTS])

    def _table(self, split: str) -> Path:
        return self.root / "data" / f"{split}_data.csv"

    def _read(self, split: str) -> dict[str, Utterance]:
        """Utterances of a table."""
        table = self._table(split)
        if not table.is_file():
            raise FileNotFoundError(f"Fluent Speech Commands: there is no {table}: {REMEDY}")
        utterances: dict[str, Utterance] = {}
        for number, row in rows(table, COLUMNS):
            if empty := [name for name in COLUMNS if not row[name]]:
                raise ValueError(f"{table}:{number}: nothing in column {', '.join(empty)}")
            path = PurePosixPath(row["path"])
            name = f"{path.parent.name}/{path.stem}"
            if name in utterances:
                raise ValueError(f"{table}:{number}: {path} occurs a second time")
            labels = {slot: row[slot] for slot in SLOTS}
            labels["intent"] = "|".join(labels.values())
            utterances[name] = Utterance(self.root / path, row["speakerId"], row["transcription"], labels)
        if len(utterances) != COUNTS[split] and not self.partial:
            raise ValueError(
                f"{table} lists {len(utterances):,} utterances, the published one {COUNTS[split]:,}: {REMEDY}; "
                "data.partial=true takes a table that is meant to be a part"
            )
        return utterances

    def _check_speakers(self, splits: dict[str, dict[str, Utterance]]) -> None:
        speakers = {split: {str(utterance.speaker) for utterance in splits[split].values()} for split in splits}
        for first, second in combinations(splits, 2):
            if shared := speakers[first] & speakers[second]:
                raise ValueError(
                    f"Fluent Speech Commands: speaker {min(shared)} is in both {first}_data.csv and {second}_data.csv of "
                    f"{self.root / 'data'} ({len(shared)} speakers are), but no speaker may be in two splits: correct the tables"
                )
