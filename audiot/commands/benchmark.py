"""``audiot benchmark``: measure what ``benchmark=…`` names, and compare it with an earlier run."""

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
from audiot.base.files import replacing, write_json
from audiot.benchmark import measure as benchmark


class Benchmark(Protocol):
    """What ``benchmark=…`` chooses."""

    device: torch.device
    key: tuple[str, ...]
    """Columns of ``results.csv`` that say what was measured: with ``benchmark.compare`` lines that agree in them are one."""
    figure: str
    """The column that is compared."""

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure, write files to the run's folder, print the main table and what to do next."""


def main(cfg: DictConfig) -> None:
    """Measure; write tables, plots and ``machine.json`` to the run's folder; print the main table.

    ``benchmark.compare=FILE`` sets the results beside those of an earlier ``results.csv`` afterwards.

    Raises:
        ValueError: a measurement crashed, or something computed is wrong; told after all else is done. Or the earlier results
            are another benchmark's; told before anything is measured.
    """
    run = Path(cfg.run_dir)
    settings = plain(cfg.benchmark)
    compare = settings.pop("compare", None)
    what: Benchmark = instantiate(settings, seed=cfg.seed)
    earlier = None if compare is None else benchmark.read_results(Path(compare), what.key, what.figure)
    command = shlex.join(["audiot", "benchmark", *HydraConfig.get().overrides.task])
    machine = benchmark.describe_machine(what.device) | {"command": command, "seed": cfg.seed, "benchmark": settings}
    write_json(run / "machine.json", machine)
    say(f"device  {machine['device']}, PyTorch {machine['torch']}, {machine['threads']} CPU threads")
    begin = time.monotonic()
    try:
        what.report(run, machine)
    finally:  # a measurement that failed does not hide what became of the others
        write_json(run / "machine.json", machine | {"wall_s": round(time.monotonic() - begin, 1)})
        if earlier is not None and (run / "results.csv").is_file():
            now = benchmark.read_results(run / "results.csv", what.key, what.figure)
            with replacing(run / "comparison.md") as temporary:
                temporary.write_text(benchmark.comparison(earlier, now), encoding="utf-8")
            say(f"\n{benchmark.comparison(earlier, now)}\nfile    {run / 'comparison.md'}")


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("benchmark", sys.argv[1:])
