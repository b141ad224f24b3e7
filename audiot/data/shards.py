"""The index of a corpus in shards, and reading utterances out of them.

A shard is a tar file. The index says for each utterance in which shard its audio lies, and where: one array for each of these
figures, in one file of the format safetensors, which is read without making an object for each utterance.

A folder of shards has ``index.json`` (names, sizes and SHA-256 of all files), ``index.safetensors``, and for each shard
``recording.NNNNNN.tar`` and ``cuts.NNNNNN.jsonl.gz`` as Lhotse Shar has them. A corpus that was opened has a local folder: a
prepared folder whose ``shards.json`` says where the shards are.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import soundfile
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from audiot.base.files import printable, read_json, replacing, replacing_gzip
from audiot.data.audio import MAX_SAMPLES, MAX_SAMPLES_PER_BYTE, SHORTFALL_S, reason, resample
from audiot.data.storage import FILE_NAME, Range, Storage, StorageError

if TYPE_CHECKING:  # Lhotse imports PyTorch, which workers of preparation do not need
    from lhotse import CutSet
    from lhotse.cut import MonoCut

FORMAT_VERSION = 1
INDEX, ARRAYS, SHARDS = "index.json", "index.safetensors", "shards.json"
MOST_LABELS = 2**30  # bytes of a shard's labels; a few bytes of gzip could fill the memory
SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COLUMNS = {"id_ends": np.int64, "shard": np.int32, "offset": np.int64, "size": np.int64, "num_samples": np.int32}
MEMBER = re.compile(r"(.+)@(\d+)\+(\d+)(?:#([0-9a-f]{8}))?", re.DOTALL)


class Utterance(NamedTuple):
    """An utterance in a shard.

    Args:
        id: Its id.
        path: Where its audio is: ``SHARD@OFFSET+SIZE``, and ``#CRC`` (CRC-32) if that is known.
        num_samples: Samples at the corpus's rate.
    """

    id: str
    path: str
    num_samples: int


class Index:
    """Where each utterance of a corpus lies. Utterances are in the order of the shards.

    Args:
        arrays: ``ids`` (all ids as UTF-8, uint8), ``id_ends`` (N,) the end of each in it, ``shard`` (N,), ``offset`` (N,) and
            ``size`` (N,) in bytes, ``num_samples`` (N,), ``crc32`` (N,) if it is known, and for each split ``split/NAME``: the
            numbers of its utterances.
        shard_bytes: Size of each shard in bytes.
        place: Name of the index in errors.

    Raises:
        ValueError: the arrays do not fit each other or the shards.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], shard_bytes: Sequence[int], place: str) -> None:
        self.arrays = arrays
        self.splits = {name.removeprefix("split/"): own for name, own in arrays.items() if name.startswith("split/")}
        if wrong := self._wrong(np.asarray(shard_bytes, np.int64)):
            raise ValueError(f"{place} is damaged ({wrong}): copy it again, or write the shards anew")

    def __len__(self) -> int:
        return len(self.arrays["shard"])

    def _wrong(self, shard_bytes: np.ndarray) -> str:
        """What does not hold; nothing of a good index."""
        arrays = self.arrays
        types = COLUMNS | {"ids": np.uint8} | ({"crc32": np.uint32} if "crc32" in arrays else {})
        for name, kind in types.items():
            if name not in arrays or arrays[name].dtype != kind or arrays[name].ndim != 1:
                return f"it has no {name} of {np.dtype(kind)}"
        count, ends, size = len(arrays["shard"]), arrays["id_ends"], arrays["size"]
        if any(len(arrays[name]) != count for name in types if name != "ids") or not count:
            return "its arrays are empty or differ in length"
        if ends[-1] != len(arrays["ids"]) or (np.diff(ends, prepend=0) < 1).any():
            return "an id is empty or outside"
        shard, offset = arrays["shard"], arrays["offset"]
        if shard[0] < 0 or shard[-1] >= len(shard_bytes) or (np.diff(shard) < 0).any():
            return "a shard is not listed"
        if (offset < 0).any() or (size < 1).any() or (size > shard_bytes[shard] - offset).any():
            return "audio lies outside its shard"
        samples = arrays["num_samples"]
        if (samples < 1).any() or (samples > MAX_SAMPLES).any() or (samples > MAX_SAMPLES_PER_BYTE * size).any():
            return "an utterance has more samples than its bytes can hold, or none"
        for name, own in self.splits.items():
            if not SPLIT.fullmatch(name) or own.dtype != np.int32 or own.ndim != 1 or not len(own):
                return f"its split {name[:40]!r} is empty or has another type"
            if own[0] < 0 or own[-1] >= count or (np.diff(own) < 1).any():
                return f"its split {name} repeats an utterance or names one that it has not"
        return "" if self.splits else "it has no split"

    @classmethod
    def read(cls, path: Path, shard_bytes: Sequence[int]) -> Index:
        """Read the arrays of a file.

        Raises:
            ValueError: it is damaged.
        """
        try:
            with safe_open(path, framework="np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again, or write the shards anew") from None
        return cls(arrays, shard_bytes, str(path))

    def save(self, path: Path) -> None:
        """Write the arrays to a file."""
        with replacing(path) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, temporary)

    @staticmethod
    def of(columns: Mapping[str, Sequence[Any]], splits: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Arrays of an index from its columns, with ``id`` a text for each utterance, and the numbers of each split."""
        ids = [name.encode() for name in columns["id"]]
        arrays = {name: np.asarray(columns[name], kind) for name, kind in COLUMNS.items() if name != "id_ends"}
        if "crc32" in columns:
            arrays["crc32"] = np.asarray(columns["crc32"], np.uint32)
        arrays["ids"] = np.frombuffer(b"".join(ids), np.uint8)
        arrays["id_ends"] = np.cumsum([len(name) for name in ids], dtype=np.int64)
        return arrays | {f"split/{name}": np.asarray(numbers, np.int32) for name, numbers in splits.items()}

    def shards(self, split: str) -> np.ndarray:
        """Bounds (n + 1,) in the numbers of a split at which another shard begins."""
        shard = self.arrays["shard"][self.splits[split]]
        return np.concatenate([[0], np.flatnonzero(np.diff(shard)) + 1, [len(shard)]])

    def rows(self, numbers: np.ndarray, names: Sequence[str]) -> Iterator[Utterance]:
        """The utterances with these numbers.

        Args:
            numbers: Numbers of utterances.
            names: Path of each shard.
        """
        arrays = self.arrays
        ends = arrays["id_ends"]
        starts = np.where(numbers > 0, ends[numbers - 1], 0)
        checks = arrays["crc32"][numbers].tolist() if "crc32" in arrays else [None] * len(numbers)
        columns = (arrays[name][numbers].tolist() for name in ("shard", "offset", "size", "num_samples"))
        ids = arrays["ids"]
        for start, end, check, shard, offset, size, num_samples in zip(
            starts.tolist(), ends[numbers].tolist(), checks, *columns, strict=True
        ):
            name = ids[start:end].tobytes().decode("utf-8", "replace")
            crc = "" if check is None else f"#{check:08x}"
            yield Utterance(name, f"{names[shard]}@{offset}+{size}{crc}", num_samples)


class File(NamedTuple):
    """A file of a folder of shards. Without a SHA-256 it is not checked."""

    name: str
    size: int
    sha256: str | None = None


class Shards:
    """The shards of an opened corpus.

    Args:
        folder: Local folder of the corpus.
        content: Content of its shards.json.

    Raises:
        ValueError: the content is not that of such a file.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        place = str(folder / SHARDS)
        root, rate = content.get("root"), content.get("sample_rate")
        if not isinstance(root, str) or not isinstance(rate, int) or not is_count(rate):
            raise ValueError(f"{place} is damaged (root or sample_rate): delete {folder}, and it is opened anew")
        self.storage, self.sample_rate = Storage(root), rate
        self.recordings, self.cuts = files_of(content, place)

    def index(self) -> Index:
        """The index, read from the local folder."""
        return Index.read(self.folder / ARRAYS, [file.size for file in self.recordings])

    def manifest(self, split: str) -> Path:
        """Manifest of a split with its labels. The first call makes it, of the labels of all shards that the split lies in.

        Raises:
            StorageError: labels can't be read.
            ValueError: labels are broken, or an utterance has none.
        """
        path = self.folder / f"{split}.jsonl.gz"
        if not path.is_file():
            index = self.index()
            numbers, bounds = index.splits[split], index.shards(split)
            with replacing_gzip(path) as stream:
                for start, stop in pairwise(bounds):
                    own = numbers[start:stop]
                    labels = self._labels(int(index.arrays["shard"][own[0]]))
                    where = printable(self.storage.place(self.cuts[int(index.arrays["shard"][own[0]])].name))
                    for row in index.rows(own, [file.name for file in self.recordings]):
                        if row.id not in labels:
                            raise ValueError(f"{where} has no utterance {row.id!r}, which the index names: write the shards anew")
                        try:
                            cut = _cut(row, labels[row.id], self.sample_rate)
                        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
                            # Lhotse may raise any of these for fields that are missing or have another type.
                            raise ValueError(f"{where}: the labels of {row.id!r} are broken: {error}") from None
                        stream.write(json.dumps(cut).encode() + b"\n")
        return path

    def _labels(self, shard: int) -> dict[str, dict[str, Any]]:
        """Lines of the shard's labels by the id of the utterance."""
        file = self.cuts[shard]
        kept = self.folder / "cuts" / file.name
        data = kept.read_bytes() if kept.is_file() else checked(self.storage, file)
        found = {}
        try:
            text = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MOST_LABELS + 1)
            if len(text) > MOST_LABELS:
                raise ValueError(f"more than {MOST_LABELS:,} bytes")
            for line in text.splitlines():
                entry = json.loads(line)
                found[entry["id"]] = entry
        except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error, RecursionError) as error:
            raise ValueError(f"{printable(self.storage.place(file.name))} holds no cuts: {error}") from None
        return found

    def check(self, verify: bool = False) -> None:
        """Refuse shards that are missing or truncated. Sizes are compared where the storage tells them.

        Args:
            verify: Whether to read all shards and compare their SHA-256.

        Raises:
            StorageError: naming the first, and how many.
        """
        sizes = self.storage.sizes() if self.storage.scheme not in ("http", "https") else {}
        bad = [file for file in self.recordings if sizes and sizes.get(file.name, (None, ""))[0] != file.size]
        if bad:
            has = sizes.get(bad[0].name)
            what = "is missing" if has is None else f"is damaged: it has {has[0]:,} bytes instead of {bad[0].size:,}"
            raise StorageError(
                f"{printable(self.storage.place(bad[0].name))} {what} ({len(bad):,} of {len(self.recordings):,} shards): "
                "copy them again"
            )
        for file in self.recordings if verify else ():
            checked(self.storage, file)


