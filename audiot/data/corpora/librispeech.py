"""LibriSpeech, a thousand hours of English audiobooks, and Mini LibriSpeech, with their download."""

from __future__ import annotations

import http.client
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations, groupby
from pathlib import Path
from typing import NamedTuple

from lhotse.cut import Cut
from lhotse.utils import resumable_download

from audiot.base.streams import key
from audiot.data.corpora.phone_labels import Tier, aligned_cuts, phone_label_files, read_phone_labels
from audiot.data.corpora.published import Utterance, check_sha256, labelled_manifests, unpack
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources, files_below
from audiot.data.text import lines

MIRROR = "https://www.openslr.org/resources"


class Subset(NamedTuple):
    """A published subset: number of utterances, number of the resource at OpenSLR, bytes and SHA-256 of the archive."""

    utterances: int
    resource: int
    size: int
    sha256: str


# Checksums from torchaudio and TensorFlow Datasets. That of Mini LibriSpeech was checked with OpenSLR's MD5.
SUBSETS = {
    "dev-clean": Subset(2703, 12, 337926286, "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3"),
    "dev-other": Subset(2864, 12, 314305928, "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365"),
    "test-clean": Subset(2620, 12, 346663984, "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23"),
    "test-other": Subset(2939, 12, 328757843, "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29"),
    "train-clean-100": Subset(28539, 12, 6387309499, "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"),
    "train-clean-360": Subset(104014, 12, 23049477885, "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"),
    "train-other-500": Subset(148688, 12, 30593501606, "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"),
    "train-clean-5": Subset(1519, 31, 332954390, "47805806c8b15f7549f3c51bd6b7da72ec0128a34d32830c8014a88658c0292d"),
    "dev-clean-2": Subset(1089, 31, 126046265, "176ec501490eced2d6c1f89f4f0ddc7dfe799e649e5322f8ba49fe3ff50c8012"),
}
ROLES = ("train", "valid", "test")
TABLES = ("SPEAKERS.TXT", "CHAPTERS.TXT")


