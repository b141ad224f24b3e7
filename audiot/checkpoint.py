"""An encoder by itself: waveforms in, hidden states out; a folder of ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from audiot.base.devices import find_device
from audiot.base.files import read_json, replacing, write_json
from audiot.base.parts import FORMAT_VERSION, check_version, make, named, resolved
from audiot.features import Features
from audiot.model import Encoder, length_mask

SPARE_BYTES = 2**28  # of tables that a model makes of its config, such as the angles of rotary positions
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_waveforms(waveforms: Any) -> None:
    """Refuse anything but a tensor (B, N) of floats.

    Raises:
        ValueError: saying what was expected and found.
    """
    if isinstance(waveforms, Tensor):
        if waveforms.ndim == 2 and waveforms.is_floating_point():
            return
        found = f"one of the shape {tuple(waveforms.shape)} and {str(waveforms.dtype).removeprefix('torch.')}"
    else:
        found = f"a {type(waveforms).__name__}"
    raise ValueError(
        f"waveforms must be a tensor (batch, samples) of floats in [-1, 1], found {found}: "
        "torch.as_tensor(x, dtype=torch.float32) makes one of an array or list, x[None] a batch of one waveform"
    )


class AudioEncoder(nn.Module):
    """A feature front end and the encoder over it.

    ``to(torch.bfloat16)`` computes all but the features in that precision, with less than half of the memory.

    Args:
        features: Config of the front end (``_target_`` and its parameters), a plain dict.
        model: Config of the encoder, a plain dict.
    """

    def __init__(self, features: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = {"features": dict(features), "model": dict(model)}
        self.features: Features = make(features)
        self.encoder: Encoder = make(model, input_dim=self.features.embed_dim, inside=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of every layer. A waveform gives the same ones alone and in a batch.

        Args:
            waveforms: (B, N) in [-1, 1] at ``features.sample_rate``.
            lengths: (B,) samples, best kept on the CPU; None: all N.
            last: Number of layers to run; None: all.

        Returns:
            Hidden states (layers + 1, B, T, d) in the encoder's dtype, zero after an utterance's end, and lengths (B,) in frames
            of the encoder.

        Raises:
            ValueError: the waveforms are no such tensor.
        """
        check_waveforms(waveforms)
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1])
        tokens, num_tokens = self.features(waveforms, lengths)
        valid = length_mask(num_tokens, tokens.shape[1], tokens.device)
        # Frames that stacking leaves over make gaps in the memory, with or without which code is generated anew.
        tokens = tokens.to(self.encoder.input.weight.dtype).contiguous()
        hidden = torch.stack(self.encoder(self.features.embed(tokens, valid), valid, last))
        return hidden if valid is None else hidden * valid[..., None], num_tokens

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the encoder in place, by torch.compile for batches of any size and length; the features stay outside.

        Neither the modules nor the state dict change. Code is generated on first use, for batches with padding, batches without
        and batches of one.

        Args:
            *args: Arguments of torch.compile.
            **options: Options of torch.compile; ``dynamic`` is True unless it is given.
        """
        self.encoder.compile(*args, **{"dynamic": True} | options)


def save_encoder(path: str | Path, encoder: AudioEncoder) -> None:
    """Write an encoder's folder; the same weights give the same bytes.

    Args:
        path: Folder, made if needed.
        encoder: What to save.
    """
    path = Path(path)
    _save(path / "model.safetensors", encoder.state_dict())
    write_json(path / "config.json", {"format_version": FORMAT_VERSION, **named(encoder.config)})


def save_objective(path: str | Path, config: Mapping[str, Any], objective: nn.Module) -> None:
    """Write an objective beside its encoder, for continued pre-training: its head, and what was fitted or learned for it.

    Args:
        path: The encoder's folder.
        config: Config of the objective, a plain dict.
        objective: What to save.
    """
    path = Path(path)
    _save(path / "objective.safetensors", objective.state_dict())
    write_json(path / "objective.json", {"format_version": FORMAT_VERSION, "objective": named(config)})


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    with replacing(path, durable=True) as temporary:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, temporary)


def load_objective(path: str | Path, trusted: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state of the objective beside an encoder; both are empty where there is none.

    An encoder of an earlier version has a reconstruction head among its own weights.

    Raises:
        ValueError: the files are damaged, of another version, or hold more than data.
    """
    path = Path(path)
    if not (path / "objective.json").is_file():
        weights = Weights(path / "model.safetensors")
        heads = {name: value for name, value in weights.read().items() if name.startswith("head.")}
        return ({"_target_": "audiot.objectives.reconstruction.Reconstruction"}, heads) if heads else ({}, {})
    place = path / "objective.json"
    content = read_json(place, "objective")
    check_version(content.get("format_version"), place)
    return part_of(content.get("objective"), place, trusted, "objective"), Weights(path / "objective.safetensors").read()


