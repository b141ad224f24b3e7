"""Finding, opening and decoding audio files. Preparation, prediction and extraction use this module.

Headers are not trusted. The content of an MP3, Ogg or FLAC follows from its frames and pages, and a whole file is decoded to its
real end. A header that declares more or less than the file holds raises a `BadAudioError` with the reason.
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
# Other audio that soundfile cannot read. Such files are reported as unreadable, not ignored.
UNREADABLE = ("m4a", "aac", "mp4", "wma", "webm", "amr", "ape", "wv")

SHORTFALL_S = 0.08  # a decoder may stop one frame early (MP3 at 8 kHz: 576 samples); more means a truncated file
MIN_DURATION_S = 0.1
SILENCE_DBFS = -70.0

# Limits for one utterance, whatever its header says.
MAX_SAMPLES = 2**29  # 9.3 hours at 16 kHz, 3.1 at 48 kHz; 2 GiB of float32
MAX_DECODE_S = 3600.0
MAX_SAMPLES_PER_BYTE = 8192  # FLAC comes closest, with 65,535 equal samples in 13 bytes
SAMPLE_RATES = (1_000, 1_000_000)  # Hz
BLOCK = 2**18  # values decoded at a time, over all channels
LOUDEST = 8.0  # limit for floats: resampling and mixing exceed 1 a little, unscaled integers by far
UNKNOWN = 2**62  # libsndfile gives 2^63 - 1 for an unknown number of samples


class BadAudioError(Exception):
    """Audio that cannot be used. The message is the reason in rejected.csv: a kind, then ``: details``."""


def reason(error: BaseException) -> str:
    """The first informative line of an error. Lhotse adds pages of context."""
    text = getattr(error, "error_string", None) or str(error)
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _named() -> Iterator[None]:
    """Turn any error of a decoder into a `BadAudioError`, because a broken file may cause any error."""
    try:
        yield
    except BadAudioError:
        raise
    except MemoryError:
        raise BadAudioError("unreadable: it does not fit into memory") from None
    except Exception as error:
        raise BadAudioError(f"unreadable: {reason(error)}") from None


# Finding


def find_audio(root: str | Path, suffixes: Iterable[str] = (*READABLE, *UNREADABLE)) -> list[str]:
    """Sorted paths of the audio files below a folder, with '/' as separator, equal under any locale (see `name_text`).

    Linked folders are followed, and read once if several links lead to them. Names that begin with a dot and prepared corpora
    below the folder are skipped.

    Args:
        root: Folder to search.
        suffixes: Suffixes of audio files, in lower case and without a dot.

    Raises:
        FileNotFoundError: there are no audio files.
        OSError: a folder cannot be read.
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
    """The named file, or all audio files below the named folder (see `find_audio`).

    Raises:
        FileNotFoundError: the folder has no audio files.
    """
    name = name_text(name)
    return [str(Path(name, path)) for path in find_audio(name)] if os.path.isdir(name_bytes(name)) else [name]


# Opening


class _Part(NamedTuple):
    """Bytes of a file that a decoder reads as a file of their own: ``head``, then bytes ``start`` to ``stop``."""

    start: int
    stop: int
    head: bytes = b""


class _View(io.RawIOBase):
    """File object over a `_Part`. C code calls it, so an OSError is stored in ``error`` instead of raised."""

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
    """SoundFile that reads forward only. soundfile would seek after each read, which fails in a stream of unknown length."""

    def seekable(self) -> bool:
        return False


