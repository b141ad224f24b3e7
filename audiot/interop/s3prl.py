"""Reading and writing checkpoints of S3PRL's Mockingjay, TERA and AudioALBERT (github.com/s3prl/s3prl, 0.4.18).

A checkpoint becomes an audiot encoder. Up to rounding, it gives S3PRL's hidden states of each waveform alone. In a batch, audiot
gives the same states, but S3PRL does not: it guesses lengths by counting frames whose sum is not zero, lets padding into log-mel
frames near an utterance's end, and cuts a long batch into chunks by its longest item. CMVN differs in channels that deviate by
less than 1e-4, such as digital silence: S3PRL divides by any deviation and amplifies rounding to noise.
"""

from __future__ import annotations

import argparse
import inspect
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.utils import get_class
from torch import Tensor

from audiot.attention.query_key import QueryKey
from audiot.base.files import replacing
from audiot.base.pairing import torchaudio
from audiot.base.parts import parameters
from audiot.checkpoint import AudioEncoder, check_sizes, check_tensors, load_encoder, load_objective
from audiot.downstream.upstream import EncoderUpstream
from audiot.features import MFCC, KaldiFbank, LogMel, Spectrogram
from audiot.objectives.reconstruction import ReconstructionHead
from audiot.positions import Sinusoid

SAMPLE_RATE = 16000  # Hz
EPS = 1e-4  # standard deviation of a log channel without information
LARGEST_EPS = 1e-3  # up to this eps, CMVN counts as equal to S3PRL's
FLOOR = 1e-10  # S3PRL's floor of powers
NUM_FREQUENCIES = 201  # size that S3PRL's mel filters are made for

FBANK = {  # Kaldi's option → ours
    "num_mel_bins": "num_mel_bins",
    "frame_length": "frame_length_ms",
    "frame_shift": "frame_shift_ms",
    "low_freq": "low_freq",
    "high_freq": "high_freq",
}
KALDI: dict[str, tuple[type, dict[str, str]]] = {
    "fbank": (KaldiFbank, FBANK),
    "mfcc": (MFCC, {"num_ceps": "n_mfcc", "cepstral_lifter": "cepstral_lifter", **FBANK}),
}
STFT: dict[str, type] = {"mel": LogMel, "linear": Spectrogram}
HEAD = {"dense": "dense", "LayerNorm": "norm", "output": "output"}  # S3PRL's module name → ours

# Classes of optimisers in old checkpoints, replaced by stand-ins that do nothing.
SCHEDULES = [
    f"{module}.{name}"
    for module in ("optimizers", "s3prl.optimizers")
    for name in (
        "ConstantLR",
        "WarmupConstantSchedule",
        "WarmupCosineSchedule",
        "WarmupCosineWithHardRestartsSchedule",
        "WarmupCosineWithWarmupRestartsSchedule",
        "WarmupLinearSchedule",
    )
]


def upstream(path: str) -> EncoderUpstream:
    """A checkpoint of S3PRL as an upstream: ``upstream=s3prl upstream.path=X.ckpt``."""
    return EncoderUpstream(import_s3prl(path)[0])


