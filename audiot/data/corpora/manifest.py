"""Manifests that exist already: Lhotse cuts or NeMo's JSON lines."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lhotse import CutSet, SupervisionSegment
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy
from tqdm import tqdm

from audiot.data.corpora.folder import audio_cut, hold_out
from audiot.data.manifests import Manifests
from audiot.data.prepare import BadAudioError
from audiot.data.sources import Sources

CUT_TYPES = ("MonoCut", "MultiCut", "MixedCut", "Cut")
ROUNDING_S = 0.05  # NeMo manifests give durations by hand, often to a tenth of a second


class ManifestCorpus:
    """Splits from Lhotse cuts (JSONL) or NeMo manifests (JSON lines), plain or gzipped; the content tells which.

    NeMo: ``audio_filepath`` and, where given, ``offset`` and ``duration`` (seconds), ``text``, ``speaker``, ``lang``; all
    other fields (``label``, …) become custom fields of the supervision. The id is the path without suffix below the
    manifest's folder, with ``@offset+duration`` where the entry takes a part of its file.

    Args:
        train: Manifest of the training utterances.
        valid: For validation; None: ``valid_fraction`` of the training utterances.
        test: For testing; None: as many again.
        valid_fraction: Share of the training utterances to hold out, at least one.
        seed: Of that choice.
        root: What relative audio paths are relative to; None: ``folder`` for Lhotse's, the manifest's folder for NeMo's.
        folder: The current folder.

    Raises:
        FileNotFoundError: a manifest is missing.
    """

    def __init__(
        self,
        train: str | Path,
        valid: str | Path | None = None,
        test: str | Path | None = None,
        valid_fraction: float = 0.05,
        seed: int = 0,
        root: str | Path | None = None,
        folder: str | Path = ".",
    ) -> None:
        named = {"train": train, "valid": valid, "test": test}
        self.paths = {role: Path(path) for role, path in named.items() if path is not None}
        for role, path in self.paths.items():
            if not path.is_file():
                raise FileNotFoundError(f"data.{role}: there is no manifest {path}")
        self.valid_fraction, self.seed = valid_fraction, seed
        self.root = None if root is None else Path(root)
        self.folder = Path(folder)

    def manifests(self, progress: bool = True) -> Manifests:
        """Read the manifests, and of NeMo's also the headers of the audio, which give the sampling rate.

        Raises:
            ValueError: a line is broken (the error names it), an id occurs twice, an utterance of ``train`` is also in
                another split, or a split is empty.
        """
        rejected: list[tuple[str, str]] = []
        splits = {role: self._read(path, rejected, progress) for role, path in self.paths.items()}
        for role, cuts in splits.items():
            if shared := cuts.keys() & splits["train"].keys() if role != "train" else set():
                raise ValueError(f"{min(shared)!r} is in both {self.paths['train']} and {self.paths[role]}")
            if not cuts and not rejected:
                raise ValueError(f"{self.paths[role]} has no utterance")
        held_out = [role for role in ("valid", "test") if role not in splits]
        if held_out and splits["train"]:
            train = splits["train"]
            chosen = hold_out(list(train), self.valid_fraction, self.seed, held_out)
            splits |= {role: {name: train[name] for name in names} for role, names in chosen.items()}
        order = [role for role in ("train", "valid", "test") if role in splits]
        return Manifests({role: CutSet.from_cuts(splits[role].values()) for role in order}, rejected=rejected)

    def sources(self) -> Sources:
        """The manifests; the audio is what their cuts name."""
        return Sources(texts=list(self.paths.values()))

    def _read(self, path: Path, rejected: list[tuple[str, str]], progress: bool) -> dict[str, Cut]:
        lines = list(_lines(path))
        cuts: dict[str, Cut] = {}
        with ThreadPoolExecutor(16) as pool:  # reading headers is waiting for disks
            parsed = pool.map(partial(self._parse, path), lines)
            bar = tqdm(parsed, total=len(lines), desc=path.name, unit="utt", disable=not progress)
            for (number, _), cut in zip(lines, bar, strict=True):
                if isinstance(cut, tuple):
                    rejected.append(cut)
                elif cut.id in cuts:
                    raise ValueError(f"{path}:{number}: the utterance {cut.id!r} occurs a second time")
                else:
                    cuts[cut.id] = cut
        return cuts

    def _parse(self, path: Path, line: tuple[int, dict[str, Any]]) -> Cut | tuple[str, str]:
        """The cut of a line, or path and reason where its audio can't be used."""
        number, entry = line
        try:
            if "audio_filepath" in entry:
                return self._nemo(entry, path.parent if self.root is None else self.root)
            if entry.get("type") in CUT_TYPES:
                return self._lhotse(entry)
            raise ValueError("neither a Lhotse cut (a type such as MonoCut) nor a NeMo entry (audio_filepath)")
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            # What Lhotse's reading of a cut may raise on fields that are missing or of another type.
            detail = str(error) if isinstance(error, ValueError) else f"not a Lhotse cut: {error!r}"
            raise ValueError(f"{path}:{number}: {detail}") from None

    def _lhotse(self, entry: dict[str, Any]) -> Cut:
        cut = deserialize_item(entry)
        root = self.folder if self.root is None else self.root
        if isinstance(cut, (MonoCut, MultiCut)):
            cut = cut.with_recording_path_prefix(root)
        else:  # a MixedCut has no such method for all its tracks
            tracks = [
                fastcopy(track, cut=track.cut.with_recording_path_prefix(root))
                if isinstance(track.cut, (MonoCut, MultiCut))
                else track
                for track in cut.tracks
            ]
            cut = fastcopy(cut, tracks=tracks)
        return cut

    def _nemo(self, entry: dict[str, Any], base: Path) -> Cut | tuple[str, str]:
        fields = dict(entry)
        name, offset, duration = fields.pop("audio_filepath"), fields.pop("offset", None), fields.pop("duration", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"audio_filepath must be one path, found {name!r}")
        offset = 0.0 if offset is None else offset
        for what, value in (("offset", offset), ("duration", 0.0 if duration is None else duration)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{what} must be a number of seconds, found {value!r}")
        path = base / name
        below = path.relative_to(base) if path.is_relative_to(base) else path.relative_to(path.anchor)
        try:
            cut = audio_cut(path, below.with_suffix("").as_posix())
        except BadAudioError as reason:
            return str(path), str(reason)
        end = cut.duration if duration is None else offset + duration
        if offset >= cut.duration or end > cut.duration + ROUNDING_S:
            return str(path), f"not as its manifest says: {cut.duration:.3f} s long, not {max(offset, end):.3f} s"
        if offset > 0 or end < cut.duration - ROUNDING_S:
            piece = f"@{float(offset)}" if duration is None else f"@{float(offset)}+{float(duration)}"
            cut = cut.truncate(offset=offset, duration=min(end, cut.duration) - offset).with_id(cut.id + piece)
        text, speaker, language = fields.pop("text", None), fields.get("speaker"), fields.pop("lang", None)
        cut.supervisions = [
            SupervisionSegment(
                cut.id,
                cut.recording_id,
                0.0,
                cut.duration,
                cut.channel,
                text=text,
                speaker=None if speaker is None else str(speaker),
                language=language,
                custom=fields or None,
            )
        ]
        return cut


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that isn't blank."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(path) if zipped else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable after line {number}: {error}") from None


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{path}:{number}: a JSON object was expected, found {type(entry).__name__}")
    return entry
