"""The probes that follow pre-training: each one is a run of ``finetune``."""

from __future__ import annotations

import gc
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from audiot.commands.common import same_data, say
from audiot.commands.finetune import finetune
from audiot.data.prepare import ROLES, PreparedCorpus
from audiot.files import read_json

SHARED = ("seed", "data_dir", "data", "features", "positions", "attention", "model")


def run_probes(cfg: DictConfig, run: Path) -> dict[str, float]:
    """The test's figure (accuracy, or what the task monitors) of every entry of ``cfg.probes``.

    One that a resumed run has done before is not done again.
    """
    figures = {}
    for name, overrides in cfg.probes.items():
        folder = run / "probes" / str(name).replace("/", "-")
        if not (folder / "metrics.json").is_file():
            say(f"\n{name}:  audiot finetune {' '.join(overrides)}{same_data(run)}")
            probe = probe_config(cfg, list(overrides), folder)
            (folder / ".hydra").mkdir(parents=True, exist_ok=True)
            OmegaConf.save(probe, folder / ".hydra" / "config.yaml")  # for `audiot evaluate`
            finetune(probe)
            gc.collect()  # trainer, callbacks and module refer to each other, and hold the probe's hidden states
        metrics = read_json(folder / "metrics.json", "metrics")
        figures[str(name)] = metrics[f"test/{metrics['monitor']}"]
    return figures


def check_probes(cfg: DictConfig, run: Path, corpus: PreparedCorpus) -> None:
    """Look for the labels that the probes need before pre-training, which may take days.

    Raises:
        ValueError: a probe's split or its labels are not there.
    """
    for name, overrides in cfg.probes.items():
        probe = probe_config(cfg, list(overrides), run / "probes")
        labels = instantiate(probe.downstream.labels)
        try:
            for role in ROLES:
                labels.names(next(iter(corpus.cuts(corpus.split_for(probe.downstream.task, role)))))
        except ValueError as error:
            raise ValueError(f"{error} (wanted by the probe {name}; probes=none or probe=false pre-trains without)") from error


def probe_config(cfg: DictConfig, overrides: list[str], folder: Path) -> DictConfig:
    """The config of ``audiot finetune OVERRIDES`` on the data, model and device of a pre-training run."""
    overrides = [*overrides, f"run_dir={folder}", "logger=none"]
    if GlobalHydra.instance().is_initialized():
        probe = compose("finetune", overrides)
    else:  # a resumed run
        with initialize_config_module("audiot.conf", version_base="1.3"):
            probe = compose("finetune", overrides)
    OmegaConf.set_struct(probe, False)
    for name in SHARED:
        probe[name] = cfg[name]  # whole: another corpus or mechanism has other keys
    device = {"trainer": {"accelerator": cfg.trainer.accelerator}}
    if cfg.trainer.precision != "auto":  # what is fast here need not be what a figure is compared in
        device["trainer"]["precision"] = cfg.trainer.precision
    explicit = OmegaConf.from_dotlist([override for override in overrides if override.startswith("data.")])
    merged = OmegaConf.merge(probe, device, explicit)
    assert isinstance(merged, DictConfig)
    return merged