def _cut(row: Utterance, labels: Mapping[str, Any], sample_rate: int) -> dict[str, Any]:
    """A prepared cut as a dict: the labels of its line, and the audio that the index names."""
    from audiot.data.corpora.manifest import checked_cut

    duration = row.num_samples / sample_rate
    source = {"type": "shar", "channels": [0], "source": row.path}
    recording = {"id": row.id, "sources": [source], "sampling_rate": sample_rate, "num_samples": row.num_samples}
    cut = {"id": row.id, "start": 0.0, "duration": duration, "channel": 0, "type": "MonoCut"}
    cut |= {name: labels[name] for name in ("supervisions", "custom") if labels.get(name) is not None}
    cut["recording"] = recording | {"duration": duration, "channel_ids": [0]}
    return checked_cut(cut, ("shar",)).to_dict()


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**62


def files_of(content: Mapping[str, Any], place: str) -> tuple[list[File], list[File]]:
    """Audio and labels of each shard that a list of shards names. Each must be a file of one folder.

    Raises:
        ValueError: the list is damaged.
    """
    shards = content.get("shards")
    parts: tuple[list[File], list[File]] = ([], [])
    for shard in shards if isinstance(shards, list) else [None]:
        for kind, part in zip(("recording", "cuts"), parts, strict=True):
            part.append(file_of(shard.get(kind) if isinstance(shard, dict) else None, place))
    return parts


