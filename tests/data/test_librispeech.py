from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from mini_librispeech import SUBSETS, demo_speech, make_mini_librispeech

from audiot.data.corpora import librispeech
from audiot.data.corpora.demo_phones import PHONES
from audiot.data.corpora.librispeech import LibriSpeechCorpus, Subset
from audiot.data.labels import CharacterLabels, FrameLabels
from audiot.data.prepare import prepare
from audiot.features import KaldiFbank

# Subset → speaker → chapter → utterances.
TREE = {
    "train-clean-100": {"103": {"1240": 12, "1241": 8}, "1034": {"121119": 20}},
    "train-clean-360": {"14": {"208": 3}},
    "dev-clean": {"84": {"121123": 3, "121550": 2}},
    "test-clean": {"61": {"70968": 4}},
}


def names(subset):
    chapters = ((speaker, chapter, count) for speaker, of in TREE[subset].items() for chapter, count in of.items())
    return sorted(f"{speaker}-{chapter}-{n:04d}" for speaker, chapter, count in chapters for n in range(count))


def write_subset(root: Path, subset: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(0).uniform(-0.5, 0.5, 3200), 16000, format="FLAC")
    for name in names(subset):
        speaker, chapter, number = name.split("-")
        folder = root / subset / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.flac").write_bytes(buffer.getvalue())
        with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as stream:
            stream.write(f"{name} NUMBER {int(number)} OF THE SPEAKER'S\n")


