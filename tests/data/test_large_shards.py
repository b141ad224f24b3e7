"""An index of 10,000 hours: 2.4 million utterances in 10,000 shards, whose files are empty."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from audiot.data.shards import Index

COUNT, PER_SHARD, HELD_OUT = 2_400_000, 240, 1_000
MEASURE = """
import json, resource, sys, time
from pathlib import Path

from audiot.data.batches import crop_lengths
from audiot.data.corpora.shar import SharCorpus
from audiot.data.datamodule import SpeechDataModule
from audiot.features import LogMel

begin = time.perf_counter()
corpus = SharCorpus(sys.argv[1]).open(Path(sys.argv[2]), {})
figures = {"open_s": time.perf_counter() - begin}
lengths = crop_lengths(LogMel(), 4.0, 8)
data = SpeechDataModule(corpus, "pretrain", batch_s=64.0, crop_s=4.0, lengths=lengths, num_workers=0)
begin = time.perf_counter()
batches = iter(data.train_dataloader().sampler)
next(batches)
figures["first_batch_s"] = time.perf_counter() - begin
data.next_batch = (0, 1)  # behind it
begin, seen, number = time.perf_counter(), set(), 0
for (epoch, _), pieces in data.train_dataloader().sampler:
    if epoch:
        break
    names = [piece.id for piece in pieces]
    assert seen.isdisjoint(names) and len(set(names)) == len(names)
    seen.update(names)
    number += 1
taken = time.perf_counter() - begin
begin = time.perf_counter()
data.next_batch = (0, number // 2)
next(iter(data.train_dataloader().sampler))
figures |= {"batches_per_s": number / taken, "utterances": len(seen), "resume_half_s": time.perf_counter() - begin}
figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps(figures))
"""


@pytest.mark.slow
def test_ten_thousand_hours_take_little_memory_and_every_utterance_comes_once(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    generator = np.random.default_rng(0)
    samples = generator.integers(10 * 16000, 20 * 16000, COUNT)
    size = samples  # of FLAC, a byte each
    shard = np.arange(COUNT) // PER_SHARD
    ends = np.cumsum(size + 512)
    first = np.concatenate([[0], ends[PER_SHARD - 1 : -1 : PER_SHARD]])
    held = COUNT - 2 * HELD_OUT
    columns = {
        "id": [f"speaker{number % 5000:04d}/chapter{number % 77:02d}/utterance-{number:08d}" for number in range(COUNT)],
        "shard": shard,
        "offset": ends - size - first[shard],
        "size": size,
        "crc32": generator.integers(0, 2**32, COUNT),
        "num_samples": samples,
    }
    splits = {"train": range(held), "valid": range(held, held + HELD_OUT), "test": range(held + HELD_OUT, COUNT)}
    sizes = (ends[PER_SHARD - 1 :: PER_SHARD] - first).tolist()
    Index(Index.of(columns, splits), sizes, "index").save(folder / "index.safetensors")
    shards = []
    for number, own in enumerate(sizes):
        recording, cuts = f"recording.{number:06d}.tar", f"cuts.{number:06d}.jsonl.gz"
        with (folder / recording).open("wb") as stream:
            stream.truncate(own)
        shards.append({"recording": {"file": recording, "bytes": own}, "cuts": {"file": cuts, "bytes": 1}})
    arrays = (folder / "index.safetensors").read_bytes()
    listed = {"file": "index.safetensors", "bytes": len(arrays), "sha256": hashlib.sha256(arrays).hexdigest()}
    content = {"corpus": "0" * 64, "format_version": 1, "sample_rate": 16000, "task_splits": {}, "index": listed}
    (folder / "index.json").write_text(json.dumps(content | {"shards": shards}))
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "opened")]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(figures)
    assert figures["utterances"] >= held - 64
    assert figures["peak_gb"] < 2