def file_of(entry: Any, place: str) -> File:
    """A file that a list of shards names.

    Raises:
        ValueError: it is not a file of the same folder, or has no size.
    """
    found = entry if isinstance(entry, dict) else {}
    name, size, sha256 = found.get("file"), found.get("bytes"), found.get("sha256")
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
        raise ValueError(f"{place} names {str(name)[:80]!r}, which is no file of its folder: write the shards anew")
    if not isinstance(size, int) or not is_count(size) or not isinstance(sha256, str | None):
        raise ValueError(f"{place} gives no bytes or no SHA-256 of {name}: write the shards anew")
    return File(name, size, sha256)


def checked(storage: Storage, file: File) -> bytes:
    """A whole file, compared with its size and its SHA-256.

    Raises:
        StorageError: it is another.
    """
    data = storage.read(file.name, file.size)
    if file.sha256 is not None and hashlib.sha256(data).hexdigest() != file.sha256:
        raise StorageError(
            f"{printable(storage.place(file.name))} is damaged (its SHA-256 is not that of the index): copy it again"
        )
    return data


@lru_cache(maxsize=8)
def open_shards(folder: Path) -> Shards:
    """The shards of an opened corpus, read once in a process."""
    return Shards(folder, read_json(folder / SHARDS, "list of shards"))


