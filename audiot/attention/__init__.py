"""Attention mechanisms by name. The Hydra group `conf/attention` is the registry: one file there, one mechanism."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from hydra.utils import get_class
from torch import nn

from audiot.attention.mechanism import AttentionMechanism
from audiot.attention.patterns import patterns
from audiot.attention.self_attention import SelfAttention
from audiot.base import groups
from audiot.positions import Positions

__all__ = ["AttentionMechanism", "SelfAttention", "after_step", "build", "build_mechanism", "names", "parameters", "patterns"]


def names() -> list[str]:
    """Names of all attention mechanisms, sorted: what `attention=` accepts on the command line."""
    return groups.options("attention")


def build(
    name: str, embed_dim: int, num_heads: int, max_frames: int, positions: Positions | None = None, **overrides: Any
) -> SelfAttention:
    """Build an attention layer outside Hydra: `build("query_key", embed_dim=768, num_heads=12, max_frames=1500)`.

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
    options = _config(name)
    mechanism = get_class(options.pop("_target_"))
    for override in overrides:
        if override not in options:
            raise ValueError(f"attention {name!r} has no parameter {override!r}: {_suggestion(override, options)}")
    return mechanism(embed_dim, num_heads, max_frames, **{**options, **overrides})


def parameters(name: str) -> dict[str, Any]:
    """The own parameters of a mechanism, with the values of its YAML file.

    Raises:
        ValueError: an unknown mechanism.
    """
    options = _config(name)
    del options["_target_"]
    return options


def after_step(model: nn.Module) -> None:
    """Call `after_step` of each mechanism in a model: once after each step of the optimiser, on every rank."""
    for module in model.modules():
        if isinstance(module, AttentionMechanism):
            module.after_step()


def _config(name: str) -> dict[str, Any]:
    """A mechanism's file, without the choices of other groups, which are Hydra's affair."""
    if name not in names():
        raise ValueError(f"unknown attention {name!r}: {_suggestion(name, names())}")
    return {key: value for key, value in groups.read_option("attention", name).items() if key != "defaults"}


def _suggestion(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    choices = f"choose one of {', '.join(known)}"
    return f"did you mean {nearest[0]!r}? Otherwise {choices}" if nearest else choices