class LibriSpeechCorpus:
    """LibriSpeech (Panayotov et al. 2015): 16 kHz FLAC, ``SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac``.

    Supervisions have speaker, text, ``custom["subset"]``, ``custom["chapter"]`` and, if SPEAKERS.TXT exists, ``custom["gender"]``
    (F or M). With ``phones`` they have ``alignment["phone"]``, and ``alignment["word"]`` if the TextGrids do. Splits:

    - ``train``, ``valid`` and ``test`` are the given subsets, without common speakers: for speech and phone recognition, and
      other tasks about new speakers.
    - ``pretrain`` has the subsets for pre-training, if they differ from ``train``. It is validated on ``valid``.
    - ``probe_train``, ``probe_valid`` and ``probe_test`` are parts of ``train`` with the same speakers, for frame-wise phones
      and for speakers, as in S3PRL. They follow the lists ``phone_train`` and ``phone_test``. Without lists, a fifth of each
      speaker's utterances is ``probe_test``. In both cases a tenth of the others is ``probe_valid``, chosen by a hash.
    - ``phone_train``, ``phone_valid`` and ``phone_test`` are the utterances of these with phone labels, if some lack them.

    Args:
        root: Folder LibriSpeech, or the one that contains it.
        train: Subsets for training downstream tasks.
        valid: Subsets for validation.
        test: Subsets for testing speech recognition.
        pretrain: Subsets for pre-training; None takes those of ``train``.
        phones: Phone labels, see :func:`audiot.data.corpora.phone_labels.read_phone_labels`; None for none.
        phone_train: File with the utterances for training probes, one per line.
        phone_test: File with the utterances for testing probes, one per line.
        strip_stress: Whether to remove stress marks (AH0 → AH), see :func:`audiot.data.corpora.phone_labels.phone_symbol`.
        download: Whether to download missing subsets.
        mirror: Address of the download.
        partial: Whether utterances of the subsets or of the lists may be missing.
        seed: Seed of the choice of probe utterances.

    Raises:
        ValueError: a subset is unknown or used twice, or only one of the two lists is given.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | Sequence[str] = ("train-clean-100",),
        valid: str | Sequence[str] = ("dev-clean",),
        test: str | Sequence[str] = ("test-clean",),
        pretrain: str | Sequence[str] | None = None,
        phones: str | Path | None = None,
        phone_train: str | Path | None = None,
        phone_test: str | Path | None = None,
        strip_stress: bool = False,
        download: bool = False,
        mirror: str = MIRROR,
        partial: bool = False,
        seed: int = 0,
    ) -> None:
        root = Path(root)
        self.root = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
        given = {"train": train, "valid": valid, "test": test, "pretrain": train if pretrain is None else pretrain}
        self.subsets = {role: [names] if isinstance(names, str) else list(names) for role, names in given.items()}
        self._check_subsets()
        self.phones = None if phones is None else Path(phones)
        if (phone_train is None) != (phone_test is None):
            raise ValueError("data.phone_train and data.phone_test belong together: give both lists or none")
        self.lists = {"train": Path(phone_train), "test": Path(phone_test)} if phone_train and phone_test else {}
        self.strip_stress, self.download, self.mirror = strip_stress, download, mirror.rstrip("/")
        self.partial, self.seed = partial, seed

    def _check_subsets(self) -> None:
        for role, names in self.subsets.items():
            if unknown := [name for name in names if name not in SUBSETS]:
                raise ValueError(f"data.{role}: {unknown[0]!r} is not a subset of LibriSpeech, which are: {', '.join(SUBSETS)}")
            if not names and role != "test":
                raise ValueError(f"data.{role} must name at least one subset: {', '.join(SUBSETS)}")
            if repeated := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"data.{role} names {min(repeated)} twice")
        for one, other in (*combinations(ROLES, 2), ("pretrain", "valid"), ("pretrain", "test")):
            if shared := set(self.subsets[one]) & set(self.subsets[other]):
                raise ValueError(
                    f"{min(shared)} is in both data.{one} and data.{other}: a test on training data is meaningless; leave it "
                    "out of one"
                )

    def manifests(self, progress: bool = True) -> Manifests:
        """Cuts of all splits. Alignments are added during iteration, because Lhotse's items for all would fill gigabytes.

        Raises:
            FileNotFoundError: a subset, utterances, phone labels or a list are missing.
            OSError: a download failed.
            ValueError: a transcript, phone labels or a list are broken or belong to another corpus, an utterance is in two splits
                of a task, or an archive is damaged.
        """
        wanted = list(dict.fromkeys(chain.from_iterable(self.subsets.values())))
        if self.download:
            for subset in wanted:
                self._download(subset)
        if missing := [subset for subset in wanted if not (self.root / subset).is_dir()]:
            there = ", ".join(subset for subset in SUBSETS if (self.root / subset).is_dir()) or "none"
            archives = ", ".join(f"{self._url(subset)} ({SUBSETS[subset].size / 1e9:.1f} GB)" for subset in missing)
            raise FileNotFoundError(
                f"LibriSpeech: no {', '.join(missing)} in {self.root} (subsets there: {there}): data.download=true gets what is "
                f"missing, or unpack {archives} in {self._place}; data.root names another tree"
            )
        utterances, rejected = self._find(wanted)
        read = labelled_manifests("LibriSpeech", utterances, {}, rejected, progress)
        cuts = {cut.id: cut for split in read.splits.values() for cut in split}
        if not cuts:  # preparation reports the error
            return read
        probes = self._probes({name: found for subset in self.subsets["train"] for name, found in utterances[subset].items()})
        tiers, phone_probes = self._phones(cuts, probes, progress)

        def names(role: str) -> list[str]:
            return [name for subset in self.subsets[role] for name in utterances[subset]]

        splits = {role: names(role) for role in ROLES}
        if set(self.subsets["pretrain"]) != set(self.subsets["train"]):
            splits["pretrain"] = names("pretrain")
        splits |= {f"probe_{role}": found for role, found in probes.items()}
        if phone_probes is not probes:
            splits |= {f"phone_{role}": found for role, found in phone_probes.items()}
        splits = {split: [name for name in names if name in cuts] for split, names in splits.items()}
        splits = {split: names for split, names in splits.items() if names}
        new_speakers = {role: role for role in ROLES}
        same_speakers = {role: f"probe_{role}" for role in ROLES}
        tasks = {
            "pretrain": {"train": "pretrain" if "pretrain" in splits else "train", "valid": "valid"},
            "asr": new_speakers,
            "phone_recognition": new_speakers,
            "speaker_verification": new_speakers,
            "phone": same_speakers if phone_probes is probes else {role: f"phone_{role}" for role in ROLES},
            "speaker": same_speakers,
            "speaker_identification": same_speakers,
        }
        return Manifests(
            {split: aligned_cuts([cuts[name] for name in names], tiers) for split, names in splits.items()},
            {task: {role: split for role, split in roles.items() if split in splits} for task, roles in tasks.items()},
            read.rejected,
        )

    def sources(self) -> Sources:
        """Recordings and transcripts of the subsets, tables of the corpus, phone labels and lists."""
        folders = [self.root / subset for subset in dict.fromkeys(chain.from_iterable(self.subsets.values()))]
        found = [path for folder in folders for path in files_below(folder, ".flac", ".trans.txt")]
        texts: list[str | Path] = [
            *(path for path in found if path.endswith(".txt")),
            *(self.root / name for name in TABLES),
            *self.lists.values(),
        ]
        if self.phones is not None:
            texts += phone_label_files(self.phones)
        return Sources([path for path in found if path.endswith(".flac")], texts)

    @property
    def _place(self) -> Path:
        """Folder in which to unpack an archive, which contains a folder LibriSpeech."""
        return self.root.parent if self.root.name == "LibriSpeech" else self.root

    def _url(self, subset: str) -> str:
        return f"{self.mirror}/{SUBSETS[subset].resource}/{subset}.tar.gz"

    def _find(self, subsets: Iterable[str]) -> tuple[dict[str, dict[str, Utterance]], list[tuple[str, str]]]:
        """Utterances by subset and id; and path and reason of those that cannot be used."""
        genders = {row[0]: {"gender": row[1]} for row in _table(self.root / TABLES[0], 2)}
        chapters: dict[str, set[str]] = {subset: set() for subset in SUBSETS}
        for row in _table(self.root / TABLES[1], 4):
            chapters.setdefault(row[3], set()).add(f"{row[1]}/{row[0]}")
        found: dict[str, dict[str, Utterance]] = {}
        rejected: list[tuple[str, str]] = []
        subset_of: dict[str, str] = {}
        with ThreadPoolExecutor(16) as pool:  # listing folders and reading transcripts mostly waits for disks
            for subset in subsets:
                utterances: dict[str, Utterance] = {}
                problems: list[str] = []
                listed = pool.map(_subfolders, _subfolders(self.root / subset))
                folders = list(chain.from_iterable(listed))
                for chapter in pool.map(_read_chapter, folders):
                    labels = {"subset": subset, "chapter": chapter.folder.name}
                    speaker = chapter.folder.parent.name
                    for name, text in chapter.texts.items():
                        path = chapter.folder / f"{name}.flac"
                        utterances[name] = Utterance(path, speaker, text, labels | genders.get(speaker, {}))
                    problems += chapter.problems
                    rejected += chapter.rejected
                there = {f"{folder.parent.name}/{folder.name}" for folder in folders}
                problems += [f"{chapter}: no such folder" for chapter in sorted(chapters[subset] - there)]
                self._check_complete(subset, len(utterances), problems)
                for name in utterances:
                    if subset_of.setdefault(name, subset) != subset:
                        raise ValueError(
                            f"LibriSpeech: utterance {name} is in {subset_of[name]} and in {subset} (Mini LibriSpeech is part of "
                            "the large corpus): choose one of the two subsets"
                        )
                found[subset] = utterances
        return found, rejected

    def _check_complete(self, subset: str, count: int, problems: Sequence[str]) -> None:
        expected = SUBSETS[subset].utterances
        if count >= expected and not problems:
            return
        first = f" ({'; '.join(problems[:3])}{f'; {len(problems) - 3:,} more' if len(problems) > 3 else ''})" if problems else ""
        lack = f"LibriSpeech: {self.root / subset} is incomplete: found {count:,} of {expected:,} utterances{first}"
        if not self.partial:
            raise FileNotFoundError(
                f"{lack}: delete the folder, then data.download=true gets it again, or unpack {self._url(subset)} in "
                f"{self._place}; data.partial=true accepts an incomplete tree"
            )
        print(f"{lack}; data.partial=true continues with them", flush=True)

    def _probes(self, train: Mapping[str, Utterance]) -> dict[str, list[str]]:
        """Utterances of the train subsets for probes, by role."""
        if not self.lists:
            test = self._hold_out(train, train, 0.2, "probe_test")
            rest = [name for name in train if name not in test]
        else:
            listed = {role: _read_list(path, f"data.phone_{role}") for role, path in self.lists.items()}
            if both := listed["train"].keys() & listed["test"].keys():
                raise ValueError(
                    f"{min(both)} is in both {self.lists['train']} and {self.lists['test']} ({len(both):,} utterances are): a "
                    "test on training data is meaningless; leave them out of one"
                )
            for role, names in listed.items():
                unknown = [name for name in names if name not in train]
                if unknown and (not self.partial or len(unknown) == len(names)):
                    raise ValueError(
                        f"{self.lists[role]}:{names[unknown[0]]}: {unknown[0]} is not in {', '.join(self.subsets['train'])} of "
                        f"{self.root} ({len(unknown):,} of {len(names):,} utterances are not): a list of other subsets than "
                        "data.train? data.partial=true skips utterances that the tree lacks"
                    )
                if unknown:
                    lack = f"{self.root} lacks {len(unknown):,} of {len(names):,} utterances in {self.lists[role]}"
                    print(f"LibriSpeech: {lack}; data.partial=true continues with the others", flush=True)
            test = set(listed["test"])
            rest = [name for name in train if name in listed["train"]]
        valid = self._hold_out(rest, train, 0.1, "probe_valid")
        return {
            "train": [name for name in rest if name not in valid],
            "valid": [name for name in rest if name in valid],
            "test": [name for name in train if name in test],
        }

    def _hold_out(self, names: Iterable[str], of: Mapping[str, Utterance], share: float, purpose: str) -> set[str]:
        """A share of each speaker's utterances, at least one, chosen by a hash. Speakers with one utterance keep it."""
        held: set[str] = set()
        for _, group in groupby(sorted(names, key=lambda name: str(of[name].speaker)), key=lambda name: of[name].speaker):
            ranked = sorted(group, key=lambda name: key(purpose, self.seed, name))
            held.update(ranked[: max(round(share * len(ranked)), 1) if len(ranked) > 1 else 0])
        return held

    def _phones(
        self, cuts: Mapping[str, Cut], probes: dict[str, list[str]], progress: bool
    ) -> tuple[dict[str, dict[str, Tier]], dict[str, list[str]]]:
        """Alignment tiers of utterances, and the splits of probes for phones (``probes`` itself if all have labels)."""
        if self.phones is None:
            return {}, probes
        tiers = read_phone_labels(self.phones, cuts.values(), self.strip_stress, progress)
        readable = {role: [name for name in names if name in cuts] for role, names in probes.items()}
        labelled = {role: [name for name in names if name in tiers] for role, names in readable.items()}
        count, total = (sum(map(len, splits.values())) for splits in (labelled, readable))
        if total and not count:
            raise ValueError(
                f"data.phones={self.phones} has labels for none of the {total:,} utterances for probes in {self.root}, "
                f"{next(chain.from_iterable(readable.values()))} first: are they of other subsets than data.train?"
            )
        if count == total:
            return tiers, probes
        if self.lists:
            role, name = next((role, name) for role, names in readable.items() for name in names if name not in tiers)
            raise ValueError(
                f"{name} of {self.lists['test' if role == 'test' else 'train']} has no phone labels in {self.phones} "
                f"({total - count:,} of {total:,} utterances have none): remove it from the list, or get its labels"
            )
        print(f"LibriSpeech: {count:,} of {total:,} utterances for probes have phone labels in {self.phones}", flush=True)
        return tiers, labelled

    def _download(self, subset: str) -> None:
        """Download and unpack a missing subset. Its folder appears when everything is unpacked."""
        folder = self.root / subset
        if folder.is_dir():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        own = [place / f"{subset}.tar.gz" for place in (self.root, self.root.parent)]
        archive = next((path for path in own if path.is_file()), self.root / f".{subset}.tar.gz.part")
        fetched = archive not in own
        published = SUBSETS[subset]
        if fetched:
            fetch(self._url(subset), archive, published.size)
        verify(archive, published.size, published.sha256)
        unpacked = self.root / f".{subset}.part"
        print(f"LibriSpeech: unpacking {archive}", flush=True)
        unpack(archive, unpacked)
        if not (unpacked / "LibriSpeech" / subset).is_dir():
            raise ValueError(f"{archive} holds no folder LibriSpeech/{subset}: delete it and run again")
        for path in sorted((unpacked / "LibriSpeech").iterdir()):  # SPEAKERS.TXT, CHAPTERS.TXT, LICENSE.TXT, …
            if path.is_file() and not (self.root / path.name).exists():
                os.replace(path, self.root / path.name)
        os.replace(unpacked / "LibriSpeech" / subset, folder)
        shutil.rmtree(unpacked)
        if fetched:
            archive.unlink()


