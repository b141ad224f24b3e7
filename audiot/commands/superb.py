"""``audiot superb RUN``: an encoder on SUPERB's tasks, the learning rate of each chosen on validation, in one table."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from audiot.base.config import plain
from audiot.base.console import say
from audiot.base.files import write_csv, write_text
from audiot.base.quoting import override, path, quoted
from audiot.base.tables import aligned, markdown
from audiot.commands import launch
from audiot.data.sources import file_digest
from audiot.study.design import Job
from audiot.study.running import Worker, runs_at_a_time
from audiot.study.superb import CORPORA, HEADER, TASKS, TITLES, Superb

PASSED = ("upstream=", "upstream.", "trainer=", "trainer.")  # beginnings of overrides that are those of every run


def main(cfg: DictConfig) -> None:
    """Run what is left of the tasks, and write the table.

    Raises:
        FileNotFoundError: there is no encoder, or a corpus is missing.
        ValueError: a setting is wrong, or a task has no result because its runs failed, which is told after all else is done.
    """
    given = HydraConfig.get().overrides.task
    encoder, heard = _encoder(cfg)
    _check_corpora(cfg)
    failed: dict[str, tuple[Job, str]] = {}
    passed = [each for each in given if each.startswith(PASSED) and not each.startswith("upstream.path=")]
    tasks = {name: _overrides(cfg, name, [*encoder, *passed]) for name in cfg.tasks}
    search = plain(cfg.search)
    superb = Superb(tasks, heard, search["factors"], search["steps"], list(cfg.seeds), failed)
    folder, modules = Path(cfg.folder), ("audiot.commands.finetune",)
    jobs = runs_at_a_time(cfg.jobs, _automatic, "table")
    worker = Worker(superb, folder, jobs, launch.run, None, cfg.data_dir, modules, "superb", resumes=True)
    worker.failed = failed
    if worker.at_a_time:
        worker.work()
    records = worker.records.load()
    rows = superb.rows(records, cfg.resamples)
    missing = [name for name in superb.tasks if name not in {row["task"] for row in rows}]
    command = " ".join(["audiot superb", *(quoted(each) for each in given if not each.startswith("jobs="))])
    if rows:
        write_csv(folder / "results.csv", rows)
        write_csv(folder / "runs.csv", superb.trials(records))
        lines = [[*HEADER], *([_cell(name, value) for name, value in row.items()] for row in rows)]
        words = f"`{command}`\n\nRates in %, with 95% intervals. The learning rate was chosen on validation.\n\n"
        write_text(folder / "results.md", f"{words}{markdown(lines)}\n")
        say(aligned(lines))
        say(f"wrote   {', '.join(str(folder / name) for name in ('results.csv', 'results.md', 'runs.csv'))}")
    for job, why in failed.values():
        say(f"failed  {job.name}: {why}")
    if not missing:
        say(f"next:   open {path(folder / 'results.md')}")
    elif failed:
        raise ValueError(f"no result of {', '.join(missing)}: runs failed, as told above; the same command tries them again")
    else:
        say(f"next:   {command} goes on, {', '.join(missing)} are left")


def _encoder(cfg: DictConfig) -> tuple[list[str], str]:
    """Overrides that name the encoder, and a digest of what is in its files.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not said which one.
    """
    name = cfg.upstream.path
    if name is not None and _choice() == "features":
        raise ValueError(f"upstream={_choice()} takes no run, found {name}: drop one of them")
    if name is None and _choice() in ("features", "random"):  # the config says all of them
        return [], _choice()
    if name is None:
        raise ValueError("which encoder? audiot superb RUN, where RUN is a pre-training run's folder; or upstream=features")
    given = Path(name)
    if _choice() in ("checkpoint", "random") and (given / "encoder").is_dir():
        given = given / "encoder"
    if not given.exists():
        if _choice() != "hf":
            raise FileNotFoundError(f"no encoder at {given}: expected the folder of a pre-training run")
        return [override("upstream.path", name)], name  # on the hub
    files = sorted(each for each in given.rglob("*") if each.is_file()) if given.is_dir() else [given]
    if not files:
        raise FileNotFoundError(f"no encoder at {given}: the folder is empty")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(given)} {file_digest(file)}\n".encode(errors="surrogateescape"))
    return [override("upstream.path", str(given))], digest.hexdigest()


def _choice() -> str:
    return str(HydraConfig.get().runtime.choices["upstream"])


def _overrides(cfg: DictConfig, name: str, passed: list[str]) -> list[str]:
    """Overrides of a task's runs."""
    if name not in TASKS:  # `Superb` says what there is
        return []
    root = override("data.root", str(cfg.roots[CORPORA[name]]))
    upstream = [] if any(each.startswith("upstream=") for each in passed) else [f"upstream={_choice()}"]
    return [f"experiment=superb_{name}", root, *upstream, *passed, *cfg.finetune, *cfg.overrides[name]]


def _check_corpora(cfg: DictConfig) -> None:
    """Look for all corpora before the first of the runs, which may take days."""
    missing: dict[str, list[str]] = {}
    for name in cfg.tasks:
        corpus = CORPORA.get(name)
        if corpus is not None and not Path(cfg.roots[corpus]).is_dir():
            missing.setdefault(corpus, []).append(f"{name} ({TITLES[name]})")
    if missing:
        told = "; ".join(f"{', '.join(names)}: {cfg.roots[corpus]}, roots.{corpus}=…" for corpus, names in missing.items())
        left = [name for name in cfg.tasks if CORPORA.get(name) not in missing]
        some = f", or leave them out with tasks=[{','.join(left)}]" if left else ""
        raise FileNotFoundError(f"no corpus for {told}. Get them (docs/corpora.md says where){some}")
    if "pr" in cfg.tasks and not any("lexicon=" in each or "data.phones=" in each for each in (*cfg.overrides.pr, *cfg.finetune)):
        raise ValueError(
            "phone recognition needs phones: \"overrides.pr=['downstream.labels.lexicon=FILE']\" or data.phones=FILE there"
        )


def _automatic() -> int:
    """Runs at a time, by the machine."""
    return max(1, torch.cuda.device_count())


def _cell(name: str, value: Any) -> str:
    if name in ("validation", "test", "low", "high") and value != "":
        return f"{100 * value:.2f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from audiot.commands.launch import run

    run("superb", sys.argv[1:])
