"""Upstreams by their paths: audiot's own encoders, checkpoints of S3PRL and models of Hugging Face."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from audiot.downstream.upstream import Upstream, checkpoint


def open_upstream(kind: str, path: str, trusted: Collection[str]) -> Upstream:
    """An upstream of a kind: ``checkpoint`` (a run's folder will do), ``s3prl`` or ``hf``, on the CPU."""
    if kind == "s3prl":
        from audiot.interop.s3prl import upstream

        return upstream(path)
    if kind == "hf":
        from audiot.interop.hf_upstream import hf  # needs transformers

        return hf(path)
    inside = Path(path) / "encoder"
    return checkpoint(str(inside) if (inside / "config.json").is_file() else path, trusted)


def kind_of(path: str) -> str:
    """The kind of upstream that a path leads to: a file is S3PRL's, a folder audiot's or Hugging Face's, a mere name a hub's."""
    place = Path(path)
    if not place.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):  # a hub's names have one / at most
        raise FileNotFoundError(f"objective.teacher={path}: there is nothing: expected RUN/encoder, an S3PRL checkpoint, a model")
    if place.is_file():
        return "s3prl"
    files = (place / "model.safetensors", place / "encoder" / "model.safetensors")
    own = any(file.is_file() for file in files) and not (place / "preprocessor_config.json").is_file()
    return "checkpoint" if own else "hf"
