"""``audiot benchmark benchmark=data``: the speed of each stage between a corpus and the features on a device."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra.utils import instantiate
from lhotse import CutSet
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from audiot.analysis.plots import plot_speeds
from audiot.base.console import say
from audiot.base.files import write_csv, write_text
from audiot.base.groups import options, read_option
from audiot.base.tables import aligned, markdown
from audiot.benchmark.measure import MAX_CALLS, time_of
from audiot.benchmark.settings import check_counts, check_known, check_seconds, find_device
from audiot.data.batches import Batch, crop_lengths, to_device
from audiot.data.datamodule import SpeechDataModule, useful_workers
from audiot.data.manifests import Manifests
from audiot.data.opening import NO_RESULT, data_options, open_corpus
from audiot.data.prepare import PreparedCorpus, prepare
from audiot.features import Features
from audiot.following import same_data

Row = dict[str, Any]


class DataBenchmark:
    """Speed of each stage before the model, in times real time, with the settings of pre-training.

    ``prepare`` decodes, resamples and writes utterances in one process. ``sampling`` is the choice of cuts and crops in the main
    process. ``loading`` is everything up to a batch in the main process, with worker processes. ``transfer`` takes a batch to the
    device, as floats. ``front end`` computes its features there.

    Args:
        data: Config of a corpus and of its batches.
        data_dir: Folder of the corpora.
        features: Config of the front end that crops fit and whose frames are counted.
        front_ends: Names of `conf/features`.
        prepare_utterances: Utterances of the training split to prepare.
        seconds: Seconds per measurement.
        rounds: Measurements per stage. The median is told.
        device: ``auto``, ``cpu``, ``cuda``, …
        seed: Seed of the order and the crops.

    Raises:
        ValueError: an unknown name or an impossible size.
    """

    key = ("what", "setting")
    figure = "times_real_time"

    def __init__(
        self,
        data: Mapping[str, Any],
        data_dir: str,
        features: Mapping[str, Any],
        front_ends: Sequence[str],
        prepare_utterances: int,
        seconds: float,
        rounds: int,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        check_known("front_ends", front_ends, options("features"))
        check_counts(prepare_utterances=prepare_utterances, rounds=rounds)
        check_seconds(seconds)
        self.device = find_device(device)
        self.cfg = OmegaConf.create({"data": data, "data_dir": data_dir, "seed": seed})
        self.features: Features = instantiate(features)
        self.front_ends = front_ends
        self.prepare_utterances = prepare_utterances
        self.seconds = seconds
        self.rounds = rounds

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure. Write ``results.csv``, ``table.md`` and ``benchmark.png``, and print the table."""
        rows: list[Row] = []
        for row in self._measure(run):
            rows.append(row)
            write_csv(run / "results.csv", rows)  # each time, so that Ctrl-C leaves something behind
        table = [
            ["stage", "setting", "cores", "µs per cut", "× real time", "× real time per core"],
            *(
                [
                    row["what"],
                    row["setting"],
                    f"{row['cores']}",
                    f"{row['us_per_cut']:,.4g}",
                    f"{row['times_real_time']:,.0f}",
                    f"{row['times_real_time_per_core']:,.0f}",
                ]
                for row in rows
            ),
        ]
        loading = next(row for row in rows if row["setting"] == "data.num_workers")
        where = ", ".join(dict.fromkeys([machine["device"], machine["cpu"]]))
        title = f"{self.cfg.data.name}, {self._batches()}; {where}, median of {self.rounds}"
        feeds = (
            f"{loading['cores']} loader processes feed training at {loading['frames_per_s']:,} frames/s, "
            f"{loading['times_real_time']:,.0f} times real time"
        )
        notes = (
            "In the rows of the device a core is a CPU thread, or the whole GPU. Files come from the operating system's memory "
            "if they fit there. The first epoch waits for the disk."
        )
        text = f"# Data\n\n{title}\n\n{markdown(table)}\n\n{feeds}.\n\n{notes}\n\n`{machine['command']}`\n"
        write_text(run / "table.md", text)
        speeds = {f"{row['what']}, {row['setting']}": row["times_real_time_per_core"] for row in rows}
        plot_speeds(speeds, f"Times real time per core (on a GPU: per GPU): {title}", run / "benchmark.png")
        say(f"\n{title}\n{aligned(table)}\n\n{feeds}\n")
        say(f"run     {run}\nfiles   table.md, results.csv, benchmark.png, machine.json")
        say(" ".join(["next:   audiot pretrain", *same_data(run)]))

    def _batches(self) -> str:
        data = self.cfg.data
        pieces = "whole utterances" if data.crop_s is None else f"crops of {data.crop_s:g} s"
        most = "" if data.max_utterances is None else f", {data.max_utterances} utterances"
        return f"{pieces}, batches of {data.batch_s:g} s{most}"

    def _measure(self, run: Path) -> Iterator[Row]:
        yield self._prepare(run)
        corpus = open_corpus(self.cfg)
        if corpus.sample_rate != self.features.sample_rate:
            raise ValueError(
                f"the corpus is at {corpus.sample_rate} Hz and the features at {self.features.sample_rate} Hz: "
                f"set data.prepare.sample_rate={self.features.sample_rate}"
            )
        yield self._sampling(corpus)
        given = self.cfg.data.num_workers
        chosen = useful_workers(1, self.device.type != "cpu") if given == "auto" else given
        yield self._loading(corpus, "one worker", 1)
        yield self._loading(corpus, "data.num_workers", chosen)
        loader = self._data(corpus, 0).train_dataloader()
        batch = next(iter(loader))
        if self.device.type == "cuda":
            batch = {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        yield self._on_device("transfer", "to floats", batch, partial(to_device, batch, self.device))
        there = to_device(batch, self.device)
        for name in self.front_ends:
            config = read_option("features", name) | {"sample_rate": corpus.sample_rate}
            front_end: Features = instantiate(config).to(self.device)
            yield self._on_device("front end", name, batch, partial(front_end, there["waveforms"], there["lengths"]))

    def _data(self, corpus: PreparedCorpus, num_workers: int) -> SpeechDataModule:
        data = self.cfg.data
        settings = data_options(self.cfg) | {"num_workers": num_workers}
        lengths = crop_lengths(self.features, data.crop_s, data.num_lengths)
        return SpeechDataModule(corpus, "pretrain", crop_s=data.crop_s, lengths=lengths, **settings)

    def _prepare(self, run: Path) -> Row:
        data = self.cfg.data
        corpus: Manifests = instantiate(data.corpus).manifests()
        split = corpus.task_splits.get("pretrain", {}).get("train", "train")
        if split not in corpus.splits:
            raise ValueError(f"data={data.name} has no split {split!r} to pre-train on: it has {', '.join(corpus.splits)}")
        some = Manifests({"train": CutSet.from_cuts(islice(corpus.splits[split], self.prepare_utterances))})
        settings: dict[str, Any] = OmegaConf.to_container(data.prepare, resolve=True)  # type: ignore[assignment]
        settings = {name: value for name, value in settings.items() if name not in NO_RESULT}
        settings |= {"num_jobs": 1, "copy": True, "progress": False}
        taken = []
        for _ in range(self.rounds):
            with TemporaryDirectory(dir=run) as folder, redirect_stdout(io.StringIO()):
                begin = time.perf_counter()
                done = prepare(some, folder, **settings)
                taken.append(time.perf_counter() - begin)
        seconds = median(taken)
        return _row("prepare", "one process", 1, done.counts["train"] / seconds, 3600 * done.hours["train"] / seconds)

    def _sampling(self, corpus: PreparedCorpus) -> Row:
        loader = self._data(corpus, 0).train_dataloader()
        assert isinstance(loader, DataLoader)
        batches = iter(loader.sampler)
        cuts, samples = self._rates(batches, lambda item: [cut.num_samples for cut in item[1]])
        return _row("sampling", "main process", 1, cuts, samples / corpus.sample_rate)

    def _loading(self, corpus: PreparedCorpus, setting: str, num_workers: int) -> Row:
        loader = self._data(corpus, num_workers).train_dataloader()
        assert isinstance(loader, DataLoader)
        batches = iter(loader)
        for _ in range(1 + (loader.prefetch_factor or 0) * num_workers):  # made before the clock runs
            next(batches)
        sizes: list[int] = []

        def lengths(batch: Batch) -> list[int]:
            found: list[int] = batch["lengths"].tolist()
            sizes.extend(found)
            return found

        cuts, samples = self._rates(batches, lengths)
        tokens = int(self.features.num_tokens(torch.tensor(sizes)).sum())
        row = _row("loading", setting, max(1, num_workers), cuts, samples / corpus.sample_rate)
        return row | {"frames_per_s": round(samples * tokens / sum(sizes))}

    def _rates(self, batches: Iterator[Any], sizes: Callable[[Any], list[int]]) -> tuple[float, float]:
        """Cuts per second and samples per second: medians over the rounds."""
        rates = []
        for _ in range(self.rounds):
            cuts = samples = 0
            taken = 0.0
            while not cuts or taken < self.seconds:
                begin = time.perf_counter()
                batch = next(batches)
                taken += time.perf_counter() - begin
                found = sizes(batch)
                cuts, samples = cuts + len(found), samples + sum(found)
            rates.append((cuts / taken, samples / taken))
        cuts_per_s, samples_per_s = zip(*rates, strict=True)
        return median(cuts_per_s), median(samples_per_s)

    def _on_device(self, what: str, setting: str, batch: Batch, call: Callable[[], object]) -> Row:
        time_of(call, 2, self.device)
        count = max(1, min(MAX_CALLS, int(self.seconds / time_of(call, 1, self.device))))
        seconds = median(time_of(call, count, self.device) for _ in range(self.rounds))
        cores = torch.get_num_threads() if self.device.type == "cpu" else 1
        lengths = batch["lengths"]
        return _row(what, setting, cores, len(lengths) / seconds, int(lengths.sum()) / self.features.sample_rate / seconds)


def _row(what: str, setting: str, cores: int, cuts_per_s: float, times_real_time: float) -> Row:
    return {
        "what": what,
        "setting": setting,
        "cores": cores,
        "cuts_per_s": round(cuts_per_s, 1),
        "us_per_cut": float(f"{1e6 / cuts_per_s:.4g}"),
        "times_real_time": round(times_real_time, 1),
        "times_real_time_per_core": round(times_real_time / cores, 1),
        "frames_per_s": "",
    }