def write_tables(root: Path) -> None:
    (root / "SPEAKERS.TXT").write_text(
        ";ID  |SEX| SUBSET           |MINUTES| NAME\n"
        "14   | F | train-clean-360  | 25.03 | Kristin LeMoine\n"
        "84   | F | dev-clean        |  8.02 | Christie Nowak\n"
        "103  | F | train-clean-100  | 20.18 | |CBW|Simon\n"
        "1034 | M | train-clean-100  | 20.18 | Kevin O'Coin\n"
    )
    (root / "CHAPTERS.TXT").write_text(
        ";ID    |READER|MINUTES| SUBSET           | PROJ.|BOOK ID| CH. TITLE | PROJECT TITLE\n"
        "121123 | 84    | 0.01  | dev-clean        | 1 | 1 | One | Book\n"
        "121550 | 84    | 0.01  | dev-clean        | 1 | 1 | Two | Book\n"
        "1240   | 103   | 0.01  | train-clean-100  | 1 | 1 | Three | Book\n"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "LibriSpeech"
    for subset in TREE:
        write_subset(root, subset)
    write_tables(root)
    return root


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """Publish the counts above as those of the corpus."""
    for subset in TREE:
        monkeypatch.setitem(librispeech.SUBSETS, subset, Subset(len(names(subset)), 12, 0, ""))


@pytest.fixture
def root(whole, tmp_path):
    """A whole tree to be changed."""
    return shutil.copytree(whole, tmp_path / "LibriSpeech")


def read(root, **options):
    manifests = LibriSpeechCorpus(root, **options).manifests(progress=False)
    return {split: [cut.id for cut in cuts] for split, cuts in manifests.splits.items()}


def speakers(ids):
    return {name.split("-")[0] for name in ids}


# The tree


def test_the_published_archives_are_those_of_torchaudio(monkeypatch):
    monkeypatch.undo()
    from torchaudio.datasets.librispeech import _CHECKSUMS

    checksums = {
        f"http://www.openslr.org/resources/12/{name}.tar.gz": found.sha256 for name, found in librispeech.SUBSETS.items()
    }
    assert _CHECKSUMS.items() <= checksums.items()
    training = ("train-clean-100", "train-clean-360", "train-other-500")
    assert sum(librispeech.SUBSETS[name].utterances for name in training) == 281_241
    assert len({found.sha256 for found in librispeech.SUBSETS.values()}) == len(librispeech.SUBSETS) == 9


def test_subsets_become_splits_and_utterances_have_their_labels(whole):
    manifests = LibriSpeechCorpus(whole).manifests(progress=False)
    found = {split: [cut.id for cut in cuts] for split, cuts in manifests.splits.items()}
    assert found["train"] == names("train-clean-100")
    assert found["valid"] == names("dev-clean")
    assert found["test"] == names("test-clean")
    (supervision,) = next(cut for cut in manifests.splits["train"] if cut.id == "103-1241-0007").supervisions
    assert (supervision.speaker, supervision.text) == ("103", "NUMBER 7 OF THE SPEAKER'S")
    assert supervision.custom == {"subset": "train-clean-100", "chapter": "1241", "gender": "F"}
    assert "gender" not in manifests.splits["test"][0].supervisions[0].custom  # SPEAKERS.TXT does not list 61
    assert manifests.rejected == []


def test_each_task_has_its_splits(whole):
    tasks = LibriSpeechCorpus(whole).manifests(progress=False).task_splits
    roles = {role: role for role in ("train", "valid", "test")}
    probes = {role: f"probe_{role}" for role in roles}
    assert tasks == {
        "pretrain": {"train": "train", "valid": "valid"},
        **{task: roles for task in ("asr", "phone_recognition", "speaker_verification")},
        **{task: probes for task in ("phone", "speaker", "speaker_identification")},
    }


def test_pretraining_may_have_other_subsets_than_probes(whole):
    manifests = LibriSpeechCorpus(whole, pretrain=["train-clean-360"]).manifests(progress=False)
    assert manifests.task_splits["pretrain"] == {"train": "pretrain", "valid": "valid"}
    assert [cut.id for cut in manifests.splits["pretrain"]] == names("train-clean-360")
    assert {cut.id for cut in manifests.splits["probe_train"]} < set(names("train-clean-100"))
    both = LibriSpeechCorpus(whole, train=["train-clean-360", "train-clean-100"], test=[]).manifests(progress=False)
    assert [cut.id for cut in both.splits["train"]] == names("train-clean-360") + names("train-clean-100")
    assert both.task_splits["asr"] == {"train": "train", "valid": "valid"}


def test_the_folder_that_librispeech_lies_in_does_too(whole):
    assert read(whole.parent) == read(whole)


def test_the_order_of_the_tree_and_of_its_transcripts_does_not_matter(root):
    expected = read(root)
    path = root / "dev-clean" / "84" / "121123" / "84-121123.trans.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))
    (root / "train-clean-100" / ".hidden").mkdir()
    (root / "train-clean-100" / "103" / "1240" / "._103-1240-0000.flac").touch()  # macOS leaves such files
    assert read(root) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": ["train-clean"]},
            r"data\.train: 'train-clean' is not a subset of LibriSpeech, which are: dev-clean, .*dev-clean-2",
        ),
        ({"valid": []}, r"data\.valid must name at least one subset"),
        ({"train": ["train-clean-100", "train-clean-100"]}, r"data\.train names train-clean-100 twice"),
        ({"valid": ["test-clean"]}, r"test-clean is in both data\.valid and data\.test: a test on training data"),
        ({"pretrain": ["train-clean-100", "dev-clean"]}, r"dev-clean is in both data\.pretrain and data\.valid"),
        ({"phone_train": "train_split.txt"}, r"data\.phone_train and data\.phone_test belong together"),
    ],
)
def test_subsets_that_make_no_sense_are_refused(whole, options, message):
    with pytest.raises(ValueError, match=message):
        LibriSpeechCorpus(whole, **options)


def test_one_subset_may_be_given_without_brackets(whole):
    assert read(whole, train="train-clean-100", valid="dev-clean") == read(whole)


def test_an_utterance_in_two_subsets_is_refused(root):
    shutil.copytree(root / "dev-clean" / "84", root / "train-clean-5" / "84")
    with pytest.raises(ValueError, match=r"84-121123-0000 is in train-clean-5 and in dev-clean \(Mini LibriSpeech is part of"):
        read(root, train=["train-clean-5"], partial=True)


