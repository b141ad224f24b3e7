"""Hidden states of a corpus in files: the folder that ``audiot extract`` writes, and its reader.

``config.json`` holds the settings of the extraction. ``shard-00000.safetensors``, … hold one tensor per utterance: (T, d), or
(layers, T, d) for several layers. ``index.csv`` (utterance, shard, frames, seconds) is written when all shards are complete.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from audiot.base.files import read_json, replacing, write_json

FORMAT_VERSION = 1
Failures = dict[str, str]
"""Utterance or path → the reason why it cannot be used."""


class States(Mapping[str, Tensor]):
    """Hidden states by utterance, in the order of the data. They are read from disk on access.

    Args:
        folder: Folder that ``audiot extract`` wrote.

    Attributes:
        config: Content of ``config.json``: ``encoder``, ``layers``, ``dtype``, … The middle of state t lies
            ``first_frame_ms`` + t · ``frame_shift_ms`` after the beginning.
        frames: Utterance → T.
        seconds: Utterance → its duration in seconds.

    Raises:
        FileNotFoundError: the folder holds no hidden states, or the extraction is incomplete.
        ValueError: the states have another format version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json", "config of extracted hidden states")
        if self.config.get("format_version") != FORMAT_VERSION or "num_shards" not in self.config:
            raise ValueError(
                f"{self.folder} holds no hidden states of format {FORMAT_VERSION}: extract them again into another folder"
            )
        index = self.folder / "index.csv"
        if not index.is_file():
            raise FileNotFoundError(f"{self.folder} is not extracted to the end: run audiot extract again to go on")
        self.frames: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._shard: dict[str, int] = {}
        with index.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                name = row["utterance"]
                self._shard[name] = int(row["shard"])
                self.frames[name] = int(row["frames"])
                self.seconds[name] = float(row["seconds"])
        self._open: dict[int, Any] = {}

    def __getitem__(self, utterance: str) -> Tensor:
        """Hidden states (T, d), or (layers, T, d) for several layers: a CPU tensor of dtype ``config["dtype"]``."""
        number = self._shard[utterance]
        if number not in self._open:
            self._open[number] = safe_open(shard_path(self.folder, number), "pt")
        return self._open[number].get_tensor(utterance)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    def __len__(self) -> int:
        return len(self._shard)

    def __getstate__(self) -> dict[str, Any]:
        """State without open files, so that it can be sent to a loader's workers."""
        return {**self.__dict__, "_open": {}}


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder's config, or check that the existing one is equal.

    Raises:
        ValueError: the folder has another config.
        FileExistsError: the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: the last argument is the folder to write")
    path = folder / "config.json"
    if not path.exists():
        write_json(path, settings)
        return
    here, now = (_comparable(config) for config in (read_json(path, "config of extracted hidden states"), settings))
    for name in [*now, *here]:
        before, after = here.get(name, "not set"), now.get(name, "not set")
        if before != after:
            raise ValueError(
                f"{folder} was extracted with {name} {before}, now it is {after}: choose another folder, or delete this one"
            )


def _comparable(config: Any) -> dict[str, Any]:
    """Settings by dotted names, without the encoder's path, which may change."""
    flat: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else {}).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    flat.pop("encoder.path", None)
    return flat


def write_shard(folder: Path, number: int, states: Mapping[str, Tensor], failures: Failures) -> None:
    """Write a shard. Equal states give equal bytes, whatever their order."""
    with replacing(shard_path(folder, number)) as temporary:
        save_file(dict(states), temporary, metadata={"failures": json.dumps(failures, sort_keys=True)})


def stored(path: Path) -> Iterator[tuple[str, int]]:
    """Utterances of a shard and their numbers of frames."""
    with safe_open(path, "pt") as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            yield name, shard.get_slice(name).get_shape()[-2]


def shard_failures(folder: Path, number: int) -> Failures:
    """Utterances that a shard lacks, with the reasons.

    Raises:
        ValueError: the file is damaged.
    """
    path = shard_path(folder, number)
    try:
        with safe_open(path, "pt") as shard:
            return json.loads(shard.metadata()["failures"])
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the command again") from error


def is_done(folder: Path, number: int) -> bool:
    """Whether a shard is complete. A shard that lacks utterances is not, because their files may have been repaired."""
    return shard_path(folder, number).is_file() and not shard_failures(folder, number)
