"""Imported last by the server from which the runs of a study fork: it reads their corpus once for all of them.

The server imports all else while the corpus is still being prepared.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import librosa

from audiot.data.datamodule import open_cuts, open_pieces
from audiot.data.prepare import PreparedCorpus
from audiot.study.running import CORPUS

LOOK_S = 0.05


def prepared(told: Path) -> Path | None:
    """Wait until the study has written the folder of its corpus to a file.

    Args:
        told: The file. It is empty until then.

    Returns:
        The folder; None if the study has ended, or has given up and deleted the file.
    """
    study = os.getppid()
    while os.getppid() == study:
        try:
            if directory := told.read_text(encoding="utf-8"):
                return Path(directory)
        except FileNotFoundError:
            return None
        time.sleep(LOOK_S)
    return None


def hold(directory: Path) -> None:
    """Read what data modules read of a corpus, which they then find in this process and its forks."""
    gc.disable()  # each collection would look at all that is read
    corpus = PreparedCorpus.load(directory)
    for split in corpus.counts:
        open_cuts(corpus.directory, split, True, corpus.content)
    open_pieces(corpus.directory, corpus.split_for("pretrain", "train"), corpus.content)
    open_cuts(corpus.directory, corpus.split_for("pretrain", "valid"), False, corpus.content)
    gc.enable()
    gc.freeze()  # collections in the forks would copy the pages


if CORPUS in os.environ:
    librosa.filters.mel(sr=16_000, n_fft=512, norm=None)  # the first call loads much, as our features make it
    if (directory := prepared(Path(os.environ[CORPUS]))) is not None:
        hold(directory)