# What is missing


def test_a_missing_subset_says_where_it_was_sought_and_how_to_get_it(root):
    shutil.rmtree(root / "dev-clean")
    expected = (
        r"LibriSpeech: no dev-clean, test-other in .*/LibriSpeech \(subsets there: test-clean, train-clean-100, "
        r"train-clean-360\): data\.download=true .* https://www\.openslr\.org/resources/12/dev-clean\.tar\.gz \(0\.0 GB\), "
        rf"https://www\.openslr\.org/resources/12/test-other\.tar\.gz \(0\.3 GB\) in {root.parent}; data\.root"
    )
    for partial_tree in (False, True):
        with pytest.raises(FileNotFoundError, match=expected):
            read(root, test=["test-other"], partial=partial_tree)


def test_a_missing_root_says_that_nothing_is_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no train-clean-100, dev-clean, test-clean in .*nowhere \(subsets there: none\)"
    ):
        read(tmp_path / "nowhere")


CHAPTER = Path("dev-clean") / "84" / "121123"


def remove_recordings(root):
    for number in (0, 2):
        (root / CHAPTER / f"84-121123-{number:04d}.flac").unlink()


def remove_transcript(root):
    (root / CHAPTER / "84-121123.trans.txt").unlink()


def cut_transcript(root):
    path = root / CHAPTER / "84-121123.trans.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))


def remove_chapter(root):
    shutil.rmtree(root / CHAPTER)


def remove_chapter_and_table(root):
    remove_chapter(root)
    (root / "CHAPTERS.TXT").unlink()


def empty_chapter(root):
    remove_chapter(root)
    (root / CHAPTER).mkdir()


INCOMPLETE = {
    remove_recordings: (3, r" \(84/121123: no 84-121123-0000\.flac, 2 of 3 recordings in all\)", 0),
    remove_transcript: (2, r" \(84/121123: no 84-121123\.trans\.txt, 3 recordings\)", 3),
    cut_transcript: (3, r" \(84/121123: 84-121123\.trans\.txt lacks 84-121123-0001, 2 of 3 recordings in all\)", 2),
    remove_chapter: (2, r" \(84/121123: no such folder\)", 0),
    remove_chapter_and_table: (2, "", 0),
    empty_chapter: (2, r" \(84/121123: no 84-121123\.trans\.txt, 0 recordings\)", 0),
}


@pytest.mark.parametrize("damage", INCOMPLETE, ids=lambda damage: damage.__name__)
def test_a_half_unpacked_subset_says_what_is_missing_unless_it_is_meant_to_be_a_part(root, damage, capsys):
    count, detail, without_text = INCOMPLETE[damage]
    damage(root)
    lack = rf"LibriSpeech: .*/dev-clean is incomplete: found {count} of 5 utterances{detail}"
    with pytest.raises(FileNotFoundError, match=rf"{lack}: delete the folder, then data\.download=true .*data\.partial=true"):
        read(root)
    manifests = LibriSpeechCorpus(root, partial=True).manifests(progress=False)
    assert len(manifests.splits["valid"]) == count
    assert [reason for _, reason in manifests.rejected] == ["no transcript"] * without_text
    assert f"dev-clean is incomplete: found {count} of 5 utterances" in capsys.readouterr().out


def test_a_recording_without_transcript_in_a_whole_subset_is_refused_unless_it_is_meant_to_be_a_part(root):
    shutil.copy(root / CHAPTER / "84-121123-0000.flac", root / CHAPTER / "84-121123-0003.flac")
    expected = r"found 5 of 5 utterances \(84/121123: 84-121123\.trans\.txt lacks 84-121123-0003, 1 of 4 recordings in all\)"
    with pytest.raises(FileNotFoundError, match=expected):
        read(root)
    manifests = LibriSpeechCorpus(root, partial=True).manifests(progress=False)
    assert manifests.rejected == [(str(root / CHAPTER / "84-121123-0003.flac"), "no transcript")]


