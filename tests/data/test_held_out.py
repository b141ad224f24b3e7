"""Held-out utterances of a corpus without splits have new speakers if there are enough."""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import soundfile

from audiot.data.corpora.folder import FolderCorpus
from audiot.data.corpora.held_out import divide, hold_out_of_each, hold_out_speakers
from audiot.data.corpora.manifest import ManifestCorpus

ROLES = ("train", "valid", "test")


def corpus(speakers, takes=10, **labels):
    """Labels by utterance, with a number of takes per speaker; ``labels`` are functions of speaker and take."""
    return {
        f"{speaker}_{take}": {"speaker": speaker, **{name: label(speaker, take) for name, label in labels.items()}}
        for speaker in speakers
        for take in range(takes)
    }


def speakers_of(names):
    return {name.split("_")[0] for name in names}


def test_whole_speakers_are_held_out_and_known_ones_are_kept_for_tasks_about_speakers():
    labels_of = corpus("abcdefghij")
    splits, tasks = divide({"train": list(labels_of)}, labels_of, 0.05, 0)
    voices = [speakers_of(splits[role]) for role in ROLES]
    assert [len(own) for own in voices] == [8, 1, 1]
    assert sum(map(len, voices)) == len(set.union(*voices))
    assert sorted(chain.from_iterable(splits[role] for role in ROLES)) == sorted(labels_of)
    # 5% of 100 utterances, not whole speakers.
    assert [len(splits[f"speaker_{role}"]) for role in ROLES] == [90, 5, 5]
    assert speakers_of(splits["speaker_train"]) == set("abcdefghij")
    for task in ("speaker", "speaker_identification"):
        assert tasks[task] == {role: f"speaker_{role}" for role in ROLES}
    assert tasks["pretrain"] == {"train": "pretrain", "valid": "valid"}
    tested = {name for split in ("valid", "test", "speaker_valid", "speaker_test") for name in splits[split]}
    assert set(splits["pretrain"]) == set(labels_of) - tested


def test_the_choice_of_speakers_is_a_function_of_seed_and_speaker_alone():
    labels_of = corpus("abcdefghij")
    backwards = dict(reversed(labels_of.items()))
    chosen = [hold_out_speakers(labels, 0.05, 0, ("valid", "test")) for labels in (labels_of, backwards)]
    assert {role: set(names) for role, names in chosen[0].items()} == {role: set(names) for role, names in chosen[1].items()}
    assert len({tuple(hold_out_speakers(labels_of, 0.05, seed, ("valid", "test"))["test"]) for seed in range(8)}) > 1


def test_training_keeps_half_of_the_utterances_and_every_label_that_speakers_share():
    gender = {"a": "f", "b": "f", "c": "m", "d": "m", "e": "m"}
    labels_of = corpus("abcde", gender=lambda speaker, take: gender[speaker])
    for seed in range(20):
        split = hold_out_speakers(labels_of, 0.05, seed, ("valid", "test"))
        assert {labels_of[name]["gender"] for name in split["train"]} == {"f", "m"}
    most = {name: labels for name, labels in corpus("abcde").items() if labels["speaker"] == "a" or name.endswith(("0", "1"))}
    for seed in range(20):  # a has 10 of 18
        split = hold_out_speakers(most, 0.05, seed, ("valid", "test"))
        assert "a" in speakers_of(split["train"])


@pytest.mark.parametrize(
    ("labels_of", "said"),
    [
        (corpus("abc"), "3 speakers are too few to hold some out: validation and test will have speakers of training\n"),
        (corpus("a"), "1 speaker is too few to hold some out: validation and test will have speakers of training\n"),
        (corpus("abcd") | {"x": {}}, "some utterances have no speaker: validation and test may have speakers of training\n"),
        ({str(n): {} for n in range(20)}, ""),  # nothing is known of speakers, and nothing asked for
    ],
)
def test_speakers_that_cannot_be_held_out_are_told(capsys, labels_of, said):
    splits, tasks = divide({"train": list(labels_of)}, labels_of, 0.1, 0)
    assert capsys.readouterr().out == said
    assert (set(splits), tasks) == (set(ROLES), {})


