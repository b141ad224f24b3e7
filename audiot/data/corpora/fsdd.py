"""Free Spoken Digit Dataset: recordings of English digits."""

from __future__ import annotations

import re
from pathlib import Path

from audiot.data.corpora.published import ROLES, Utterance, check_complete, labelled_manifests
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources, files_below

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TAKES = 50  # recordings of each digit by each speaker
NAME = re.compile(r"([0-9])_([^_]+)_(0|[1-9][0-9]*)\.wav")


class FsddCorpus:
    """Free Spoken Digit Dataset (Jackson et al. 2018, doi:10.5281/zenodo.1342401): English digits, 8 kHz, ``7_jackson_32.wav``.

    Split ``test``, takes 0 to 4, is the official one. Of the official training takes, 5 to 9 are ``valid`` and the others
    ``train``. All three have every digit of every speaker. Supervisions have speaker, text (``seven``) and ``custom["keyword"]``
    (``7``).

    Args:
        root: Clone of the repository, or its folder of recordings.
        partial: Whether recordings of its speakers may be missing.
    """

    def __init__(self, root: str | Path, partial: bool = False) -> None:
        self.root, self.partial = Path(root), partial

    def sources(self) -> Sources:
        """The recordings."""
        return Sources(files_below(self._folder(), ".wav"))

    def _folder(self) -> Path:
        folder = self.root / "recordings"
        return folder if folder.is_dir() else self.root

    def manifests(self, progress: bool = True) -> Manifests:
        """Cuts of all splits.

        Raises:
            FileNotFoundError: there are no recordings, or those of a speaker are incomplete.
        """
        folder = self._folder()
        names = sorted(path.name for path in folder.glob("*.wav") if path.name[0] != ".")
        remedy = "git clone https://github.com/Jakobovski/free-spoken-digit-dataset and set data.root"
        if not names:
            raise FileNotFoundError(f"FSDD: no recordings in {self.root / 'recordings'} nor in {self.root}: {remedy}")
        splits: dict[str, dict[str, Utterance]] = {"train": {}, "valid": {}, "test": {}}
        rejected = []
        for name in names:
            if match := NAME.fullmatch(name):
                digit, speaker, take = match.groups()
                split = "test" if int(take) < 5 else "valid" if int(take) < 10 else "train"
                labels = {"keyword": digit}
                splits[split][name[:-4]] = Utterance(folder / name, speaker, NUMBERS[int(digit)], labels)
            else:
                rejected.append((str(folder / name), "not named DIGIT_SPEAKER_TAKE.wav"))
        speakers = sorted({str(utterance.speaker) for split in splits.values() for utterance in split.values()})
        wanted = [f"{digit}_{speaker}_{take}.wav" for speaker in speakers for digit in range(10) for take in range(TAKES)]
        there = set(names)
        missing = [name for name in wanted if name not in there]
        check_complete("FSDD", folder, len(missing), len(wanted), missing, remedy, self.partial)
        if absent := sorted(set(SPEAKERS) - set(speakers)):
            print(f"FSDD: {folder} has {len(speakers)} speakers, without {', '.join(absent)}", flush=True)
        return labelled_manifests("FSDD", splits, {"keyword": ROLES, "speaker": ROLES}, rejected, progress)
