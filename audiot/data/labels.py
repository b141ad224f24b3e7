"""Labels of a cut: one an utterance, or one a frame from an alignment tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from torch import Tensor

from audiot.features import Features

IGNORED = -100  # label of a frame that no interval of the alignment covers; losses and metrics leave it out


class Labels(Protocol):
    """How to read the labels of a task off a cut."""

    per_frame: bool

    def names(self, cut: Cut) -> list[str]:
        """All label names of the cut."""

    def encode(self, cut: Cut, index: dict[str, int]) -> Tensor:
        """Class indices: a scalar, or (frames,)."""


class UtteranceLabel:
    """One label an utterance: its speaker, or any custom field (``keyword``, …).

    Args:
        field: ``speaker`` or the name of a custom field of the supervision.
        features: Not used: labels of every kind take the same arguments.
    """

    per_frame = False

    def __init__(self, field: str, features: Features | None = None) -> None:
        self.field = field

    def names(self, cut: Cut) -> list[str]:
        """The label, as a list of one."""
        supervision = cut.supervisions[0] if cut.supervisions else None
        custom = (supervision.custom or {}) if supervision else {}
        value = custom.get(self.field) if supervision is None or self.field != "speaker" else supervision.speaker
        if value is None:
            known = ", ".join(sorted({"speaker", *custom})) if supervision else "none, it has no supervision"
            raise ValueError(f"utterance {cut.id} has no label {self.field!r} (its labels: {known}); choose another task or data")
        return [str(value)]

    def encode(self, cut: Cut, index: dict[str, int]) -> Tensor:
        """Class index, a scalar."""
        return torch.tensor(index[self.names(cut)[0]])


class FrameLabels:
    """One label a frame: the interval of the alignment tier that the frame's centre lies in.

    Args:
        tier: Name of the alignment tier (``phone``).
        features: The front end whose frames are labelled.
    """

    per_frame = True

    def __init__(self, tier: str, features: Features) -> None:
        self.tier = tier
        self.features = features

    def _intervals(self, cut: Cut) -> list[tuple[float, float, str]]:
        items = [
            (item.start, item.end, item.symbol)
            for supervision in cut.supervisions
            for item in (supervision.alignment or {}).get(self.tier, [])
        ]
        if not items:
            raise ValueError(f"utterance {cut.id} has no alignment tier {self.tier!r}; choose another task or data")
        return sorted(items)

    def names(self, cut: Cut) -> list[str]:
        """Every symbol of the tier."""
        return [symbol for _, _, symbol in self._intervals(cut)]

    def encode(self, cut: Cut, index: dict[str, int]) -> Tensor:
        """Class index of each frame (frames,), ``IGNORED`` where no interval covers its centre."""
        intervals = self._intervals(cut)
        num_frames = self.features.num_frames(cut.num_samples)
        # Lhotse moves the supervisions of a cropped cut, but not their alignments: those count from the recording's start.
        rate = self.features.sample_rate
        centers = (self.features.frame_centers(num_frames).numpy() + round(cut.start * rate)) / rate
        starts = np.array([start for start, _, _ in intervals])
        ends = np.array([end for _, end, _ in intervals])
        classes = np.array([index[symbol] for _, _, symbol in intervals])
        at = np.searchsorted(starts, centers, side="right") - 1
        covered = (at >= 0) & (centers < ends[at.clip(0)])
        return torch.from_numpy(np.where(covered, classes[at.clip(0)], IGNORED))


def vocabulary(cuts: CutSet, labels: Labels) -> list[str]:
    """All label names in ``cuts``, sorted."""
    return sorted({name for cut in cuts for name in labels.names(cut)})


def check_known(cuts: Iterable[Cut], labels: Labels, index: dict[str, int], split: str) -> None:
    """Refuse a label that training never saw.

    Raises:
        ValueError: naming the label, its utterance and the split.
    """
    for cut in cuts:
        for name in labels.names(cut):
            if name not in index:
                raise ValueError(
                    f"label {name!r} of utterance {cut.id} ({split} split) does not occur in training "
                    f"({len(index)} labels do): move an utterance with it into training, or leave it out of {split}"
                )
