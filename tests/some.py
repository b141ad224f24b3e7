"""Which cases of a test the gate runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test: the gate takes the cases in `quick`, ``pytest -m slow`` the others."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
