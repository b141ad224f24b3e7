"""The probes that follow pre-training: each one is a run of ``finetune``."""

from __future__ import annotations

import gc
import io
import logging
import multiprocessing
import traceback
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from audiot.base.config import compose_command, plain
from audiot.base.console import log, say
from audiot.base.failures import reason
from audiot.base.quoting import override, quoted
from audiot.commands.finetune import finetune
from audiot.data.prepare import ROLES, PreparedCorpus, start_worker, usable_cores
from audiot.following import foreign_packages, same_data, trusting
from audiot.runs import Interrupted, check_config, read_results, write_config
from audiot.training.trainer import known_precision

MOST_ON_GPU = 8  # probes at a time
GPU_BYTES = 8 * 2**30  # free memory for each of them
SHARED = ("seed", "debug", "data_dir", "data", "features", "positions", "attention", "model")


def probe_configs(cfg: DictConfig, run: Path, trusted: Collection[str] | None = None) -> dict[str, DictConfig]:
    """The config of every entry of ``cfg.probes``, by its name.

    Args:
        cfg: The run's config.
        run: Its folder.
        trusted: For a config that comes from a file: packages from outside audiot whose parts it may name.

    Raises:
        ValueError: ``cfg.probe_jobs`` is no number of processes.
    """
    jobs = cfg.probe_jobs
    if jobs != "auto" and not (isinstance(jobs, int) and jobs >= 1):
        raise ValueError(f"probe_jobs must be auto or at least 1, found {jobs}")
    probes = {
        name: probe_config(cfg, overrides, run / "probes" / name.replace("/", "-"))
        for name, overrides in probe_overrides(cfg).items()
    }
    if trusted is not None:
        for name, probe in probes.items():
            check_config(probe, f"{run}, probes.{name}", trusted)
    return probes


def probe_overrides(cfg: DictConfig) -> dict[str, list[str]]:
    """The overrides of every entry of ``cfg.probes``; what an interpolation stands for, a path say, is quoted for Hydra."""
    written = OmegaConf.to_container(cfg.probes)
    assert isinstance(written, dict)
    return {
        str(name): [
            override(*given.split("=", 1)) if "${" in raw else given for raw, given in zip(raws, cfg.probes[name], strict=True)
        ]
        for name, raws in written.items()
    }


def check_probes(probes: Mapping[str, DictConfig], corpus: PreparedCorpus) -> None:
    """Look for the labels that the probes need before pre-training, which may take days.

    Raises:
        ValueError: a probe's split or its labels are not there.
    """
    for name, probe in probes.items():
        labels = instantiate(probe.downstream.labels)
        try:
            for role in ROLES:
                labels.names(next(iter(corpus.cuts(corpus.split_for(probe.downstream.task, role)))))
        except ValueError as error:
            raise ValueError(f"{error} (wanted by the probe {name}; probes=none or probe=false pre-trains without)") from error


