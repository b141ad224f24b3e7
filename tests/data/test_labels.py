"""Labels of utterances and frames against slow loops, and the share of labelled utterances."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from audiot.data.batches import Crop
from audiot.data.datamodule import SpeechDataModule, open_cuts
from audiot.data.labels import IGNORED, FrameLabels, UtteranceLabel, check_known, vocabulary
from audiot.features import LogMel


def made_up(items, name="cut", num_samples=8000, **supervision):
    """A cut of half a second with alignment items (symbol, begin, end) in samples."""
    alignment = {"phone": [AlignmentItem(symbol, begin / 16000, (end - begin) / 16000) for symbol, begin, end in items]}
    duration = num_samples / 16000
    segment = SupervisionSegment(name, name, 0.0, duration, alignment=alignment if items else None, **supervision)
    recording = Recording(name, [AudioSource("file", [0], "none.wav")], 16000, num_samples, duration)
    return MonoCut(name, 0.0, duration, 0, supervisions=[segment], recording=recording)


def by_loop(items, num_samples, index, begin=0):
    """Class of every 25 ms frame, one each 10 ms, by the sample in its middle; ``begin`` is where the cut begins."""
    classes = []
    for first in range(0, num_samples - 400 + 1, 160):
        label = IGNORED
        for symbol, start, end in items:
            if start <= begin + first + 200 < end:
                label = index[symbol]
        classes.append(label)
    return classes


INDEX = {"A": 0, "B": 1, "C": 2}
ITEMS = [("A", 0, 1000), ("B", 1000, 1960), ("A", 1960, 2100), ("C", 3000, 5130), ("B", 5130, 7000)]  # two gaps


def test_frame_labels_equal_a_loop_and_gaps_are_ignored():
    labels = FrameLabels("phone", LogMel()).encode(made_up(ITEMS), INDEX)
    expected = by_loop(ITEMS, 8000, INDEX)
    assert labels.tolist() == expected
    assert labels.dtype == torch.long
    assert {IGNORED, 0, 1, 2} == set(expected)


def test_frame_labels_do_not_depend_on_the_order_of_the_items():
    labels = FrameLabels("phone", LogMel())
    assert labels.encode(made_up(ITEMS[::-1]), INDEX).equal(labels.encode(made_up(ITEMS), INDEX))


def test_frame_labels_follow_the_front_end():
    features = LogMel(win_length=800, n_fft=1024, hop_length=320, stack=3)
    labels = FrameLabels("phone", features).encode(made_up(ITEMS), INDEX)
    assert len(labels) == (8000 - 800) // 320 + 1  # one a spectrogram frame, whatever the stacking
    for t, label in enumerate(labels.tolist()):
        found = [INDEX[symbol] for symbol, start, end in ITEMS if start <= 320 * t + 400 < end]
        assert label == (found[0] if found else IGNORED)


def test_frame_labels_of_a_crop_are_those_of_its_piece():
    rng = np.random.default_rng(0)
    for number in range(20):
        bounds = np.sort(rng.choice(np.arange(1, 16000), 12, replace=False)).tolist()
        items = [("ABC"[k % 3], begin, end) for k, (begin, end) in enumerate(pairwise(bounds)) if k != 5]
        crop = Crop(0.4, number, 0)(made_up(items, f"cut{number}", 16000))
        assert crop.num_samples == 6400
        labels = FrameLabels("phone", LogMel()).encode(crop, INDEX)
        assert labels.tolist() == by_loop(items, 6400, INDEX, begin=round(crop.start * 16000))


def test_phones_of_the_demo_corpus_equal_a_loop(demo_corpus):
    cuts = open_cuts(demo_corpus.directory, "valid")
    labels = FrameLabels("phone", LogMel())
    index = {name: number for number, name in enumerate(vocabulary(cuts, labels))}
    for cut in cuts:
        items = [
            (item.symbol, round(item.start * 16000), round(item.end * 16000)) for item in cut.supervisions[0].alignment["phone"]
        ]
        expected = by_loop(items, cut.num_samples, index)
        assert labels.encode(cut, index).tolist() == expected
        assert IGNORED not in expected


def test_utterance_labels_are_the_speaker_or_a_custom_field():
    cut = made_up([], speaker="anna", custom={"keyword": "stop", "take": 3})
    assert UtteranceLabel("speaker").names(cut) == ["anna"]
    assert UtteranceLabel("keyword").names(cut) == ["stop"]
    assert UtteranceLabel("take").names(cut) == ["3"]
    assert UtteranceLabel("speaker").encode(cut, {"bert": 0, "anna": 1}).equal(torch.tensor(1))


def test_a_missing_label_names_the_utterance_and_what_there_is():
    cut = made_up([], name="utt7", custom={"keyword": "stop"})
    with pytest.raises(ValueError, match=r"utterance utt7 has no label 'speaker' \(its labels: keyword, speaker\)"):
        UtteranceLabel("speaker").names(cut)
    with pytest.raises(ValueError, match=r"utterance utt7 has no label 'accent'"):
        UtteranceLabel("accent").names(cut)
    cut.supervisions = []
    with pytest.raises(ValueError, match=r"utterance utt7 has no label 'speaker' \(its labels: none, it has no supervision\)"):
        UtteranceLabel("speaker").names(cut)
    with pytest.raises(ValueError, match="utterance utt7 has no alignment tier 'phone'"):
        FrameLabels("phone", LogMel()).names(cut)


def test_vocabulary_is_sorted_and_without_repeats():
    cuts = CutSet.from_cuts([made_up(ITEMS, "one"), made_up([("Z", 0, 9), ("A", 9, 20)], "two")])
    assert vocabulary(cuts, FrameLabels("phone", LogMel())) == ["A", "B", "C", "Z"]


def test_a_label_that_training_never_saw_names_itself_and_its_utterance():
    cuts = [made_up([], "one", speaker="anna"), made_up([], "two", speaker="bert")]
    check_known(cuts[:1], UtteranceLabel("speaker"), {"anna": 0}, "valid")
    with pytest.raises(
        ValueError, match=r"label 'bert' of utterance two \(test split\) does not occur in training \(1 labels do\)"
    ):
        check_known(cuts, UtteranceLabel("speaker"), {"anna": 0}, "test")


def test_a_data_module_refuses_unseen_labels_and_knows_its_classes(demo_corpus):
    speakers = SpeechDataModule(demo_corpus, "speaker", batch_s=8.0, labels=UtteranceLabel("speaker"))
    assert speakers.classes == ["train000", "train001"]
    assert speakers.index == {"train000": 0, "train001": 1}
    with pytest.raises(ValueError, match=r"label 'valid000' of utterance valid000.* \(valid split\) does not occur in training"):
        SpeechDataModule(demo_corpus, "phone", batch_s=8.0, labels=UtteranceLabel("speaker"))


def test_smaller_label_fractions_are_part_of_larger_ones(demo_corpus):
    def chosen(fraction, seed=0):
        return set(SpeechDataModule(demo_corpus, "phone", batch_s=8.0, label_fraction=fraction, seed=seed).training_cuts().ids)

    count = len(chosen(1.0))
    sizes = []
    larger = chosen(1.0)
    for fraction in (0.9, 0.5, 0.3, 0.1, 0.001):
        smaller = chosen(fraction)
        assert smaller < larger or (smaller == larger and len(smaller) == 1)
        assert smaller == chosen(fraction)
        sizes.append(len(smaller))
        larger = smaller
    assert sizes == [int(np.ceil(fraction * count)) for fraction in (0.9, 0.5, 0.3, 0.1, 0.001)]
    assert sizes[-1] == 1
    assert any(chosen(0.3, seed) != chosen(0.3) for seed in (1, 2, 3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")  # Lhotse's, about so few utterances
def test_a_label_fraction_leaves_classes_and_test_data_alone(demo_corpus):
    labels = FrameLabels("phone", LogMel())
    whole = SpeechDataModule(demo_corpus, "phone", batch_s=8.0, num_workers=0, labels=labels)
    few = SpeechDataModule(demo_corpus, "phone", batch_s=8.0, num_workers=0, labels=labels, label_fraction=0.1)
    assert few.classes == whole.classes
    for role in ("valid", "test"):
        one, other = ([batch["ids"] for batch in source.ordered_loader(role)] for source in (few, whole))
        assert one == other
    assert sorted(name for batch in few.ordered_loader("train") for name in batch["ids"]) == sorted(few.training_cuts().ids)
