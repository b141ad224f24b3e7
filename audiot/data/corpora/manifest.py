"""Existing manifests: Lhotse cuts or NeMo's JSON lines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy
from tqdm import tqdm

from audiot.base.files import name_text
from audiot.data.audio import BadAudioError
from audiot.data.corpora.folder import audio_cut
from audiot.data.corpora.held_out import divide
from audiot.data.labels import values_of
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources
from audiot.data.text import MOST_S, as_label, as_seconds, as_text, json_object, lines

CUT_TYPES = ("MonoCut", "MultiCut", "MixedCut", "Cut")
SOURCES = ("file", "memory", "url", "command", "shar")  # Lhotse's
SAFE_SOURCES = ("file", "memory")
ROUNDING_S = 0.05  # NeMo manifests give durations by hand, often to a tenth of a second


class ManifestCorpus:
    """Splits from Lhotse cuts (JSONL) or NeMo manifests (JSON lines), plain or gzipped. The content decides which.

    NeMo entries have ``audio_filepath`` and optionally ``offset`` and ``duration`` (seconds), ``text``, ``speaker`` and ``lang``.
    Other fields (``label``, …) become custom fields of the supervision. Null and blank fields are left out. The id is the path
    below the manifest's folder without suffix, followed by ``@offset+duration`` if the entry is a part of its file.

    Args:
        train: Manifest of the training utterances.
        valid: Manifest for validation; None takes ``valid_fraction`` of the training utterances. They have other speakers if
            there are enough, see :func:`audiot.data.corpora.held_out.divide`.
        test: Manifest for testing; None takes as many utterances as for validation.
        valid_fraction: Share of the training utterances to hold out, at least one utterance.
        seed: Seed of the choice of held-out utterances.
        root: Base of relative audio paths; None: ``folder`` for Lhotse, the manifest's folder for NeMo.
        folder: Current folder, to which a corpus without root belongs; None means the same. The config sets it to the root.
        sources: Kinds of audio sources that the manifests may name: ``file``, ``memory`` (inside the manifest), and for manifests
            that you trust ``url`` (fetched) and ``command`` (run in a shell).

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
        folder: str | Path | None = ".",
        sources: Sequence[str] = SAFE_SOURCES,
    ) -> None:
        if unknown := set(sources) - set(SOURCES):
            raise ValueError(f"data.sources: no kind {min(unknown)!r} of audio sources; there are {', '.join(SOURCES)}")
        named = {"train": train, "valid": valid, "test": test}
        self.paths = {role: Path(path) for role, path in named.items() if path is not None}
        for role, path in self.paths.items():
            if not path.is_file():
                raise FileNotFoundError(f"data.{role}: there is no manifest {path}")
        self.valid_fraction, self.seed = valid_fraction, seed
        self.root = None if root is None else Path(root)
        self.folder = Path("." if folder is None else folder)
        self.kinds = tuple(sources)

    def manifests(self, progress: bool = True) -> Manifests:
        """Read the manifests. For NeMo's, the headers of the audio are read too, which give the sample rate.

        Raises:
            ValueError: a line is broken (the message has its number), an id is repeated, an utterance of ``train`` is also in
                another split, or a split is empty.
        """
        rejected: list[tuple[str, str]] = []
        splits = {role: self._read(path, rejected, progress) for role, path in self.paths.items()}
        for role, cuts in splits.items():
            if shared := cuts.keys() & splits["train"].keys() if role != "train" else set():
                raise ValueError(f"{min(shared)!r} is in both {self.paths['train']} and {self.paths[role]}")
            if not cuts and not rejected:
                raise ValueError(f"{self.paths[role]} has no utterance")
        if not splits["train"]:  # preparation reports the error
            return Manifests({role: CutSet.from_cuts(cuts.values()) for role, cuts in splits.items()}, rejected=rejected)
        labels_of = {name: _labels(cut) for cuts in splits.values() for name, cut in cuts.items()}
        given = {role: list(cuts) for role, cuts in splits.items()}
        divided, tasks = divide(given, labels_of, self.valid_fraction, self.seed)
        chosen = {split: [splits.get(split, splits["train"])[name] for name in names] for split, names in divided.items()}
        return Manifests({split: CutSet.from_cuts(cuts) for split, cuts in chosen.items()}, tasks, rejected)

    def sources(self) -> Sources:
        """The manifests. Their cuts name the audio."""
        return Sources(texts=list(self.paths.values()))

    def _read(self, path: Path, rejected: list[tuple[str, str]], progress: bool) -> dict[str, Cut]:
        entries = list(_entries(path))
        cuts: dict[str, Cut] = {}
        with ThreadPoolExecutor(16) as pool:  # reading headers mostly waits for disks
            parsed = pool.map(partial(self._parse, path), entries)
            bar = tqdm(parsed, total=len(entries), desc=path.name, unit="utt", disable=not progress)
            for (number, _), cut in zip(entries, bar, strict=True):
                if isinstance(cut, tuple):
                    rejected.append(cut)
                elif cut.id in cuts:
                    raise ValueError(f"{path}:{number}: the utterance {cut.id!r} occurs a second time")
                else:
                    cuts[cut.id] = cut
        _say_speakers(path, cuts.values())
        return cuts

    def _parse(self, path: Path, line: tuple[int, dict[str, Any]]) -> Cut | tuple[str, str]:
        """The cut of a line, or path and reason if its audio cannot be used."""
        number, entry = line
        try:
            if "audio_filepath" in entry:
                return self._nemo(entry, Path(name_text(path.parent if self.root is None else self.root)))
            if entry.get("type") in CUT_TYPES:
                return self._lhotse(entry)
            raise ValueError("neither a Lhotse cut (a type such as MonoCut) nor a NeMo entry (audio_filepath)")
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
            # Lhotse may raise any of these for fields that are missing or have another type.
            detail = str(error) if isinstance(error, ValueError) else f"not a Lhotse cut: {error!r}"
            raise ValueError(f"{path}:{number}: {detail}") from None

    def _lhotse(self, entry: dict[str, Any]) -> Cut:
        cut = checked_cut(entry, self.kinds)
        root = self.folder if self.root is None else self.root
        if isinstance(cut, (MonoCut, MultiCut)):
            cut = cut.with_recording_path_prefix(root)
        else:  # MixedCut has no such method for all tracks
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
        if as_seconds(offset, "offset") < 0:
            raise ValueError(f"offset must be a number of seconds of at least 0, found {offset}")
        if duration is not None and as_seconds(duration, "duration") <= 0:
            raise ValueError(f"duration must be a number of seconds above 0, found {duration}")
        text, language = as_text(fields.pop("text", None), "text"), as_text(fields.pop("lang", None), "lang")
        speaker = as_label(fields.get("speaker"), "speaker")
        as_label(fields.get("label"), "label")
        custom = {field: value for field, value in fields.items() if value is not None and str(value).strip()}
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
        cut.supervisions = [
            SupervisionSegment(
                cut.id,
                cut.recording_id,
                0.0,
                cut.duration,
                cut.channel,
                text=text,
                speaker=speaker,
                language=language,
                custom=custom or None,
            )
        ]
        return cut