def test_many_problems_are_counted(root):
    for path in (root / "train-clean-100").glob("*/*/*.trans.txt"):
        path.unlink()
    remove_transcript(root)
    shutil.rmtree(root / "train-clean-100" / "103")
    shutil.copytree(root / "train-clean-100" / "1034" / "121119", root / "train-clean-100" / "1034" / "2")
    shutil.copytree(root / "train-clean-100" / "1034" / "121119", root / "train-clean-100" / "1034" / "3")
    with pytest.raises(FileNotFoundError, match=r"found 0 of 40 .*1034/121119: .*; 1034/2: .*; 1034/3: .*; 1 more\)"):
        read(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("84-121550-0000 OF ANOTHER CHAPTER", r"expected 84-121123-NUMBER and its words, found '84-121550-0000 OF"),
        ("84-121123-0003WITHOUT A SPACE", r"expected 84-121123-NUMBER and its words, found '84-121123-0003WITHOUT A"),
        ("84-121123-0001 AGAIN", r"utterance 84-121123-0001 occurs a second time"),
    ],
)
def test_a_broken_transcript_is_refused_with_its_line(root, line, message):
    with (root / CHAPTER / "84-121123.trans.txt").open("a") as stream:
        stream.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"84-121123\.trans\.txt:5: {message}"):
        read(root)


def test_a_transcript_that_is_not_utf_8_is_refused_by_name(root):
    (root / CHAPTER / "84-121123.trans.txt").write_bytes(b"84-121123-0000 \xc9T\xc9\n")
    with pytest.raises(ValueError, match=r"84-121123\.trans\.txt:1: not UTF-8 \(byte 0xc9\): save the file as UTF-8"):
        read(root)


def test_a_broken_table_is_refused_with_its_line(root):
    with (root / "SPEAKERS.TXT").open("a") as stream:
        stream.write("61\n")
    with pytest.raises(ValueError, match=r"SPEAKERS\.TXT:6: expected 2 or more columns with '\|' between, found '61'"):
        read(root)


def test_an_empty_transcript_is_left_to_the_tasks_that_need_it(root):
    path = root / CHAPTER / "84-121123.trans.txt"
    path.write_text(path.read_text().replace("NUMBER 1 OF THE SPEAKER'S", ""))
    cuts = LibriSpeechCorpus(root).manifests(progress=False).splits["valid"]
    assert cuts[1].supervisions[0].text == ""
    with pytest.raises(ValueError, match="utterance 84-121123-0001 has no transcript"):
        CharacterLabels().names(cuts[1])


def test_bad_audio_is_rejected_and_the_rest_goes_on(root):
    (root / CHAPTER / "84-121123-0001.flac").write_bytes(b"")
    manifests = LibriSpeechCorpus(root).manifests(progress=False)
    assert manifests.rejected == [(str(root / CHAPTER / "84-121123-0001.flac"), "empty: 0 bytes")]
    assert len(manifests.splits["valid"]) == 4


# Probes


def test_every_speaker_is_in_all_parts_of_the_probes(whole):
    found = read(whole)
    parts = {role: set(found[f"probe_{role}"]) for role in ("train", "valid", "test")}
    assert set.union(*parts.values()) == set(names("train-clean-100"))
    assert sum(map(len, parts.values())) == 40
    for role, share in (("train", 14), ("valid", 2), ("test", 4)):  # of each speaker's twenty
        assert {speaker: sum(name.startswith(f"{speaker}-") for name in parts[role]) for speaker in ("103", "1034")} == {
            "103": share,
            "1034": share,
        }


def test_the_choice_follows_the_seed_alone(root):
    expected = read(root, seed=3)
    assert expected == read(root, seed=3)
    assert expected["probe_test"] != read(root, seed=4)["probe_test"]
    shutil.rmtree(root / "train-clean-100" / "103")
    rest = read(root, seed=3, partial=True)
    assert rest["probe_test"] == [name for name in expected["probe_test"] if name.startswith("1034-")]


