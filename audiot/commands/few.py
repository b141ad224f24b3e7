"""What a figure over few utterances is worth, and what little audio asks for, in words."""

from __future__ import annotations

from math import ceil, sqrt

from omegaconf import DictConfig

from audiot.adaptation.plan import LITTLE_H, LOW_RATE, PRETRAINING_BATCH_S
from audiot.base.console import say
from audiot.data.prepare import PreparedCorpus

ENOUGH = 20  # utterances
Z = 1.96  # standard deviations of a normal distribution that hold 95%
MANY_PASSES = 50  # over little audio
NAMES = {"valid": "validation", "test": "test"}


def say_few(cfg: DictConfig, corpus: PreparedCorpus, task: str, roles: tuple[str, ...], counted: bool = False) -> None:
    """Say of each split with few utterances how much its figure may be off.

    Args:
        cfg: The config, which knows whether the size of a split can be set.
        corpus: The corpus.
        task: Whose splits they are.
        roles: ``valid``, ``test``.
        counted: The figure is the share of utterances that are right.
    """
    for role in roles:
        count = corpus.counts[corpus.split_for(task, role)]
        if count < ENOUGH:
            say(f"few     {worth(role, count, counted)}: {_remedy(cfg, corpus, task, role)}")


def say_little(cfg: DictConfig, hours: float, steps: int, batches: int) -> None:
    """Say of a pre-training that passes over little audio again and again what learns it more surely.

    Args:
        cfg: Its config.
        hours: Hours of audio to train on.
        steps: Steps in all.
        batches: Batches of a step, of all processes.
    """
    name = "batch_s" if cfg.data.get("global_batch_s") is None else "global_batch_s"  # earlier runs have none
    seconds = cfg.data[name]
    passes = steps * seconds * (batches if name == "batch_s" else 1) / max(1e-6, 3600 * hours)
    if hours >= LITTLE_H or passes <= MANY_PASSES:
        return
    smaller = PRETRAINING_BATCH_S[False][0]
    settings = []
    if seconds > smaller:
        settings.append(f"data.{name}={smaller:g}")
    if cfg.optimizer.get("lr", 0) > LOW_RATE:
        settings.append(f"optimizer.lr={LOW_RATE:g}")
    remedy = f"; {' '.join(settings)} learns it more surely" if settings else ""
    say(f"little  training passes {passes:,.0f} times over {hours:.2g} h of audio: more audio is better{remedy}")


def worth(role: str, count: int, counted: bool) -> str:
    """How much a figure over so many utterances may be off."""
    many = f"only {count} {NAMES[role]} utterance{'s' if count > 1 else ''}"
    if not counted:
        return f"{many}, take its figure for a trial run's"
    if role == "valid":
        return f"{many}, each is {100 / count:.0f} points of accuracy"
    half = 100 * Z / (2 * sqrt(count + Z**2))  # of Wilson's interval (1927) around one half
    return f"{many}, an accuracy of 50% stands for {50 - half:.0f} to {50 + half:.0f}% (95% interval)"


def _remedy(cfg: DictConfig, corpus: PreparedCorpus, task: str, role: str) -> str:
    """A larger share where the split is held out and training has utterances to spare, else more audio."""
    if cfg.data.get("valid_fraction") is None or cfg.data.get(role) is not None:
        return f"more {NAMES[role]} audio says more"
    own = [name for name in NAMES if cfg.data.get(name) is None]
    share = ceil(100 * ENOUGH / sum(corpus.counts[corpus.split_for(task, name)] for name in ("train", *own))) / 100
    return f"data.valid_fraction={share:g} or more audio says more" if share <= 0.25 else "more audio says more"
