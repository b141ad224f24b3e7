"""Messages of a run, on the terminal and in its log."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger("audiot")


@rank_zero_only
def say(message: str = "") -> None:
    """Print a line and keep it in the run's log."""
    log.info(message)


def table(rows: Mapping[str, str]) -> str:
    """Lines of names and values, aligned."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
