"""An encoder by itself: waveforms in, hidden states out; a folder of ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audiot.base.devices import find_device
from audiot.base.files import read_json, replacing, write_json
from audiot.features import Features
from audiot.model import Encoder, length_mask

FORMAT_VERSION = 1
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
        self.features: Features = instantiate(features)
        self.encoder: Encoder = instantiate(model, input_dim=self.features.output_dim, _recursive_=False, _convert_="all")

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of every layer. A waveform gives the same ones alone and in a batch.

        Args:
            waveforms: (B, N) in [-1, 1] at ``features.sample_rate``.
            lengths: (B,) samples, best kept on the CPU; None: all N.

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
        hidden = torch.stack(self.encoder(tokens, valid))
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


def save_encoder(path: str | Path, encoder: AudioEncoder, head: nn.Module | None = None) -> None:
    """Write an encoder's folder; the same weights give the same bytes.

    Args:
        path: Folder, made if needed.
        encoder: What to save.
        head: The reconstruction head, kept for continued pre-training.
    """
    path = Path(path)
    state = encoder.state_dict()
    if head is not None:
        state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    with replacing(path / "model.safetensors") as temporary:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, temporary)
    write_json(path / "config.json", {"format_version": FORMAT_VERSION, **encoder.config})


def load_encoder(
    path: str | Path,
    trusted: tuple[str, ...] = ("audiot",),
    head: nn.Module | None = None,
    *,
    compile: bool = False,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> AudioEncoder:
    """Load an exported encoder, in evaluation mode.

    Args:
        path: Its folder (``RUN/encoder``).
        trusted: Packages whose classes the config may name; add your own for your own mechanisms.
        head: A reconstruction head to fill with the one that was saved.
        compile: Generate faster code on first use; see `AudioEncoder.compile`.
        dtype: Of the weights and hidden states, float32, bfloat16 or float16, or their names; None: as they were saved. Features
            are float32 always.
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
    config = read_json(path / "config.json", "encoder config")
    if not isinstance(config, dict) or not {"format_version", "features", "model"} <= config.keys():
        raise ValueError(f"{path / 'config.json'} is no audiot encoder's config: format_version, features, model expected")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {config['format_version']}, this audiot reads {FORMAT_VERSION}: use the one that wrote it"
        )
    check_targets(config, trusted, path)
    encoder = AudioEncoder(config["features"], config["model"])
    weights = _read_weights(path / "model.safetensors")
    head_weights = {name.removeprefix("head."): value for name, value in weights.items() if name.startswith("head.")}
    _fill(encoder, {name: value for name, value in weights.items() if not name.startswith("head.")}, path)
    if head is not None:
        _fill(head, head_weights, path)
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


def check_targets(config: Any, trusted: tuple[str, ...], path: Path) -> None:
    """Refuse all but modules of trusted packages in a config, which names code to run.

    Args:
        config: Dicts and lists, at any depth.
        trusted: Packages.
        path: Of the config, for errors.

    Raises:
        ValueError: naming what is refused.
    """
    if isinstance(config, list):
        config = dict(enumerate(config))
    if isinstance(config, dict):
        if "_target_" in config:
            _check_target(str(config["_target_"]), trusted, path)
        for value in config.values():
            check_targets(value, trusted, path)


def _check_target(target: str, trusted: tuple[str, ...], path: Path) -> None:
    if target.split(".")[0] not in trusted:
        raise ValueError(f"{path} names {target}, and only {', '.join(trusted)} may be loaded: add its package to `trusted`")
    try:
        found = get_object(target)  # imports the trusted package alone
    except ImportError as error:
        raise ValueError(f"{path} names {target}, which is not there: install the version that wrote it") from error
    # The name alone says little: a trusted module may have imported anything, `os` say.
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.split(".")[0] in trusted):
        raise ValueError(f"{path} names {target}, which is no module of {', '.join(trusted)}: use a config that audiot wrote")


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): export the encoder again") from error


def _fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit the model: {detail}") from error
