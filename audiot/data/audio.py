"""Audio files: found, opened and read to their end. Preparation, prediction and extraction share what is here.

No header is believed. What an MP3, Ogg or FLAC holds is told by its frames and pages, every whole file is decoded until nothing
comes any more, and a header that says more or less than there is ends in a `BadAudioError` that names the reason.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import soundfile
import soxr

from audiot.base.files import name_bytes, name_text
from audiot.data.sources import is_prepared

READABLE = ("wav", "wave", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "snd", "caf", "w64", "rf64", "sph")
# Audio too, but soundfile can't read it: such files are reported as unreadable rather than passed over.
UNREADABLE = ("m4a", "aac", "mp4", "wma", "webm", "amr", "ape", "wv")

SHORTFALL_S = 0.08  # a decoder may stop one lossy frame early (MP3 at 8 kHz: 576 samples); with less, it was cut off
MIN_DURATION_S = 0.1
SILENCE_DBFS = -70.0

# What one utterance may cost, whatever its header says.
MAX_SAMPLES = 2**29  # 9.3 hours at 16 kHz, 3.1 at 48 kHz; 2 GiB of float32
MAX_DECODE_S = 3600.0
MAX_SAMPLES_PER_BYTE = 8192  # FLAC comes closest: 65,535 equal samples in 13 bytes
SAMPLE_RATES = (1_000, 1_000_000)  # Hz
BLOCK = 2**18  # values that are decoded at a time, of all channels together
LOUDEST = 8.0  # of floats: resampling and mixing exceed 1 a little, 16-bit integers by far
UNKNOWN = 2**62  # libsndfile gives 2^63 - 1 where it doesn't know the number of samples


class BadAudioError(Exception):
    """Audio that can't be used; its message is the reason that rejected.csv gives: a kind, then ``: details``."""


def reason(error: BaseException) -> str:
    """The first line that says something: Lhotse adds pages of context."""
    text = getattr(error, "error_string", None) or str(error)
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _named() -> Iterator[None]:
    """Make whatever a decoder raises a `BadAudioError`: a broken file may break it in any way."""
    try:
        yield
    except BadAudioError:
        raise
    except MemoryError:
        raise BadAudioError("unreadable: it does not fit into the memory") from None
    except Exception as error:
        raise BadAudioError(f"unreadable: {reason(error)}") from None


# Finding


