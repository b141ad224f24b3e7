"""``audiot benchmark``: run the benchmark that ``benchmark=…`` names, and compare its results with an earlier run's."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from audiot.base.config import plain
from audiot.base.console import say
from audiot.base.files import write_json, write_text
from audiot.benchmark.comparison import comparison, read_results
from audiot.benchmark.machine import describe_machine


class Benchmark(Protocol):
    """The benchmark that ``benchmark=…`` chooses."""

    device: torch.device
    key: tuple[str, ...]
    """Columns of ``results.csv`` that say what was measured. ``benchmark.compare`` compares lines that agree in them."""
    figure: str
    """The column that is compared."""

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure, write files to the run's folder, and print the main table and what to run next."""


def main(cfg: DictConfig) -> None:
    """Measure. Write tables, pictures and ``machine.json`` to the run's folder, and print the main table.

    ``benchmark.compare=FILE`` then compares the results with an earlier ``results.csv``.

    Raises:
        ValueError: a measurement crashed, or something computes wrong results. This error comes after all else is done. Or the
            earlier results belong to another benchmark. This error comes before anything is measured.
    """
    run = Path(cfg.run_dir)
    settings = plain(cfg.benchmark)
    compare = settings.pop("compare", None)
    what: Benchmark = instantiate(settings, seed=cfg.seed)
    earlier = None if compare is None else read_results(Path(compare), what.key, what.figure)
    command = shlex.join(["audiot", "benchmark", *HydraConfig.get().overrides.task])
    machine = describe_machine(what.device) | {"command": command, "seed": cfg.seed, "benchmark": settings}
    write_json(run / "machine.json", machine)
    say(f"device  {machine['device']}, PyTorch {machine['torch']}, {machine['threads']} CPU threads")
    begin = time.monotonic()
    try:
        what.report(run, machine)
    finally:  # also when a measurement failed, since the others have results
        write_json(run / "machine.json", machine | {"wall_s": round(time.monotonic() - begin, 1)})
        if earlier is not None and (run / "results.csv").is_file():
            text = comparison(earlier, read_results(run / "results.csv", what.key, what.figure))
            write_text(run / "comparison.md", text)
            say(f"\n{text}\nfile    {run / 'comparison.md'}")


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("benchmark", sys.argv[1:])
