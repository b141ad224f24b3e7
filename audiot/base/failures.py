"""What a run can do without: a picture or a table that fails is told at the end, and the run goes on."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from audiot.base.console import say


class Failures:
    """What failed on the way, each with its reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.traces: dict[str, str] = {}

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Note that `what` failed where the block raises an error, which ends here. Ctrl-C passes."""
        try:
            yield
        except Exception as error:
            self.reasons[what] = reason(error)
            self.traces[what] = traceback.format_exc()

    def update(self, other: Failures) -> None:
        """Take over what others have noted."""
        self.reasons |= other.reasons
        self.traces |= other.traces

    def tell(self, debug: bool) -> None:
        """Say a line for each.

        Args:
            debug: Whether tracebacks are said too.
        """
        for what, why in self.reasons.items():
            say(f"{self.traces[what] if debug else ''}failed  {what}: {why}")


def reason(error: BaseException) -> str:
    """Why something failed, in one line; the error's kind is named where its words are for programmers."""
    words = " ".join(str(error).split())
    return words if words and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {words}".rstrip(": ")
