"""``audiot study``: what each attention mechanism costs and buys, under which objective, and how sure that is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from audiot.base.config import compose_command, plain
from audiot.base.console import say
from audiot.base.parts import make
from audiot.base.quoting import override, path, quoted
from audiot.checkpoint import AudioEncoder
from audiot.commands import launch
from audiot.data.opening import open_corpus
from audiot.data.prepare import PreparedCorpus, usable_cores
from audiot.study.comparison import check_statsmodels
from audiot.study.design import Study
from audiot.study.gathering import gather
from audiot.study.report import write_report
from audiot.study.running import Worker, runs_at_a_time

ON_A_GPU = 16  # runs at a time on each card, if there is a core for each
MODULES = ("audiot.commands.pretrain", "audiot.commands.finetune", "audiot.commands.abx", "audiot.commands.analyze")


def main(cfg: DictConfig) -> None:
    """Run what is left of a study, and write its report.

    Raises:
        ModuleNotFoundError: statsmodels is not installed.
        ValueError: a setting is wrong, or runs failed, which is told after all else is done.
    """
    check_statsmodels()
    given = HydraConfig.get().overrides.task
    device = [override for override in given if override.startswith(("trainer=", "trainer."))]
    settings = plain(cfg.study)
    study: Study = make(settings | {name: [*settings[name], *device] for name in ("pretrain", "finetune")})
    folder = Path(cfg.folder)
    if study.rehearsal:
        say(f"rehearsal: {study.rehearsal}")
    jobs = runs_at_a_time(cfg.jobs, _automatic, "report")
    worker = Worker(study, folder, jobs, launch.run, partial(_corpus, study, cfg), cfg.data_dir, MODULES)
    if worker.at_a_time:
        worker.work()
    records = worker.records.load()
    command = " ".join(["audiot study", *(quoted(override) for override in given if override != "jobs=0")])
    findings = gather(study, records, worker.failed, command, worker.records.arrays)
    files = write_report(findings, folder)
    for sentence in findings.summary:
        say(sentence)
    say(f"report  {', '.join(str(file) for file in files)}")
    if worker.failed:
        # In the study's order: that in which runs end differs from time to time.
        job, why = next(worker.failed[job.key] for job in study.jobs(records) if job.key in worker.failed)
        raise ValueError(f"{len(worker.failed)} runs failed, the same command tries them again; the first, {job.name}: {why}")
    say(f"next:   open {path(files[0])}")
    if findings.unfinished:
        say(f"        {command} goes on, {len(findings.unfinished)} runs are left that are known by now")


def _corpus(study: Study, cfg: DictConfig) -> Path:
    """Prepare the corpus of the runs before several of them ask for it."""
    places = [override("data_dir", cfg.data_dir), override("run_dir", cfg.run_dir)]
    corpus = open_corpus(compose_command("pretrain", [*study.data, *places]))
    for line in too_long(study, corpus, places):
        say(line)
    return corpus.directory


def too_long(study: Study, corpus: PreparedCorpus, places: Sequence[str]) -> Iterator[str]:
    """Warnings of mechanisms that take no audio as long as the tasks may hear, before hours of training end in that.

    Args:
        study: The study.
        corpus: Its corpus, of which all but the audio of pre-training is looked at.
        places: Overrides that say where runs and corpora lie.
    """
    trained = corpus.split_for("pretrain", "train")
    longest = max((cut.num_samples for split in corpus.counts if split != trained for cut in corpus.cuts(split)), default=0)
    for mechanism in study.mechanisms:
        job = study.searched(next(iter(study.objectives)), mechanism)[0]
        cfg = compose_command("pretrain", [*job.shared, *job.own, *places])
        model = AudioEncoder(plain(cfg.features), plain(cfg.model))
        limits = [each.max_frames for each in model.encoder.mechanisms if each.max_frames is not None]
        frames = model.features.num_tokens(longest)
        if model.encoder.chunk_frames is None and limits and min(limits) < frames:
            yield (
                f"warning: {mechanism} takes {min(limits)} frames, and the longest utterance has {frames} "
                f"({longest / corpus.sample_rate:.3g} s): tasks that hear it will fail, but with study.chunked=true"
            )


def _automatic() -> int:
    """Runs at a time, by the machine."""
    cards = torch.cuda.device_count()
    return cards * max(1, min(ON_A_GPU, usable_cores() // cards)) if cards else usable_cores()


if __name__ == "__main__":
    from audiot.commands.launch import run

    run("study", sys.argv[1:])
