"""Result of reading a corpus: Lhotse cuts by split, and the splits that each task uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lhotse import CutSet


@dataclass(frozen=True)
class Manifests:
    """Cuts of a corpus.

    Args:
        splits: Split name (``train``, ``valid``, ``test``, …) → its cuts.
        task_splits: Task name (``phone``, ``speaker``, …) → role (``train``, ``valid``, ``test``) → split name. A task that is
            missing uses the splits named like the roles.
        rejected: Path and reason of each file that the corpus itself left out.
    """

    splits: Mapping[str, CutSet]
    task_splits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rejected: Sequence[tuple[str, str]] = ()
