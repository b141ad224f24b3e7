"""A manifest of a thousand hours opens without being read to its end, and is never held in memory as a whole."""

from __future__ import annotations

import gzip
import json
from itertools import islice

import lhotse.serialization
import pytest

import audiot.data.datamodule
from audiot.data.datamodule import SpeechDataModule
from audiot.data.prepare import PreparedCorpus

COUNT = 60_000


def cut(number):
    """One of 1 to 35 s, as JSON."""
    num_samples = 16000 + 7919 * number % (34 * 16000)
    name, duration = f"utterance{number}", num_samples / 16000
    source = {"type": "file", "channels": [0], "source": f"audio/{name}.wav"}
    recording = {"id": name, "sources": [source], "sampling_rate": 16000, "num_samples": num_samples, "duration": duration}
    return {"id": name, "start": 0.0, "duration": duration, "channel": 0, "recording": recording, "type": "MonoCut"}


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    counts = {"train": COUNT, "valid": 3, "test": 3}
    for split, count in counts.items():
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", compresslevel=1) as stream:
            stream.writelines(json.dumps(cut(number)) + "\n" for number in range(count))
    content = {"format_version": 1, "settings": {"prepare": {"sample_rate": 16000}}, "counts": counts, "hours": counts}
    (folder / "corpus.json").write_text(json.dumps(content | {"rejected": 0, "scaled": 0, "task_splits": {}}))
    return PreparedCorpus.load(folder)


@pytest.mark.slow
def test_the_first_batch_of_a_large_manifest_needs_only_its_beginning(large_corpus, monkeypatch):
    monkeypatch.setattr(audiot.data.datamodule, "EAGER_CUTS", 1000)
    audiot.data.datamodule.open_cuts.cache_clear()
    read = []
    original = lhotse.serialization.deserialize_item
    monkeypatch.setattr("lhotse.lazy.deserialize_item", lambda item: read.append(1) or original(item))
    data = SpeechDataModule(large_corpus, "pretrain", batch_s=480.0, crop_s=15.0, num_buckets=10, num_workers=0)
    batches = list(islice(iter(data.train_dataloader().sampler), 20))
    assert all(sum(cut.duration for cut in cuts) <= 480.0 for _, cuts in batches)
    assert 0 < len(read) < 0.6 * COUNT  # Lhotse's buffer, and what it estimates the buckets from
    audiot.data.datamodule.open_cuts.cache_clear()
