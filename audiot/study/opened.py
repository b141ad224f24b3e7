"""Imported by the server from which the runs of a study fork: it reads their corpus once for all of them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import librosa

from audiot.data.datamodule import open_cuts, open_pieces
from audiot.data.prepare import PreparedCorpus

VARIABLE = "AUDIOT_STUDY_CORPUS"  # folder of the prepared corpus: the server is given nothing else than its environment


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


if VARIABLE in os.environ:
    librosa.filters.mel(sr=16_000, n_fft=512, norm=None)  # the first call loads much, as our features make it
    hold(Path(os.environ[VARIABLE]))
