"""A prediction in words, and shortened for JSON."""

from __future__ import annotations

from typing import Any

from audiot.downstream.objectives import Row


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
