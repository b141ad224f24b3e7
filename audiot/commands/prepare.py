"""``audiot prepare``: make a corpus ready for training."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from audiot.base.console import say
from audiot.base.quoting import argument, quoted
from audiot.data.opening import open_corpus
from audiot.data.sharding import write_shards
from audiot.following import RATE

FORMATS = ("wav", "shar")


def main(cfg: DictConfig) -> None:
    """Prepare the corpus of the config, unless that is done already, and say how to train on it."""
    if cfg.data.prepare.format not in FORMATS:
        raise ValueError(f"data.prepare.format must be {' or '.join(FORMATS)}, found {cfg.data.prepare.format!r}")
    corpus = open_corpus(cfg)
    for split, count in corpus.counts.items():
        say(f"  {split:<14} {count:>7} utterances  {corpus.hours[split]:8.2f} h")
    given = [quoted(override) for override in HydraConfig.get().overrides.task]
    if cfg.data.prepare.format == "shar":
        folder = corpus.directory / "shar"
        summary = write_shards(corpus, folder, cfg.data.prepare.shard_hours, cfg.data.prepare.num_jobs)
        say(f"shards  {folder}: {summary}")
        rate = [argument("data.prepare.sample_rate", corpus.sample_rate)] if corpus.sample_rate != RATE else []
        given = ["data=shar", argument("data.root", folder), *rate]
    say(" ".join(["next:   audiot pretrain", *given]))


if __name__ == "__main__":
    import sys

    from audiot.commands.launch import run

    run("prepare", sys.argv[1:])
