"""The demo corpus with several sentences in an utterance."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from test_demo import check_cover

from audiot.data.corpora.demo import DemoCorpus
from audiot.data.corpora.demo_texts import KEYWORDS

SIZES = {"num_speakers": 1, "num_valid_speakers": 1, "num_test_speakers": 1, "heldout_utterances": 1, "speaker_utterances": 1}


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    root = tmp_path_factory.mktemp("corpora") / "joined"
    splits = DemoCorpus(root, **SIZES, utterance_s=6.0, train_utterances=5, num_jobs=1).manifests(progress=False).splits
    return {split: list(cuts) for split, cuts in splits.items()}


@pytest.mark.slow
def test_as_many_utterances_as_asked_for_last_long_enough(cuts):
    assert {split: len(cuts[split]) for split in cuts} == {
        "train": 5,
        "valid": 1,
        "test": 1,
        "speaker_valid": 2,
        "speaker_test": 1,
    }
    for cut in itertools.chain(*cuts.values()):
        assert 6.0 <= cut.duration <= 10.0
        text = cut.supervisions[0].text
        keywords = [word for word in re.findall(r"\w+", text) if word in KEYWORDS]
        assert len(keywords) == len(text.split(". ")) > 1  # one a sentence
        assert cut.supervisions[0].custom["keyword"] == keywords[0]


def test_phones_cover_the_cut_and_pauses_are_quiet(cuts):
    for cut in itertools.chain(*cuts.values()):
        phones = cut.supervisions[0].alignment["phone"]
        check_cover(phones, cut.duration)
        audio = cut.load_audio()[0].astype(np.float64)
        pauses = [phone for phone in phones[1:-1] if phone.symbol == "SIL" and phone.duration >= 0.15]
        assert len(pauses) >= len(cut.supervisions[0].text.split(". ")) - 1
        for phone in pauses:
            inside = audio[round(phone.start * 16000) + 400 : round(phone.end * 16000) - 400]
            assert np.mean(inside**2) < 0.05 * np.mean(audio**2)


def test_a_corpus_of_single_sentences_is_not_taken_for_one_of_joined_ones(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(DemoCorpus(tmp_path, **SIZES).parameters))
    with pytest.raises(ValueError, match=r"utterance_s=None there, 6\.0 asked for"):
        DemoCorpus(tmp_path, **SIZES, utterance_s=6.0).manifests(progress=False)
