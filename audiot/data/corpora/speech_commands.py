"""Google Speech Commands: one-second recordings of single words."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from lhotse.utils import resumable_download

from audiot.base.streams import key
from audiot.data.audio import AudioFile, BadAudioError
from audiot.data.corpora.published import ROLES, Utterance, check_complete, check_sha256, labelled_manifests, unpack
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources, files_below
from audiot.data.text import lines

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
NOISE = "_background_noise_"
NOISES = ("doing_the_dishes", "dude_miaowing", "exercise_bike", "pink_noise", "running_tap", "white_noise")
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
NAME = re.compile(r"([0-9a-f]+)_nohash_[0-9]+\.wav")
TEST_SET_NAME = re.compile(r"(?:([a-z]+)_)?(([0-9a-f]+)_nohash_[0-9]+)\.wav(?:\.wav)?")

# Published numbers: recordings of each word, lines of the lists, files of the test set.
WORDS = {
    1: {
        "bed": 1713, "bird": 1731, "cat": 1733, "dog": 1746, "down": 2359, "eight": 2352, "five": 2357, "four": 2372,
        "go": 2372, "happy": 1742, "house": 1750, "left": 2353, "marvin": 1746, "nine": 2364, "no": 2375, "off": 2357,
        "on": 2367, "one": 2370, "right": 2367, "seven": 2377, "sheila": 1734, "six": 2369, "stop": 2380, "three": 2356,
        "tree": 1733, "two": 2373, "up": 2375, "wow": 1745, "yes": 2377, "zero": 2376,
    },
    2: {
        "backward": 1664, "bed": 2014, "bird": 2064, "cat": 2031, "dog": 2128, "down": 3917, "eight": 3787,
        "five": 4052, "follow": 1579, "forward": 1557, "four": 3728, "go": 3880, "happy": 2054, "house": 2113,
        "learn": 1575, "left": 3801, "marvin": 2100, "nine": 3934, "no": 3941, "off": 3745, "on": 3845, "one": 3890,
        "right": 3778, "seven": 3998, "sheila": 2022, "six": 3860, "stop": 3872, "three": 3727, "tree": 1759,
        "two": 3880, "up": 3723, "visual": 1592, "wow": 2123, "yes": 4044, "zero": 4052,
    },
}  # fmt: skip
LISTED = {1: {"valid": 6798, "test": 6835}, 2: {"valid": 9981, "test": 11005}}
TEST_SET = {1: 3081, 2: 4890}

# Part of each noise recording that provides the silence of a split.
NOISE_PARTS = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}

URL = "http://download.tensorflow.org/data/"
# Bytes and SHA-256 from torchaudio and TensorFlow Datasets. Neither has that of version 1's test set.
ARCHIVES = {
    "speech_commands_v0.01": (1489096277, "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d"),
    "speech_commands_v0.02": (2428923189, "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"),
    "speech_commands_test_set_v0.02": (112563277, "cc2a00c1147c2254e9be3fa0f779d8c17421dc349b86366567a8edfa9acd51df"),
}


class SpeechCommandsCorpus:
    """Speech Commands (Warden 2018, arXiv:1804.03209), version 1 (64,721 recordings of 30 words) or 2 (105,829 of 35).

    Splits ``train``, ``valid`` and ``test`` follow the official lists. Supervisions have speaker (a hash), text (the word) and
    ``custom["keyword"]``, the class. It is the word itself, or with 12 classes (the task of the paper and SUPERB) one of ten
    words, ``_unknown_`` or ``_silence_``. With 12 classes:

    - ``_unknown_`` has ``unknown`` times as many recordings as a keyword in the split, chosen from the other words by a hash.
    - ``_silence_`` has ``silence`` times as many one-second pieces, cut at equal distances from the noise recordings: from the
      first 80% of each for ``train``, the next 10% for ``valid``, the last for ``test``. They overlap only within a split.
    - ``test`` is the published test set of 12 classes if ``test_root`` is given. Else it is made like the others.

    Args:
        root: Unpacked archive.
        version: Version of the corpus, 1 or 2.
        classes: Number of classes, 12 or the number of words; None: 12 for version 1, 35 for version 2.
        test_root: Unpacked test set, for 12 classes.
        unknown: Number of ``_unknown_`` recordings per recording of a keyword; None takes all.
        silence: Number of ``_silence_`` pieces per recording of a keyword.
        download: Whether to download missing data.
        partial: Whether recordings or lines of the lists may be missing.
        seed: Seed of the choice of ``_unknown_``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        version: int = 1,
        classes: int | None = None,
        test_root: str | Path | None = None,
        unknown: float | None = 0.1,
        silence: float = 0.1,
        download: bool = False,
        partial: bool = False,
        seed: int = 0,
    ) -> None:
        if version not in WORDS:
            raise ValueError(f"data.version must be 1 or 2, found {version!r}")
        self.words = WORDS[version]
        classes = (12 if version == 1 else len(self.words)) if classes is None else classes
        if classes not in (12, len(self.words)):
            raise ValueError(f"data.classes must be 12 or, in version {version}, {len(self.words)}, found {classes!r}")
        for name, value in (("unknown", 1 if unknown is None else unknown), ("silence", silence)):
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"data.{name} must be a positive number, found {value!r}")
        self.root, self.version, self.twelve = Path(root), version, classes == 12
        self.test_root = None if test_root is None or not self.twelve else Path(os.path.normpath(test_root))
        self.unknown, self.silence = unknown, silence
        self.download, self.partial, self.seed = download, partial, seed
        self.title = f"Speech Commands v{version}"

    def sources(self) -> Sources:
        """The recordings, those of the test set where it is used, and the lists."""
        tests = [] if self.test_root is None else files_below(self.test_root, ".wav")
        return Sources([*files_below(self.root, ".wav"), *tests], [self.root / name for name in LISTS.values()])

    def manifests(self, progress: bool = True) -> Manifests:
        """Cuts of all splits.

        Raises:
            FileNotFoundError: a folder, a list or recordings are missing.
            OSError: the download failed.
            ValueError: the tree has the other version, a list is broken, a recording is in two splits, or a download is damaged.
        """
        if self.download:
            download(f"speech_commands_v0.0{self.version}", self.root)
            if self.test_root is not None:
                download(f"speech_commands_test_set_v0.0{self.version}", self.test_root)
        found = self._find()
        lists = {split: self._read_list(name, LISTED[self.version][split]) for split, name in LISTS.items()}
        if both := lists["valid"] & lists["test"]:
            raise ValueError(f"{self.title}: {min(both)} is in both {' and '.join(LISTS.values())} of {self.root}: correct them")
        self._check_complete(found, lists)

        splits: dict[str, dict[str, Utterance]] = {split: {} for split in ROLES}
        rejected = []
        for word, names in found.items():
            for name in names:
                path = self.root / word / name
                if match := NAME.fullmatch(name):
                    split = next((split for split, listed in lists.items() if f"{word}/{name}" in listed), "train")
                    splits[split][f"{word}/{name[:-4]}"] = Utterance(path, match[1], word, {"keyword": word})
                else:
                    rejected.append((str(path), "not named SPEAKER_nohash_NUMBER.wav"))
        if self.twelve:
            noises = self._noises(rejected)
            recordings = splits
            made = [split for split in ROLES if split != "test" or self.test_root is None]
            splits = {split: self._twelve(split, recordings[split], noises) for split in made}
            if self.test_root is not None:
                splits["test"] = self._test_set(self.test_root, recordings, rejected)
        return labelled_manifests(self.title, splits, {"keyword": ROLES}, rejected, progress)

    @property
    def _remedy(self) -> str:
        archive = f"{URL}speech_commands_v0.0{self.version}.tar.gz"
        return f"data.download=true gets it, or unpack {archive} there; data.root names another place"

    def _find(self) -> dict[str, list[str]]:
        """Files of each word."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.title}: there is no folder {self.root}: {self._remedy}")
        folders = {path.name: path for path in sorted(self.root.iterdir()) if path.is_dir() and path.name[0] not in "._"}
        if others := sorted(name for name in folders.keys() - self.words.keys() if any(folders[name].glob("*.wav"))):
            hint = " (data.version=2 has them)" if set(others) <= WORDS[2].keys() else ""
            raise ValueError(
                f"{self.title} has no words {', '.join(others)}{hint}: move these folders out of {self.root}, or choose another "
                "version"
            )
        return {word: _recordings(folders[word]) if word in folders else [] for word in self.words}

    def _read_list(self, name: str, published: int) -> set[str]:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.title}: there is no {path}: {self._remedy}")
        listed: set[str] = set()
        for number, line in lines(path):
            word, _, recording = line.partition("/")
            if word not in self.words or not NAME.fullmatch(recording):
                raise ValueError(f"{path}:{number}: expected a path such as bed/0c40e715_nohash_0.wav, found {line[:80]!r}")
            if line in listed:
                raise ValueError(f"{path}:{number}: {line} occurs a second time")
            listed.add(line)
        if len(listed) != published and not self.partial:
            raise ValueError(
                f"{path} lists {len(listed):,} recordings, that of version {self.version} has {published:,}: {self._remedy}; "
                "data.partial=true accepts an incomplete list"
            )
        return listed

    def _check_complete(self, found: dict[str, list[str]], lists: dict[str, set[str]]) -> None:
        """Check the files in the lists, which name a fifth of the recordings, and the number of the others."""
        there = {f"{word}/{name}" for word, names in found.items() for name in names}
        listed = sorted(set.union(*lists.values()) - there)
        lacking = {word: count - len(found[word]) for word, count in self.words.items() if len(found[word]) < count}
        missing = [f"{word}: {lack:,} of {self.words[word]:,}" for word, lack in lacking.items()]
        if listed:
            missing.insert(0, f"of the lists {len(listed):,}, {listed[0]} first")
        count, expected = max(sum(lacking.values()), len(listed)), sum(self.words.values())
        check_complete(self.title, self.root, count, expected, missing, self._remedy, self.partial)

    def _noises(self, rejected: list[tuple[str, str]]) -> dict[Path, tuple[int, int]]:
        """Number of samples and sample rate of each noise recording."""
        paths = [self.root / NOISE / f"{name}.wav" for name in NOISES]
        absent = [f"{NOISE}/{path.name}" for path in paths if not path.is_file()]
        check_complete(f"{self.title}, noise", self.root, len(absent), len(paths), absent, self._remedy, self.partial)
        noises = {}
        for path in paths:
            if path.is_file():
                try:
                    with AudioFile(path) as file:
                        noises[path] = (file.num_samples, file.sample_rate)
                except BadAudioError as reason:
                    rejected.append((str(path), str(reason)))
        return noises

    def _twelve(self, split: str, recordings: dict[str, Utterance], noises: dict[Path, tuple[int, int]]) -> dict[str, Utterance]:
        """A split with 12 classes, made from one with all words."""
        keywords = {name: found for name, found in recordings.items() if found.text in KEYWORDS}
        others = sorted(recordings.keys() - keywords.keys(), key=lambda name: key("unknown", self.seed, name))
        if self.unknown is not None:
            others = others[: math.ceil(self.unknown * len(keywords))]
        labels = {"keyword": UNKNOWN}
        unknown = {name: recordings[name]._replace(custom=labels) for name in sorted(others)}
        return keywords | unknown | _silence(split, math.ceil(self.silence * len(keywords)), noises)

    def _test_set(
        self, root: Path, recordings: dict[str, dict[str, Utterance]], rejected: list[tuple[str, str]]
    ) -> dict[str, Utterance]:
        """The published test set: one folder per class, with names such as ``bed_0c40e715_nohash_0.wav.wav`` in ``_unknown_``."""
        archive = f"speech_commands_test_set_v0.0{self.version}"
        remedy = (
            f"data.download=true gets it, or unpack {URL}{archive}.tar.gz there; data.test_root names another place, "
            "data.test_root=null takes the recordings of testing_list.txt instead"
        )
        if not root.is_dir():
            raise FileNotFoundError(f"{self.title}: there is no test set {root}: {remedy}")
        found = {name: _recordings(root / name) for name in (*KEYWORDS, UNKNOWN, SILENCE)}
        count = sum(map(len, found.values()))
        empty = [f"{name}: all" for name, names in found.items() if not names]
        lack = max(TEST_SET[self.version] - count, len(empty))
        names = empty or [f"{name}: {len(there)} there" for name, there in found.items()]
        check_complete(f"{self.title}, test set", root, lack, TEST_SET[self.version], names, remedy, self.partial)
        utterances = {}
        for folder, files in found.items():
            for name in files:
                path, match, labels = root / folder / name, TEST_SET_NAME.fullmatch(name), {"keyword": folder}
                if folder == SILENCE:
                    utterance = Utterance(path, custom=labels)
                elif match is None or (match[1] is None) == (folder == UNKNOWN):
                    rejected.append((str(path), "not named as in the published test set"))
                    continue
                else:
                    word = match[1] or folder
                    utterance = Utterance(path, match[3], word, labels)
                    for split in ("train", "valid"):
                        if f"{word}/{match[2]}" in recordings[split]:
                            raise ValueError(
                                f"{self.title}: {path} of the test set is {word}/{match[2]}.wav of the {split} split: a test on "
                                "training data is meaningless; do test set and lists have the same version?"
                            )
                utterances[f"test_set/{folder}/{name[:-4]}"] = utterance
        return utterances


def _recordings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.wav") if path.name[0] != ".")


def _silence(split: str, count: int, noises: dict[Path, tuple[int, int]]) -> dict[str, Utterance]:
    """One-second pieces at equal distances from the split's parts of all noise recordings."""
    begin, end = NOISE_PARTS[split]
    starts: list[tuple[Path, range, int]] = []
    for path, (num_samples, rate) in noises.items():
        first, last = math.ceil(begin * num_samples), math.floor(end * num_samples) - rate
        if last >= first:
            starts.append((path, range(first, last + 1), rate))
    total = sum(len(places) for _, places, _ in starts)
    if count and noises and not total:
        raise ValueError(
            f"the {split} parts of {NOISE} are shorter than a second, too short for {SILENCE}: restore the recordings"
        )
    pieces = {}
    for number in range(min(count, total)):
        at = (2 * number + 1) * total // (2 * min(count, total))
        for path, places, rate in starts:
            if at < len(places):
                name = f"{SILENCE}/{path.stem}@{places[at]}"
                pieces[name] = Utterance(path, custom={"keyword": SILENCE}, piece=(places[at], rate))
                break
            at -= len(places)
    return pieces


def download(name: str, folder: Path) -> None:
    """Download and unpack an archive of Speech Commands, unless its folder exists. An interrupted download continues.

    Args:
        name: Name of the archive without suffix.
        folder: Folder to unpack to.

    Raises:
        OSError: the download failed.
        ValueError: the download is incomplete or differs from the published file.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive = folder.parent / f"{name}.tar.gz"
    try:
        resumable_download(f"{URL}{archive.name}", archive)
    except OSError as error:
        raise OSError(f"{URL}{archive.name} can't be downloaded to {archive.parent}: {error}") from error
    size = archive.stat().st_size
    published, expected = ARCHIVES.get(name, (size, None))
    if size < published:
        raise ValueError(f"{archive} is incomplete, {size:,} of {published:,} bytes: run the command again to continue")
    if expected is not None:
        check_sha256(archive, expected)
    unpacked = folder.with_name(f".{folder.name}.partial")
    unpack(archive, unpacked)
    os.replace(unpacked, folder)
    archive.unlink()
