"""``audiot extract DATA … OUT --encoder RUN/encoder``: hidden states of a corpus to files."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from audiot.base.devices import find_device
from audiot.base.files import name_text, printable
from audiot.base.framing import middles
from audiot.base.private import compile_error
from audiot.base.quoting import argument
from audiot.checkpoint import DTYPES
from audiot.commands.upstreams import open_upstream
from audiot.data.audio import AudioFile, BadAudioError, audio_files
from audiot.data.corpora.manifest import SAFE_SOURCES, ManifestCorpus
from audiot.data.datamodule import PreparedPieces
from audiot.data.prepare import PreparedCorpus
from audiot.data.shards import INDEX
from audiot.downstream.upstream import EncoderUpstream, Upstream
from audiot.extraction.extract import Extractor, Utterance, data_digest, num_frames, plan, total_seconds, usable, write_index
from audiot.extraction.states import FORMAT_VERSION, Failures, States, claim, is_done, shard_failures, shard_path, stored


def main(options: argparse.Namespace) -> None:
    """Extract; what can't be used is listed at the end, and the exit code is then 1."""
    device = find_device(options.device, f"no device {options.device!r} here")
    on_gpu = device.type == "cuda"
    upstream = open_upstream(options.upstream, options.encoder, options.trust)
    if options.compile and not isinstance(upstream, EncoderUpstream):
        raise ValueError(f"--compile is for audiot's own encoders, not --upstream {options.upstream}: leave it out")
    compute_dtype = options.compute_dtype or ("bfloat16" if on_gpu else "float32")
    layers = chosen_layers(options.layers, upstream.num_states)
    failures: Failures = {}
    utterances = usable(find_utterances(options.data, failures, options.sources.split(",")), upstream.features, failures)
    if not utterances:
        raise ValueError(f"no utterance can be used, the first because: {next(iter(failures.values()))}")
    frame_bytes = len(layers) * upstream.state_dim * DTYPES[options.dtype].itemsize
    shards = plan(utterances, upstream.features, frame_bytes, options.shard_mb * 1e6)
    settings = {
        "format_version": FORMAT_VERSION,
        "encoder": {"upstream": options.upstream, "path": str(options.encoder), "digest": digest(upstream)},
        "layers": layers,
        "state_dim": upstream.state_dim,
        "dtype": options.dtype,
        "compute_dtype": compute_dtype,
        "sample_rate": upstream.features.sample_rate,
        **frame_times(upstream),
        "data": {
            "utterances": len(utterances),
            "seconds": round(total_seconds(utterances), 3),
            "digest": data_digest(utterances),
        },
        "shard_mb": options.shard_mb,
        "num_shards": len(shards),
    }
    folder = Path(options.out)
    claim(folder, settings)

    upstream = upstream.to(device=device, dtype=DTYPES[compute_dtype]).eval()
    if isinstance(upstream, EncoderUpstream) and options.compile:
        upstream.encoder.compile()
    first, step = options.part
    mine = {number: shards[number] for number in range(first, len(shards), step)}
    todo = {number: shard for number, shard in mine.items() if not is_done(folder, number)}
    check_space(folder, todo, upstream.features, frame_bytes)
    extractor = Extractor(upstream, layers, DTYPES[options.dtype], options.batch_s or (480 if on_gpu else 60), options.workers)
    try:
        speed = extractor.run(todo, folder, initial=sum(total_seconds(mine[number]) for number in mine.keys() - todo.keys()))
    except compile_error() as error:
        words = " ".join(str(error).split("\n\n")[0].split())[:200]
        raise ValueError(f"torch.compile failed: {words}: leave --compile out") from error
    for number in mine:
        failures |= shard_failures(folder, number)
    left = sum(not shard_path(folder, number).is_file() for number in range(len(shards)))
    if not left:
        write_index(folder, shards)
    _report(folder, settings, mine, left, speed)
    if failures:
        listed = "\n".join(f"  {printable(name)}: {reason}" for name, reason in failures.items())
        sys.exit(f"audiot: error: {len(failures)} utterances can't be used:\n{listed}")


def _report(
    folder: Path, settings: Mapping[str, Any], mine: Mapping[int, Sequence[Utterance]], left: int, speed: float | None
) -> None:
    """The last lines: what there is now, how fast it went, and how to read it."""
    count, seconds, size = 0, 0.0, 0
    for number, shard in mine.items():
        names = {name for name, _ in stored(shard_path(folder, number))}
        count += len(names)
        seconds += total_seconds([utterance for utterance in shard if utterance.id in names])
        size += shard_path(folder, number).stat().st_size
    how_fast = "which were there already" if speed is None else f"{speed:,.0f} × real time"
    how_large = f"{size / 1e9:,.2f} GB" if size > 1e9 else f"{size / 1e6:,.2f} MB"
    files = "1 shard" if len(mine) == 1 else f"{len(mine)} shards"
    print(f"wrote   {folder}: {count:,} utterances, {seconds / 3600:,.2f} h, {how_fast}; {how_large} in {files}")
    if left:
        print(f"left    {left} of {settings['num_shards']} shards, to other parts; the last one to end writes index.csv")
        return
    layers = [] if len(settings["layers"]) == 1 else [str(len(settings["layers"]))]
    shape = ", ".join([*layers, "T", str(settings["state_dim"])])
    print(f"read:   states = audiot.read_states({json.dumps(str(folder), ensure_ascii=False)})")
    for name in islice(States(folder), 1):
        print(f"        states[{name!r}]  # ({shape}), a frame every {settings['frame_shift_ms']:g} ms")