def test_what_is_held_out_is_like_the_split_that_is_given(capsys):
    labels_of = corpus("abcdef")
    takes = [name for name in labels_of if name.endswith("_0")]
    splits, tasks = divide({"train": [name for name in labels_of if name not in takes], "test": takes}, labels_of, 0.1, 0)
    assert speakers_of(splits["valid"]) <= speakers_of(splits["train"])  # as the test's are
    assert len(splits["valid"]) == 5  # 10% of 54
    voice = [name for name in labels_of if name.startswith("a")]
    splits, tasks = divide({"train": [name for name in labels_of if name not in voice], "test": voice}, labels_of, 0.1, 0)
    assert not speakers_of(splits["valid"]) & speakers_of(splits["train"])
    assert tasks == {}
    assert capsys.readouterr().out == ""


def test_folders_and_manifests_hold_speakers_out(tmp_path):
    names = [f"{speaker}_{word}_{take}" for speaker in "abcde" for word in ("yes", "no") for take in range(2)]
    for name in names:
        soundfile.write(tmp_path / f"{name}.wav", np.full(1600, 0.1), 16000)
    entries = [{"audio_filepath": f"{name}.wav", "speaker": name[0], "word": name.split("_")[1]} for name in names]
    (tmp_path / "train.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for made in (FolderCorpus(tmp_path, "{speaker}_{word}_{take}"), ManifestCorpus(tmp_path / "train.json")):
        manifests = made.manifests(progress=False)
        voices = [{cut.supervisions[0].speaker for cut in manifests.splits[role]} for role in ROLES]
        assert [len(own) for own in voices] == [3, 1, 1]
        assert set.union(*voices) == set("abcde")
        known = manifests.task_splits["speaker"]
        assert {cut.supervisions[0].speaker for cut in manifests.splits[known["train"]]} == set("abcde")


def test_every_speaker_of_the_known_ones_is_heard_in_training():
    labels_of = corpus("abcd", takes=10) | corpus("efgh", takes=1)
    for seed in range(20):
        splits, _ = divide({"train": list(labels_of)}, labels_of, 0.2, seed)
        assert speakers_of(splits["speaker_train"]) == set("abcdefgh")
        assert [len(splits[f"speaker_{role}"]) for role in ("valid", "test")] == [9, 9]  # 20% of 44
        assert splits["pretrain"]


def test_where_no_speaker_has_a_second_utterance_there_are_no_splits_of_known_ones(capsys):
    labels_of = corpus("abcd", takes=1)
    splits, tasks = divide({"train": list(labels_of)}, labels_of, 0.1, 0)
    assert capsys.readouterr().out == (
        "too few speakers have a second utterance: there are no splits for tasks about known speakers\n"
    )
    assert ({role: len(names) for role, names in splits.items()}, tasks) == ({"train": 2, "valid": 1, "test": 1}, {})


def test_every_label_has_its_share_of_every_split():
    label_of = {f"{label}{number}": label for label, count in {"a": 40, "b": 20, "c": 3}.items() for number in range(count)}
    split = hold_out_of_each(list(label_of), 0.1, 0, ("valid", "test"), label_of)
    shares = {role: Counter(label_of[name] for name in names) for role, names in split.items()}
    assert shares == {"train": {"a": 32, "b": 16, "c": 1}, "valid": {"a": 4, "b": 2, "c": 1}, "test": {"a": 4, "b": 2, "c": 1}}
    again = hold_out_of_each(sorted(label_of, reverse=True), 0.1, 0, ("valid", "test"), label_of)
    assert {role: sorted(names) for role, names in again.items()} == {role: sorted(names) for role, names in split.items()}


def test_a_label_of_two_files_can_not_be_in_three_splits():
    label_of = {"a0": "a", "a1": "a", "a2": "a", "b0": "b", "b1": "b"}
    with pytest.raises(ValueError, match="label 'b' has 2 usable files, and training, valid and test need one each"):
        hold_out_of_each(list(label_of), 0.1, 0, ("valid", "test"), label_of)
