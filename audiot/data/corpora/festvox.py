"""Voices for Festival, such as CMU ARCTIC: recordings, transcripts and phone labels of one speaker per folder."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path
from sys import intern

from lhotse.cut import Cut
from tqdm import tqdm

from audiot.base.streams import key
from audiot.data.audio import find_audio
from audiot.data.corpora.phone_labels import Tier, aligned_cuts
from audiot.data.corpora.published import Utterance, labelled_manifests
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources, files_below
from audiot.data.text import lines

ROLES = ("train", "valid", "test")
SECONDS_APART = 0.1  # allowed difference between the ends of labels and audio, as in tasks about frames
PROMPT = re.compile(r'\(\s*([^\s"()]+)\s+"((?:[^"\\]|\\.)*)"\s*\)')
HTS = re.compile(r"[0-9]+\s+[0-9]+\s+\S+")
LAYOUT = "wav/UTTERANCE.wav, etc/txt.done.data, lab/UTTERANCE.lab"


class FestvoxCorpus:
    """Voices in Festvox's layout (Black and Lenzo 2003, festvox.org/bsv), such as CMU ARCTIC (Kominek and Black 2003).

    A voice's folder has ``wav/UTTERANCE.wav`` (or another suffix of audio), ``etc/txt.done.data`` and ``lab/UTTERANCE.lab``.
    Supervisions have the text, and phones as ``alignment["phone"]``, with silences named as in the file (``pau``). Utterances
    may lack either. If ``root`` is a folder of voices, the speaker is the name of the voice's folder, and ids are
    ``VOICE/UTTERANCE``; else there is no speaker, and ids are ``UTTERANCE``.

    A hash of seed and ``UTTERANCE`` chooses the splits, whatever other files there are. A sentence that several voices read under
    the same name is therefore in the same split for all of them, and each split has all voices. ``phone_train``, ``phone_valid``
    and ``phone_test`` are the utterances with phones, if some lack them; ``text_train`` and so on are those with a transcript.

    Args:
        root: Folder of a voice, or of folders of voices.
        valid_fraction: Share of the sentences for validation, and again for the test.
        seed: Seed of the choice.

    Raises:
        FileNotFoundError: there is no voice.
        ValueError: the fraction is out of range.
    """

    def __init__(self, root: str | Path, valid_fraction: float = 0.1, seed: int = 0) -> None:
        self.root, self.valid_fraction, self.seed = Path(root), valid_fraction, seed
        if not 0 < valid_fraction < 0.5:
            raise ValueError(f"data.valid_fraction must be above 0 and below 0.5, found {valid_fraction}")
        self.voices = self._find_voices()

    def _find_voices(self) -> dict[str, Path]:
        """Folder of each voice by name; the name of a single voice is blank."""
        if (self.root / "wav").is_dir():
            return {"": self.root}
        names = sorted(os.listdir(self.root)) if self.root.is_dir() else []
        if not (voices := {name: self.root / name for name in names if name[0] != "." and (self.root / name / "wav").is_dir()}):
            raise FileNotFoundError(
                f"Festvox: no folder wav in {self.root} nor in the folders in it: data.root must be the folder of a voice "
                f"({LAYOUT}), or a folder of voices"
            )
        return voices

    def sources(self) -> Sources:
        """Recordings, transcripts and phone labels."""
        audio = [str(folder / "wav" / name) for folder in self.voices.values() for name in _audio(folder)]
        texts: list[str | Path] = [_prompts(folder) for folder in self.voices.values()]
        return Sources(audio, texts + [path for folder in self.voices.values() for path in files_below(folder / "lab", ".lab")])

    def manifests(self, progress: bool = True) -> Manifests:
        """Cuts of all splits. Phone labels that are missing or broken are listed as rejected; the utterance stays.

        Raises:
            FileNotFoundError: there is no audio.
            ValueError: transcripts are broken, two audio files are one utterance, all phone labels are broken, or a split is
                empty.
        """
        utterances: dict[str, Utterance] = {}
        labels: dict[str, Path] = {}
        rejected: list[tuple[str, str]] = []
        for voice, folder in self.voices.items():
            found, missing = _utterances(voice, folder)
            utterances |= found
            rejected += missing
            if (folder / "lab").is_dir():
                labels |= {name: folder / "lab" / f"{_sentence(voice, name)}.lab" for name in found}
            else:
                print(f"Festvox: no folder lab in {folder}: its utterances have no phones", flush=True)
        if not utterances:
            raise FileNotFoundError(f"Festvox: no audio in {', '.join(str(folder / 'wav') for folder in self.voices.values())}")
        read = labelled_manifests("Festvox", {"all": utterances}, {}, rejected, progress)
        cuts = {cut.id: cut for split in read.splits.values() for cut in split}
        if not cuts:  # preparation reports the error
            return read
        tiers, unlabelled = _read_labels({name: path for name, path in labels.items() if name in cuts}, cuts, progress)
        return self._split(cuts, tiers, [*read.rejected, *unlabelled])

    def _split(
        self, cuts: Mapping[str, Cut], tiers: Mapping[str, Mapping[str, Tier]], rejected: Sequence[tuple[str, str]]
    ) -> Manifests:
        splits: dict[str, list[str]] = {role: [] for role in ROLES}
        for name in cuts:
            splits[self._role(name if "" in self.voices else name.partition("/")[2])].append(name)
        if empty := [role for role, names in splits.items() if not names]:
            raise ValueError(
                f"Festvox: {len(cuts):,} utterances of {self.root} leave none for {empty[0]}: change "
                f"data.valid_fraction={self.valid_fraction}, or add utterances"
            )
        tasks: dict[str, dict[str, str]] = {}
        with_text = {name for name, cut in cuts.items() if cut.supervisions[0].text}
        for kind, what, named, about in (
            ("phone", "phones", set(tiers), ("phone", "phone_recognition")),
            ("text", "a transcript", with_text, ("asr",)),
        ):
            if named and len(named) < len(cuts):
                print(f"Festvox: {len(named):,} of {len(cuts):,} utterances of {self.root} have {what}", flush=True)
                roles = {role: f"{kind}_{role}" for role in ROLES if named & set(splits[role])}
                splits |= {split: [name for name in splits[role] if name in named] for role, split in roles.items()}
                tasks |= {task: roles for task in about}
        found = {split: aligned_cuts([cuts[name] for name in names], tiers) for split, names in splits.items()}
        return Manifests(found, tasks, rejected)

    def _role(self, sentence: str) -> str:
        at = key("festvox", self.seed, sentence) % 2**64 / 2**64
        return "test" if at < self.valid_fraction else "valid" if at < 2 * self.valid_fraction else "train"


def _sentence(voice: str, name: str) -> str:
    return name.removeprefix(f"{voice}/") if voice else name


def _prompts(folder: Path) -> Path:
    return folder / "etc" / "txt.done.data"


def _audio(folder: Path) -> list[str]:
    """Paths of a voice's audio below ``wav``."""
    try:
        return find_audio(folder / "wav")
    except FileNotFoundError:
        return []


