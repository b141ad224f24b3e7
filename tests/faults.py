"""How often a fault is injected."""

from __future__ import annotations

import pytest

TRIES = 10


def tries(count: int = TRIES):
    """Parameters of a test that injects a fault: the gate takes the first, ``pytest -m slow`` the others."""
    return [pytest.param(0), *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, count))]