def fetch(url: str, path: Path, size: int) -> None:
    """Download a file. An interrupted download continues where it stopped.

    Args:
        url: Address of the file.
        path: Path to write.
        size: Published size in bytes. A file of that size is not downloaded again.

    Raises:
        OSError: the download failed or is incomplete.
    """
    print(f"downloading {url} ({size / 1e9:.1f} GB) to {path}", flush=True)
    try:
        resumable_download(url, path, completed_file_size=size)
    except (OSError, http.client.HTTPException) as error:
        remedy = "run the command again to continue, or set data.mirror"
        raise OSError(f"{url} can't be downloaded to {path}: {error}; {remedy}") from error
    if (found := path.stat().st_size) < size:
        raise OSError(f"{path} has {found:,} of the {size:,} bytes of {url}: run the command again to continue")


def verify(path: Path, size: int, sha256: str) -> None:
    """Refuse a file that differs from the published one.

    Raises:
        ValueError: the file differs. The message has its path.
    """
    if (there := path.stat().st_size) != size:
        raise ValueError(f"{path} is not the published file: {there:,} bytes instead of {size:,}: delete it and run again")
    check_sha256(path, sha256)


class _Chapter(NamedTuple):
    folder: Path
    texts: dict[str, str]  # id → transcript, for utterances with audio
    problems: list[str]
    rejected: list[tuple[str, str]]


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.name[0] != "." and entry.is_dir())


