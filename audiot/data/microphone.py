"""Sound of a microphone, through PortAudio."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

BLOCK_S = 0.05
MOST_S = 60.0  # of sound that waits to be read
SILENT_S = 3.0  # a microphone that works gives a block every 50 ms


class Block(NamedTuple):
    """Sound that came since the last block: ``samples`` (n,), and whether some before them are ``lost``."""

    samples: np.ndarray
    lost: bool = False


class Microphone:
    """An opened microphone. Iterating gives a `Block` whenever there is sound; ``with`` closes it.

    All that waits comes in one block, so a reader that was busy catches up in one step.

    Args:
        name: Number or a part of the name of the input; None: the default one.

    Attributes:
        name: Name of the input.
        sample_rate: Its sample rate in Hz.

    Raises:
        ImportError: sounddevice is not installed.
        ValueError: PortAudio is missing, there is no such input, or it can't be opened.
    """

    def __init__(self, name: str | None = None) -> None:
        self._library = _sounddevice()
        device = int(name) if name is not None and name.isdecimal() else name
        try:
            found = self._library.query_devices(device, "input")
            self.name: str = found["name"]
            self.sample_rate = round(found["default_samplerate"])
            self._waiting: queue.Queue[Block | None] = queue.Queue(round(MOST_S / BLOCK_S))
            self._lost = False
            self._stream = self._library.InputStream(
                samplerate=self.sample_rate,
                blocksize=round(BLOCK_S * self.sample_rate),
                device=device,
                channels=min(2, found["max_input_channels"]),  # some inputs have no single channel
                dtype="float32",
                callback=self._take,
                finished_callback=self._finish,
            )
        except (ValueError, self._library.PortAudioError) as error:
            wanted = "no microphone can be used" if name is None else f"--input {name} can't be used"
            raise ValueError(f"{wanted}: {' '.join(str(error).split())}; {self._inputs()}") from error

    def __enter__(self) -> Microphone:
        try:
            self._stream.start()
        except self._library.PortAudioError as error:
            self._stream.close()
            raise ValueError(f"the microphone {self.name} can't be started: {' '.join(str(error).split())}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Block]:
        """Blocks without an end.

        Raises:
            ValueError: the microphone gives no sound any more.
        """
        while True:
            try:
                blocks = [self._waiting.get(timeout=SILENT_S)]
                while not self._waiting.empty():
                    blocks.append(self._waiting.get_nowait())
            except queue.Empty:
                blocks = [None]
            whole = [block for block in blocks if block is not None]
            if whole:
                yield Block(np.concatenate([block.samples for block in whole]), any(block.lost for block in whole))
            if len(whole) < len(blocks):
                raise ValueError(
                    f"the microphone {self.name} gives no sound any more: plug it in again, or choose another --input"
                )

    def _take(self, samples: np.ndarray, count: int, times: Any, status: Any) -> None:
        """What PortAudio calls, in a thread of its own, with samples (count, channels)."""
        block = Block(samples.mean(axis=1), self._lost or bool(status.input_overflow))
        try:
            self._waiting.put_nowait(block)
            self._lost = False
        except queue.Full:
            self._lost = True

    def _finish(self) -> None:
        """What PortAudio calls when the stream has ended."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:  # the reader will wait in vain, and say so
            self._lost = True

    def _inputs(self) -> str:
        """The inputs that there are, in words."""
        found = [
            f"{number} ({device['name']})"
            for number, device in enumerate(self._library.query_devices())
            if device["max_input_channels"]
        ]
        return f"inputs: {', '.join(found)}" if found else "this machine has no input"


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        message = "--microphone needs sounddevice: pip install 'audiot[microphone]'"
        raise ModuleNotFoundError(message, name="sounddevice") from error
    except OSError as error:
        raise ValueError(
            f"--microphone needs PortAudio ({error}): install it (apt install libportaudio2, dnf install portaudio)"
        ) from error
    return sounddevice
