"""Demo corpus: synthetic speech of eSpeak NG with exact phone times, made offline in half a minute.

eSpeak NG is licensed GPL-3.0-or-later; :mod:`audiot.data.corpora.espeak` loads it in separate processes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem
from tqdm import tqdm

from audiot.base.files import room
from audiot.data.corpora.espeak import SAMPLE_RATE, write_atomically
from audiot.data.manifests import Manifests
from audiot.data.prepare import usable_cores
from audiot.data.sources import Sources

# eSpeak's voice → accent.
ACCENTS = {
    "en-us": "American",
    "en": "British",
    "en-gb-scotland": "Scottish",
    "en-gb-x-gbclan": "Lancashire",
    "en-029": "Caribbean",
}
# All voices of eSpeak NG 1.52 except whispers, UniRobot and shelby, and RicishayMax, whose echo blurs the phones.
VARIANTS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "AnxiousAndy", "Demonic", "Denis", "Diogo", "Gene", "Gene2",
    "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Mr serious", "Nguyen", "Reed", "Storm",
    "Tweaky", "adam", "anika", "anikaRobot", "announcer", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb",
    "croak", "david", "ed", "edward", "edward2", "f1", "f2", "f3", "f4", "f5", "fast", "grandma", "grandpa",
    "gustave", "ian", "iven", "iven2", "iven3", "iven4", "john", "kaukovalta", "klatt", "klatt2", "klatt3", "klatt4",
    "klatt5", "klatt6", "linda", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "marcelo", "max", "michel",
    "miguel", "mike2", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert", "robosoft", "robosoft2",
    "robosoft3", "robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8", "sandro", "steph", "steph2",
    "steph3", "travis", "victor", "zac",
)  # fmt: skip
SPLITS = ("train", "valid", "test", "speaker_valid", "speaker_test")
_NUM_HELDOUT_VARIANTS = 24  # never used by training speakers

_SPEAKER_VALID_UTTERANCES = 2
_RECIPE = 1  # raise it when the same parameters give other bytes


class DemoCorpus:
    """Synthetic English speech of many speakers in five accents. Every utterance has phones, keyword and speaker.

    A speaker is a voice variant, an accent, a pitch, a pitch range and a rate. All are fixed by `seed` and the speaker's number,
    so more speakers or hours only add to a corpus. Utterances are sentences of a small grammar
    (:mod:`audiot.data.corpora.demo_texts`), 1.5 to 4 s long at 16 kHz, with varied level and a little noise. With `utterance_s`,
    several sentences are joined by short pauses.

    The splits are ``train``; ``valid`` and ``test``, with other speakers and voice variants; and ``speaker_valid`` and
    ``speaker_test``, with the training speakers. No sentence is in two of train, valid and test. speaker_valid uses the
    sentences of valid, speaker_test those of test.

    Supervisions have text, speaker, language, ``custom["keyword"]`` (one of twelve, from the first sentence),
    ``custom["accent"]`` and ``alignment["phone"]``. The alignment has 39 ARPAbet phones and SIL
    (:mod:`audiot.data.corpora.demo_phones`) and covers the cut.

    Args:
        root: Folder of the corpus, made on first use. It may be moved.
        hours: Hours of speech in ``train``.
        num_speakers: Number of training speakers.
        num_valid_speakers: Number of speakers in ``valid``.
        num_test_speakers: Number of speakers in ``test``.
        heldout_utterances: Utterances per speaker in ``valid`` and ``test``.
        speaker_utterances: Utterances per training speaker in ``speaker_test``; ``speaker_valid`` has two.
        utterance_s: Seconds of speech to which sentences of a speaker are joined; None: one sentence per utterance.
        train_utterances: Utterances per speaker in ``train``, instead of `hours`.
        seed: Seed of the corpus. Equal seeds give equal audio.
        num_jobs: Speaking processes at a time, by default one per core. It does not affect the audio.

    Raises:
        ValueError: a count is not positive.
    """

    def __init__(
        self,
        root: str | Path,
        hours: float = 3.0,
        num_speakers: int = 64,
        num_valid_speakers: int = 4,
        num_test_speakers: int = 8,
        heldout_utterances: int = 40,
        speaker_utterances: int = 8,
        utterance_s: float | None = None,
        train_utterances: int | None = None,
        seed: int = 0,
        num_jobs: int | None = None,
    ) -> None:
        self.root = Path(root)
        self.parameters = {
            "hours": float(hours),
            "num_speakers": num_speakers,
            "num_valid_speakers": num_valid_speakers,
            "num_test_speakers": num_test_speakers,
            "heldout_utterances": heldout_utterances,
            "speaker_utterances": speaker_utterances,
            # Left out if they change nothing, so that a corpus made before these parameters existed stays valid.
            **({} if utterance_s is None else {"utterance_s": float(utterance_s)}),
            **({} if train_utterances is None else {"train_utterances": train_utterances}),
        }
        for name, value in self.parameters.items():
            if value <= 0:
                raise ValueError(f"demo corpus: {name} must be positive, found {value}")
        if seed < 0:
            raise ValueError(f"demo corpus: seed must not be negative, found {seed}")
        if num_jobs is not None and num_jobs < 1:
            raise ValueError(f"demo corpus: num_jobs must be positive or null (one per core), found {num_jobs}")
        self.parameters |= {"seed": seed, "recipe": _RECIPE}
        self.num_jobs = num_jobs or usable_cores()

    def manifests(self, progress: bool = True) -> Manifests:
        """Cuts of all splits. Missing parts of the corpus are made first.

        Raises:
            ValueError: the folder holds a corpus with other parameters.
            ModuleNotFoundError: eSpeak NG is needed but not installed.
        """
        if not self._is_complete():
            self._make(progress)
        heldout = {"train": "train", "valid": "valid", "test": "test"}
        known_speakers = {"train": "train", "valid": "speaker_valid", "test": "speaker_test"}
        return Manifests(
            splits={split: self._load(split) for split in SPLITS},
            task_splits={
                "phone": heldout,
                "keyword": heldout,
                **dict.fromkeys(("speaker", "speaker_identification", "intent"), known_speakers),
                "pretrain": {"train": "train", "valid": "valid"},
            },
        )

    def sources(self) -> Sources:
        """The lists of utterances. Their cuts name the audio."""
        return Sources(texts=[self.root / f"{split}.jsonl" for split in SPLITS])

    def speakers(self) -> dict[str, dict[str, Any]]:
        """Voice of each speaker: the arguments of :class:`audiot.data.corpora.espeak.Espeak`."""
        seed = self.parameters["seed"]
        variants = list(VARIANTS)
        random.Random(f"{seed}/variants").shuffle(variants)
        heldout, training = variants[:_NUM_HELDOUT_VARIANTS], variants[_NUM_HELDOUT_VARIANTS:]
        speakers: dict[str, dict[str, Any]] = {}
        # valid and test take variants from the two ends of the held-out ones.
        for role, pool in (("train", training), ("valid", heldout), ("test", heldout[::-1])):
            count = self.parameters["num_speakers" if role == "train" else f"num_{role}_speakers"]
            for k in range(int(count)):
                name = f"{role}{k:03d}"
                rng = random.Random(f"{seed}/{name}")
                while name not in speakers:
                    voice = {
                        "variant": pool[k % len(pool)],
                        "accent": list(ACCENTS)[(k % len(pool) + k // len(pool)) % len(ACCENTS)],
                        "pitch": rng.randint(25, 75),
                        "pitch_range": rng.randint(25, 75),
                        "rate": rng.randint(150, 200),
                    }
                    if voice not in speakers.values():
                        speakers[name] = voice
        return speakers

    def _is_complete(self) -> bool:
        """Whether the corpus is complete. A complete or begun corpus with other parameters raises ValueError."""
        for path in (self.root / "corpus.json", self.root / "corpus.partial.json"):
            if path.exists():
                found = json.loads(path.read_text())
                if found != self.parameters:
                    names = sorted(found.keys() | self.parameters.keys())
                    changes = [
                        f"{name}={found.get(name)} there, {self.parameters.get(name)} asked for"
                        for name in names
                        if found.get(name) != self.parameters.get(name)
                    ]
                    raise ValueError(
                        f"{self.root} holds a demo corpus with other parameters ({'; '.join(changes)}): "
                        "choose another folder (data.name), or delete this one"
                    )
                return path.name == "corpus.json"
        return False

    def _make(self, progress: bool) -> None:
        if importlib.util.find_spec("espeakng_loader") is None:
            raise ModuleNotFoundError("the demo corpus needs eSpeak NG: pip install 'audiot[demo]'", name="espeakng_loader")
        # corpus.partial.json keeps the parameters of an incomplete corpus, so that it is not continued with others.
        parameters = json.dumps(self.parameters, indent=2).encode()
        write_atomically(self.root / "corpus.partial.json", parameters)
        jobs = {speaker: self._job(speaker, voice) for speaker, voice in self.speakers().items()}
        self._speak(jobs, progress)

        splits: dict[str, list[str]] = {part["split"]: [] for job in jobs.values() for part in job["parts"]}
        for speaker, job in jobs.items():
            for utterance in json.loads(Path(job["utterances"]).read_text()):
                cut = _cut(utterance, speaker, ACCENTS[job["voice"]["accent"]])
                splits[utterance["split"]].append(json.dumps(cut.to_dict(), ensure_ascii=False))
        for split, lines in splits.items():
            write_atomically(self.root / f"{split}.jsonl", "".join(f"{line}\n" for line in lines).encode())
        write_atomically(self.root / "corpus.json", parameters)
        (self.root / "corpus.partial.json").unlink(missing_ok=True)

    def _job(self, speaker: str, voice: dict[str, Any]) -> dict[str, Any]:
        """Arguments of :func:`audiot.data.corpora.espeak.speak_speaker`."""
        parameters = self.parameters
        role = speaker.rstrip("0123456789")
        if role == "train":
            seconds = parameters["hours"] * 3600 / parameters["num_speakers"]
            wanted = {"count": parameters["train_utterances"]} if "train_utterances" in parameters else {"seconds": seconds}
            # Parts of fixed size come first, so that their audio does not depend on the hours.
            parts = [
                {"split": "speaker_valid", "sentences": "valid", "count": _SPEAKER_VALID_UTTERANCES},
                {"split": "speaker_test", "sentences": "test", "count": parameters["speaker_utterances"]},
                {"split": "train", "sentences": "train", **wanted},
            ]
        else:
            parts = [{"split": role, "sentences": role, "count": parameters["heldout_utterances"]}]
        return {
            "audio": str(self.root / "audio" / speaker),
            "utterances": str(self.root / "speakers" / f"{speaker}.json"),
            "speaker": speaker,
            "voice": voice,
            "seed": parameters["seed"],
            "utterance_s": parameters.get("utterance_s", 0),
            "parts": parts,
        }

    def _speak(self, jobs: dict[str, dict[str, Any]], progress: bool) -> None:
        """Speak the missing speakers, each in a separate process."""
        spoken = [job for job in jobs.values() if Path(job["utterances"]).exists()]
        missing = [job for job in jobs.values() if job not in spoken]
        seconds = sum(map(_speech_s, spoken))
        bar = tqdm(total=len(jobs), initial=len(spoken), desc="demo corpus", unit="speaker", disable=not progress)
        with bar:
            for speaker in _spoken(missing, self.num_jobs, self.root):
                seconds += _speech_s(jobs[speaker])
                bar.set_postfix_str(f"{seconds / 3600:.2f} h of speech", refresh=False)
                bar.update()

    def _load(self, split: str) -> CutSet:
        cuts = CutSet.from_jsonl(self.root / f"{split}.jsonl")
        return cuts.with_recording_path_prefix(self.root)


def _spoken(jobs: list[dict[str, Any]], num_jobs: int, root: Path) -> Iterator[str]:
    """Run some jobs at a time. Yields the speaker of each finished job.

    Raises:
        OSError: a file could not be written below ``root``, or the process was killed. What is spoken is kept.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "audiot.data.corpora.espeak", str(num_jobs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # starting a pool of threads takes longer than speaking
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with suppress(BrokenPipeError), process.stdin as stream:  # if it ended at once, it reports why
                json.dump(jobs, stream)
            for line in process.stdout:
                yield line.rstrip("\n")
            failures = process.stderr.read().strip().splitlines()
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise OSError(
            f"demo corpus: its process was killed ({name}), for want of memory perhaps: +data.corpus.num_jobs=1 needs less"
        )
    if process.returncode:
        failure = failures[-1] if failures else f"exit status {process.returncode}"
        if not re.search(r"\b(OSError|LibsndfileError)\b", failure):
            raise RuntimeError(f"demo corpus: {failure}")
        raise OSError(f"demo corpus: {failure}, {room(root)}: make room there, and the same command goes on")


def _speech_s(job: dict[str, Any]) -> float:
    utterances = json.loads(Path(job["utterances"]).read_text())
    return math.fsum(utterance["num_samples"] for utterance in utterances) / SAMPLE_RATE


def _cut(utterance: dict[str, Any], speaker: str, accent: str) -> MonoCut:
    """The cut of one utterance. The path of its recording is relative to the corpus folder."""
    name, num_samples = utterance["id"], utterance["num_samples"]
    duration = num_samples / SAMPLE_RATE
    starts = [start for _, start in utterance["phones"]] + [num_samples]
    phones = [
        AlignmentItem(phone, start / SAMPLE_RATE, (end - start) / SAMPLE_RATE)
        for (phone, start), end in zip(utterance["phones"], starts[1:], strict=True)
    ]
    recording = Recording(
        id=name,
        sources=[AudioSource(type="file", channels=[0], source=f"audio/{speaker}/{name}.wav")],
        sampling_rate=SAMPLE_RATE,
        num_samples=num_samples,
        duration=duration,
    )
    supervision = SupervisionSegment(
        id=name,
        recording_id=name,
        start=0.0,
        duration=duration,
        text=utterance["text"],
        language="English",
        speaker=speaker,
        custom={"keyword": utterance["keyword"], "accent": accent},
        alignment={"phone": phones},
    )
    return MonoCut(id=name, start=0.0, duration=duration, channel=0, supervisions=[supervision], recording=recording)
