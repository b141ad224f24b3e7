"""Attention mechanisms by name. The Hydra group `conf/attention` is the registry: one file there, one mechanism."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from importlib import resources
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from audiot.attention.mechanism import AttentionMechanism
from audiot.attention.patterns import patterns
from audiot.attention.self_attention import SelfAttention
from audiot.positions import Positions

__all__ = ["AttentionMechanism", "SelfAttention", "build", "names", "patterns"]


def names() -> list[str]:
    """Names of all attention mechanisms, sorted: what `attention=` accepts on the command line."""
    return sorted(file.name.removesuffix(".yaml") for file in _group().iterdir() if file.name.endswith(".yaml"))


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
    if name not in names():
        raise ValueError(f"unknown attention {name!r}: {_suggestion(name, names())}")
    config = OmegaConf.create((_group() / f"{name}.yaml").read_text(encoding="utf-8"))
    options: Any = OmegaConf.to_container(config, resolve=True)
    options.pop("defaults", None)  # choices of other groups: Hydra's affair
    mechanism = get_class(options.pop("_target_"))
    known = list(inspect.signature(mechanism).parameters)[3:]  # after embed_dim, num_heads, max_frames
    for override in overrides:
        if override not in known:
            raise ValueError(f"attention {name!r} has no parameter {override!r}: {_suggestion(override, known)}")
    options.update(overrides)
    return SelfAttention(embed_dim, num_heads, mechanism(embed_dim, num_heads, max_frames, **options), positions)


def _group() -> Any:
    return resources.files("audiot.conf") / "attention"


def _suggestion(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    choices = f"choose one of {', '.join(known)}"
    return f"did you mean {nearest[0]!r}? Otherwise {choices}" if nearest else choices