@pytest.fixture
def lists(tmp_path):
    """S3PRL's lists; one utterance is on neither."""
    listed = names("train-clean-100")[:-1]
    test = listed[::4]
    files = {"phone_train": tmp_path / "train_split.txt", "phone_test": tmp_path / "test_split.txt"}
    files["phone_train"].write_text("".join(f"{name}\n" for name in listed if name not in test))
    files["phone_test"].write_text("\n".join(test) + "\n\n")
    return files


def ids(path):
    return path.read_text().split()


def test_lists_choose_the_probes_utterances(whole, lists):
    found = read(whole, **lists)
    assert found["probe_test"] == sorted(ids(lists["phone_test"]))
    assert sorted(found["probe_train"] + found["probe_valid"]) == sorted(ids(lists["phone_train"]))
    assert speakers(found["probe_valid"]) == {"103", "1034"}
    assert len(found["probe_valid"]) == 2 + 1  # a tenth of each speaker's: 15 and 14
    assert found == read(whole, **lists)
    assert any(read(whole, seed=seed, **lists)["probe_valid"] != found["probe_valid"] for seed in range(1, 4))


def test_an_utterance_on_both_lists_is_refused(whole, lists):
    with lists["phone_train"].open("a") as stream:
        stream.write("103-1240-0004\n")
    expected = r"103-1240-0004 is in both .*train_split\.txt and .*test_split\.txt \(1 utterances are\): a test on training data"
    with pytest.raises(ValueError, match=expected):
        read(whole, **lists)


def test_a_listed_utterance_that_is_not_there_is_refused_unless_the_tree_is_a_part(whole, lists, capsys):
    with lists["phone_test"].open("a") as stream:
        stream.write("14-208-0000\n999-1-0000\n")  # of train-clean-360, and of nobody
    expected = r"test_split\.txt:12: 14-208-0000 is not in train-clean-100 of .*/LibriSpeech \(2 of 12 utterances are not\)"
    with pytest.raises(ValueError, match=expected):
        read(whole, **lists)
    assert read(whole, **lists, partial=True)["probe_test"] == sorted(ids(lists["phone_test"])[:-2])
    assert "lacks 2 of 12 utterances in" in capsys.readouterr().out


def test_a_list_of_another_corpus_is_refused_for_a_part_too(whole, lists):
    lists["phone_test"].write_text("14-208-0000\n14-208-0001\n")
    with pytest.raises(
        ValueError, match=r"test_split\.txt:1: 14-208-0000 is not in .*\(2 of 2 utterances are not\): a list of other"
    ):
        read(whole, **lists, partial=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "103-1240-0000\n103-1240-0001 103-1240-0002\n",
            r"train_split\.txt:2: expected one utterance, found '103-1240-0001 103-12",
        ),
        (
            "103-1240-0001\n103-1240-0002\n103-1240-0001\n",
            r"train_split\.txt:3: utterance 103-1240-0001 occurs a second time, .* 1",
        ),
        ("\n\n", r"data\.phone_train: .*train_split\.txt is empty"),
    ],
)
def test_a_broken_list_is_refused_with_its_line(whole, lists, content, message):
    lists["phone_train"].write_text(content)
    with pytest.raises(ValueError, match=message):
        read(whole, **lists)


def test_a_missing_list_says_where_s3prl_has_it(whole, lists):
    lists["phone_test"].unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.phone_test: there is no list .*test_split\.txt: S3PRL's are .*cpc_phone"):
        read(whole, **lists)


# Phones


@pytest.fixture
def phones(tmp_path):
    """Labels of all training utterances but the last, 18 frames each."""
    path = tmp_path / "converted_aligned_phones.txt"
    path.write_text("".join(f"{name} {'7 ' * 9}{'8 ' * 9}\n" for name in names("train-clean-100")[:-1]))
    return path