def find_audio(root: str | Path, suffixes: Iterable[str] = (*READABLE, *UNREADABLE)) -> list[str]:
    """Paths of the audio files below a folder, '/' between folders, sorted; the same under any locale (see `name_text`).

    Linked folders are followed, and read once where several ways lead to them. Names that begin with a dot are passed over, and
    so are prepared corpora below the folder.

    Args:
        root: The folder.
        suffixes: Suffixes of audio files, lower case, without dot.

    Raises:
        FileNotFoundError: there is none.
        OSError: a folder can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    suffixes = set(suffixes)
    top = name_bytes(root)
    paths: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if folder != top and is_prepared(names):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(b"."))
        below = os.path.relpath(folder, top)
        for name in names:
            if not name.startswith(b".") and os.fsdecode(name).rpartition(".")[2].lower() in suffixes:
                paths.append(os.path.normpath(os.path.join(below, name)))
    if not paths:
        raise FileNotFoundError(f"{root} has no audio files ({', '.join(sorted(suffixes))})")
    return [path.decode("utf-8", "surrogateescape").replace(os.sep, "/") for path in sorted(paths)]


def audio_files(name: str | Path) -> list[str]:
    """The file of that name, or all audio below the folder of that name (see `find_audio`).

    Raises:
        FileNotFoundError: the folder has none.
    """
    name = name_text(name)
    return [str(Path(name, path)) for path in find_audio(name)] if os.path.isdir(name_bytes(name)) else [name]


# Opening


class _Part(NamedTuple):
    """Bytes of a file that make a file for a decoder: ``head``, then those from ``start`` to ``stop``."""

    start: int
    stop: int
    head: bytes = b""


class _View(io.RawIOBase):
    """A `_Part` to read from. What the system raises is kept in ``error``, as C code calls this."""

    def __init__(self, descriptor: int, part: _Part) -> None:
        self.descriptor = descriptor
        self.part = part
        self.size = len(part.head) + part.stop - part.start
        self.position = 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self.position))
        data = self.part.head[self.position : self.position + count]
        if len(data) < count:
            behind = self.position + len(data) - len(self.part.head)
            try:
                data += os.pread(self.descriptor, count - len(data), self.part.start + behind)
            except OSError as error:
                self.error = error
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class _Forward(soundfile.SoundFile):
    """Read from front to back: soundfile else seeks after each read, which a stream of unknown length refuses."""

    def seekable(self) -> bool:
        return False


class AudioFile:
    """A regular file of audio, opened; ``with`` closes it.

    Args:
        path: The file. Text stands for its bytes in UTF-8, under any locale.

    Attributes:
        sample_rate: Hz.
        channels: How many.
        format: Container and coding, as soundfile names them: ``("WAV", "PCM_16")``.

    Raises:
        BadAudioError: missing, not a regular file, unreadable, truncated, empty, or longer than its header or `MAX_SAMPLES`.
    """

    def __init__(self, path: str | Path) -> None:
        self._descriptor, self._size = _open(path)
        try:
            with _named():
                self._look()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back to the system."""
        os.close(self._descriptor)

    def _look(self) -> None:
        # What decoders read: the file as it is (None), or parts of it.
        self._parts: list[_Part | None] = [None]
        self._unbounded: _Part | None = None  # for reading a FLAC to its end
        self._lengths: list[int | None] = []
        with open(self._descriptor, "rb", closefd=False) as stream:
            start = _behind_tags(stream)
            stream.seek(start)
            magic = stream.read(42)
            is_mpeg = _mpeg_frame(magic) is not None
            if magic[:4] == b"OggS":
                self._parts = _ogg_parts(stream, self._size)
            elif is_mpeg:
                self._parts = _mpeg_parts(stream, start, self._size)
            elif magic[:4] == b"fLaC" and len(magic) == 42:
                self._unbounded = _flac_without_length(magic, start, self._size)
            sizes = _chunk_sizes(stream, magic, start, self._size)
        for part in self._parts:
            with self._decoder(part) as file:
                form = (file.samplerate, file.channels)
                if not self._lengths:
                    self.sample_rate, self.channels = form
                    self.format = (file.format, file.subtype)
                    if not SAMPLE_RATES[0] <= self.sample_rate <= SAMPLE_RATES[1]:
                        raise BadAudioError(f"absurd sample rate: {self.sample_rate} Hz")
                if form != (self.sample_rate, self.channels):
                    raise BadAudioError(_changes(self.sample_rate, self.channels, *form))
                if file.format == "MP3" and not is_mpeg:
                    raise BadAudioError(f"unreadable: no frame of MPEG audio at byte {start}")
                if sizes and sizes.behind * file.frames > SHORTFALL_S * file.samplerate * sizes.audio:
                    raise BadAudioError(f"longer than its header says: {sizes.behind} bytes lie behind its end, joined perhaps")
                self._lengths.append(None if file.frames >= UNKNOWN else file.frames)
        declared = sum(length for length in self._lengths if length)
        if declared > MAX_SAMPLES_PER_BYTE * self._size:
            raise BadAudioError(f"truncated: its header says {declared} samples, more than its {self._size} bytes can hold")
        check_budget(declared)
        if declared == 0 and None not in self._lengths:
            raise BadAudioError("empty: 0 samples")

    @contextmanager
    def _decoder(self, part: _Part | None) -> Iterator[_Forward]:
        if part is None:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            with _Forward(self._descriptor, closefd=False) as file:
                yield file
            return
        view = _View(self._descriptor, part)
        try:
            with _Forward(view) as file:
                yield file
        finally:
            if view.error is not None:
                raise view.error

    @cached_property
    def num_samples(self) -> int:
        """Samples of a channel; counted by decoding where the header doesn't tell.

        Raises:
            BadAudioError: as of `blocks`.
        """
        if None in self._lengths:
            return sum(map(len, self.blocks()))
        return sum(length for length in self._lengths if length)

    def blocks(self, start: int = 0, num_samples: int | None = None) -> Iterator[np.ndarray]:
        """Decode: blocks (n, channels) of float32, one after the other.

        Args:
            start: First sample.
            num_samples: How many; None: all there are.

        Raises:
            BadAudioError: unreadable, truncated, longer than its header, or over the budget (`MAX_SAMPLES`, `MAX_DECODE_S`).
        """
        until = time.monotonic() + MAX_DECODE_S
        count = 0
        with _named():
            for block in self._all() if num_samples is None else self._piece(start, num_samples):
                count += len(block)
                check_budget(count)
                if time.monotonic() > until:
                    raise BadAudioError(f"unreadable: decoding takes longer than {MAX_DECODE_S:g} s")
                yield block
        if count == 0:
            raise BadAudioError("empty: 0 samples")

    def _all(self) -> Iterator[np.ndarray]:
        for part, length in zip(self._parts, self._lengths, strict=True):
            with self._decoder(self._unbounded or part) as file:
                count = 0
                for block in _read(file, length):
                    count += len(block)
                    yield block
                if length is not None and length - count > SHORTFALL_S * self.sample_rate:
                    raise BadAudioError(f"truncated: {count} samples of {length}")
                if self._unbounded and count == length and self._goes_on(file):
                    raise BadAudioError(f"longer than its header says: more than {length} samples")

    def _goes_on(self, file: soundfile.SoundFile) -> bool:
        """Whether audio comes behind the last sample that a FLAC's header gives. A tag breaks its decoder, and does no harm."""
        assert self._unbounded is not None
        try:
            return len(file.read(4096)) > 0
        except soundfile.SoundFileError:
            with open(self._descriptor, "rb", closefd=False) as stream:
                return _find(stream, re.compile(rb"fLaC[\x00\x80]\x00\x00\x22"), self._unbounded.start) is not None

    def _piece(self, start: int, num_samples: int) -> Iterator[np.ndarray]:
        check_budget(num_samples)
        left = num_samples
        for part, length in zip(self._parts, self._lengths, strict=True):
            if length is not None and start >= length:
                start -= length
                continue
            with self._decoder(part if length is not None else self._unbounded) as file:
                if start and length is None:  # it can't be sought in
                    for _ in _read(file, start):
                        pass
                elif start:
                    file.seek(start)
                for block in _read(file, left if length is None else min(left, length - start)):
                    left -= len(block)
                    yield block
            start = 0
            if not left:
                return
        if left > SHORTFALL_S * self.sample_rate:
            raise BadAudioError(f"truncated: {num_samples - left} samples of {num_samples}")

    def read_mono(self, channels: Sequence[int] | None = None, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """Samples (N,) in float32, the average of ``channels`` (None: all). Arguments and errors are those of `blocks`."""
        chosen = slice(None) if channels is None else list(channels)
        with np.errstate(invalid="ignore"):  # infinities that cancel make a NaN, which is refused later
            means = [block[:, chosen].mean(axis=1) for block in self.blocks(start, num_samples)]
        with _named():
            return np.concatenate(means)


def _open(path: str | Path) -> tuple[int, int]:
    """Descriptor and size of a regular file; a pipe or a device, which might be waited for for ever, is not opened."""
    try:
        name = name_bytes(path)
        # Another kind may have taken the name between the two calls; O_NONBLOCK then doesn't wait.
        if stat.S_ISREG(os.stat(name).st_mode):
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size:
                return descriptor, status.st_size
            os.close(descriptor)
            if stat.S_ISREG(status.st_mode):
                raise BadAudioError("empty: 0 bytes")
    except (FileNotFoundError, NotADirectoryError):
        raise BadAudioError("missing") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name, or half a character
        raise BadAudioError(f"unreadable: {getattr(error, 'strerror', None) or error}") from None
    raise BadAudioError("not a regular file")


def check_file(path: str | Path) -> None:
    """Look at a file that another library is to read, which might wait for a pipe for ever.

    Raises:
        BadAudioError: missing, not a regular file, not permitted, or empty.
    """
    os.close(_open(path)[0])


def _read(file: soundfile.SoundFile, num_samples: int | None) -> Iterator[np.ndarray]:
    """Blocks (n, channels) until so many samples were read, or all."""
    left = math.inf if num_samples is None else num_samples
    size = max(1, BLOCK // file.channels)
    while left and len(block := file.read(int(min(left, size)), dtype="float32", always_2d=True)):
        left -= len(block)
        yield block


def check_budget(num_samples: int) -> None:
    """Refuse more samples than `MAX_SAMPLES`.

    Raises:
        BadAudioError: they are more.
    """
    if num_samples > MAX_SAMPLES:
        raise BadAudioError(f"too long: more than {MAX_SAMPLES:,} samples: cut it into pieces")


def _changes(rate: int, channels: int, new_rate: int, new_channels: int) -> str:
    return f"joined of unlike parts: {rate} Hz, {channels} channels, then {new_rate} Hz, {new_channels} channels"


def _find(stream: IO[bytes], pattern: re.Pattern[bytes], position: int) -> int | None:
    """Where a pattern of at most 16 bytes occurs from ``position`` on."""
    stream.seek(position)
    window = b""
    while block := stream.read(2**20):
        window = window[-15:] + block
        if found := pattern.search(window):
            return stream.tell() - len(window) + found.start()
    return None


# Chunks of WAV (RIFF, RF64), AIFF, W64, CAF, and the header of AU


class _Sizes(NamedTuple):
    """Bytes of audio, and of what lies behind that is no chunk."""

    audio: int
    behind: int


CHUNKS = {  # magic → where they begin, what each begins with (name, length), to what they are aligned
    b"RIFF": (12, "<4sI", 2),
    b"RIFX": (12, ">4sI", 2),
    b"RF64": (12, "<4sI", 2),
    b"FORM": (12, ">4sI", 2),
    b"riff": (40, "<16sQ", 8),
    b"caff": (8, ">4sQ", 1),
}


def _chunk_sizes(stream: IO[bytes], magic: bytes, start: int, size: int) -> _Sizes | None:
    """Compare the length in the header with the file's own, of which libsndfile takes the smaller one and says nothing.

    None: not such a file, or a length that was left open, as by a program that writes to a pipe.

    Raises:
        BadAudioError: the file ends before its audio.
    """
    if magic[:4] == b".snd":
        begin, length = struct.unpack(">II", magic[4:12].ljust(8, b"\xff"))
        return _audio_size(length, 0x7FFF0000, size - start - begin)
    if magic[:4] not in CHUNKS:
        return None
    at, head, alignment = CHUNKS[magic[:4]]
    head_size = struct.calcsize(head)
    sizes, long_length = None, None
    while at + head_size <= size - start:
        stream.seek(start + at)
        name, length = struct.unpack(head, stream.read(head_size))
        if magic[:4] == b"riff":  # it counts its own head
            length = max(0, length - head_size)
        left = size - start - at - head_size
        if name == b"ds64":
            long_length = int.from_bytes(stream.read(16)[8:], "little")
        if sizes is None and name[:4] in (b"data", b"SSND"):
            is_long = length == 0xFFFFFFFF and bool(long_length)
            length = long_length if is_long and long_length else length
            sizes = _audio_size(length, 0x7FFF0000 if head[-1] == "I" and not is_long else 2**62, left)
            if sizes is None:
                return None
        elif length > left or name[:4] == magic[:4] or not all(32 <= letter < 127 for letter in name[:4]):
            break
        at += head_size + length + -length % alignment
    return sizes and _Sizes(sizes.audio, max(0, size - start - at))


def _audio_size(length: int, open_from: int, left: int) -> _Sizes | None:
    if length >= open_from:
        return None
    if length > left:
        raise BadAudioError(f"truncated: the header says {length} bytes, the file has {left}")
    return _Sizes(length, left - length)


# Tags, which may lie before and behind the audio of an MP3 or FLAC


def _tag(stream: IO[bytes], position: int) -> int:
    """Bytes of the ID3 or APE tag at a position, 0 where there is none."""
    stream.seek(position)
    head = stream.read(16)
    if head[:3] == b"ID3" and len(head) >= 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return size + (20 if head[5] & 0x10 else 10)
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX" and len(head) == 16:
        return int.from_bytes(head[12:16], "little") + 32  # it names the size of items and footer
    return 0


def _behind_tags(stream: IO[bytes]) -> int:
    position = 0
    while size := _tag(stream, position):
        position += size
    return position


# FLAC (RFC 9639)


def _flac_without_length(magic: bytes, start: int, size: int) -> _Part:
    """The stream with a header that leaves the number of samples open, so that it is decoded to its end."""
    head = bytearray(magic[:26])  # the last 36 bits are the number
    head[21] &= 0xF0
    head[22:26] = bytes(4)
    return _Part(start + 26, size, bytes(head))


# Ogg (RFC 3533)


def _ogg_parts(stream: IO[bytes], size: int) -> list[_Part | None]:
    """The streams that follow each other in an Ogg file: libsndfile reads the first alone.

    Raises:
        BadAudioError: a stream does not end with a page that is marked as its last, its positions go back, or there is
            something else between pages.
    """
    starts: list[int] = []
    positions: dict[bytes, int] = {}  # of each logical stream, in samples
    at = 0
    begins = last = False  # what the page before was
    while at < size:
        stream.seek(at)
        page = stream.read(27)
        if page[:4] != b"OggS"[: len(page)]:
            if not last or _find(stream, re.compile(b"OggS"), at) is not None:
                raise BadAudioError(f"unreadable: no Ogg page at byte {at}")
            size = at  # a tag, say
            break
        if len(page) < 27:
            break
        if page[5] & 2 and not begins:
            if starts and not last:
                raise BadAudioError("truncated: an Ogg stream has no last page")
            starts.append(at)
            positions = {}
        begins, last = bool(page[5] & 2), bool(page[5] & 4)
        (position,) = struct.unpack("<q", page[6:14])
        if position != -1 and position < positions.get(page[14:18], 0):
            raise BadAudioError(f"unreadable: the Ogg page at byte {at} goes back in time")
        positions[page[14:18]] = max(position, positions.get(page[14:18], 0))
        at += 27 + page[26] + sum(stream.read(page[26]))
    if not last or at != size:
        raise BadAudioError("truncated: the Ogg stream has no last page")
    return [_Part(start, stop) for start, stop in zip(starts, [*starts[1:], size], strict=True)] if starts[1:] else [None]


# MPEG audio (ISO 11172-3, 13818-3)


class _Frame(NamedTuple):
    """What the header of a frame says."""

    size: int  # bytes
    num_samples: int
    sample_rate: int  # Hz
    channels: int
    layer: int
    tag_at: int  # where a Xing tag would be


KBIT_PER_S = {  # by MPEG 1 or 2, and layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MPEG_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # MPEG 1, 2, 2.5


def _mpeg_frame(header: bytes) -> _Frame | None:
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer, no_crc = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3), header[1] & 1
    bits, rate, padding, mono = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1, header[3] >> 6 == 3
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:  # reserved, or a size that only the next frame tells
        return None
    one = version == 3
    bits_per_s = 1000 * KBIT_PER_S[1 if one else 2, layer][bits - 1]
    sample_rate = MPEG_RATES[version][rate]
    num_samples = 384 if layer == 1 else 1152 if one or layer == 2 else 576
    slots = num_samples // (32 if layer == 1 else 8) * bits_per_s // sample_rate + padding
    side = (17 if mono else 32) if one else (9 if mono else 17)
    return _Frame(
        slots * (4 if layer == 1 else 1), num_samples, sample_rate, 1 if mono else 2, layer, 4 + side + (0 if no_crc else 2)
    )


def _mpeg_frames(stream: IO[bytes], at: int, size: int) -> Iterator[tuple[int, _Frame, bytes]]:
    """Place, header and first bytes of every whole frame; tags and junk between them are passed over."""
    while at < size:
        stream.seek(at)
        head = stream.read(64)
        if frame := _mpeg_frame(head):
            if at + frame.size <= size:
                yield at, frame, head
            at += frame.size
        else:
            tag = _tag(stream, at)
            at = at + tag if tag else _next_mpeg_frame(stream, at + 1, size)


def _next_mpeg_frame(stream: IO[bytes], at: int, size: int) -> int:
    """Where the next frame that is followed by one of its kind begins; the end of the file if there is none."""
    sync = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]", re.S)
    while (found := _find(stream, sync, at)) is not None:
        stream.seek(found)
        frame = _mpeg_frame(stream.read(4))
        if frame:
            stream.seek(found + frame.size)
            behind = _mpeg_frame(stream.read(4))
            if behind and behind[2:5] == frame[2:5]:
                return found
        at = found + 1
    return size


@dataclass
class _MpegStream:
    """Frames that follow each other without anything between."""

    start: int  # of its audio
    stop: int
    frame: _Frame
    header: bytes = b""  # of its first frame of audio
    tag: bytes = b""  # the frame in front that has a Xing tag, and no audio
    num_frames: int = 0
    steady: bool = True  # one bit rate


def _mpeg_parts(stream: IO[bytes], start: int, size: int) -> list[_Part | None]:
    """The streams of an MPEG file, each with a header that says how many frames it has.

    A decoder believes a Xing tag, or else the bit rate of the first frame, and stops there. So the frames are counted, and
    where they are more than is said, the decoder gets a true tag.

    Raises:
        BadAudioError: a Xing tag says more than there is, or the streams are of different kinds.
    """
    streams: list[_MpegStream] = []
    for at, frame, head in _mpeg_frames(stream, start, size):
        first = streams[0].frame if streams else frame
        if frame[2:5] != first[2:5]:
            raise BadAudioError(_changes(first.sample_rate, first.channels, frame.sample_rate, frame.channels))
        is_tag = frame.layer == 3 and head[frame.tag_at : frame.tag_at + 4] in (b"Xing", b"Info")
        if is_tag or not streams or at != streams[-1].stop:
            streams.append(_MpegStream(at, at, frame))
        own = streams[-1]
        own.stop = at + frame.size
        if is_tag:
            stream.seek(at)
            own.start, own.tag = own.stop, stream.read(frame.size)
        else:
            own.header = own.header or head[:4]
            own.num_frames += 1
            own.steady = own.steady and abs(frame.size - own.frame.size) <= 4  # of padding
    parts: list[_Part | None] = [part for own in streams if (part := _mpeg_part(own)) is not None]
    if not parts:
        raise BadAudioError("unreadable: no frame of MPEG audio")
    return [None] if parts == [_Part(start, streams[0].stop)] else parts


def _mpeg_part(stream: _MpegStream) -> _Part | None:
    frame, tag, at = stream.frame, bytearray(stream.tag), stream.frame.tag_at
    if frame.layer < 3:
        if not stream.steady:
            raise BadAudioError(f"unreadable: MPEG layer {frame.layer} with a variable bit rate")
        return _Part(stream.start, stream.stop)
    flags, declared = struct.unpack(">II", tag[at + 4 : at + 12]) if len(tag) >= at + 16 else (0, 0)
    if flags & 1 and (declared - stream.num_frames) * frame.num_samples > SHORTFALL_S * frame.sample_rate:
        raise BadAudioError(f"truncated: its header says {declared} frames, it has {stream.num_frames}")
    if stream.num_frames == 0:
        return None
    if flags & 1 and declared >= stream.num_frames:
        return _Part(stream.start - len(tag), stream.stop)
    if flags & 1:  # kept, as it says how many samples an encoder put around the audio
        tag[at + 8 : at + 12] = struct.pack(">I", stream.num_frames)
        if flags & 2:
            tag[at + 12 : at + 16] = struct.pack(">I", stream.stop - stream.start + len(tag))
    else:
        tag = bytearray(_xing_frame(stream.header, stream.num_frames))
    return _Part(stream.start, stream.stop, bytes(tag))


def _xing_frame(header: bytes, num_frames: int) -> bytes:
    """A frame without audio whose tag gives the number of those that follow."""
    # No CRC, no padding, and the eighth of the bit rates, with which a tag fits into a frame of any sample rate.
    header = bytes([header[0], header[1] | 1, 0x80 | header[2] & 0x0C, header[3]])
    frame = _mpeg_frame(header)
    assert frame is not None
    return (header.ljust(frame.tag_at, b"\0") + b"Info" + struct.pack(">II", 1, num_frames)).ljust(frame.size, b"\0")


# What is heard


def check_duration(
    num_samples: int, sample_rate: int, min_duration_s: float = MIN_DURATION_S, max_duration_s: float | None = None
) -> None:
    """Refuse an utterance that is empty, too short or too long.

    Raises:
        BadAudioError: it is.
    """
    duration = num_samples / sample_rate
    if num_samples == 0:
        raise BadAudioError("empty: 0 samples")
    if duration < min_duration_s:
        raise BadAudioError(f"too short: {duration:.3f} s, min_duration_s is {min_duration_s:g}")
    if max_duration_s is not None and duration > max_duration_s:
        raise BadAudioError(f"too long: {duration:.3f} s, max_duration_s is {max_duration_s:g}")


def check_sound(mono: np.ndarray, silence_dbfs: float = SILENCE_DBFS) -> None:
    """Refuse samples (N,) that are not finite, or silent: of an RMS below ``silence_dbfs``; a full-scale square wave has 0.

    Raises:
        BadAudioError: they are.
    """
    if not np.isfinite(mono).all():
        raise BadAudioError("non-finite samples")
    rms = math.sqrt(np.mean(np.square(mono, dtype=np.float64)))
    if rms < 10 ** (silence_dbfs / 20):
        level = f"{20 * math.log10(rms):.1f} dBFS" if rms else "all zeros"
        raise BadAudioError(f"silent: {level}, silence_dbfs is {silence_dbfs:g}")


def resample(mono: np.ndarray, sample_rate: int, new_rate: int) -> np.ndarray:
    """Samples (N,) at another rate."""
    return mono if sample_rate == new_rate else soxr.resample(mono, sample_rate, new_rate, quality="HQ")


def heard(mono: np.ndarray, sample_rate: int, new_rate: int, silence_dbfs: float = SILENCE_DBFS) -> np.ndarray:
    """Samples (N,) at another rate, if they are fit to be heard by a model: what preparation accepts by default.

    Raises:
        BadAudioError: too short, non-finite or silent.
    """
    check_duration(len(mono), sample_rate)
    check_sound(mono, silence_dbfs)
    return resample(mono, sample_rate, new_rate)


def as_mono(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Samples (N,) or (N, channels) of floats in [-1, 1] or 16-bit integers as their average (N,) in float32.

    Raises:
        BadAudioError: they are something else.
    """
    samples = np.asarray(samples)
    expected = "samples must be (N,) or (N, channels) of floats in [-1, 1] or 16-bit integers"
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 0 < samples.shape[1] <= max(1, samples.shape[0])):
        raise BadAudioError(f"{expected}, found the shape {samples.shape}")
    if samples.dtype != np.int16 and not np.issubdtype(samples.dtype, np.floating):
        raise BadAudioError(f"{expected}, found {samples.dtype}")
    whole = isinstance(sample_rate, (int, np.integer)) and not isinstance(sample_rate, bool)
    if not whole or not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise BadAudioError(f"the sample rate must be a whole number of Hz, {SAMPLE_RATES[0]:,} at least, found {sample_rate!r}")
    check_budget(len(samples))
    floats = samples.astype(np.float32) / (32768 if samples.dtype == np.int16 else 1)
    with np.errstate(invalid="ignore"):
        mono = floats if floats.ndim == 1 else floats.mean(axis=1)
    if np.isfinite(mono).all() and len(mono) and (peak := float(np.abs(mono).max())) > LOUDEST:
        raise BadAudioError(f"{expected}, found values up to {peak:g}")
    return mono


def read_audio(path: str | Path, sample_rate: int, silence_dbfs: float = SILENCE_DBFS) -> np.ndarray:
    """The samples (N,) of an audio file in float32: the average of its channels, at ``sample_rate``.

    Raises:
        BadAudioError: missing, unreadable, truncated, too short, non-finite, silent, …: the message is the reason.
    """
    with AudioFile(path) as file:
        return heard(file.read_mono(), file.sample_rate, sample_rate, silence_dbfs)