class AudioFile:
    """An opened audio file. It must be a regular file, and ``with`` closes it.

    Args:
        path: Path of the file. Text is encoded in UTF-8, under any locale.

    Attributes:
        sample_rate: Sample rate in Hz.
        channels: Number of channels.
        format: Container and coding as soundfile names them, such as ``("WAV", "PCM_16")``.

    Raises:
        BadAudioError: the file is missing, not regular, unreadable, truncated, empty, or longer than its header or `MAX_SAMPLES`.
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
        """Close the file."""
        os.close(self._descriptor)

    def _look(self) -> None:
        # Parts of the file that decoders read; None stands for the whole file.
        self._parts: list[_Part | None] = [None]
        self._unbounded: _Part | None = None  # for decoding a FLAC to its real end
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

    @property
    def declared(self) -> int | None:
        """Samples per channel by the headers of its parts; None if one does not tell. Nothing is decoded."""
        known = [length for length in self._lengths if length is not None]
        return sum(known) if len(known) == len(self._lengths) else None

    @cached_property
    def num_samples(self) -> int:
        """Samples per channel. If the header does not tell, they are counted by decoding.

        Raises:
            BadAudioError: same errors as `blocks`.
        """
        return sum(map(len, self.blocks())) if self.declared is None else self.declared

    def blocks(self, start: int = 0, num_samples: int | None = None) -> Iterator[np.ndarray]:
        """Decode to successive blocks (n, channels) of float32.

        Args:
            start: First sample.
            num_samples: Number of samples; None means all.

        Raises:
            BadAudioError: the file is unreadable, truncated, longer than its header, or over `MAX_SAMPLES` or `MAX_DECODE_S`.
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
        """Whether a FLAC has audio behind the last sample of its header. A tag there stops the decoder and is harmless."""
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
                if start and length is None:  # it is not seekable
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
        """Samples (N,) in float32, averaged over ``channels`` (None: all). Arguments and errors are those of `blocks`."""
        chosen = slice(None) if channels is None else list(channels)
        with np.errstate(invalid="ignore"):  # inf - inf gives NaN, which is refused later
            means = [block[:, chosen].mean(axis=1) for block in self.blocks(start, num_samples)]
        with _named():
            return np.concatenate(means)


def _open(path: str | Path) -> tuple[int, int]:
    """Descriptor and size of a regular file. Pipes and devices are not opened, because reading them may block forever."""
    try:
        name = name_bytes(path)
        # The file may be replaced by a pipe between the two calls. O_NONBLOCK then prevents blocking.
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
    except (OSError, ValueError) as error:  # ValueError: a zero byte or a lone surrogate in the name
        raise BadAudioError(f"unreadable: {getattr(error, 'strerror', None) or error}") from None
    raise BadAudioError("not a regular file")


def check_file(path: str | Path) -> None:
    """Check a file before another library reads it, which could block forever on a pipe.

    Raises:
        BadAudioError: the file is missing, not regular, not permitted or empty.
    """
    os.close(_open(path)[0])