def tier(cut):
    return (cut.supervisions[0].alignment or {}).get("phone")


def test_phones_are_a_tier_of_the_utterances_that_have_labels(whole, phones, lists):
    manifests = LibriSpeechCorpus(whole, phones=phones, **lists).manifests(progress=False)
    for _ in range(2):  # preparation iterates twice
        assert all(len(tier(cut)) == 2 for split in ("train", "valid", "test") for cut in manifests.splits[f"probe_{split}"])
    assert [cut.id for cut in manifests.splits["train"] if tier(cut) is None] == names("train-clean-100")[-1:]
    assert all(tier(cut) is None for cut in manifests.splits["valid"])
    assert len(manifests.splits["probe_train"]) == len(list(manifests.splits["probe_train"]))
    assert manifests.task_splits["phone"]["train"] == "probe_train"


def test_without_lists_the_phone_task_has_the_labelled_utterances_alone(whole, phones, capsys):
    manifests = LibriSpeechCorpus(whole, phones=phones).manifests(progress=False)
    assert manifests.task_splits["phone"] == {role: f"phone_{role}" for role in ("train", "valid", "test")}
    assert manifests.task_splits["speaker"] == {role: f"probe_{role}" for role in ("train", "valid", "test")}
    for role in ("train", "valid", "test"):
        labelled = [cut.id for cut in manifests.splits[f"probe_{role}"] if tier(cut) is not None]
        assert [cut.id for cut in manifests.splits[f"phone_{role}"]] == labelled
    assert "39 of 40 utterances for probes have phone labels" in capsys.readouterr().out


def test_a_listed_utterance_without_labels_is_refused(whole, phones, lists):
    phones.write_text("".join(line for line in phones.read_text().splitlines(keepends=True) if "103-1240-0004" not in line))
    expected = r"103-1240-0004 of .*test_split\.txt has no phone labels in .*phones\.txt \(1 of 39 utterances have none\)"
    with pytest.raises(ValueError, match=expected):
        read(whole, phones=phones, **lists)


def test_labels_of_another_corpus_are_refused(whole, phones):
    phones.write_text("19-198-0000 1 2 3\n")
    with pytest.raises(ValueError, match=r"data\.phones=.* has labels for none of the 40 utterances for probes in .*, 103"):
        read(whole, phones=phones)


def test_labels_of_other_audio_are_refused_by_name_counts_and_file(whole, phones):
    phones.write_text(phones.read_text().replace("103-1240-0004 7", "103-1240-0004 7" + " 7" * 6))
    expected = r"converted_aligned_phones\.txt:5: utterance 103-1240-0004 has 24 labels and 18 frames of 10 ms \(3,200 samples at"
    with pytest.raises(ValueError, match=expected):
        read(whole, phones=phones)


# The miniature


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("mini")
    return make_mini_librispeech(demo_speech(folder / "demo"), folder)


def test_the_miniature_is_a_tree_of_five_subsets(mini):
    corpus = LibriSpeechCorpus(
        mini.root, SUBSETS[:1], ["dev-clean"], ["test-clean"], pretrain=SUBSETS[:3], phones=mini.textgrids, partial=True
    )
    splits = corpus.manifests(progress=False).splits
    assert {cut.id for cut in splits["pretrain"]} == {name for subset in SUBSETS[:3] for name in mini.utterances[subset]}
    for cut in splits["pretrain"]:
        source = mini.sources[cut.id]
        assert np.array_equal(cut.load_audio(), source.load_audio())
        expected = [(item.symbol, pytest.approx(item.start, abs=1e-4)) for item in source.supervisions[0].alignment["phone"]]
        assert [(item.symbol, item.start) for item in tier(cut)] == expected
        assert cut.supervisions[0].text.replace(" ", "").replace("'", "").isalpha()