def checked_cut(entry: dict[str, Any], kinds: Collection[str]) -> Cut:
    """The cut of a line, whose fields have the right types.

    Args:
        entry: The line as a dict.
        kinds: Kinds of audio sources that it may name.

    Raises:
        ValueError: a field is wrong, or a source is of another kind. Lhotse may raise other errors for fields that it lacks.
    """
    _check_sources(entry, kinds)
    cut = deserialize_item(entry)
    _check(cut)
    return cut


def _labels(cut: Cut) -> dict[str, str]:
    """Fields of a cut that are texts or whole numbers and equal in all of its supervisions, including the speaker."""
    customs = [supervision.custom or {} for supervision in cut.supervisions]
    others = {name for custom in customs for name, value in custom.items() if not isinstance(value, str | int | None)}
    others |= {name for custom in customs for name, value in custom.items() if isinstance(value, bool)}
    fields = {name for custom in customs for name in custom} - others - {"speaker"}
    values = {name: values_of(cut, name) for name in ("speaker", *sorted(fields))}
    return {name: found[0] for name, found in values.items() if len(found) == 1}


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank."""
    for number, line in lines(path):
        try:
            entry = json_object(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        yield number, entry


def _check_sources(entry: Any, kinds: Collection[str]) -> None:
    """Refuse audio sources of other kinds, wherever in a cut they stand: in a track, a transform or a custom field.

    Raises:
        ValueError: naming the kind.
    """
    if isinstance(entry, dict):
        if "source" in entry and "type" in entry and entry["type"] not in kinds:
            what = {"command": ", which a shell would run", "url": ", which would be fetched"}.get(str(entry["type"]), "")
            raise ValueError(
                f"an audio source is of the kind {entry['type']!r}{what}: not without "
                f"data.sources=[{','.join(kinds)},{entry['type']}] (audiot extract: --sources), for a manifest that you trust"
            )
        entry = list(entry.values())
    for value in entry if isinstance(entry, list) else ():
        _check_sources(value, kinds)


def _check(cut: Cut) -> None:
    """Refuse fields of a Lhotse cut that have a wrong type, since Lhotse does not check them.

    Raises:
        ValueError: a field is wrong. The message has its name.
    """
    if not isinstance(cut.id, str) or not cut.id.strip():
        raise ValueError(f"id must be text, found {cut.id!r}")
    for part in [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]:
        if isinstance(part, (MonoCut, MultiCut)):
            _check_recording(part.recording)
    if as_seconds(cut.start, "start") < 0 or as_seconds(cut.duration, "duration") <= 0:
        raise ValueError(f"start must be at least 0 and duration above 0, found {cut.start} and {cut.duration}")
    for number, supervision in enumerate(cut.supervisions):
        name = f"supervisions[{number}]"
        as_seconds(supervision.start, f"{name}.start")
        if as_seconds(supervision.duration, f"{name}.duration") < 0:
            raise ValueError(f"{name}.duration must be at least 0, found {supervision.duration}")
        as_text(supervision.text, f"{name}.text")
        as_text(supervision.language, f"{name}.language")
        as_label(supervision.speaker, f"{name}.speaker")
        if not isinstance(supervision.custom, dict | None):
            raise ValueError(f"{name}.custom must be an object, found {type(supervision.custom).__name__}")
        for tier, items in (supervision.alignment or {}).items():
            for symbol, start, duration, _ in items:
                if (
                    type(symbol) is str
                    and type(start) is type(duration) is float
                    and abs(start) < MOST_S
                    and 0 <= duration < MOST_S
                ):
                    continue  # skips the checks below, because a corpus has millions of items
                as_text(symbol, f"a symbol of {name}.alignment.{tier}")
                as_seconds(start, f"a start of {name}.alignment.{tier}")
                if as_seconds(duration, f"a duration of {name}.alignment.{tier}") < 0:
                    raise ValueError(f"a duration of {name}.alignment.{tier} must be at least 0, found {duration}")


def _check_recording(recording: Recording | None) -> None:
    if recording is None:
        raise ValueError("the cut has no recording: audio is needed, not features")
    as_seconds(recording.duration, "recording.duration")
    for name, value in (("sampling_rate", recording.sampling_rate), ("num_samples", recording.num_samples)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**48:
            raise ValueError(f"recording.{name} must be a whole number above 0, found {value!r}")
    if not recording.sources:
        raise ValueError("recording.sources is empty")
    for source in recording.sources:
        if source.type == "file" and not isinstance(source.source, str):
            raise ValueError(f"recording.sources: source must be one path, found {source.source!r}")
        if not isinstance(source.channels, list) or not all(type(channel) is int for channel in source.channels):
            raise ValueError(f"recording.sources: channels must be a list of whole numbers, found {source.channels!r}")


def _say_speakers(path: Path, cuts: Collection[Cut]) -> None:
    """Report how many cuts have several speakers. A speaker label is impossible for them."""
    several = {cut.id: speakers for cut in cuts if len(speakers := values_of(cut, "speaker")) > 1}
    if several:
        name, speakers = next(iter(several.items()))
        print(
            f"{path}: {len(several):,} of {len(cuts):,} cuts have several speakers, {name} first ({', '.join(speakers[:5])}): "
            "their texts are joined in order of time, and tasks about speakers refuse them; Lhotse's "
            "CutSet.trim_to_supervisions(keep_overlapping=False) makes a cut of each supervision",
            flush=True,
        )
