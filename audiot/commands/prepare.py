"""``audiot prepare``: make a corpus ready for training."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from audiot.base.console import say
from audiot.base.quoting import quoted
from audiot.data.opening import open_corpus


def main(cfg: DictConfig) -> None:
    """Prepare the corpus of the config, unless that is done already, and say how to train on it."""
    corpus = open_corpus(cfg)
    for split, count in corpus.counts.items():
        say(f"  {split:<14} {count:>7} utterances  {corpus.hours[split]:8.2f} h")
    say(" ".join(["next:   audiot pretrain", *map(quoted, HydraConfig.get().overrides.task)]))


if __name__ == "__main__":
    import sys

    from audiot.commands.launch import run

    run("prepare", sys.argv[1:])