def located_cuts(folder: Path, split: str) -> CutSet:
    """Cuts of a split with their labels, streamed from its manifest. Their audio is found from any current folder."""
    from lhotse import CutSet

    cuts = CutSet.from_jsonl_lazy(open_shards(folder.absolute()).manifest(split))
    return cuts.map(partial(_located, folder.absolute()), apply_fn=None)


def _located(folder: Path, cut: MonoCut) -> MonoCut:
    (source,) = cut.recording.sources
    source.source = f"{folder}/{source.source}"
    return cut


def manifest_of(folder: Path, split: str) -> Path:
    """Manifest of a split of a prepared folder. That of a corpus in shards is made if it is not there yet."""
    return open_shards(folder.absolute()).manifest(split) if is_sharded(folder) else folder / f"{split}.jsonl.gz"


def is_sharded(folder: Path) -> bool:
    """Whether a prepared folder is an opened corpus of shards."""
    return (folder / SHARDS).is_file()


def read_members(paths: Sequence[str]) -> list[bytes]:
    """Audio files of utterances, read out of their shards and compared with their CRC-32.

    Args:
        paths: Places of the audio, each below the folder of an opened corpus.

    Raises:
        StorageError: audio can't be read, or is damaged.
    """
    places = [_place(path) for path in paths]
    found: dict[int, bytes] = {}
    for folder in dict.fromkeys(folder for folder, _, _ in places):
        own = [number for number, place in enumerate(places) if place[0] == folder]
        storage = open_shards(folder).storage
        for number, data in zip(own, storage.ranges([places[number][1] for number in own]), strict=True):
            _, wanted, crc = places[number]
            if crc is not None and zlib.crc32(data) != crc:
                raise StorageError(
                    f"{printable(storage.place(wanted.name))} is damaged at byte {wanted.start:,} (its CRC-32 is not that of the "
                    "index): copy it again"
                )
            found[number] = data
    return [found[number] for number in range(len(paths))]


def decode_member(path: str, data: bytes, begin: int, num_samples: int, sample_rate: int, out: np.ndarray) -> np.ndarray:
    """Samples [begin, begin + num_samples) of an audio file at ``sample_rate``, averaged over its channels.

    Args:
        path: Place of the audio, for errors.
        data: Content of the file.
        begin: First sample.
        num_samples: Number of samples.
        sample_rate: Sample rate in Hz.
        out: Room (num_samples,) for the samples of a 16-bit mono file at this rate (int16).

    Returns:
        ``out``, or a new float32 array if the file is of another kind.

    Raises:
        StorageError: the file is damaged, or too short.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (file.channels, file.samplerate) != (1, sample_rate):
                if file.frames > min(MAX_SAMPLES, MAX_SAMPLES_PER_BYTE * len(data)):
                    raise ValueError(f"its header says {file.frames:,} samples, more than its {len(data):,} bytes can hold")
                mono = file.read(dtype="float32", always_2d=True).mean(axis=1)
                samples = resample(mono, file.samplerate, sample_rate)[begin : begin + num_samples]
                count = len(samples)
            else:
                if begin:
                    file.seek(begin)
                if file.subtype == "PCM_16":
                    samples, count = out, file.buffer_read_into(out, "int16")
                else:
                    samples = file.read(num_samples, dtype="float32")
                    count = len(samples)
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
        raise _damaged(path, reason(error)) from None
    missing = num_samples - count
    if missing > SHORTFALL_S * sample_rate or (missing and samples is out):
        raise _damaged(path, f"found {begin + count:,} samples, expected {begin + num_samples:,}")
    return np.pad(samples, (0, missing)) if missing else samples


def _damaged(path: str, what: str) -> StorageError:
    folder, wanted, _ = _place(path)
    place = printable(open_shards(folder).storage.place(wanted.name))
    return StorageError(f"{place} is damaged at byte {wanted.start:,} ({what}): copy it again")


def member_size(path: str) -> int:
    """Bytes of an utterance's audio in its shard."""
    return _place(path)[1].size


def _place(path: str) -> tuple[Path, Range, int | None]:
    """Folder of the opened corpus, bytes of a shard, and their CRC-32."""
    match = MEMBER.fullmatch(path)
    if match is None:
        raise ValueError(f"{printable(path)} names no audio in a shard")
    folder, name = match[1].rsplit("/", 1)
    return Path(folder), Range(name, int(match[2]), int(match[3])), None if match[4] is None else int(match[4], 16)