def _utterances(voice: str, folder: Path) -> tuple[dict[str, Utterance], list[tuple[str, str]]]:
    """Utterances of a voice by id; and path and reason of audio that is missing or has an impossible name."""
    texts = read_prompts(_prompts(folder)) if _prompts(folder).is_file() else {}
    if not texts:
        print(f"Festvox: no transcripts in {_prompts(folder)}", flush=True)
    found: dict[str, Utterance] = {}
    rejected: list[tuple[str, str]] = []
    for file in _audio(folder):
        path, sentence = folder / "wav" / file, file.rpartition(".")[0]
        name = f"{voice}/{sentence}" if voice else sentence
        if any("\ud800" <= character <= "\udfff" for character in file):
            rejected.append((str(path), "its name is not UTF-8: rename it"))
        elif name in found:
            raise ValueError(f"{found[name].path} and {path} would be one utterance: move one away")
        else:
            found[name] = Utterance(path, voice or None, texts.get(sentence) or None, language=None)
    there = {_sentence(voice, name) for name in found}
    lacking = [str(folder / "wav" / f"{sentence}.wav") for sentence in texts if sentence not in there]
    rejected += [(path, "missing: etc/txt.done.data lists it") for path in lacking]
    return found, rejected


def read_prompts(path: str | Path) -> dict[str, str]:
    r"""Transcripts by utterance, from lines ``( UTTERANCE "TEXT" )``, where ``\"`` and ``\\`` stand for ``"`` and ``\``.

    Raises:
        ValueError: a line is broken, or an utterance occurs twice. The message has the line.
    """
    texts: dict[str, str] = {}
    for number, line in lines(path):
        if not (match := PROMPT.fullmatch(line)):
            raise ValueError(
                f'{path}:{number}: expected ( UTTERANCE "TEXT" ) in a line, with \\" for a quote inside the text, '
                f"found {line[:60]!r}"
            )
        name, text = match.groups()
        if name in texts:
            raise ValueError(f"{path}:{number}: utterance {name} occurs a second time")
        texts[name] = re.sub(r"\\(.)", r"\1", text).strip()
    return texts