def _read_chapter(folder: Path) -> _Chapter:
    where = f"{folder.parent.name}/{folder.name}"
    transcript = folder / f"{folder.parent.name}-{folder.name}.trans.txt"
    files = {file for file in os.listdir(folder) if file[0] != "."}
    audio = {file.removesuffix(".flac") for file in files if file.endswith(".flac")}
    texts = _read_transcript(transcript) if transcript.name in files else {}
    missing, silent = sorted(texts.keys() - audio), sorted(audio - texts.keys())
    problems = []
    if transcript.name not in files:
        problems.append(f"{where}: no {transcript.name}, {len(audio):,} recordings")
    elif silent:
        problems.append(f"{where}: {transcript.name} lacks {silent[0]}, {len(silent):,} of {len(audio):,} recordings in all")
    if missing:
        problems.append(f"{where}: no {missing[0]}.flac, {len(missing):,} of {len(texts):,} recordings in all")
    rejected = [(str(folder / f"{name}.flac"), "no transcript") for name in silent]
    return _Chapter(folder, {name: text for name, text in sorted(texts.items()) if name in audio}, problems, rejected)


def _read_transcript(path: Path) -> dict[str, str]:
    """Words by utterance, from lines ``SPEAKER-CHAPTER-NUMBER WORDS``."""
    texts: dict[str, str] = {}
    chapter = path.name.removesuffix(".trans.txt")
    for number, line in lines(path):
        name, _, text = line.partition(" ")
        if not re.fullmatch(rf"{re.escape(chapter)}-[0-9]+", name):
            raise ValueError(f"{path}:{number}: expected {chapter}-NUMBER and its words, found {line[:60]!r}")
        if name in texts:
            raise ValueError(f"{path}:{number}: utterance {name} occurs a second time")
        texts[name] = text.strip()
    return texts


def _table(path: Path, columns: int) -> Iterator[list[str]]:
    """First columns of SPEAKERS.TXT or CHAPTERS.TXT, ``ID | SEX | …``; nothing if the file does not exist."""
    if path.is_file():
        for number, line in lines(path):
            if line[0] != ";":
                row = [field.strip() for field in line.split("|")]
                if len(row) < columns:
                    raise ValueError(f"{path}:{number}: expected {columns} or more columns with '|' between, found {line[:60]!r}")
                yield row[:columns]


def _read_list(path: Path, argument: str) -> dict[str, int]:
    """Line number of each utterance, from a file with one utterance per line."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}: there is no list {path}: S3PRL's are train_split.txt and test_split.txt in data/cpc_phone of "
            "github.com/s3prl/s3prl"
        )
    names: dict[str, int] = {}
    for number, line in lines(path):
        if len(line.split()) != 1:
            raise ValueError(f"{path}:{number}: expected one utterance, found {line[:60]!r}")
        if line in names:
            raise ValueError(f"{path}:{number}: utterance {line} occurs a second time, first in line {names[line]}")
        names[line] = number
    if not names:
        raise ValueError(f"{argument}: {path} is empty")
    return names
