"""A miniature LibriSpeech of demo speech: the published layout and file names, and its exact phones as the published labels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import soundfile
from lhotse.cut import Cut

from audiot.data.corpora.demo_phones import PHONES

# Reader, sex and subset; LibriSpeech's own numbers, one speaker of the demo corpus each.
READERS = (
    ("103", "F", "train-clean-100"),
    ("1034", "M", "train-clean-100"),
    ("14", "F", "train-clean-360"),
    ("20", "F", "train-other-500"),
    ("84", "F", "dev-clean"),
    ("61", "M", "test-clean"),
)
SUBSETS = tuple(dict.fromkeys(subset for _, _, subset in READERS))


class MiniLibriSpeech(NamedTuple):
    """Paths of the corpus.

    Args:
        root: The folder LibriSpeech.
        phones: converted_aligned_phones.txt of train-clean-100: index of the phone in ``PHONES``, per 10 ms.
        phone_train: List of four of five utterances of train-clean-100.
        phone_test: List of the others.
        textgrids: Folder of TextGrids of all subsets, their only tier ``phones``; an empty interval is silence.
        utterances: Subset → ids, sorted.
        sources: Id → the demo corpus's cut.
    """

    root: Path
    phones: Path
    phone_train: Path
    phone_test: Path
    textgrids: Path
    utterances: dict[str, list[str]]
    sources: dict[str, Cut]

    @property
    def overrides(self) -> list[str]:
        """Arguments for a command: the default subsets, S3PRL's labels and lists."""
        values = {
            "data": "librispeech",
            "data.root": self.root,
            "data.partial": "true",
            "data.phones": self.phones,
            "data.phone_train": self.phone_train,
            "data.phone_test": self.phone_test,
        }
        return [f"{name}={value}" for name, value in values.items()]


def demo_speech(folder: Path) -> list[Cut]:
    """Cuts of six speakers, six sentences and more each, some 100 s of speech; spoken in a few seconds, two at a time."""
    from audiot.data.corpora.demo import DemoCorpus

    demo = DemoCorpus(
        folder,
        hours=4 * 18 / 3600,
        num_speakers=4,
        num_valid_speakers=1,
        num_test_speakers=1,
        heldout_utterances=6,
        speaker_utterances=2,
        num_jobs=2,
    )
    splits = demo.manifests(progress=False).splits
    return [cut for split in ("train", "speaker_valid", "speaker_test", "valid", "test") for cut in splits[split]]