def find_utterances(names: Sequence[str], failures: Failures, sources: Sequence[str] = SAFE_SOURCES) -> list[Utterance]:
    """The utterances of files, folders, manifests and prepared corpora, in order; what can't be opened goes to ``failures``.

    The id of a file is its path below the folder that was named, without suffix; of a file that was named itself, its name.

    Raises:
        ValueError: two have one id, or a manifest is broken.
        FileNotFoundError: a folder holds no audio.
    """
    found: dict[str, Utterance] = {}
    for name in names:
        path = Path(name)
        if path.is_dir() and any((path / mark).is_file() for mark in ("corpus.json", "journal.jsonl")):
            corpus = PreparedCorpus.load(path)
            corpus.check_audio()
            # Splits may share utterances, which are then the same.
            own = list({utterance.id: utterance for split in corpus.counts for utterance in _prepared(path, split)}.values())
        elif (path / INDEX).is_file():
            opens = " ".join(["audiot prepare data=shar", argument("data.root", name)])
            raise ValueError(f"{name} holds shards: {opens} prints the folder to name here")
        elif name.endswith((".jsonl", ".jsonl.gz")):
            split = path.name.split(".jsonl")[0]
            prepared = (path.parent / "corpus.json").is_file() and split in PreparedCorpus.load(path.parent).counts
            if prepared:
                PreparedCorpus.load(path.parent).check_audio()
            own = list(_prepared(path.parent, split) if prepared else _listed(path, failures, sources))
        else:
            own = _files(name, failures)
        for utterance in own:
            if found.setdefault(utterance.id, utterance) is not utterance:
                raise ValueError(
                    f"two utterances have the id {utterance.id!r}, the second in {name}: extract them to two folders"
                )
    return list(found.values())


def _prepared(directory: Path, split: str) -> Iterator[Utterance]:
    for piece in PreparedPieces(directory, split):
        yield Utterance(piece.id, piece if piece.in_shard else piece.path, piece.num_samples, piece.sampling_rate, prepared=True)


def _listed(path: Path, failures: Failures, sources: Sequence[str]) -> Iterator[Utterance]:
    rejected: list[tuple[str, str]] = []
    cuts = ManifestCorpus(path, sources=sources)._read(path, rejected, progress=True)
    failures.update(rejected)
    for cut in cuts.values():
        if not cut.has_recording:
            raise ValueError(f"{path}: the cut {cut.id} has no recording: hidden states are of audio")
        yield Utterance(cut.id, cut, cut.num_samples, cut.sampling_rate)


def _files(name: str, failures: Failures) -> list[Utterance]:
    base = Path(name_text(name)) if Path(name).is_dir() else Path(name_text(name)).parent
    paths = audio_files(name)
    with ThreadPoolExecutor(16) as pool:  # reading headers is waiting for disks
        headers = list(tqdm(pool.map(_header, paths), "look", len(paths), unit="file", delay=1, leave=False))
    found = []
    for path, header in zip(paths, headers, strict=True):
        if isinstance(header, str):
            failures[path] = header
        else:
            found.append(Utterance(printable(Path(path).relative_to(base).with_suffix("").as_posix()), path, *header))
    return found


def _header(path: str) -> tuple[int, int] | str:
    """Samples and sample rate of a file, or why it can't be used."""
    try:
        with AudioFile(path) as file:
            return file.num_samples, file.sample_rate
    except BadAudioError as reason:
        return str(reason)


def chosen_layers(text: str, num_states: int, option: str = "--layers") -> list[int]:
    """Numbers of hidden states from 0 on, of ``last``, ``all`` or numbers separated by commas, which may count from the end.

    Raises:
        ValueError: there is no such state, or one is named twice.
    """
    if text in ("last", "all"):
        return [num_states - 1] if text == "last" else list(range(num_states))
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be last, all or numbers separated by commas, found {text!r}") from None
    for number in numbers:
        if not -num_states <= number < num_states:
            raise ValueError(f"{option}={text}: the encoder has the hidden states 0 to {num_states - 1}, or -1 to -{num_states}")
    layers = [number % num_states for number in numbers]
    if len(set(layers)) < len(layers):
        raise ValueError(f"{option}={text} names a hidden state twice")
    return layers


def digest(upstream: Upstream) -> str:
    """Names an upstream by its weights and its config."""
    found = hashlib.sha256(json.dumps(upstream.config, sort_keys=True, default=str).encode())
    for name, value in sorted(upstream.state_dict().items()):
        found.update(name.encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def frame_times(upstream: Upstream) -> dict[str, float]:
    """``frame_shift_ms`` from one hidden state to the next, and ``first_frame_ms``, the middle of the first."""
    features, per_ms = upstream.features, upstream.features.sample_rate / 1000
    return {
        "frame_shift_ms": features.hop_length * upstream.stack / per_ms,
        "first_frame_ms": middles(features, upstream.stack, 1).item() / per_ms,
    }


def check_space(folder: Path, todo: Mapping[int, Sequence[Utterance]], features: Any, frame_bytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OSError: it has none.
    """
    needed = frame_bytes * sum(num_frames(utterance, features) for shard in todo.values() for utterance in shard)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: take fewer --layers or --dtype float16, "
            "or another disk"
        )
