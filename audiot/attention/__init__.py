"""Attention mechanisms by name. The Hydra group `conf/attention` is the registry: each file there is one mechanism."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.utils import get_class
from torch import Tensor, nn

from audiot.attention.mechanism import AttentionMechanism
from audiot.attention.patterns import patterns
from audiot.attention.self_attention import SelfAttention
from audiot.base import groups
from audiot.base.former import instead, translate_v1
from audiot.positions import Positions

__all__ = [
    "AttentionMechanism",
    "SelfAttention",
    "after_step",
    "build",
    "build_mechanism",
    "command_line",
    "discard",
    "mechanisms",
    "names",
    "parameters",
    "patterns",
    "translate_v1",
]


def names() -> list[str]:
    """Names of all attention mechanisms, sorted: what `attention=` accepts on the command line."""
    return groups.options("attention")


def build(
    name: str, embed_dim: int, num_heads: int, max_frames: int, positions: Positions | None = None, **overrides: Any
) -> SelfAttention:
    """Build an attention layer outside Hydra: `build("query_key", embed_dim=768, num_heads=12, max_frames=1500)`.

    A parameter that is a part with a config group of its own is a name in this group, or a mapping with the name and parameters:
    `search="chunked"`, `search={"name": "chunked", "chunk_size": 16}`. The classes themselves take the object:
    `SimpleLSH(768, 12, 1500, search=Chunked(chunk_size=16))`.

    Args:
        name: One of `names()`.
        embed_dim: Width of the model.
        num_heads: Number of heads.
        max_frames: Longest sequence to support.
        positions: The model's positions; rotary ones act inside the layer.
        overrides: Parameters of the mechanism that replace those of its YAML file.

    Returns:
        The layer, (B, T, embed_dim) → (B, T, embed_dim).

    Raises:
        ValueError: an unknown mechanism or parameter, or one with an impossible value.
    """
    mechanism = build_mechanism(name, embed_dim, num_heads, max_frames, **overrides)
    return SelfAttention(embed_dim, num_heads, mechanism, positions)


def build_mechanism(name: str, embed_dim: int, num_heads: int, max_frames: int, **overrides: Any) -> AttentionMechanism:
    """Build a mechanism alone, without projections around it; arguments and errors as `build`."""
    target, options = _config("attention", name, "attention")
    for override, value in overrides.items():
        if override not in options:
            now = instead(f"attention.{override}", str(value))
            if now is not None:
                raise ValueError(f"the parameter {override!r} of attention {name!r} is gone: it is now {now}")
            raise ValueError(f"attention {name!r} has no parameter {override!r}: {_suggestion(override, options)}")
    parts = {word: _part(word, options[word], overrides.get(word, {})) for word in options if _is_part(word)}
    return get_class(target)(embed_dim, num_heads, max_frames, **{**options, **overrides, **parts})


def parameters(name: str) -> dict[str, Any]:
    """The own parameters of a mechanism, with the values of its YAML file: plain values, and parts as `build` takes them.

    Raises:
        ValueError: an unknown mechanism.
    """
    return _config("attention", name, "attention")[1]


def command_line(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line calls the choice of a mechanism and its parameters, as `build` takes them: key → value."""
    found: dict[str, Any] = {"attention": name}
    for word, value in overrides.items():
        if not _is_part(word):
            found[f"attention.{word}"] = value
            continue
        given = {"name": value} if isinstance(value, str) else dict(value)
        if "name" in given:
            found[f"attention/{word}"] = given.pop("name")
        found |= {f"attention.{word}.{key}": each for key, each in given.items()}
    return found


def mechanisms(model: nn.Module) -> list[AttentionMechanism]:
    """All attention mechanisms in a model."""
    return [module for module in model.modules() if isinstance(module, AttentionMechanism)]


def after_step(model: nn.Module) -> None:
    """Call `after_step` of each mechanism in a model: once after each step of the optimiser, on every rank."""
    for mechanism in mechanisms(model):
        mechanism.after_step()


def discard(model: nn.Module, skipped: Tensor) -> None:
    """Call `discard` of each mechanism in a model: once before each step of the optimiser, on every rank.

    Args:
        model: The model.
        skipped: Whether the step is skipped, bool (), on the model's device.
    """
    for mechanism in mechanisms(model):
        mechanism.discard(skipped)


def _config(group: str, name: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Class and parameters of a file, without the choices of other groups, which are Hydra's affair."""
    known = groups.options(group)
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}: {_suggestion(name, known)}")
    config = groups.read_option(group, name)
    for default in config.pop("defaults", []):
        for part, choice in default.items():
            if _is_part(part):
                config[part] = {"name": choice, **_config(f"{group}/{part}", choice, part)[1]}
    return config.pop("_target_"), config


def _part(word: str, default: Mapping[str, Any], given: Any) -> Any:
    """Build what a parameter with a group of its own stands for: a name, or a mapping with the name and parameters."""
    group = f"attention/{word}"
    if not isinstance(given, (str, Mapping)):
        raise ValueError(f"{word} is {given!r}: set it to one of {', '.join(groups.options(group))}, or {{name: …, …}}")
    chosen = {"name": given} if isinstance(given, str) else dict(given)
    name = chosen.pop("name", default["name"])
    target, options = _config(group, name, word)
    for key in chosen:
        if key not in options:
            raise ValueError(f"{word} {name!r} has no parameter {key!r}: {_suggestion(key, options)}")
    return get_class(target)(**options | chosen)


def _is_part(word: str) -> bool:
    """Whether a parameter is a part with a config group of its own, inside that of the mechanisms."""
    return f"attention/{word}" in groups.groups()


def _suggestion(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    choices = f"choose one of {', '.join(known)}"
    return f"did you mean {nearest[0]!r}? Otherwise {choices}" if nearest else choices