def make_mini_librispeech(cuts: Iterable[Cut], folder: Path) -> MiniLibriSpeech:
    """Make the tree of the speech of six speakers, in the order in which they occur; the same cuts give the same bytes."""
    spoken: dict[str, list[Cut]] = {}
    for cut in cuts:
        spoken.setdefault(cut.supervisions[0].speaker, []).append(cut)
    assert len(spoken) == len(READERS), f"{len(READERS)} speakers are needed, {len(spoken)} are there"
    root, textgrids, labels = folder / "LibriSpeech", folder / "textgrids", folder / "cpc_phone"
    labels.mkdir(parents=True)
    utterances: dict[str, list[str]] = {subset: [] for subset in SUBSETS}
    sources: dict[str, Cut] = {}
    chapters, frames, lists = [], [], {"train": [], "test": []}
    for number, ((reader, _, subset), of_speaker) in enumerate(zip(READERS, spoken.values(), strict=True)):
        half = -(-len(of_speaker) // 2)
        for part, of_chapter in enumerate((of_speaker[:half], of_speaker[half:])):
            chapter = str(121000 + 10 * number + part)
            name = f"{reader}-{chapter}"
            place = root / subset / reader / chapter
            place.mkdir(parents=True)
            (textgrids / subset / reader / chapter).mkdir(parents=True)
            ids = [f"{name}-{index:04d}" for index in range(len(of_chapter))]
            for index, (utterance, cut) in enumerate(zip(ids, of_chapter, strict=True)):
                soundfile.write(place / f"{utterance}.flac", cut.load_audio()[0], cut.sampling_rate, subtype="PCM_16")
                path = textgrids / subset / reader / chapter / f"{utterance}.TextGrid"
                path.write_text(textgrid(cut), encoding="utf-8")
                if subset == "train-clean-100":
                    frames.append(f"{utterance} {' '.join(map(str, frame_labels(cut)))}\n")
                    lists["test" if index % 5 == 2 else "train"].append(utterance)
            text = "".join(f"{utterance} {upper(cut)}\n" for utterance, cut in zip(ids, of_chapter, strict=True))
            (place / f"{name}.trans.txt").write_text(text)
            minutes = sum(cut.duration for cut in of_chapter) / 60
            chapters.append(f"{chapter} | {reader:<5} | {minutes:.2f} | {subset:<16} | 1 | 1 | Chapter {part + 1} | Demo\n")
            utterances[subset] += ids
            sources |= zip(ids, of_chapter, strict=True)
    speakers = [f"{reader:<5}| {sex} | {subset:<17}| 25.00 | Demo Speaker {reader}\n" for reader, sex, subset in READERS]
    (root / "SPEAKERS.TXT").write_text(";ID  |SEX| SUBSET           |MINUTES| NAME\n" + "".join(speakers))
    header = ";ID    |READER|MINUTES| SUBSET           | PROJ.|BOOK ID| CH. TITLE | PROJECT TITLE\n"
    (root / "CHAPTERS.TXT").write_text(header + "".join(chapters))
    (root / "README.TXT").write_text("A miniature LibriSpeech of demo speech.\n")
    (labels / "converted_aligned_phones.txt").write_text("".join(frames))
    for role, names in lists.items():
        (labels / f"{role}_split.txt").write_text("".join(f"{name}\n" for name in names))
    return MiniLibriSpeech(
        root,
        labels / "converted_aligned_phones.txt",
        labels / "train_split.txt",
        labels / "test_split.txt",
        textgrids,
        {subset: sorted(names) for subset, names in utterances.items()},
        sources,
    )


def upper(cut: Cut) -> str:
    """The transcript in capitals, without punctuation."""
    return " ".join(re.sub(r"[^A-Z' ]", " ", cut.supervisions[0].text.upper()).split())


def frame_labels(cut: Cut) -> list[int]:
    """The phone in the middle of every full frame of 25 ms, one per 10 ms."""
    items = cut.supervisions[0].alignment["phone"]
    centers = [(first + 200) / 16000 for first in range(0, cut.num_samples - 400 + 1, 160)]
    symbols = [next(item.symbol for item in items if center < item.end) for center in centers]
    return [PHONES.index(symbol) for symbol in symbols]


def textgrid(cut: Cut) -> str:
    """A TextGrid as the Montreal Forced Aligner writes it, long format."""
    items = cut.supervisions[0].alignment["phone"]
    edges = [0.0, *(round(item.end, 4) for item in items[:-1]), round(cut.duration, 4)]
    intervals = chain.from_iterable(
        (
            f"        intervals [{number}]:",
            f"            xmin = {start} ",
            f"            xmax = {end} ",
            f'            text = "{"" if item.symbol == "SIL" else item.symbol}" ',
        )
        for number, (item, start, end) in enumerate(zip(items, edges[:-1], edges[1:], strict=True), start=1)
    )
    lines = (
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0 ",
        f"xmax = {edges[-1]} ",
        "tiers? <exists> ",
        "size = 1 ",
        "item []: ",
        "    item [1]:",
        '        class = "IntervalTier" ',
        '        name = "phones" ',
        "        xmin = 0 ",
        f"        xmax = {edges[-1]} ",
        f"        intervals: size = {len(items)} ",
        *intervals,
    )
    return "\n".join(lines) + "\n"
