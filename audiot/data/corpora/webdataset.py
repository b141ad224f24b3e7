"""WebDataset: tar files whose members ``KEY.wav`` (or flac, ogg, opus, mp3) have their labels beside them.

Nothing is extracted and nothing is run: the headers of the tar and of the audio are read, and ``KEY.json``, ``KEY.txt`` and
``KEY.cls`` as text. Members of other kinds, pickles among them, are passed over.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

import soundfile
from lhotse import SupervisionSegment
from tqdm import tqdm

from audiot.base.files import printable, read_json, replacing_gzip, replacing_text, write_json
from audiot.data.audio import MAX_SAMPLES_PER_BYTE, BadAudioError, check_budget, check_duration, reason
from audiot.data.corpora.held_out import divide
from audiot.data.corpora.shar import note_shards, opening, write_corpus
from audiot.data.manifests import Manifests
from audiot.data.prepare import PreparedCorpus
from audiot.data.shards import ARRAYS, SHARDS, Index
from audiot.data.sources import Sources
from audiot.data.storage import Storage, StorageError
from audiot.data.text import as_label, as_text, json_object

AUDIO = ("wav", "flac", "ogg", "opus", "mp3")
LABELS = ("json", "txt", "cls")
MOST_LABEL_BYTES = 2**20
AT_A_TIME = 8  # shards that are scanned together


class _Member(NamedTuple):
    offset: int
    size: int
    num_samples: int


@dataclass
class _Shard:
    """What a shard holds."""

    size: int = 0  # bytes
    audio: dict[str, _Member] = field(default_factory=dict)
    texts: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by key and kind
    rejected: list[tuple[str, str]] = field(default_factory=list)  # key and reason
    ignored: Counter[str] = field(default_factory=Counter)  # members by their kind


class WebDatasetCorpus:
    """Utterances in the tar files of a folder, a web server or an object store. They are streamed as they are.

    An index is built once, by looking into each shard. Audio at another rate is resampled whenever it is read, and channels are
    averaged. The id of an utterance is its key: the member's name up to the first dot.

    ``KEY.json`` is an object: ``text``, ``speaker``, ``lang``, and other fields as labels. ``KEY.txt`` is the text, ``KEY.cls``
    the label ``label``. Null and blank fields are left out.

    Args:
        root: Folder of the shards: a path, ``http(s)://…`` or ``s3://…``.
        train: Names of the training shards, with ``*`` and ``?`` for any text and any character.
        valid: Names of the shards for validation; None takes ``valid_fraction`` of the training utterances (see
            :func:`audiot.data.corpora.held_out.divide`).
        test: Names of the shards for testing; None takes as many utterances as for validation.
        valid_fraction: Share of the training utterances to hold out, at least one utterance.
        seed: Seed of the choice of held-out utterances.
        sample_rate: Sample rate in Hz of what is read.
        min_duration_s: Shortest utterance in seconds; shorter ones are left out.
        max_duration_s: Longest utterance in seconds; longer ones are left out. None means no limit.
    """

    def __init__(
        self,
        root: str | Path,
        train: str = "*.tar",
        valid: str | None = None,
        test: str | None = None,
        valid_fraction: float = 0.05,
        seed: int = 0,
        sample_rate: int = 16000,
        min_duration_s: float = 0.1,
        max_duration_s: float | None = None,
    ) -> None:
        self.storage = Storage(root)
        named = {"train": train, "valid": valid, "test": test}
        self.patterns = {role: pattern for role, pattern in named.items() if pattern is not None}
        self.valid_fraction, self.seed = valid_fraction, seed
        self.sample_rate = sample_rate
        self.durations = min_duration_s, max_duration_s

    def manifests(self) -> Manifests:
        """Refuse, since nothing is decoded anew.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"data=webdataset: the shards in {self.storage.root} are streamed as they are, there is nothing to prepare"
        )

    def sources(self) -> Sources:
        """No files: shards are looked for whenever the corpus is opened."""
        return Sources()

    def open(self, directory: Path, settings: Mapping[str, Any], when: str = "update") -> PreparedCorpus:
        """Build the index in a local folder, unless it is there. An interrupted run goes on after the shards that are done.

        Args:
            directory: Local folder of the corpus.
            settings: Settings of the corpus, which are recorded.
            when: Treatment of shards that have changed since: ``update`` looks into the changed ones, ``check`` refuses,
                ``keep`` does not look.

        Raises:
            StorageError: a shard is missing, truncated, no tar file, or can't be read.
            ValueError: labels are broken, two utterances have one id, no utterance can be used, or (with ``check``) shards have
                changed.
        """
        with opening(directory):
            return self._open(directory, settings, when)

    def _open(self, directory: Path, settings: Mapping[str, Any], when: str) -> PreparedCorpus:
        complete = (directory / "corpus.json").is_file()
        if complete and when == "keep":
            return PreparedCorpus.load(directory)
        there = self.storage.sizes()
        shards = {role: sorted(name for name in there if fnmatchcase(name, own)) for role, own in self.patterns.items()}
        for role, names in shards.items():
            if not names:
                raise FileNotFoundError(f"{self.storage.root} has no file {self.patterns[role]} (data.{role})")
        states = {name: list(there[name]) for name in sorted({name for names in shards.values() for name in names})}
        digest = hashlib.sha256(json.dumps([states, shards]).encode()).hexdigest()
        known = read_json(directory / SHARDS, "list of shards").get("digest") if complete else None
        if known != digest:
            if known is not None and when == "check":
                raise ValueError(
                    f"the shards in {self.storage.root} have changed since {directory} was opened: audiot prepare looks into "
                    "them anew, data.prepare.when=keep uses the index as it was"
                )
            self._build(directory, settings, shards, states, digest)
        return PreparedCorpus.load(directory)

    def _build(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        shards: Mapping[str, Sequence[str]],
        states: Mapping[str, Sequence[Any]],
        digest: str,
    ) -> None:
        for name in ("corpus.json", SHARDS):
            (directory / name).unlink(missing_ok=True)
        for path in directory.glob("*.jsonl.gz"):
            path.unlink()
        with ThreadPoolExecutor(AT_A_TIME) as pool:  # it mostly waits for disks and servers
            scans = pool.map(lambda name: self._scan(directory, name, states[name]), states)
            scanned = dict(zip(states, tqdm(scans, "shards", len(states), unit="shard", delay=1), strict=True))
        columns: dict[str, list[Any]] = {name: [] for name in ("id", "shard", "offset", "size", "num_samples")}
        labels_of: dict[str, dict[str, str]] = {}
        place_of: dict[str, int] = {}
        for number, (name, scan) in enumerate(scanned.items()):
            for key, member, labels in zip(scan["ids"], scan["members"], scan["labels"], strict=True):
                if key in place_of:
                    raise ValueError(f"two utterances have the id {key!r}, the second in {name}: ids must be unique")
                place_of[key] = len(place_of)
                labels_of[key] = labels
                for column, value in zip(columns, (key, number, *member), strict=True):
                    columns[column].append(value)
        self._tell(directory, scanned)
        if not place_of:
            raise ValueError(f"no utterance of {self.storage.root} can be used: see {directory / 'rejected.csv'}")
        given = {role: [key for name in names for key in scanned[name]["ids"]] for role, names in shards.items()}
        for role, names in given.items():
            if role != "train" and (shared := set(names) & set(given["train"])):
                raise ValueError(
                    f"{min(shared)!r} is in the shards of data.train and of data.{role}: name them so that none is in both"
                )
        splits, tasks = divide(given, labels_of, self.valid_fraction, self.seed)
        numbers = {split: sorted(place_of[name] for name in names) for split, names in splits.items()}
        sizes = [scan["bytes"] for scan in scanned.values()]
        index = Index(Index.of(columns, numbers), sizes, str(directory / ARRAYS))
        index.save(directory / ARRAYS)
        listed = [
            {
                "recording": {"file": name, "bytes": scan["bytes"]},
                "cuts": {"file": f"{name}.jsonl.gz", "bytes": (directory / "cuts" / f"{name}.jsonl.gz").stat().st_size},
            }
            for name, scan in scanned.items()
        ]
        note_shards(directory, self.storage, self.sample_rate, digest, listed)
        content = hashlib.sha256(json.dumps([columns, splits, list(labels_of.values())]).encode()).hexdigest()
        write_corpus(directory, index, self.sample_rate, settings, tasks, content)

    def _tell(self, directory: Path, scanned: Mapping[str, Mapping[str, Any]]) -> None:
        """Write rejected.csv, and say what was left out."""
        rejected = [(key, name, why) for name, scan in scanned.items() for key, why in scan["rejected"]]
        with replacing_text(directory / "rejected.csv") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("utterance", "path", "reason"), *rejected])
        if rejected:
            reasons = Counter(why.split(":")[0] for _, _, why in rejected).most_common()
            why = ", ".join(f"{count} {kind}" for kind, count in reasons)
            print(f"rejected {len(rejected):,} utterances ({why}): see {directory / 'rejected.csv'}", flush=True)
        ignored: Counter[str] = sum((Counter(scan["ignored"]) for scan in scanned.values()), Counter())
        if ignored:
            kinds = ", ".join(f"{printable(kind)[:20]} {count:,}" for kind, count in ignored.most_common(5))
            print(f"passed over {ignored.total():,} members of other kinds ({kinds}): only audio and labels are read", flush=True)

    def _scan(self, directory: Path, name: str, state: Sequence[Any]) -> dict[str, Any]:
        """What a shard holds. What is known of it is kept, with its labels in a file beside."""
        noted, labels_file = directory / "scan" / f"{name}.json", directory / "cuts" / f"{name}.jsonl.gz"
        if noted.is_file() and labels_file.is_file():
            known = read_json(noted, "note of a shard")
            if known["state"] == list(state) and any(state):  # a list of links tells neither size nor time
                return known
        place = printable(self.storage.place(name))
        shard = self.storage.again(self.storage.place(name), lambda: self._read(name))
        audio, texts = shard.audio, shard.texts
        found: dict[str, Any] = {"state": list(state), "bytes": shard.size, "ids": list(audio), "members": list(audio.values())}
        found["labels"] = []
        with replacing_gzip(labels_file) as labels:
            for key, member in audio.items():
                line = _supervision(key, member.num_samples / self.sample_rate, texts.get(key, {}), place)
                labels.write(json.dumps({"id": key, "supervisions": [line.to_dict()]}).encode() + b"\n")
                fields = {"speaker": line.speaker} | (line.custom or {})
                found["labels"].append({field: str(value) for field, value in fields.items() if value is not None})
        found |= {"rejected": shard.rejected, "ignored": shard.ignored}
        write_json(noted, found)
        return found

    def _read(self, name: str) -> _Shard:
        """Look at all members of a shard."""
        shard = _Shard()
        with self.storage.opened(name) as stream:
            shard.size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            try:
                with tarfile.open(fileobj=stream, mode="r:") as tar:
                    for member in tar:
                        self._look(tar, member, shard)
                    stream.seek(tar.offset)
                    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends at a broken header too
                        raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
            except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
                place = printable(self.storage.place(name))
                raise StorageError(f"{place} is truncated or no plain tar file ({reason(error)}): copy it again") from None
        return shard

    def _look(self, tar: tarfile.TarFile, member: tarfile.TarInfo, shard: _Shard) -> None:
        """Note a member of a tar file."""
        if member.isdir():
            return
        if member.offset_data + member.size > shard.size:
            raise tarfile.ReadError("unexpected end of data")
        folder, _, base = printable(member.name).rpartition("/")
        stem, _, kind = base.partition(".")
        key, kind = f"{folder}/{stem}".lstrip("/"), kind.lower()
        if not member.isreg() or member.issparse():
            shard.ignored["links and devices"] += 1
        elif not stem or kind not in (*AUDIO, *LABELS) or (kind in AUDIO and key in shard.audio):
            shard.ignored[f".{kind}"] += 1
        elif kind in LABELS:
            if member.size > MOST_LABEL_BYTES:
                raise ValueError(f"{base} has {member.size:,} bytes, which no labels have")
            shard.texts.setdefault(key, {})[kind] = _opened(tar, member).read()
        else:
            # Local files are read by their header alone. An error of a server must not come up inside the decoder's C code.
            stream = _opened(tar, member) if self.storage.is_local else io.BytesIO(_opened(tar, member).read())
            try:
                shard.audio[key] = _Member(member.offset_data, member.size, self._samples(stream, member.size))
            except BadAudioError as why:
                shard.rejected.append((key, str(why)))

    def _samples(self, stream: IO[bytes], size: int) -> int:
        """Samples of an audio file at the corpus's rate, by its header."""
        try:
            with soundfile.SoundFile(stream) as file:
                frames, rate = file.frames, file.samplerate
        except (soundfile.SoundFileError, ValueError) as error:
            raise BadAudioError(f"unreadable: {reason(error)}") from None
        check_budget(frames)
        check_duration(frames, rate, *self.durations)
        count = math.floor(frames * self.sample_rate / rate)
        if count > MAX_SAMPLES_PER_BYTE * size:
            raise BadAudioError(f"truncated: its header says {frames} samples, more than its {size} bytes can hold")
        return count


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream


def _supervision(key: str, duration: float, texts: Mapping[str, bytes], place: str) -> SupervisionSegment:
    """The labels of an utterance.

    Raises:
        ValueError: they are broken. The message has the shard and the member.
    """
    kind = ""
    try:
        fields: dict[str, Any] = {}
        for kind, content in texts.items():
            words = content.decode("utf-8-sig").strip()
            if kind == "json":
                fields |= json_object(words)
            else:
                fields.setdefault("text" if kind == "txt" else "label", words)
        kind = "json"
        text, language = as_text(fields.pop("text", None), "text"), as_text(fields.pop("lang", None), "lang")
        speaker = as_label(fields.get("speaker"), "speaker")
        as_label(fields.get("label"), "label")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{place}: {key}.{kind}: {reason(error)}") from None
    custom = {name: value for name, value in fields.items() if isinstance(value, str | int | float) and str(value).strip()}
    return SupervisionSegment(key, key, 0.0, duration, 0, text=text, speaker=speaker, language=language, custom=custom or None)
