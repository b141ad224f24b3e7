"""VoxCeleb1: interviews of celebrities, for speaker identification and verification."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from audiot.base.streams import key
from audiot.data.corpora.published import Utterance, check_complete, labelled_manifests
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources, files_below
from audiot.data.text import lines

PARTS = {"1": "train", "2": "valid", "3": "test"}
COUNTS = {"train": 138361, "valid": 6904, "test": 8251}
TEST_SPEAKERS = frozenset(f"id{number}" for number in range(10270, 10310))  # of verification
NAME = re.compile(r"id[0-9]{5}/[^/\s]+/[0-9]{5}\.wav")
META = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta"
REMEDY = (
    "ask for the audio at https://www.robots.ox.ac.uk/~vgg/data/voxceleb, unpack vox1_dev_wav.zip and vox1_test_wav.zip, both "
    "into data.root or into its folders dev and test"
)


class VoxCeleb1Corpus:
    """VoxCeleb1 (Nagrani et al. 2017, arXiv:1706.08612): 153,516 utterances of 1,251 speakers, ``wav/id10001/VIDEO/00001.wav``.

    Utterances have ids such as ``id10001/VIDEO/00001``, those of the trials without suffix. Splits:

    - ``identification_train``, ``identification_valid`` and ``identification_test`` are the official ones, with all speakers in
      each.
    - ``verification_test`` is the official one: all 4,874 utterances of 40 speakers. Of the other 1,211 speakers, a hash chooses
      ``valid_speakers`` for ``verification_valid``, so that validation uses new speakers like the test. The rest is
      ``verification_train``.
    - ``pretrain`` has the utterances that both tasks train on, so pre-training sees the test data of neither.

    Args:
        root: Folder with ``wav``, or with ``dev/wav`` and ``test/wav``.
        iden_split: List of the identification splits, with lines ``1|2|3 id10001/VIDEO/00001.wav``. It also tells which files
            are missing. None: ``iden_split.txt`` in the root.
        trials: Verification trials ``1|0 PATH PATH``, checked against the test speakers; None for no check.
        valid_speakers: Number of training speakers held out for validating verification.
        partial: Whether recordings or lines of ``iden_split`` may be missing.
        seed: Seed of the choice of validation speakers.

    Raises:
        ValueError: ``valid_speakers`` is below 2.
    """

    def __init__(
        self,
        root: str | Path,
        iden_split: str | Path | None = None,
        trials: str | Path | None = None,
        valid_speakers: int = 40,
        partial: bool = False,
        seed: int = 0,
    ) -> None:
        self.root = Path(root)
        self.iden_split = self.root / "iden_split.txt" if iden_split is None else Path(iden_split)
        self.trials = None if trials is None else Path(trials)
        if valid_speakers < 2:
            raise ValueError(f"data.valid_speakers must be at least 2, for trials with two speakers, found {valid_speakers}")
        self.valid_speakers, self.partial, self.seed = valid_speakers, partial, seed

    def sources(self) -> Sources:
        """The recordings, the list of splits and the trials."""
        wavs = [path for folder in self._folders() for path in files_below(folder, ".wav")]
        return Sources(wavs, [self.iden_split, *([] if self.trials is None else [self.trials])])

    def _folders(self) -> list[Path]:
        return [self.root / "wav", self.root / "dev" / "wav", self.root / "test" / "wav"]

    def manifests(self, progress: bool = True) -> Manifests:
        """Cuts of all splits.

        Raises:
            FileNotFoundError: the root, recordings or a list are missing.
            ValueError: a list is broken, an utterance is in two splits or places, or a trial is not about the test speakers.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"VoxCeleb1: there is no folder {self.root}: {REMEDY}")
        parts = self._read_split()
        listed = {name for part in parts.values() for name in part}
        if self.trials is not None:
            self._check_trials(self.trials, listed)
        paths = self._find()
        self._check_complete(listed, paths)
        there = {part: [name for name in names if name in paths] for part, names in parts.items()}
        dev = [name for part in there.values() for name in part if _speaker(name) not in TEST_SPEAKERS]
        valid = self._validation_speakers(sorted({_speaker(name) for name in dev}))
        splits = {f"identification_{part}": names for part, names in there.items()}
        splits["verification_train"] = [name for name in dev if _speaker(name) not in valid]
        splits["verification_valid"] = [name for name in dev if _speaker(name) in valid]
        splits["verification_test"] = [name for part in there.values() for name in part if _speaker(name) in TEST_SPEAKERS]
        trained_on = set(splits["verification_train"])
        splits["pretrain"] = [name for name in there["train"] if name in trained_on]
        identification = {part: f"identification_{part}" for part in COUNTS}
        tasks = {
            "speaker_identification": identification,
            "speaker": identification,
            "speaker_verification": {part: f"verification_{part}" for part in COUNTS},
            "pretrain": {"train": "pretrain", "valid": "verification_valid"},
        }
        utterances = {name: Utterance(path, _speaker(name)) for name, path in paths.items()}
        rejected = [(str(path), f"not listed in {self.iden_split.name}") for name, path in paths.items() if name not in listed]
        labelled = {split: {name: utterances[name] for name in names} for split, names in splits.items()}
        return labelled_manifests("VoxCeleb1", labelled, tasks, rejected, progress)

    def _read_split(self) -> dict[str, list[str]]:
        """Utterances of each part of the identification list."""
        parts: dict[str, list[str]] = {part: [] for part in COUNTS}
        for number, words in _lines(self.iden_split, f"get {META}/iden_split.txt, or set data.iden_split to its path"):
            if len(words) != 2 or words[0] not in PARTS or not NAME.fullmatch(words[1]):
                raise ValueError(
                    f"{self.iden_split}:{number}: expected 1, 2 or 3 and a path such as id10001/VIDEO/00001.wav, "
                    f"found {' '.join(words)[:80]!r}"
                )
            parts[PARTS[words[0]]].append(words[1][:-4])
        counts = {part: len(names) for part, names in parts.items()}
        if counts != COUNTS and not self.partial:
            found, published = (" + ".join(f"{count:,}" for count in sizes.values()) for sizes in (counts, COUNTS))
            raise ValueError(
                f"{self.iden_split} lists {found} utterances, the published one {published}: get {META}/iden_split.txt; "
                "data.partial=true accepts an incomplete list"
            )
        return parts

    def _check_trials(self, trials: Path, listed: set[str]) -> None:
        for number, words in _lines(trials, f"get {META}/veri_test2.txt, or set data.trials=null for no check"):
            if len(words) != 3 or words[0] not in ("0", "1") or not all(map(NAME.fullmatch, words[1:])):
                raise ValueError(f"{trials}:{number}: expected 1 or 0 and two paths, found {' '.join(words)[:80]!r}")
            for path in words[1:]:
                if _speaker(path) not in TEST_SPEAKERS:
                    raise ValueError(
                        f"{trials}:{number}: {path} is of the training speaker {_speaker(path)}, the test speakers are id10270 "
                        "to id10309 (the lists for E and H are for models of VoxCeleb2): take veri_test2.txt or veri_test.txt"
                    )
                if path[:-4] not in listed and not self.partial:
                    raise ValueError(
                        f"{trials}:{number}: {path} is not in {self.iden_split}: does one of the lists belong to another corpus?"
                    )

    def _find(self) -> dict[str, Path]:
        """Files of the utterances, in order."""
        paths: dict[str, Path] = {}
        for folder in self._folders():
            for path in sorted(folder.glob("id*/*/*.wav")):
                name = path.relative_to(folder).as_posix()[:-4]
                if path.name[0] == ".":
                    continue
                if name in paths:
                    raise ValueError(f"VoxCeleb1: {name} is in two places, {paths[name]} and {path}: move one away")
                paths[name] = path
        return paths

    def _check_complete(self, listed: set[str], paths: dict[str, Path]) -> None:
        missing = sorted(listed - paths.keys())
        remedy = REMEDY
        for part, other in (("test", "dev"), ("dev", "test")):
            whole = {name for name in listed if (_speaker(name) in TEST_SPEAKERS) == (part == "test")}
            if paths and whole and whole == set(missing):
                remedy = (
                    f"all of the {part} part is missing, and only the {other} part is there; speaker_identification and "
                    f"speaker_verification need both: {REMEDY}"
                )
        names = (f"{name}.wav" for name in missing)
        where = f"{self.root} (in wav, dev/wav and test/wav)"
        check_complete("VoxCeleb1", where, len(missing), len(listed), names, remedy, self.partial)

    def _validation_speakers(self, speakers: list[str]) -> set[str]:
        if 0 < len(speakers) <= self.valid_speakers:
            raise ValueError(
                f"data.valid_speakers={self.valid_speakers} of {len(speakers)} training speakers in {self.root} leaves none to "
                "train on: lower it"
            )
        return set(sorted(speakers, key=lambda speaker: key("valid_speakers", self.seed, speaker))[: self.valid_speakers])


def _speaker(name: str) -> str:
    return name.split("/", 1)[0]


def _lines(path: Path, remedy: str) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(f"VoxCeleb1: there is no list {path}: {remedy}")
    return ((number, line.split()) for number, line in lines(path))
