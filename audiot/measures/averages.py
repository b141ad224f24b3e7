"""ABX errors of a whole test, and of resampled tests: of speakers, or of contexts, that are drawn with replacement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from audiot.downstream.bootstrap import FEWEST_SPEAKERS, Measured, Metrics
from audiot.measures.abx import Cells, Unit

ENTRIES = 4_000_000  # numbers of a table that are computed together
DEFAULTS = {"samples": 1000, "seed": None, "keep": False}  # of the settings of the bootstrap


def choose_unit(units: Sequence[Unit], context: str) -> tuple[str | None, str]:
    """What is resampled, and the reason for it: ``speaker``, ``context``, or None if there is no interval.

    Speakers are drawn if there are at least 8, as in `audiot.downstream.bootstrap`. The spread of fewer can't be estimated.
    Contexts are drawn then: no unit is in two of them, so their errors come from different units. The interval says what other
    contexts of these speakers may give. With ``context=any`` each unit is compared with those of all phones, and no part of the
    test can be drawn without the others.

    Args:
        units: All units of the test.
        context: ``within`` or ``any``.
    """
    speakers = len({unit.speaker for unit in units if not unit.silent})
    if speakers >= FEWEST_SPEAKERS:
        return "speaker", f"the test has at least {FEWEST_SPEAKERS}"
    few = f"the test has fewer than {FEWEST_SPEAKERS} speakers ({speakers})"
    if context == "any":
        return None, f"{few}, and with context=any there are no contexts to resample instead"
    contexts = len({_name(unit, "context") for unit in units if not unit.silent})
    if contexts < FEWEST_SPEAKERS:
        return None, f"{few}, and fewer than {FEWEST_SPEAKERS} contexts ({contexts})"
    return "context", few


def _name(unit: Unit, kind: str | None) -> str:
    """What of the resampled ones a unit belongs to."""
    return str((unit.before, unit.after)) if kind == "context" else unit.speaker


class Average:
    """The mean of the errors of cells: over those of two phones and a speaker (of A and B), over speakers, over pairs of phones.

    Of a resampled test it is the mean as if the test had the drawn speakers alone. A speaker who is drawn twice counts as two
    speakers with the same speech: the cells of A and B count twice, and a cell where X is of another speaker counts as often as
    the product of both numbers says. The two are not other speakers to each other. A context that is drawn twice counts as two
    contexts. A speaker without cells in a draw is left out of the mean of its pair, and a pair of phones without cells out of the
    last mean. The cells are those of the whole test, ``max_speakers`` included.

    Args:
        cells: The cells, at least one.
        units: All units of the test, to which the members of the cells belong.
        kind: What is resampled, ``speaker`` or ``context``; None is as ``speaker``.
    """

    def __init__(self, cells: Cells, units: Sequence[Unit], kind: str | None) -> None:
        self.names = sorted({_name(unit, kind) for unit in units if not unit.silent})
        place = {name: number for number, name in enumerate(self.names)}
        first = cells.members[np.cumsum(cells.sizes) - cells.sizes]  # a unit of each group
        drawn = np.array([place[_name(units[number], kind)] for number in first])
        phones, speakers = int(cells.phones.max()) + 1, int(cells.speakers.max()) + 1
        pair = cells.phones[cells.a] * phones + cells.phones[cells.b]
        rows, which, row = np.unique(pair * speakers + cells.speakers[cells.a], return_index=True, return_inverse=True)
        by_context, is_across = kind == "context", bool((cells.a != cells.x).any())
        self.of_row = None if by_context else torch.from_numpy(drawn[cells.a[which]])  # what weighs a row, (R,)
        self.weighs_cells = by_context or is_across
        column = drawn[cells.x] if self.weighs_cells else np.zeros_like(cells.x)
        self.where = torch.from_numpy(np.stack([row, column]))
        self.size = len(rows), len(self.names) if self.weighs_cells else 1
        pairs, of_pair = np.unique(rows // speakers, return_inverse=True)
        rows_of_pairs = torch.from_numpy(np.stack([of_pair, np.arange(len(rows))]))
        self.pairs = _sparse(rows_of_pairs, torch.ones(len(rows)), (len(pairs), len(rows)))
        self.cells = _sparse(self.where, torch.ones(len(row)), self.size)  # number of cells of each row and column

    def whole(self, found: np.ndarray) -> float:
        """The error of the whole test, of the errors of the cells (C,)."""
        return float(self.resampled(found, torch.ones(1, len(self.names), dtype=torch.float64)))

    def resampled(self, found: np.ndarray, counts: Tensor) -> Tensor:
        """The error of resampled tests (tests,), NaN where a test has no cell.

        Args:
            found: Errors of the cells (C,).
            counts: How often each of `names` is in each test, (tests, names), float64.
        """
        errors = _sparse(self.where, torch.from_numpy(found), self.size)
        return torch.cat([self._resampled(errors, some) for some in counts.split(max(1, ENTRIES // self.size[0]))])

    def _resampled(self, errors: Tensor, counts: Tensor) -> Tensor:
        numbers = counts.T.contiguous()  # of names, tests
        of_cells = numbers if self.weighs_cells else numbers.new_ones(1, len(counts))
        weights = torch.sparse.mm(self.cells, of_cells)  # whole numbers, of rows and tests
        means = torch.sparse.mm(errors, of_cells) / weights.clamp(min=1)
        there = (weights > 0).double() if self.of_row is None else (weights > 0) * numbers[self.of_row]
        speakers = torch.sparse.mm(self.pairs, there)
        by_pair = torch.sparse.mm(self.pairs, means * there) / speakers.clamp(min=1)
        return by_pair.sum(0) / (speakers > 0).sum(0)


def _sparse(where: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
    """A table of sums, of numbers (n,) and their rows and columns (2, n)."""
    with torch.sparse.check_sparse_tensor_invariants():  # PyTorch warns of tensors that nobody has chosen to check or not
        return torch.sparse_coo_tensor(where, numbers.double(), size).coalesce()


class Errors(Measured):
    """ABX errors of a layer, by name.

    Args:
        figures: Name of each error → the mean, and the errors of its cells. All means are of one test.
    """

    def __init__(self, figures: Mapping[str, tuple[Average, np.ndarray]]) -> None:
        super().__init__(next(iter(figures.values()))[0].names)
        self.figures = figures

    def metrics(self, units: Tensor, counts: Tensor) -> Metrics:
        """Errors of resampled tests, (tests,) each."""
        own = counts[:, units]
        return {name: average.resampled(found, own) for name, (average, found) in self.figures.items()}