def _read(file: soundfile.SoundFile, num_samples: int | None) -> Iterator[np.ndarray]:
    """Blocks (n, channels) up to a number of samples, or to the end."""
    left = math.inf if num_samples is None else num_samples
    size = max(1, BLOCK // file.channels)
    while left and len(block := file.read(int(min(left, size)), dtype="float32", always_2d=True)):
        left -= len(block)
        yield block


def check_budget(num_samples: int) -> None:
    """Refuse more samples than `MAX_SAMPLES`.

    Raises:
        BadAudioError: there are more.
    """
    if num_samples > MAX_SAMPLES:
        raise BadAudioError(f"too long: more than {MAX_SAMPLES:,} samples: cut it into pieces")


def _changes(rate: int, channels: int, new_rate: int, new_channels: int) -> str:
    return f"joined of unlike parts: {rate} Hz, {channels} channels, then {new_rate} Hz, {new_channels} channels"


def _find(stream: IO[bytes], pattern: re.Pattern[bytes], position: int) -> int | None:
    """Position of the first match, from ``position`` on, of a pattern of at most 16 bytes."""
    stream.seek(position)
    window = b""
    while block := stream.read(2**20):
        window = window[-15:] + block
        if found := pattern.search(window):
            return stream.tell() - len(window) + found.start()
    return None


# Chunks of WAV (RIFF, RF64), AIFF, W64 and CAF, and the header of AU


class _Sizes(NamedTuple):
    """Bytes of audio, and bytes behind it that are not a chunk."""

    audio: int
    behind: int


CHUNKS = {  # magic → offset of the first chunk, format of a chunk header (name, length), alignment
    b"RIFF": (12, "<4sI", 2),
    b"RIFX": (12, ">4sI", 2),
    b"RF64": (12, "<4sI", 2),
    b"FORM": (12, ">4sI", 2),
    b"riff": (40, "<16sQ", 8),
    b"caff": (8, ">4sQ", 1),
}


def _chunk_sizes(stream: IO[bytes], magic: bytes, start: int, size: int) -> _Sizes | None:
    """Compare the audio length in the header with the file's size. libsndfile silently takes the smaller one.

    None if the file is of another kind, or the length was left open, as by a program that writes to a pipe.

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
        if magic[:4] == b"riff":  # W64 lengths include the chunk header
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


# Tags, which may lie before or behind the audio of an MP3 or FLAC


def _tag(stream: IO[bytes], position: int) -> int:
    """Size in bytes of an ID3 or APE tag at a position; 0 if there is none."""
    stream.seek(position)
    head = stream.read(16)
    if head[:3] == b"ID3" and len(head) >= 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return size + (20 if head[5] & 0x10 else 10)
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX" and len(head) == 16:
        return int.from_bytes(head[12:16], "little") + 32  # the size field covers items and footer
    return 0


def _behind_tags(stream: IO[bytes]) -> int:
    position = 0
    while size := _tag(stream, position):
        position += size
    return position


# FLAC (RFC 9639)


def _flac_without_length(magic: bytes, start: int, size: int) -> _Part:
    """The stream with a header whose number of samples is unknown, so that it is decoded to its end."""
    head = bytearray(magic[:26])  # its last 36 bits are the number of samples
    head[21] &= 0xF0
    head[22:26] = bytes(4)
    return _Part(start + 26, size, bytes(head))


# Ogg (RFC 3533)


def _ogg_parts(stream: IO[bytes], size: int) -> list[_Part | None]:
    """The consecutive streams of an Ogg file. libsndfile reads only the first one.

    Raises:
        BadAudioError: a stream lacks its last page, its positions decrease, or there are other bytes between pages.
    """
    starts: list[int] = []
    positions: dict[bytes, int] = {}  # position of each logical stream, in samples
    at = 0
    begins = last = False  # flags of the page before
    while at < size:
        stream.seek(at)
        page = stream.read(27)
        if page[:4] != b"OggS"[: len(page)]:
            if not last or _find(stream, re.compile(b"OggS"), at) is not None:
                raise BadAudioError(f"unreadable: no Ogg page at byte {at}")
            size = at  # a tag at the end
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
            raise BadAudioError(f"unreadable: the Ogg page at byte {at} has a decreasing position")
        positions[page[14:18]] = max(position, positions.get(page[14:18], 0))
        at += 27 + page[26] + sum(stream.read(page[26]))
    if not last or at != size:
        raise BadAudioError("truncated: the Ogg stream has no last page")
    return [_Part(start, stop) for start, stop in zip(starts, [*starts[1:], size], strict=True)] if starts[1:] else [None]


# MPEG audio (ISO 11172-3, 13818-3)


class _Frame(NamedTuple):
    """Fields of an MPEG frame header."""

    size: int  # bytes
    num_samples: int
    sample_rate: int  # Hz
    channels: int
    layer: int
    tag_at: int  # position of a Xing tag in the frame


KBIT_PER_S = {  # keys: MPEG 1 or 2, and layer
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
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:  # reserved values, or a free bit rate
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
    """Position, header and first bytes of every complete frame. Tags and junk between frames are skipped."""
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
    """Position of the next frame that is followed by one of the same kind; the end of the file if there is none."""
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
    """Consecutive frames with nothing between them."""

    start: int  # position of the audio
    stop: int
    frame: _Frame
    header: bytes = b""  # header of the first audio frame
    tag: bytes = b""  # the frame with a Xing tag and no audio, in front of the others
    num_frames: int = 0
    steady: bool = True  # whether the bit rate is constant


def _mpeg_parts(stream: IO[bytes], start: int, size: int) -> list[_Part | None]:
    """The streams of an MPEG file, each with a header that declares its number of frames.

    A decoder trusts the Xing tag, or else the bit rate of the first frame, and stops there. So frames are counted here. If there
    are more than declared, the decoder gets a corrected tag.

    Raises:
        BadAudioError: a Xing tag declares more frames than there are, or the streams differ in kind.
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
            own.steady = own.steady and abs(frame.size - own.frame.size) <= 4  # padding changes the size by up to 4 bytes
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
    if flags & 1:  # kept, because it holds the encoder's delay and padding
        tag[at + 8 : at + 12] = struct.pack(">I", stream.num_frames)
        if flags & 2:
            tag[at + 12 : at + 16] = struct.pack(">I", stream.stop - stream.start + len(tag))
    else:
        tag = bytearray(_xing_frame(stream.header, stream.num_frames))
    return _Part(stream.start, stream.stop, bytes(tag))


def _xing_frame(header: bytes, num_frames: int) -> bytes:
    """A frame without audio whose Xing tag gives the number of following frames."""
    # No CRC, no padding, and bit rate 8 of the table, with which the tag fits into a frame at any sample rate.
    header = bytes([header[0], header[1] | 1, 0x80 | header[2] & 0x0C, header[3]])
    frame = _mpeg_frame(header)
    assert frame is not None
    return (header.ljust(frame.tag_at, b"\0") + b"Info" + struct.pack(">II", 1, num_frames)).ljust(frame.size, b"\0")


# Checking and converting samples


def check_duration(
    num_samples: int, sample_rate: int, min_duration_s: float = MIN_DURATION_S, max_duration_s: float | None = None
) -> None:
    """Refuse an utterance that is empty, too short or too long.

    Raises:
        BadAudioError: the utterance is one of these.
    """
    duration = num_samples / sample_rate
    if num_samples == 0:
        raise BadAudioError("empty: 0 samples")
    if duration < min_duration_s:
        raise BadAudioError(f"too short: {duration:.3f} s, min_duration_s is {min_duration_s:g}")
    if max_duration_s is not None and duration > max_duration_s:
        raise BadAudioError(f"too long: {duration:.3f} s, max_duration_s is {max_duration_s:g}")


def check_sound(mono: np.ndarray, silence_dbfs: float = SILENCE_DBFS) -> None:
    """Refuse samples (N,) that are not finite, or whose RMS is below ``silence_dbfs`` (a full-scale square wave has 0 dBFS).

    Raises:
        BadAudioError: the samples are not finite, or are silent.
    """
    if not np.isfinite(mono).all():
        raise BadAudioError("non-finite samples")
    rms = math.sqrt(np.mean(np.square(mono, dtype=np.float64)))
    if rms < 10 ** (silence_dbfs / 20):
        level = f"{20 * math.log10(rms):.1f} dBFS" if rms else "all zeros"
        raise BadAudioError(f"silent: {level}, silence_dbfs is {silence_dbfs:g}")


def resample(mono: np.ndarray, sample_rate: int, new_rate: int) -> np.ndarray:
    """Resample samples (N,)."""
    return mono if sample_rate == new_rate else soxr.resample(mono, sample_rate, new_rate, quality="HQ")


def resample_checked(mono: np.ndarray, sample_rate: int, new_rate: int, silence_dbfs: float = SILENCE_DBFS) -> np.ndarray:
    """Resample samples (N,) after checking them as preparation does by default.

    Raises:
        BadAudioError: the samples are too short, non-finite or silent.
    """
    check_duration(len(mono), sample_rate)
    check_sound(mono, silence_dbfs)
    return resample(mono, sample_rate, new_rate)


def as_mono(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Average samples (N,) or (N, channels), floats in [-1, 1] or 16-bit integers, to float32 (N,).

    Raises:
        BadAudioError: the samples have another shape, dtype or range.
    """
    samples = np.asarray(samples)
    expected = "samples must be (N,) or (N, channels) of floats in [-1, 1] or 16-bit integers"
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 0 < samples.shape[1] <= max(1, samples.shape[0])):
        raise BadAudioError(f"{expected}, found the shape {samples.shape}")
    if samples.dtype != np.int16 and not np.issubdtype(samples.dtype, np.floating):
        raise BadAudioError(f"{expected}, found {samples.dtype}")
    whole = isinstance(sample_rate, (int, np.integer)) and not isinstance(sample_rate, bool)
    if not whole or not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise BadAudioError(f"the sample rate must be a whole number of Hz, at least {SAMPLE_RATES[0]:,}, found {sample_rate!r}")
    check_budget(len(samples))
    floats = samples.astype(np.float32) / (32768 if samples.dtype == np.int16 else 1)
    with np.errstate(invalid="ignore"):
        mono = floats if floats.ndim == 1 else floats.mean(axis=1)
    if np.isfinite(mono).all() and len(mono) and (peak := float(np.abs(mono).max())) > LOUDEST:
        raise BadAudioError(f"{expected}, found values up to {peak:g}")
    return mono


def read_audio(path: str | Path, sample_rate: int, silence_dbfs: float = SILENCE_DBFS) -> np.ndarray:
    """Samples (N,) of an audio file in float32 at ``sample_rate``, averaged over its channels.

    Raises:
        BadAudioError: the file is missing, unreadable, truncated, too short, non-finite, silent, … The message is the reason.
    """
    with AudioFile(path) as file:
        return resample_checked(file.read_mono(), file.sample_rate, sample_rate, silence_dbfs)