def test_the_miniatures_training_probes_know_every_phone(mini):
    for options in ({"phone_train": mini.phone_train, "phone_test": mini.phone_test}, {}):
        corpus = LibriSpeechCorpus(mini.root, phones=mini.phones, partial=True, **options)
        splits = corpus.manifests(progress=False).splits
        known = {item.symbol for cut in splits["probe_train"] for item in tier(cut)}
        assert known == {str(number) for number in range(len(PHONES))}


def test_frames_of_a_prepared_corpus_have_the_labels_of_the_file(mini, tmp_path):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("prepare", [*mini.overrides, "run_dir=run"])
    manifests = instantiate(cfg.data.corpus).manifests(progress=False)
    prepared = prepare(manifests, tmp_path / "prepared", num_jobs=1, progress=False)
    assert prepared.split_for("phone", "test") == "probe_test"
    written = {name: labels for name, *labels in map(str.split, mini.phones.read_text().splitlines())}
    features = KaldiFbank()
    labels = FrameLabels("phone", features)
    index = {str(number): number for number in range(41)}
    for cut in prepared.cuts("probe_test"):
        labels.check(cut)
        tokens = features(torch.from_numpy(cut.load_audio()))[0]
        assert tokens.shape[1] == len(written[cut.id])
        assert labels.encode(cut, index).tolist() == list(map(int, written[cut.id]))
    for name in ("train", "valid", "test"):
        assert prepared.counts[name] == len(mini.utterances[cfg.data[name][0]])


# Download


@pytest.fixture
def archive(whole, tmp_path, monkeypatch):
    """Bytes of an archive of dev-clean that counts as published."""
    path = tmp_path / "dev-clean.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("dev-clean", "SPEAKERS.TXT", "CHAPTERS.TXT"):
            tar.add(whole / name, f"LibriSpeech/{name}")
    content = path.read_bytes()
    path.unlink()
    publish(monkeypatch, content)
    return content