def read_lab(path: str | Path, duration_s: float) -> Tier:
    """Phones of an utterance, from a label file of Festival: after a line ``#``, lines ``END_TIME NUMBER PHONE``.

    Times are in seconds. Each phone begins where the one before it ended, the first one at 0. Lines before ``#`` and what follows
    a ``;`` are skipped. Phones end with the audio at the latest.

    Args:
        path: Path of the file.
        duration_s: Duration of the audio.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another layout, times that go back, or an end more than ``SECONDS_APART`` from the audio's.
    """
    found = list(lines(path))
    begin = next((at for at, (_, line) in enumerate(found, start=1) if line == "#"), 0)
    if not begin:
        first = repr(found[0][1][:40]) if found else "nothing"
        units = ", which HTS writes: BEGIN END PHONE in units of 100 ns" if found and HTS.fullmatch(found[0][1]) else ""
        raise ValueError(f"{path}: expected a line #, then lines END_TIME NUMBER PHONE with seconds, found {first}{units}")
    symbols: list[str] = []
    edges = array("d", [0.0])
    for number, line in found[begin:]:
        fields = line.partition(";")[0].split()
        end = _number(fields[0]) if len(fields) == 3 else None
        if end is None or _number(fields[1]) is None:
            raise ValueError(f"{path}:{number}: expected END_TIME NUMBER PHONE, found {line[:40]!r}")
        if end < edges[-1]:
            raise ValueError(f"{path}:{number}: {fields[2]} ends at {end:g} s, the phone before it at {edges[-1]:g} s")
        symbols.append(intern(fields[2]))
        edges.append(end)
    if not symbols:
        raise ValueError(f"{path}: no phones after the line #")
    if abs(edges[-1] - duration_s) > SECONDS_APART:
        raise ValueError(
            f"{path} ends at {edges[-1]:.3f} s, the audio at {duration_s:.3f} s, which may be {SECONDS_APART * 1000:.0f} ms "
            "apart: labels of another file?"
        )
    count = sum(edge < duration_s for edge in edges[:-1])
    return Tier(tuple(symbols[:count]), array("d", [*edges[:count], min(edges[count], duration_s)]))


def _number(text: str) -> float | None:
    """A finite number of at least 0, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) and number >= 0 else None


def _read_labels(
    paths: Mapping[str, Path], cuts: Mapping[str, Cut], progress: bool
) -> tuple[dict[str, dict[str, Tier]], list[tuple[str, str]]]:
    """Alignment tiers by utterance; and path and reason of files that are missing or cannot be used.

    Raises:
        ValueError: there are files, but none can be used.
    """

    def read(name: str) -> Tier | str:
        try:
            return read_lab(paths[name], cuts[name].duration)
        except FileNotFoundError:
            return "no phone labels: the file is missing"
        except (OSError, ValueError) as error:
            return f"bad phone labels: {error}"

    tiers: dict[str, dict[str, Tier]] = {}
    rejected: list[tuple[str, str]] = []
    with ThreadPoolExecutor(16) as pool:  # reading small files mostly waits for disks
        bar = tqdm(pool.map(read, paths), total=len(paths), desc="read phone labels", unit="utt", disable=not progress)
        for name, result in zip(paths, bar, strict=True):
            if isinstance(result, Tier):
                tiers[name] = {"phone": result}
            else:
                rejected.append((str(paths[name]), result))
    if not tiers and (bad := [reason for _, reason in rejected if reason.startswith("bad")]):
        raise ValueError(
            f"Festvox: none of {len(paths):,} label files can be used, first {bad[0]}; without the folder lab there are no phones"
        )
    return tiers, rejected
