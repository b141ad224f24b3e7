"""Short pieces of audio inside a page, of a bounded size."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import soundfile

from audiot.data.audio import resample

RATE = 16_000  # Hz, at most


def clip(path: Path, seconds: float) -> str:
    """The beginning of a mono audio file as the data URI of a 16-bit WAV.

    Args:
        path: The file.
        seconds: How much of it, at most.

    Raises:
        OSError: it can't be read.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            samples = file.read(round(seconds * rate), dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise OSError(f"{path} can't be read: {error}") from error
    if rate > RATE:
        samples, rate = resample(samples, rate, RATE), RATE
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(samples, -1, 1), rate, subtype="PCM_16", format="WAV")
    return f"data:audio/wav;base64,{base64.b64encode(stream.getvalue()).decode()}"