def publish(monkeypatch, content, subset="dev-clean"):
    found = Subset(len(names(subset)), 12, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(librispeech.SUBSETS, subset, found)


class Server(BaseHTTPRequestHandler):
    """Server of one file, also from an offset. It stops ``broken_after`` bytes into an answer."""

    def __init__(self, *arguments, content, requests, broken_after):
        self.content, self.requests, self.broken_after = content, requests, broken_after
        super().__init__(*arguments)

    def do_GET(self):
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.requests.append((self.path, first))
        if self.path != "/12/dev-clean.tar.gz":
            self.send_error(404)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(self.content) - first))
        self.end_headers()
        answer = self.content[first:]
        self.wfile.write(answer[: self.broken_after.pop()] if self.broken_after else answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    """Starts servers: content → address and the requests so far."""
    servers = []

    def start(content, broken_after=()):
        requests = []
        handler = partial(Server, content=content, requests=requests, broken_after=list(broken_after))
        server = HTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def without_dev(root):
    shutil.rmtree(root / "dev-clean")
    for name in ("SPEAKERS.TXT", "CHAPTERS.TXT"):
        (root / name).unlink()
    return root


def test_a_missing_subset_is_downloaded_once(whole, without_dev, archive, serve):
    mirror, requests = serve(archive)
    assert read(without_dev, download=True, mirror=mirror) == read(whole)
    assert requests == [("/12/dev-clean.tar.gz", 0)]
    assert read(without_dev, download=True, mirror=f"{mirror}/") == read(whole)
    assert len(requests) == 1
    there = {path.name for path in without_dev.iterdir()}
    assert there == {*TREE, "SPEAKERS.TXT", "CHAPTERS.TXT"}  # neither the archive nor anything temporary


def test_a_mirror_may_be_a_folder(whole, without_dev, archive, tmp_path):
    (tmp_path / "mirror" / "12").mkdir(parents=True)
    (tmp_path / "mirror" / "12" / "dev-clean.tar.gz").write_bytes(archive)
    assert read(without_dev, download=True, mirror=(tmp_path / "mirror").as_uri()) == read(whole)


def test_an_interrupted_download_goes_on_where_it_was(whole, without_dev, archive, serve):
    mirror, requests = serve(archive, broken_after=[1000])
    with pytest.raises(OSError, match=rf"has 1,000 of the {len(archive):,} bytes of .*: run the command again to continue"):
        read(without_dev, download=True, mirror=mirror)
    assert not (without_dev / "dev-clean").exists()
    assert read(without_dev, download=True, mirror=mirror) == read(whole)
    assert [first for _, first in requests] == [0, 1000]


def test_a_finished_download_is_not_repeated_when_unpacking_was_interrupted(whole, without_dev, archive, serve):
    mirror, requests = serve(archive)
    (without_dev / ".dev-clean.tar.gz.part").write_bytes(archive)
    (without_dev / ".dev-clean.part" / "LibriSpeech" / "dev-clean" / "84" / "9").mkdir(parents=True)
    assert read(without_dev, download=True, mirror=mirror) == read(whole)
    assert requests == []


@pytest.mark.parametrize("place", [".", ".."])
def test_an_archive_that_is_there_is_used_and_kept(whole, without_dev, archive, serve, place):
    mirror, requests = serve(archive)
    path = without_dev / place / "dev-clean.tar.gz"
    path.write_bytes(archive)
    assert read(without_dev, download=True, mirror=mirror) == read(whole)
    assert requests == []
    assert path.is_file()


def change_a_byte(content):
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_byte, r"is damaged: its SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}: delete it"),
        (lambda content: content[:-1], r"is not the published file: [0-9,]+ bytes instead of [0-9,]+: delete it"),
        (lambda content: content + b"0", r"is not the published file: [0-9,]+ bytes instead of [0-9,]+: delete it"),
    ],
)
def test_a_wrong_archive_is_refused_by_name_and_not_unpacked(without_dev, archive, change, message):
    (without_dev / "dev-clean.tar.gz").write_bytes(change(archive))
    with pytest.raises(ValueError, match=rf"/dev-clean\.tar\.gz {message}"):
        read(without_dev, download=True)
    assert not (without_dev / "dev-clean").exists()


def test_a_damaged_download_is_refused_by_name_and_not_unpacked(without_dev, archive, serve):
    mirror, _ = serve(change_a_byte(archive))
    with pytest.raises(ValueError, match=r"\.dev-clean\.tar\.gz\.part is damaged: its SHA-256 is"):
        read(without_dev, download=True, mirror=mirror)
    assert not (without_dev / "dev-clean").exists()


def test_an_archive_of_something_else_is_refused(without_dev, whole, tmp_path, monkeypatch):
    path = without_dev / "dev-clean.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(whole / "test-clean", "LibriSpeech/test-clean")
    publish(monkeypatch, path.read_bytes())
    with pytest.raises(ValueError, match=r"dev-clean\.tar\.gz holds no folder LibriSpeech/dev-clean"):
        read(without_dev, download=True)
    path.write_bytes(b"no archive")
    publish(monkeypatch, path.read_bytes())
    with pytest.raises(ValueError, match=r"dev-clean\.tar\.gz is damaged \(not a gzip file\)"):
        read(without_dev, download=True)


def test_a_server_that_has_no_such_file_is_named(without_dev, archive, serve):
    mirror, _ = serve(archive)
    expected = rf"{mirror}/wrong/12/dev-clean\.tar\.gz can't be downloaded to .*404.*; run the command again .*data\.mirror"
    with pytest.raises(OSError, match=expected):
        read(without_dev, download=True, mirror=f"{mirror}/wrong")


def test_a_half_unpacked_subset_is_not_replaced_but_reported(root, archive, serve):
    mirror, requests = serve(archive)
    remove_transcript(root)
    with pytest.raises(FileNotFoundError, match=r"dev-clean is incomplete: .*delete the folder, then data\.download=true"):
        read(root, download=True, mirror=mirror)
    assert requests == []
