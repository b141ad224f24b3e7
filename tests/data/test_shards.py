"""Corpora in shards: written from a prepared folder, streamed from a folder or a server."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from webserver import Server

from audiot.commands.launch import describe
from audiot.data import batches as batches_module
from audiot.data import storage
from audiot.data.corpora.shar import SharCorpus
from audiot.data.datamodule import SpeechDataModule, open_pieces
from audiot.data.labels import UtteranceLabel
from audiot.data.manifests import Manifests
from audiot.data.prepare import prepare
from audiot.data.sharding import write_shards
from audiot.data.shards import Index
from audiot.data.storage import StorageError

RATE = 16000
SHARD_S = 10.0  # seconds of audio in a shard of these tests


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A prepared corpus of noise: 60 training utterances of 0.5 to 2 s, 8 for validation and test; ids with slashes."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in {"train": 60, "valid": 8, "test": 8}.items():
        cuts = []
        for number in range(count):
            path = folder / f"{split}-{number}.wav"
            samples = generator.integers(-20000, 20000, generator.integers(RATE // 2, 2 * RATE), dtype=np.int16)
            soundfile.write(path, samples, RATE, subtype="PCM_16")
            name = f"{split}/é{number:02d}"
            cut = Recording.from_file(path, recording_id=name).to_cut().with_id(name)
            custom = {"keyword": ["yes", "no"][number % 2]}
            label = SupervisionSegment(name, name, 0.0, cut.duration, speaker=f"s{number % 4}", text="a word", custom=custom)
            cut.supervisions = [label]
            cuts.append(cut)
        splits[split] = CutSet.from_cuts(cuts)
    tasks = {"pretrain": {"train": "both", "valid": "valid"}}
    splits["both"] = CutSet.from_cuts([*splits["test"], *splits["train"]])  # shares utterances with others
    return prepare(Manifests(splits, tasks), folder / "prepared", num_jobs=1, copy=True, progress=False)


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """The corpus in shards."""
    folder = tmp_path_factory.mktemp("shards") / "shar"
    write_shards(corpus, folder, SHARD_S / 3600, num_jobs=1, progress=False)
    return folder


def opened(root, directory, **options):
    return SharCorpus(root, **options).open(directory, {})


def data(corpus, **options):
    settings = {"batch_s": 6.0, "crop_s": 1.0, "num_buckets": 2, "num_workers": 0, "lengths": [8000, 16000]}
    return SpeechDataModule(corpus, "pretrain", **settings | options)


def audio_of(corpus, split):
    """Samples of each utterance by id."""
    pieces = open_pieces(corpus.directory, split, corpus.content)
    return {piece.id: np.copy(piece.read(np.empty(piece.num_samples, np.int16))) for piece in pieces}


def test_shards_hold_the_samples_labels_and_splits_of_the_corpus(corpus, shards, tmp_path):
    found = opened(shards, tmp_path / "opened")
    assert dict(found.counts) == dict(corpus.counts)
    assert found.content == corpus.content
    assert found.split_for("pretrain", "train") == "both"
    assert sum(found.hours.values()) == pytest.approx(sum(corpus.hours.values()))
    for split in corpus.counts:
        expected, own = audio_of(corpus, split), audio_of(found, split)
        assert own.keys() == expected.keys()
        assert all(np.array_equal(own[name], expected[name]) for name in expected)
        labels = {cut.id: [each.to_dict() for each in cut.supervisions] for cut in corpus.cuts(split)}
        assert {cut.id: [each.to_dict() for each in cut.supervisions] for cut in found.cuts(split)} == labels
    assert len(list(shards.glob("recording.*.tar"))) > 5
    assert sorted(path.name for path in shards.iterdir() if path.name[0] == "." or "journal" in path.name) == []


def test_lhotse_reads_the_shards_as_its_own_format(corpus, shards):
    files = {kind: sorted(shards.glob(f"{kind}.*")) for kind in ("cuts", "recording")}
    cuts = CutSet.from_shar(fields=files)
    expected = {cut.id: cut for split in corpus.counts for cut in corpus.cuts(split)}
    seen = 0
    for cut in cuts:
        assert np.array_equal(cut.load_audio(), expected[cut.id].load_audio())
        assert cut.supervisions[0].custom == expected[cut.id].supervisions[0].custom
        seen += 1
    assert seen == len(expected)


def test_a_split_lies_together_and_its_shards_have_their_hours(corpus, shards):
    index = json.loads((shards / "index.json").read_text())
    assert index["utterances"] == 76
    assert sum(shard["utterances"] for shard in index["shards"]) == 76
    assert all(shard["hours"] <= SHARD_S / 3600 for shard in index["shards"])
    with gzip.open(shards / "cuts.000000.jsonl.gz") as stream:
        first = [json.loads(line)["id"] for line in stream]
    assert all(name.startswith("train/") for name in first)
    assert first != sorted(first), "mixed by a hash"


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_see_every_utterance_once_an_epoch(shards, tmp_path, workers):
    found = opened(shards, tmp_path / "opened")
    seen: dict[int, Counter] = {0: Counter(), 1: Counter()}
    order = []
    for rank in (0, 1):
        loader = data(found, num_workers=workers)
        stream = loader.train_dataloader().sampler
        stream.rank, stream.world_size = rank, 2
        batches = loader.train_dataloader()
        batches.sampler.rank, batches.sampler.world_size = rank, 2
        for batch in batches:
            epoch = batch["position"][0]
            if epoch == 2:
                break
            seen[epoch].update(batch["ids"])
            order += [(batch["position"], batch["ids"])]
    everything = {piece.id: 1 for piece in open_pieces(found.directory, "both")}
    assert len(everything) == 68
    assert seen[0] == everything
    assert seen[1] == everything
    first, second = ([ids for (epoch, _), ids in sorted(order) if epoch == number] for number in (0, 1))
    assert first != second


def test_batches_come_from_a_window_of_shards_in_another_order_each_epoch(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW", 8)
    found = opened(shards, tmp_path / "opened")
    assert len(list(shards.glob("recording.*.tar"))) > 8
    first = []
    for epoch in (0, 1, 2):
        module = data(found, batch_s=3.0)
        module.next_batch = (epoch, 0)
        items = take(module.train_dataloader().sampler, 3)
        used = [{piece.path.partition("@")[0] for piece in pieces} for _, pieces in items]
        assert len(set.union(*used)) <= 5
        first.append(sorted(used[0]))
    assert len({str(each) for each in first}) > 1


def test_samples_of_the_corpus_are_those_of_the_prepared_folder(corpus, shards, tmp_path):
    near, far = data(corpus), data(opened(shards, tmp_path / "opened"))
    for draw in (lambda module: module.sample(20.0), lambda module: module.some("train", 9)):
        ids = [{name for batch in draw(module) for name in batch["ids"]} for module in (near, far)]
        assert ids[0] == ids[1]
        assert 5 < len(ids[0]) < 40


def described(batches):
    return [(batch["position"], batch["ids"], batch["waveforms"].sum(dtype=int).item(), batch["lengths"]) for batch in batches]


@pytest.mark.parametrize("lengths", [[8000, 16000], None])
def test_a_resumed_run_gets_the_batches_of_an_unbroken_one(shards, tmp_path, lengths):
    found = opened(shards, tmp_path / "opened")
    whole = described(take(data(found, lengths=lengths).train_dataloader(), 40))
    assert whole[-1][0][0] >= 1, "into the second epoch"
    for left_out in (1, 7, 25):  # within a shard, within an epoch
        first = data(found, lengths=lengths)
        for batch in take(first.train_dataloader(), left_out):
            first.consumed(batch)
        again = data(found, lengths=lengths, num_workers=2)
        again.load_state_dict(first.state_dict())
        assert str(described(take(again.train_dataloader(), 12))) == str(whole[left_out : left_out + 12])
        assert first.bytes_read > 0


def take(batches, count):
    found = []
    for batch in batches:
        found.append(batch)
        if len(found) == count:
            return found
    return found


def test_a_task_reads_its_labels_from_the_shards(corpus, shards, tmp_path):
    found = opened(shards, tmp_path / "opened")
    loading = {"batch_s": 6.0, "num_buckets": 2, "num_workers": 0, "labels": UtteranceLabel("keyword")}
    batches = {}
    for each in (corpus, found):
        module = SpeechDataModule(each, "keyword", **loading)
        assert module.classes == ["no", "yes"]
        batches[each.directory] = {
            name: (label, samples[:length].tolist())
            for batch in module.ordered_loader("train")
            for name, label, samples, length in zip(
                batch["ids"], batch["labels"].tolist(), batch["waveforms"], batch["lengths"].tolist(), strict=True
            )
        }
    assert batches[corpus.directory] == batches[found.directory]
    assert len(batches[found.directory]) == 60


# Writing


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_any_number_of_processes_writes_the_same_bytes(corpus, shards, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # starts at once, as all is imported
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    write_shards(corpus, tmp_path / "shar", SHARD_S / 3600, num_jobs=2, progress=False)
    assert contents(tmp_path / "shar") == contents(shards)


WRITE = """
import sys
from audiot.data import sharding
from audiot.data.prepare import PreparedCorpus
write = sharding._write_shard
def slowly(job):
    if job.number == 3:
        print("three are done", flush=True)
        sys.stdin.read()
    write(job)