def run_probes(
    cfg: DictConfig, run: Path, probes: Mapping[str, DictConfig], device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """The test's figure (accuracy, or what the task monitors) of every probe, and why those failed that have none.

    The figures also have ``intervals``, by the names of the probes, if there are any.

    One that a resumed run has done before is not done again.
    """
    left = {name: probe for name, probe in probes.items() if not _metrics(probe).is_file()}
    for probe in left.values():
        write_config(probe, Path(probe.run_dir))  # for `audiot evaluate`
    if len(left) < len(probes):
        say(f"probes  {len(probes) - len(left)} of {len(probes)} are there already")
    data = same_data(run)
    trust = trusting(cfg)
    commands = {
        name: ["audiot finetune", *map(quoted, given), *(trust if "trusted" in probes[name].upstream else []), *data]
        for name, given in probe_overrides(cfg).items()
    }
    titles = {name: f"\n{name}:  {' '.join(command)}" for name, command in commands.items()}
    jobs = useful_jobs(device) if cfg.probe_jobs == "auto" else cfg.probe_jobs
    failed: dict[str, str] = {}
    if min(jobs, len(left)) > 1:
        failed = _run_together(left, titles, min(jobs, len(left)))
    else:
        for name, probe in left.items():
            say(titles[name])
            why = _run(probe)
            if why is not None:
                say(f"failed  {why}")
                failed[name] = why
            gc.collect()  # trainer, callbacks and module refer to each other, and hold the probe's hidden states
    figures: dict[str, Any] = {}
    intervals = {}
    for name, probe in probes.items():
        if name not in failed:
            metrics = read_results(_metrics(probe), ["monitor"])
            monitored = f"test/{metrics['monitor']}"
            figures[name] = read_results(_metrics(probe), [monitored])[monitored]
            if ends := metrics.get("intervals", {}).get(monitored):
                intervals[name] = ends
    return figures | ({"intervals": intervals} if intervals else {}), failed


def _run(probe: DictConfig) -> str | None:
    """Run one probe; why it failed, None where it did not. Ctrl-C passes."""
    from audiot.commands.launch import describe, user_errors

    try:
        finetune(probe)
    except Exception as error:
        if probe.debug:
            say(traceback.format_exc())
        return describe(error) if isinstance(error, user_errors()) else reason(error)
    return None


def useful_jobs(device: torch.device) -> int:
    """Probes at a time on a device: ``probe_jobs: auto``."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return max(1, min(MOST_ON_GPU, usable_cores() // 2, torch.cuda.mem_get_info(device)[0] // GPU_BYTES))
    return torch.get_num_threads() if device.type == "cpu" else 1  # what is small runs better on one core than on several


def warm_up() -> None:
    """Begin to import what probes need, in a process that those of `_run_together` are then forks of."""
    _context()
    forkserver.ensure_running()


def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _metrics(probe: DictConfig) -> Path:
    return Path(probe.run_dir) / "metrics.json"


def _run_together(probes: Mapping[str, DictConfig], titles: Mapping[str, str], jobs: int) -> dict[str, str]:
    """Run probes in so many processes, which share out this one's threads; say what each one said when it is done.

    Returns:
        Why those failed that did.

    Raises:
        Interrupted: by Ctrl-C.
    """
    failed: dict[str, str] = {}
    before = multiprocessing.active_children()
    start = (max(1, torch.get_num_threads() // jobs), multiprocessing.get_start_method())
    with (
        ProcessPoolExecutor(jobs, _context(), _start, start) as pool,
        tqdm(total=len(probes), desc="probes", unit="probe", leave=False) as bar,
    ):
        try:
            running = {pool.submit(_told, plain(probe)): name for name, probe in probes.items()}
            for done in as_completed(running):
                name = running[done]
                try:
                    said, why = done.result()
                except BrokenProcessPool:  # takes those with it that still run or wait
                    said, why = "", "a probe was killed, for want of memory perhaps: resume the run with probe_jobs=1"
                if why is not None:
                    failed[name] = why
                    said = f"{said}\nfailed  {why}".lstrip("\n")
                with tqdm.external_write_mode():
                    say(f"{titles[name]}\n{said}")
                bar.update()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - set(before):
                process.terminate()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(0, None) from error
            raise
    return failed


def _start(threads: int, start_method: str) -> None:
    """Begin a process of `_run_together`: with its share of the threads, and loaders that start as they do elsewhere."""
    from audiot.commands.launch import quieten_libraries

    start_worker()
    multiprocessing.set_start_method(start_method, force=True)  # else that of `_context`
    quieten_libraries()
    torch.set_num_threads(threads)


def _told(probe: dict[str, Any]) -> tuple[str, str | None]:
    """Run one probe without a progress bar; what it said, and why it failed, None where it did not."""
    cfg = OmegaConf.create(probe)
    cfg.trainer.enable_progress_bar = False
    for name in ("progress", "interrupt"):  # the parent has a bar, and ends its processes itself
        cfg.callbacks.pop(name, None)
    said = logging.StreamHandler(io.StringIO())
    log.addHandler(said)
    log.setLevel(logging.INFO)
    try:
        why = _run(cfg)
    finally:
        log.removeHandler(said)
    return said.stream.getvalue().rstrip("\n"), why


def probe_config(cfg: DictConfig, overrides: list[str], folder: Path) -> DictConfig:
    """The config of ``audiot finetune OVERRIDES`` on the data, model and device of a pre-training run."""
    overrides = [*overrides, override("run_dir", folder), "logger=none"]
    probe = compose_command("finetune", overrides)
    OmegaConf.set_struct(probe, False)
    for name in SHARED:
        probe[name] = cfg[name]  # whole: another corpus or mechanism has other keys
    if "trusted" in probe.upstream:  # the encoder that this run itself builds
        probe.upstream.trusted = foreign_packages(cfg)
    device = {"trainer": {"accelerator": cfg.trainer.accelerator, "fast_dev_run": cfg.trainer.get("fast_dev_run", False)}}
    if isinstance(cfg.trainer.devices, ListConfig):
        device["trainer"]["devices"] = [cfg.trainer.devices[0]]
    if cfg.trainer.precision != "auto":  # what is fast here need not be what a figure is compared in
        device["trainer"]["precision"] = known_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    probe.plots = cfg.get("plots", True)  # a run of an earlier version has no such key
    probe.callbacks.interrupt.folder = None  # a probe takes minutes: one that is stopped begins anew
    explicit = OmegaConf.from_dotlist([given for given in overrides if given.startswith("data.")])
    same = {"data": {"prepare": {"when": "keep"}}}  # what pre-training has heard, whatever becomes of its sources meanwhile
    merged = OmegaConf.merge(probe, device, explicit, same)
    assert isinstance(merged, DictConfig)
    return merged