def load_encoder(
    path: str | Path,
    trusted: Collection[str] = (),
    *,
    compile: bool = False,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> AudioEncoder:
    """Load an exported encoder, in evaluation mode.

    Args:
        path: Its folder (``RUN/encoder``).
        trusted: Packages from outside audiot whose classes the config may name: those of your own mechanisms.
        compile: Generate faster code on first use; see `AudioEncoder.compile`.
        dtype: Type of the weights and hidden states, float32, bfloat16 or float16, or its name; None: as they were saved.
            Features are always float32.
        device: ``cpu``, ``cuda``, …; ``auto``: a GPU if there is one.

    Raises:
        FileNotFoundError: there is no encoder at ``path``.
        ValueError: what is there is of another kind, truncated, or of another version; or there is no such dtype or device.
    """
    path = Path(path)
    place = find_device(str(device), f"no device {str(device)!r} here")
    precision = None if dtype is None else find_dtype(dtype)
    if path.is_file():
        raise ValueError(
            f"{path} is a file, but an encoder is a folder with config.json and model.safetensors: a pre-training run's encoder"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"no encoder folder at {path}: expected RUN/encoder of a pre-training run")
    if not (path / "config.json").is_file() and (path / "encoder" / "config.json").is_file():
        raise ValueError(f"{path} is a run's folder: its encoder is {path / 'encoder'}")
    config = read_config(path, trusted)
    weights = Weights(path / "model.safetensors")
    own = {name: shape for name, shape in weights.shapes.items() if not name.startswith("head.")}  # of an earlier version
    check_sizes(lambda: AudioEncoder(**config), config, own, path)
    encoder = AudioEncoder(**config)
    tensors = weights.read()
    _fill(encoder, {name: tensors[name] for name in own}, path)
    if compile:
        encoder.compile()
    return encoder.eval().to(device=place, dtype=precision)


def find_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point type that encoders compute in, by name or as it is.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype}")
    return found


def read_config(path: Path, trusted: Collection[str]) -> dict[str, Any]:
    """Arguments of the `AudioEncoder` of a folder.

    Raises:
        ValueError: its ``config.json`` is not an encoder's, is of another version, or holds more than data.
    """
    place = path / "config.json"
    config = read_json(place, "encoder config")
    if not {"format_version", "features", "model"} <= config.keys():
        raise ValueError(f"{place} is no audiot encoder's config: format_version, features, model expected")
    check_version(config["format_version"], path)
    if unknown := config.keys() - {"format_version", "features", "model"}:
        raise ValueError(f"{place} has the key {min(unknown)!r}: expected format_version, features, model")
    return {name: part_of(config[name], place, trusted, name) for name in ("features", "model")}


def part_of(config: Any, where: object, trusted: Collection[str], place: str) -> dict[str, Any]:
    """`resolved`, of a config that must be a part."""
    found = resolved(config, where, trusted, place)
    if not isinstance(found, dict) or "_target_" not in found:
        raise ValueError(f"{where}: {place} is no part: expected keys, the part's name among them")
    return found


class Weights:
    """A safetensors file, of which only the header is read at first.

    Attributes:
        shapes: Name of each tensor → its shape.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, or of another kind.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        self.path = path
        with self._open() as file:
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def read(self) -> dict[str, Tensor]:
        """All tensors."""
        with self._open() as file:
            return {name: file.get_tensor(name) for name in self.shapes}

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{self.path} is truncated or not a safetensors file ({error}): export the encoder again") from error


def check_sizes(
    build: Callable[[], nn.Module], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Refuse a config whose model is not that of the tensors, before anything of its size is allocated.

    Args:
        build: Builds the model; called where tensors have no memory.
        config: What it is built of.
        shapes: Name of each tensor of its file → its shape.
        where: The file, for errors.

    Raises:
        ValueError: they differ, or the model needs tables out of all proportion to them.
    """
    layers = max([0, *_numbers(config, "num_layers")])
    if layers > max(1000, len(shapes)):  # shared ones may be more than tensors
        raise ValueError(f"{where} has {len(shapes)} tensors, which can't be those of num_layers={layers}")
    try:
        with torch.device("meta"):
            model = build()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError, AssertionError) as error:
        raise ValueError(f"{where}: nothing can be built of its config: {' '.join(str(error).split())[:300]}") from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if wanted != shapes:
        differing = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        name = differing[0]
        raise ValueError(
            f"the weights in {where} do not fit the model: {name} is {_size(shapes.get(name))}, by the config "
            f"{_size(wanted.get(name))} ({len(differing)} differ): export it again"
        )
    spare = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in wanted)
    limit = SPARE_BYTES + 8 * sum(4 * math.prod(shape) for shape in shapes.values())
    if spare > limit:
        raise ValueError(f"{where}: its config asks for tables of {spare:,} bytes, beside weights that justify {limit:,}")


def check_tensors(state: Any, where: object) -> dict[str, Tensor]:
    """A state dict from a pickle, checked: names and plain tensors, each with all of its numbers in the file.

    Raises:
        ValueError: it holds something else, such as one number that is to stand for many.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: expected tensors by their names, found a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{where}: expected tensors by their names, found {str(name)[:100]}, a {type(value).__name__}")
        dense = value.layout == torch.strided and value.device.type == "cpu"
        if not dense or value.is_quantized or value.is_complex():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise ValueError(f"{where}: {name} is a tensor of {kind}: expected plain numbers")
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{where}: {name} has {value.numel():,} numbers, of which the file holds only a part")
    return dict(state)


def _numbers(config: Any, key: str) -> Iterator[int]:
    """Values of a key, at any depth, that are whole numbers."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if name == key and isinstance(value, int):
            yield value
        yield from _numbers(value, key)


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "one number"


def _fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit the model: {detail}") from error