sharding._write_shard = slowly
sharding.write_shards(PreparedCorpus.load(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]), float(sys.argv[3]), 1, False)
"""


def test_a_killed_writing_goes_on_where_it_was(corpus, shards, tmp_path):
    folder = tmp_path / "shar"
    arguments = [sys.executable, "-c", WRITE, corpus.directory, folder, str(SHARD_S / 3600)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (folder / "index.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("recording.*.tar")}
    assert len(before) == 3
    (folder / "recording.000001.tar").write_bytes(b"cut off")  # as of a full disk
    (folder / ".recording.000003.99.tar").write_bytes(b"half")
    write_shards(corpus, folder, SHARD_S / 3600, num_jobs=1, progress=False)
    after = {name: (folder / name).stat().st_mtime_ns for name in before}
    assert {name for name in before if after[name] != before[name]} == {"recording.000001.tar"}
    assert contents(folder) == contents(shards)


def test_shards_that_are_there_are_left_alone_and_others_replaced(corpus, shards, tmp_path):
    folder = tmp_path / "shar"
    shutil.copytree(shards, folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_shards(corpus, folder, SHARD_S / 3600, num_jobs=1, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    write_shards(corpus, folder, 1.0, num_jobs=1, progress=False)
    assert len(list(folder.glob("recording.*.tar"))) == 1
    assert len(list(folder.iterdir())) == 4


# Damage


@pytest.fixture
def copy(shards, tmp_path):
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_a_missing_and_a_truncated_shard_are_told(copy, tmp_path):
    path = copy / "recording.000002.tar"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StorageError, match=r"recording.000002.tar is damaged: it has [\d,]+ bytes instead of [\d,]+ \(1 of \d+ "):
        opened(copy, tmp_path / "opened")
    path.unlink()
    with pytest.raises(StorageError, match=r"recording.000002.tar is missing \(1 of \d+ shards\): copy them again"):
        opened(copy, tmp_path / "opened")


def test_a_wrong_checksum_is_told_when_audio_is_read_and_by_verify(copy, tmp_path):
    path = copy / "recording.000002.tar"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    found = opened(copy, tmp_path / "opened")
    with pytest.raises(StorageError, match=r"copy/recording.000002.tar is damaged at byte [\d,]+ \(its CRC-32"):
        audio_of(found, "both")
    with pytest.raises(StorageError, match=r"recording.000002.tar is damaged \(its SHA-256 is not that of the index\): copy it"):
        opened(copy, tmp_path / "opened", verify=True)


def test_a_shard_that_goes_away_is_told(copy, tmp_path):
    found = opened(copy, tmp_path / "opened")
    (copy / "recording.000001.tar").unlink()
    with pytest.raises(StorageError, match=r"recording.000001.tar is missing: copy it there, or check data.root"):
        audio_of(found, "both")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(format_version=9), "index.json has format 9, but this audiot reads 1: write the shards anew"),
        (lambda index: index.update(sample_rate=8000), "holds audio at 8000 Hz and data.prepare.sample_rate is 16000: set feat"),
        (lambda index: index.update(sample_rate="16000"), r"index.json is damaged \(sample_rate or corpus\)"),
        (lambda index: index.update(corpus=3), r"index.json is damaged \(sample_rate or corpus\)"),
        (lambda index: index.update(task_splits={"a": {"train": "none"}}), r"index.json is damaged \(task_splits\)"),
        (lambda index: index.update(shards=None), "index.json names 'None', which is no file of its folder"),
        (lambda index: index["index"].update(file="../x"), "index.json names '../x', which is no file of its folder"),
        (lambda index: index["index"].update(sha256="0" * 64), r"index.safetensors is damaged \(its SHA-256 is not that of the"),
        (lambda index: index["index"].update(bytes=5), "index.safetensors has [0-9,]+ bytes instead of 5"),
        (lambda index: index["shards"].pop(), r"index.safetensors is damaged \(a shard is not listed\)"),
        (lambda index: file(index).update(file="/etc/passwd"), "index.json names '/etc/passwd', which is no file of its folder"),
        (lambda index: file(index).update(file="http://x/y"), "index.json names 'http://x/y', which is no file of its folder"),
        (lambda index: file(index).update(file=".hidden"), "index.json names '.hidden', which is no file of its folder"),
        (lambda index: file(index).update(bytes=-1), "index.json gives no bytes or no SHA-256 of recording.000000.tar"),
        (lambda index: file(index).update(bytes=20000), r"index.safetensors is damaged \(audio lies outside its shard\)"),
    ],
)
def test_an_index_from_a_stranger_is_checked(copy, tmp_path, change, words):
    index = json.loads((copy / "index.json").read_text())
    change(index)
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, StorageError), match=words):
        opened(copy, tmp_path / "opened")


def file(index):
    return index["shards"][0]["recording"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("offset", lambda old: old - 10**9, "audio lies outside its shard"),
        ("size", lambda old: old * 0 + 2**62, "audio lies outside its shard"),
        ("size", lambda old: old * 0, "audio lies outside its shard"),
        ("num_samples", lambda old: old * 0 + 2**30, "an utterance has more samples than its bytes can hold, or none"),
        ("num_samples", lambda old: old * 0 - 1, "an utterance has more samples than its bytes can hold, or none"),
        ("num_samples", lambda old: old[1:], "its arrays are empty or differ in length"),
        ("num_samples", lambda old: old.astype(np.float32), "it has no num_samples of int32"),
        ("shard", lambda old: old[::-1], "a shard is not listed"),
        ("id_ends", lambda old: old[::-1], "an id is empty or outside"),
        ("id_ends", lambda old: old + 1, "an id is empty or outside"),
        ("split/train", lambda old: old + 1000, "its split train repeats an utterance or names one that it has not"),
        ("split/train", lambda old: old * 0, "its split train repeats an utterance or names one that it has not"),
        ("split/train", lambda old: old[:0], "its split 'train' is empty or has another type"),
        ("split/../up", lambda old: np.zeros(1, np.int32), "its split '../up' is empty or has another type"),
    ],
)
def test_arrays_from_a_stranger_are_checked(shards, tmp_path, name, value, words):
    sizes = [path.stat().st_size for path in sorted(shards.glob("recording.*.tar"))]
    arrays = dict(Index.read(shards / "index.safetensors", sizes).arrays)
    Index(arrays, sizes, "good")
    arrays[name] = value(arrays.get(name))
    with pytest.raises(ValueError, match=re.escape(f"bad is damaged ({words}): copy it again, or write the shards anew")):
        Index(arrays, sizes, "bad")
    (tmp_path / "index.safetensors").write_bytes((shards / "index.safetensors").read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"index.safetensors is damaged \([^\n]*\): copy it again"):
        Index.read(tmp_path / "index.safetensors", sizes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"supervisions": [{"id": 1}]}, "cuts.000000.jsonl.gz: the labels of 'train/é[0-9]+' are broken: "),
        (
            {"custom": {"target": {"type": "command", "source": "touch ran", "channels": [0]}}},
            "of the kind 'command', which a shell",
        ),
        (None, "has no utterance 'train/é[0-9]+', which the index names: write the shards anew"),
        ("[", "holds no cuts: "),
    ],
)
def test_labels_from_a_stranger_are_checked(copy, tmp_path, line, words):
    path = copy / "cuts.000000.jsonl.gz"
    with gzip.open(path) as stream:
        first, *rest = stream.read().splitlines()
    first = {} if line is None else json.loads(first) | line if isinstance(line, dict) else first
    changed = [] if line is None else [line.encode() if isinstance(line, str) else json.dumps(first).encode()]
    path.write_bytes(gzip.compress(b"\n".join([*changed, *rest])))
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0]["cuts"] = {"file": path.name, "bytes": path.stat().st_size}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        opened(copy, tmp_path / "opened").cuts("train")


def test_an_opened_corpus_follows_its_shards(corpus, copy, tmp_path):
    first = opened(copy, tmp_path / "opened")
    first.cuts("train")
    assert (tmp_path / "opened" / "train.jsonl.gz").is_file()
    write_shards(corpus, copy, 1.0, num_jobs=1, progress=False)
    with pytest.raises(ValueError, match=r"have changed since .* was opened: audiot prepare opens them anew"):
        SharCorpus(copy).open(tmp_path / "opened", {}, "check")
    assert SharCorpus(copy).open(tmp_path / "opened", {}, "keep").content == first.content
    again = opened(copy, tmp_path / "opened")
    assert not (tmp_path / "opened" / "train.jsonl.gz").exists(), "it names the former places"
    assert audio_of(again, "train").keys() == audio_of(corpus, "train").keys()


# Servers


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(storage, "WAITS_S", (0.01, 0.01, 0.01))
    with Server(shards) as server:
        yield server
        server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_a_web_server_give_the_batches_of_a_folder(shards, server, tmp_path, workers):
    near, far = (opened(root, tmp_path / name) for name, root in (("near", shards), ("far", server.root)))
    expected = described(take(data(near).train_dataloader(), 30))
    server.faults["recording.000001.tar"] = ["drop", 503, None, "drop"]
    before, module = server.sent, data(far, num_workers=workers)
    batches = take(module.train_dataloader(), 30)
    assert str(described(batches)) == str(expected)
    for batch in batches:
        module.consumed(batch)
    assert 0 < module.bytes_read <= server.sent - before
    assert {cut.id for cut in far.cuts("valid")} == {cut.id for cut in near.cuts("valid")}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (404, r"recording.000003.tar is missing: copy it there, or check data.root"),
        (403, r"recording.000003.tar may not be read \(access is denied\)"),
        ("drop", r"recording.000003.tar can't be read after 4 tries: "),
        ("whole", r"recording.000003.tar: the server sends whole files where ranges of bytes are asked for"),
    ],
)
def test_what_a_server_denies_ends_a_training_in_a_line(server, tmp_path, fault, words):
    found = opened(server.root, tmp_path / "opened")
    server.faults["recording.000003.tar"] = [fault] * 99
    loader = data(found, num_workers=int(fault == 404)).train_dataloader()
    with pytest.raises(StorageError) as caught:
        take(loader, 99)
    assert re.fullmatch(rf"http://127.0.0.1:\d+/data/{words}[^\n]*", describe(caught.value))


def test_a_damaged_index_of_a_server_is_told(server, tmp_path):
    server.faults["index.json"] = [404]
    with pytest.raises(StorageError, match=r"/data/index.json is missing: copy it there, or check data.root"):
        opened(server.root, tmp_path / "opened")
    server.faults["index.safetensors"] = ["drop"] * 4
    with pytest.raises(StorageError, match=r"/data/index.safetensors can't be read after 4 tries"):
        opened(server.root, tmp_path / "opened")
    assert opened(server.root, tmp_path / "opened").utterances == 76, "nothing half is left"


@pytest.mark.slow
def test_shards_of_an_object_store_give_the_batches_of_a_folder(shards, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setattr(storage, "WAITS_S", (0.01, 0.01, 0.01))
        client = boto3.client("s3")
        client.create_bucket(Bucket="speech")
        for path in shards.iterdir():
            client.upload_file(str(path), "speech", f"a/b/{path.name}")
        near, far = opened(shards, tmp_path / "near"), opened("s3://speech/a/b", tmp_path / "far", verify=True)
        expected = described(take(data(near).train_dataloader(), 30))
        for workers in (0, 2):
            assert str(described(take(data(far, num_workers=workers).train_dataloader(), 30))) == str(expected)
        assert next(iter(far.cuts("train"))).supervisions
        client.delete_object(Bucket="speech", Key="a/b/recording.000003.tar")
        with pytest.raises(StorageError, match=r"s3://speech/a/b/recording.000003.tar is missing: copy it there"):
            audio_of(far, "both")
        with pytest.raises(StorageError, match=r"recording.000003.tar is missing \(1 of \d+ shards\)"):
            opened("s3://speech/a/b", tmp_path / "far")
        with pytest.raises(StorageError, match=r"s3://speech/nothing/index.json is missing"):
            opened("s3://speech/nothing", tmp_path / "other")
    finally:
        server.stop()