def import_s3prl(path: str | Path) -> tuple[AudioEncoder, ReconstructionHead | None]:
    """Read a checkpoint of S3PRL. Nothing in the file is run.

    Args:
        path: File of S3PRL's ``run_pretrain``, or one of its released checkpoints.

    Returns:
        The encoder in evaluation mode, and the reconstruction head (None if there is none or its target is not the input).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, of another kind, names code, or has settings that audiot cannot reproduce.
    """
    content, config = _read(Path(path))
    try:
        features, model = _features(config["audio"]), _model(config["transformer"], config["task"])
    except KeyError as error:
        raise ValueError(f"the config in {path} lacks {error}, so S3PRL could not read it") from error
    except (TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"S3PRL could not read the config in {path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    weights = check_tensors(content["Transformer"], path)
    if model["num_layers"] > len(weights):  # shared layers have names of their own too
        raise ValueError(f"{path} has {len(weights)} tensors, which can't be those of num_hidden_layers={model['num_layers']}")
    names = _names(model["num_layers"], model["share_layers"], model["norm"] == "pre")
    state = _state(names, weights, path)
    shapes = {f"encoder.{name}": tuple(value.shape) for name, value in state.items()}
    check_sizes(lambda: AudioEncoder(features, model), model, shapes, path)
    encoder = AudioEncoder(features, model)
    encoder.encoder.load_state_dict(state)
    saved = content.get("SpecHead")
    if not isinstance(saved, dict) or _length(saved.get("output.bias")) != encoder.features.output_dim:
        return encoder.eval(), None
    state = _state(HEAD, check_tensors(saved, path), path)
    check_sizes(lambda: _head(encoder), {}, {name: tuple(value.shape) for name, value in state.items()}, path)
    head = _head(encoder)
    head.load_state_dict(state)
    return encoder.eval(), head.eval()


def _head(encoder: AudioEncoder) -> ReconstructionHead:
    return ReconstructionHead(encoder.encoder.embed_dim, encoder.features.output_dim)


def _length(bias: Any) -> int | None:
    return len(bias) if isinstance(bias, Tensor) and bias.ndim == 1 else None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of the file, and the config of the upstream in it."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, but an S3PRL checkpoint is a file: give its .ckpt; audiot's encoders need no import"
        )
    if not path.is_file():  # reading a pipe may never end
        raise ValueError(f"{path} is not a regular file: an S3PRL checkpoint is a file")
    known: list[Any] = [argparse.Namespace, *((_Inert, name) for name in SCHEDULES)]
    try:
        with path.open("rb") as stream, torch.serialization.safe_globals(known):
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file may raise anything
        named = re.search(r"GLOBAL (\S+) (was not an allowed global|whose module)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named:
            raise ValueError(
                f"{path} is refused: it names the code {named[1]}, but a checkpoint may hold only tensors and plain values; "
                "nothing was run. If you trust it, save only its Config, Upstream_Config, Transformer and SpecHead to a new file"
            ) from error
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint: copy or download it again") from error
    entries = content if isinstance(content, dict) else {}
    for config in (entries.get("Config"), entries.get("Upstream_Config")):  # old files have the upstream's config in Config
        if isinstance(config, dict) and "transformer" in config and isinstance(entries.get("Transformer"), dict):
            if "audio" not in config:
                raise ValueError(
                    f"{path} reads features from files, without a front end (no audio in its config), but audiot needs one "
                    "from waveforms"
                )
            return entries, config
    found = ", ".join(map(str, entries)) or type(content).__name__
    raise ValueError(
        f"{path} is no Mockingjay, TERA or AudioALBERT of S3PRL: expected Transformer and a transformer's config, found {found}"
    )


class _Inert:
    """Stand-in for an object that is not needed. It does nothing."""


def _model(transformer: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the encoder. S3PRL's numbers may be strings, because YAML reads 1e-12 as one."""
    activation = transformer["hidden_act"]
    if activation != "gelu":
        raise ValueError(f"transformer.hidden_act is {activation}, but audiot's feed-forward networks have gelu")
    sequence_length = int(task["sequence_length"])
    return {
        "_target_": "audiot.model.Encoder",
        "embed_dim": int(transformer["hidden_size"]),
        "num_layers": int(transformer["num_hidden_layers"]),
        "num_heads": int(transformer["num_attention_heads"]),
        "ffn_dim": int(transformer["intermediate_size"]),
        "max_frames": sequence_length or 1500,
        "attention": {
            "_target_": "audiot.attention.query_key.QueryKey",
            "dropout": float(transformer["attention_probs_dropout_prob"]),
        },
        "positions": {"_target_": "audiot.positions.Sinusoid", "scale": 1.0},
        "dropout": float(transformer["hidden_dropout_prob"]),
        "norm": "pre" if transformer["pre_layer_norm"] else "post",
        "share_layers": bool(transformer["share_layer"]),
        "init_std": float(transformer["initializer_range"]),
        "input_init": "normal",
        "norm_states": bool(transformer["pre_layer_norm"]),
        "norm_eps": float(transformer["layer_norm_eps"]),
        "chunk_frames": sequence_length or None,
    }


def _features(audio: Mapping[str, Any]) -> dict[str, Any]:
    """Config of the front end."""
    return _kaldi_features(audio) if "kaldi" in audio else _stft_features(audio)


def _kaldi_features(audio: Mapping[str, Any]) -> dict[str, Any]:
    kind = audio["kaldi"].get("feat_type", "fbank")
    _check("audio.kaldi.feat_type", kind, *KALDI)
    front_end, names = KALDI[kind]
    defaults = _kaldi_defaults(kind)
    for option, value in audio["kaldi"][kind].items():
        if option not in names:
            _check(f"audio.kaldi.{kind}.{option}", value, defaults.get(option))
    options = defaults | audio["kaldi"][kind]
    delta, cmvn = audio.get("delta", {}), audio["cmvn"]
    _check("audio.delta.mode", delta.get("mode", "replicate"), "replicate")
    return {
        "_target_": f"audiot.features.{front_end.__name__}",
        **{ours: options[theirs] for theirs, ours in names.items()},
        "sample_rate": SAMPLE_RATE,
        "delta_order": int(delta.get("order", 2)),
        "delta_window": int(delta.get("win_length", 5)),
        **_cmvn(cmvn["use_cmvn"], float(cmvn.get("eps", FLOOR))),
    }


def _kaldi_defaults(kind: str) -> dict[str, Any]:
    return {
        name: option.default
        for name, option in inspect.signature(getattr(torchaudio("compliance.kaldi"), kind)).parameters.items()
    }


def _stft_features(audio: Mapping[str, Any]) -> dict[str, Any]:
    section = audio["input"]
    kind = section["feat_type"]
    _check("audio.input.feat_type", kind, *STFT)
    _check("audio.input.log", bool(section.get("log", False)), True)
    rate, floor = int(audio.get("sample_rate", SAMPLE_RATE)), float(audio.get("eps", FLOOR))
    return {
        "_target_": f"audiot.features.{STFT[kind].__name__}",
        **({"n_mels": int(audio.get("n_mels", 40))} if kind == "mel" else {}),
        "n_fft": 2 * (int(audio.get("n_freq", NUM_FREQUENCIES)) - 1),
        "win_length": round(audio.get("win_ms", 25) * rate / 1000),
        "hop_length": round(audio.get("hop_ms", 10) * rate / 1000),
        "floor": floor,
        "add_floor": True,
        "sample_rate": rate,
        "delta_order": int(section.get("delta", 0)),
        "center": True,
        "level_db": float(audio["target_level"]),
        **_cmvn(section.get("cmvn", False), floor),
    }


def _cmvn(use: bool, eps: float) -> dict[str, Any]:
    if use and eps > EPS:
        raise ValueError(f"its CMVN adds eps={eps:g} to deviations, but audiot's floors them at {EPS:g}, which is too different")
    return {"cmvn": "utterance" if use else "none", "eps": EPS}


def _check(name: str, value: Any, *expected: Any) -> None:
    if value not in expected:
        raise ValueError(f"{name} is {value}, but audiot only reproduces {' or '.join(map(str, expected))}")


def _names(num_layers: int, shared: bool, pre_norm: bool) -> dict[str, str]:
    """Our name of each module of S3PRL, in S3PRL's order. S3PRL has two names for some modules."""
    names = {"input_representations.spec_transform": "input", "input_representations.LayerNorm": "input_norm"}
    for index in range(num_layers):
        theirs, ours = f"encoder.layer.{index}", f"layers.{0 if shared else index}"
        for projection in ("query", "key", "value"):
            names[f"{theirs}.attention.self.{projection}"] = f"{ours}.attention.{projection}"
        names[f"{theirs}.attention.output.dense"] = f"{ours}.attention.output"
        names[f"{theirs}.attention.output.LayerNorm"] = f"{ours}.attention_norm"
        if pre_norm:
            names[f"{theirs}.attention.LayerNorm"] = f"{ours}.attention_norm"
        names[f"{theirs}.intermediate.dense"] = f"{ours}.ffn.0"
        names[f"{theirs}.output.dense"] = f"{ours}.ffn.2"
        names[f"{theirs}.output.LayerNorm"] = f"{ours}.ffn_norm"
        if pre_norm:
            names[f"{theirs}.LayerNorm"] = f"{ours}.ffn_norm"
    if pre_norm:
        states = [*(f"state_norms.{index}" for index in range(num_layers)), "output_norm"]
        names |= {f"encoder.LayerNorm.{index}": ours for index, ours in enumerate(states)}
    return names


def _state(names: Mapping[str, str], weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """S3PRL's weights as our state dict. Those that S3PRL has under two names must be equal."""
    # LayerNorms once had TensorFlow's names.
    given = {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)): value for name, value in weights.items()}
    expected = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")}
    missing, unknown = [*(expected.keys() - given)], [*(given.keys() - expected)]
    if missing or unknown:
        raise ValueError(
            f"the weights in {path} do not match its config: {len(missing)} missing ({', '.join(sorted(missing)[:3])}), "
            f"{len(unknown)} unknown ({', '.join(sorted(unknown)[:3])})"
        )
    state: dict[str, Tensor] = {}
    for theirs, ours in expected.items():
        value = given[theirs].float()
        if not state.setdefault(ours, value).equal(value):
            raise ValueError(
                f"{theirs} in {path} differs from weights that must be equal by its config: it is damaged or was changed by hand"
            )
    return state


def export_s3prl(encoder: str | Path, path: str | Path) -> None:
    """Write an exported encoder as a checkpoint that S3PRL loads as ``mockingjay_local``, with equal hidden states.

    CMVN differs in channels that deviate by less than the encoder's ``features.eps``. An encoder lacks what S3PRL needs to
    continue pre-training (the optimiser's state and the masking), so the file has Mockingjay's recipe and step 0.

    Args:
        encoder: Folder of the encoder.
        path: Path of the file to write.

    Raises:
        FileNotFoundError: there is no encoder.
        ValueError: S3PRL's Mockingjay cannot represent this encoder. The message has the reason and a remedy.
    """
    encoder = Path(encoder)
    loaded = load_encoder(encoder)
    model = _settings(loaded.config["model"])
    audio = _audio(loaded.config["features"], encoder)
    _check_model(model, encoder)
    names = _names(model["num_layers"], model["share_layers"], model["norm"] == "pre")
    objective, state = load_objective(encoder)
    own = str(objective.get("_target_")).endswith(".Reconstruction")
    heads = {name.removeprefix("head."): value for name, value in state.items() if own}
    content = {
        "Optimizer": {},
        "Step": 0,
        "Global_step": 0,
        "Epoch": 0,
        "Config": {"runner": {"total_steps": 0}, "optimizer": {}},
        "Upstream_Config": {"transformer": _transformer(model), "task": _task(model), "audio": audio},
        "Transformer": _renamed(loaded.encoder.state_dict(), names),
    }
    if heads:
        content["SpecHead"] = _renamed(heads, HEAD)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        torch.save(content, stream)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults that it leaves out."""
    known = parameters(get_class(config["_target_"])) or {}
    return {name: option.default for name, option in known.items()} | dict(config)


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> OrderedDict[str, Tensor]:
    return OrderedDict(
        (f"{theirs}.{part}", state[f"{ours}.{part}"].float()) for theirs, ours in names.items() for part in ("weight", "bias")
    )


def _refuse(encoder: Path, reason: str) -> NoReturn:
    raise ValueError(
        f"{encoder} cannot be an S3PRL checkpoint: {reason}. S3PRL can use it directly with the upstream in audiot.s3prl_upstream"
    )


def _check_model(model: Mapping[str, Any], encoder: Path) -> None:
    """Refuse a model that S3PRL's transformer cannot represent."""
    attention, positions = _settings(model["attention"]), _settings(model["positions"])
    if get_class(attention["_target_"]) is not QueryKey or attention["share_query_key"]:
        _refuse(encoder, f"its attention is {_described(model['attention'])}, S3PRL's QueryKey with both projections")
    if model.get("other_layers"):
        _refuse(encoder, "its layers have two mechanisms")
    if get_class(positions["_target_"]) is not Sinusoid or positions["scale"] != 1:
        _refuse(encoder, f"its positions are {_described(model['positions'])}, S3PRL's Sinusoid with scale 1")
    if model["norm"] == "pre" and not model["norm_states"]:
        _refuse(encoder, "with model.norm=pre, S3PRL's has a LayerNorm on every hidden state (model.norm_states=true)")


def _described(config: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in config.items() if name != "_target_")
    return f"{config['_target_'].rpartition('.')[2]}({options})"


def _transformer(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_dim": -1,  # S3PRL takes the size of the features
        "hidden_size": model["embed_dim"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "intermediate_size": model["ffn_dim"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": model["dropout"],
        "attention_probs_dropout_prob": _settings(model["attention"])["dropout"],
        "initializer_range": model["init_std"],
        "layer_norm_eps": model["norm_eps"],
        "share_layer": model["share_layers"],
        "pre_layer_norm": model["norm"] == "pre",
    }


def _task(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "loss": "L1",
        "sequence_length": model["chunk_frames"] or 0,
        "position_encoding_size": model["embed_dim"],
        "mask_proportion": 0.15,
        "mask_consecutive_min": 7,
        "mask_consecutive_max": 7,
        "mask_allow_overlap": True,
        "mask_bucket_ratio": 1.5,
        "mask_frequency": 0,
        "noise_proportion": 0.0,
    }


def _audio(config: Mapping[str, Any], encoder: Path) -> dict[str, Any]:
    """S3PRL's audio section for a front end."""
    front_end, features = get_class(config["_target_"]), _settings(config)
    common: dict[str, list[Any]] = {
        "stack": [1],
        "subsample": [None],
        "sample_rate": [SAMPLE_RATE],
        "cmvn": ["utterance", "none"],
    }
    stft: dict[str, list[Any]] = {
        "center": [True],
        "add_floor": [True],
        "n_fft": [2 * (NUM_FREQUENCIES - 1)],
        "delta_window": [5],
    }
    mel: dict[str, list[Any]] = {"f_min": [0], "f_max": [None, SAMPLE_RATE / 2], "mel_scale": ["htk"], "norm": [None]}
    is_kaldi = front_end in (KaldiFbank, MFCC)
    if not is_kaldi and front_end not in (LogMel, Spectrogram):
        _refuse(encoder, f"its features are {front_end.__name__}")
    allowed: dict[str, list[Any]] = common | ({} if is_kaldi else stft) | (mel if front_end is LogMel else {})
    for name, values in allowed.items():
        if features[name] not in values:
            _refuse(encoder, f"features.{name} is {features[name]}, S3PRL's {' or '.join(map(str, values))}")
    if features["eps"] > LARGEST_EPS:
        _refuse(
            encoder, f"features.eps is {features['eps']:g}, but S3PRL's is almost 0 (at most {LARGEST_EPS:g} counts as equal)"
        )
    if is_kaldi:
        return _kaldi_audio(front_end, features)
    if features["level_db"] is None:
        _refuse(encoder, "features.level_db is None, but S3PRL scales each utterance to a level before log-mel")
    return _stft_audio(front_end, features)


def _kaldi_audio(front_end: type, features: Mapping[str, Any]) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {  # S3PRL's recipes list all, though one is used
        "spectrogram": {"frame_length": 25.0, "frame_shift": 10.0},
        "fbank": {"num_mel_bins": 80, "frame_length": 25.0, "frame_shift": 10.0, "use_log_fbank": True},
        "mfcc": {"num_ceps": 13, "frame_length": 25.0, "frame_shift": 10.0},
    }
    (kind,) = (kind for kind, (known, _) in KALDI.items() if known is front_end)
    options = {theirs: features[ours] for theirs, ours in KALDI[kind][1].items()}
    defaults = _kaldi_defaults(kind)
    kinds[kind] |= {name: value for name, value in options.items() if name in kinds[kind] or value != defaults[name]}
    return {
        "kaldi": {"feat_type": kind, **kinds},
        "delta": {"order": features["delta_order"], "win_length": features["delta_window"]},
        "cmvn": {"use_cmvn": features["cmvn"] == "utterance"},
    }


def _stft_audio(front_end: type, features: Mapping[str, Any]) -> dict[str, Any]:
    (kind,) = (kind for kind, known in STFT.items() if known is front_end)
    section = {
        "feat_type": kind,
        "channel": 0,
        "log": True,
        "delta": features["delta_order"],
        "cmvn": features["cmvn"] == "utterance",
    }
    return {
        "target_level": _whole(features["level_db"]),
        "win_ms": _whole(features["win_length"] * 1000 / SAMPLE_RATE),
        "hop_ms": _whole(features["hop_length"] * 1000 / SAMPLE_RATE),
        "n_freq": features["n_fft"] // 2 + 1,
        "n_mels": features.get("n_mels", 80),
        "n_mfcc": 13,
        **({} if features["floor"] == FLOOR else {"eps": features["floor"]}),
        "input": section,
        "target": section | {"channel": 1},
    }


def _whole(value: float) -> int | float:
    """A whole number as int, as S3PRL's recipes write it."""
    return int(value) if value == int(value) else value
