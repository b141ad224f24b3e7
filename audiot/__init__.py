"""audiot: self-supervised audio transformers with any attention mechanism."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audiot.checkpoint import AudioEncoder as AudioEncoder
    from audiot.downstream.classifier import Classifier as Classifier
    from audiot.extraction.states import States as States

__version__ = version("audiot")


def load_encoder(path: str, **options: Any) -> AudioEncoder:
    """Load an exported encoder; see :func:`audiot.checkpoint.load_encoder`."""
    from audiot.checkpoint import load_encoder

    return load_encoder(path, **options)


def load_classifier(run: str, **options: Any) -> Classifier:
    """Load a fine-tuned model; see :func:`audiot.downstream.classifier.load_classifier`."""
    from audiot.downstream.classifier import load_classifier

    return load_classifier(run, **options)


def read_states(folder: str) -> States:
    """The hidden states that ``audiot extract`` wrote, utterance → tensor; see :class:`audiot.extraction.states.States`."""
    from audiot.extraction.states import States

    return States(folder)
