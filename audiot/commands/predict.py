"""``audiot predict RUN FILE …``: what a fine-tuned model says of audio files."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from typing import Any

from tqdm import tqdm

from audiot.base.files import printable
from audiot.data.audio import audio_files
from audiot.downstream.classifier import load_classifier
from audiot.downstream.objectives import Row
from audiot.downstream.verification import Verification


def main(options: argparse.Namespace) -> None:
    """Print a prediction a file, in the order given; files that can't be used are listed at the end, and the exit code is 1."""
    classifier = load_classifier(options.run, options.device, options.trust)
    paths = [path for name in options.files for path in audio_files(name)]
    pairs = isinstance(classifier.objective, Verification) and not options.json
    if pairs and len(paths) < 2:
        raise ValueError(
            f"{options.run} compares speakers, and one file makes no pair: give two or more, or --json for its embedding"
        )
    width = max(map(len, paths))
    bad: list[str] = []
    embeddings: list[tuple[str, list[float]]] = []
    for row in classifier.stream(paths, keep_going=True, progress=True, silence_dbfs=options.silence_dbfs):
        if "error" in row:
            bad.append(f"  {row['file']}: {row['error']}")
        if options.json:
            _print(json.dumps(shortened(row, options.top), ensure_ascii=False))
        elif pairs and "embedding" in row:
            embeddings.append((row["file"], row["embedding"]))
        elif "error" not in row:
            _print(in_words(row, options.top, width))
    for (first, one), (second, other) in combinations(embeddings, 2):
        cosine = sum(ours * theirs for ours, theirs in zip(one, other, strict=True))
        _print(f"{first:<{width}}  {second:<{width}}  {cosine:6.3f}")
    if bad:
        listed = "\n".join(bad)
        sys.exit(printable(f"audiot: error: {len(bad)} of {len(paths)} files can't be used:\n{listed}"))


def _print(text: str) -> None:
    tqdm.write(printable(text), file=sys.stdout)  # above the bar


def best(scores: dict[str, float], count: int) -> list[dict[str, Any]]:
    """The labels of the highest scores."""
    ranked = sorted(scores.items(), key=lambda item: -item[1])[:count]
    return [{"label": label, "score": round(score, 4)} for label, score in ranked]


def shortened(row: Row, top: int) -> Row:
    """A prediction for JSON: the ``top`` labels in place of the scores of all."""
    short: Row = {}
    for name, value in row.items():
        if name == "scores":
            short["top"] = best(value, top)
        elif name == "slots":
            short["slots"] = {slot: shortened(own, top) for slot, own in value.items()}
        elif name == "segments":
            short["segments"] = [shortened(segment, top) for segment in value]
        else:
            short[name] = round(value, 4) if isinstance(value, float) else value
    return short


def in_words(row: Row, top: int, width: int) -> str:
    """A prediction as text: a line a file; of frames, a line a segment below the file's name."""
    name = f"{row['file']:<{width}}"
    if "segments" in row:
        parts = row["segments"]
        widest = max(len(part["label"]) for part in parts)
        lines = [f"{part['start']:9.3f} {part['end']:9.3f}  {part['label']:<{widest}}  {part['score']:.2f}" for part in parts]
        return "\n".join([row["file"], *lines])
    if "text" in row:
        return f"{name}  {row['score']:.2f}  {row['text']}"
    if "slots" in row and top > 1:
        return f"{name}  " + ";  ".join(f"{slot}: {_ranked(own['scores'], top)}" for slot, own in row["slots"].items())
    if "scores" in row:
        return f"{name}  {_ranked(row['scores'], top)}"
    return f"{name}  {row['label']} {row['score']:.2f}"


def _ranked(scores: dict[str, float], top: int) -> str:
    return "  ".join(f"{choice['label']} {choice['score']:.2f}" for choice in best(scores, top))
