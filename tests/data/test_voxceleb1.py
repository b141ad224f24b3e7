from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from audiot.data.corpora import voxceleb1
from audiot.data.corpora.voxceleb1 import VoxCeleb1Corpus
from audiot.data.prepare import prepare

DEV = ("id10001", "id10002", "id10269", "id10310", "id11251")  # beside the range of the test speakers too
TEST = ("id10270", "id10309")
# Each speaker has three videos, one for each part of identification.
PARTS = {"1": ("1zcIwhmdeo4", (1, 2)), "2": ("-z8KsBjdNkU", (1,)), "3": ("J9lHsKG98U8", (1, 16))}


def names(speakers=DEV + TEST, parts="123"):
    return [f"{speaker}/{PARTS[part][0]}/{number:05d}" for part in parts for speaker in speakers for number in PARTS[part][1]]


def write_audio(folder: Path, speakers) -> None:
    for number, name in enumerate(names(speakers)):
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(number).uniform(-0.5, 0.5, 3200), 16000)


def write_lists(root: Path) -> None:
    lines = [f"{part} {name}.wav\n" for part in PARTS for name in names(parts=part)]
    (root / "iden_split.txt").write_text("".join(lines))
    target = "id10270/1zcIwhmdeo4/00001.wav"
    trials = (f"1 {target} id10270/J9lHsKG98U8/00016.wav\n", f"0 {target} id10309/-z8KsBjdNkU/00001.wav\n")
    (root / "veri_test2.txt").write_text("".join(trials))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A whole miniature corpus: its sizes are the published ones."""
    write_audio(tmp_path / "wav", DEV + TEST)
    write_lists(tmp_path)
    monkeypatch.setattr(voxceleb1, "COUNTS", {"train": 14, "valid": 7, "test": 14})
    return tmp_path


def corpus(root, **options):
    return VoxCeleb1Corpus(root, **{"trials": root / "veri_test2.txt", "valid_speakers": 2} | options)


def read(root, **options):
    manifests = corpus(root, **options).manifests(progress=False)
    return {split: [cut.id for cut in cuts] for split, cuts in manifests.splits.items()}


def speakers(ids):
    return {name.split("/")[0] for name in ids}


def test_the_published_list_has_153_516_utterances():
    assert sum(voxceleb1.COUNTS.values()) == 148642 + 4874
    assert len(voxceleb1.TEST_SPEAKERS) == 40


def test_identification_follows_the_official_list(root):
    found = read(root)
    assert found["identification_train"] == names(parts="1")
    assert found["identification_valid"] == names(parts="2")
    assert found["identification_test"] == names(parts="3")


def test_verification_keeps_speakers_apart(root):
    found = read(root)
    assert sorted(found["verification_test"]) == sorted(names(TEST))
    assert sorted(found["verification_train"] + found["verification_valid"]) == sorted(names(DEV))
    assert len(speakers(found["verification_valid"])) == 2
    assert not speakers(found["verification_train"]) & speakers(found["verification_valid"])
    assert found == read(root)
    others = {tuple(sorted(speakers(read(root, seed=seed)["verification_valid"]))) for seed in range(8)}
    assert len(others) > 1


def test_pretraining_hears_no_test_and_all_that_is_left(root):
    found = read(root)
    heard = set(found["pretrain"])
    for unheard in ("identification_valid", "identification_test", "verification_valid", "verification_test"):
        assert not heard & set(found[unheard])
    assert heard == set(names(parts="1")) & set(found["verification_train"])


def test_every_task_has_its_splits_and_trials_name_ids(root, tmp_path):
    manifests = corpus(root).manifests(progress=False)
    tasks = manifests.task_splits
    assert tasks["speaker"] == tasks["speaker_identification"]
    assert tasks["speaker_identification"] == {part: f"identification_{part}" for part in ("train", "valid", "test")}
    assert tasks["speaker_verification"] == {part: f"verification_{part}" for part in ("train", "valid", "test")}
    assert tasks["pretrain"] == {"train": "pretrain", "valid": "verification_valid"}
    prepared = prepare(manifests, tmp_path / "prepared", num_jobs=1, progress=False)
    cuts = {cut.id: cut.supervisions[0].speaker for cut in prepared.cuts("verification_test")}
    for line in (root / "veri_test2.txt").read_text().splitlines():
        same, first, second = line.split()
        assert (cuts[first.removesuffix(".wav")] == cuts[second.removesuffix(".wav")]) == (same == "1")


def test_dev_and_test_may_lie_in_folders_of_their_own(root, tmp_path):
    apart = tmp_path / "apart"
    write_audio(apart / "dev" / "wav", DEV)
    write_audio(apart / "test" / "wav", TEST)
    write_lists(apart)
    assert read(apart) == read(root)


def test_an_utterance_in_two_places_is_refused(root):
    write_audio(root / "test" / "wav", TEST)
    with pytest.raises(ValueError, match=r"id10270/.* is in two places, .*/wav/id10270.* and .*/test/wav/id10270"):
        read(root)


def test_missing_recordings_are_counted_and_named(root):
    gone = names()[3]
    (root / "wav" / f"{gone}.wav").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 35 recordings are missing in .*test/wav\) \({gone}\.wav\): ask for"):
        read(root)
    assert gone not in read(root, partial=True)["identification_train"]


@pytest.mark.parametrize(("part", "other", "there"), [("test", "dev", DEV), ("dev", "test", TEST)])
def test_a_tree_of_one_part_says_which_is_missing_and_who_needs_it(root, tmp_path, part, other, there):
    half = tmp_path / "half"
    write_audio(half / "wav", there)
    write_lists(half)
    expected = (
        rf"{len(names()) - len(names(there))} of 35 .*: all of the {part} part is missing, and only the {other} part is there; "
        r"speaker_identification and speaker_verification need both"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        read(half)
    found = read(half, partial=True)
    assert speakers(found["identification_test"]) == set(there)
    tasks = corpus(half, partial=True).manifests(progress=False).task_splits
    assert set(tasks["speaker_verification"]) == ({"train", "valid"} if there == DEV else {"test"})


def test_a_tree_without_audio_says_where_it_looked(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: ask for the audio at https://www\.robots"):
        read(tmp_path / "nowhere", trials=None)
    bare = tmp_path / "bare"
    bare.mkdir()
    write_lists(bare)
    with pytest.raises(FileNotFoundError, match=r"35 of 35 recordings are missing in .*bare \(in wav, dev/wav and test/wav\)"):
        read(bare)


def test_a_missing_list_says_where_it_is_published(root):
    with pytest.raises(FileNotFoundError, match=r"no list .*none\.txt: get https://www\.robots.*/iden_split\.txt"):
        read(root, iden_split=root / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"no list .*none\.txt: get https://.*/veri_test2\.txt, or set data\.trials=null"):
        read(root, trials=root / "none.txt")
    assert read(root, trials=None) == read(root)


def test_a_shortened_list_is_refused_unless_it_is_meant_to_be(root):
    path = root / "iden_split.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"iden_split\.txt lists 13 \+ 7 \+ 14 utterances, the published one 14 \+ 7 \+ 14"):
        read(root)
    manifests = corpus(root, partial=True).manifests(progress=False)
    assert len(manifests.splits["identification_train"]) == 13
    assert manifests.rejected == [(str(root / "wav" / f"{names()[0]}.wav"), "not listed in iden_split.txt")]


def test_an_utterance_in_two_parts_is_refused(root):
    path = root / "iden_split.txt"
    path.write_text(path.read_text() + f"3 {names()[0]}.wav\n")
    with pytest.raises(ValueError, match=rf"{names()[0]} is in both identification_train and identification_test"):
        read(root, partial=True)


@pytest.mark.parametrize("line", ["4 id10001/a/00001.wav", "1 id10001/a/00001.m4a", "1 id10001/00001.wav", "id10001/a/00001.wav"])
def test_a_broken_split_list_is_refused_with_its_line(root, line):
    path = root / "iden_split.txt"
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=r"iden_split\.txt:37: expected 1, 2 or 3 and a path"):
        read(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 {test} id10269/1zcIwhmdeo4/00001.wav", "of the training speaker id10269, the test speakers are id10270 to id10309"),
        ("1 {test} id10270/1zcIwhmdeo4/00099.wav", r"id10270/1zcIwhmdeo4/00099\.wav is not in .*iden_split\.txt"),
        ("2 {test} {test}", "expected 1 or 0 and two paths"),
        ("1 {test}", "expected 1 or 0 and two paths"),
    ],
)
def test_trials_about_anything_but_test_speakers_are_refused(root, line, message):
    with (root / "veri_test2.txt").open("a") as stream:
        stream.write(line.format(test="id10270/1zcIwhmdeo4/00001.wav") + "\n")
    with pytest.raises(ValueError, match=rf"veri_test2\.txt:3: .*{message}"):
        read(root)


def test_so_many_validation_speakers_that_none_is_left_are_refused(root):
    with pytest.raises(ValueError, match=r"data\.valid_speakers=5 of 5 training speakers"):
        read(root, valid_speakers=5)
    with pytest.raises(ValueError, match=r"data\.valid_speakers must be at least 2"):
        read(root, valid_speakers=1)


def test_the_config_makes_the_corpus(root):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        given = ["data=voxceleb1", f"data.root={root}", "data.valid_speakers=2", "run_dir=run"]
        cfg = compose("prepare", given)
    manifests = instantiate(cfg.data.corpus).manifests(progress=False)
    assert {split: [cut.id for cut in cuts] for split, cuts in manifests.splits.items()} == read(root)
