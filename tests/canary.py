"""What must never be run: a file that is read may name it anywhere."""

from __future__ import annotations

from pathlib import Path

MARK = Path("fired")


def fire(*_, **__):
    """Leave a mark."""
    MARK.touch()
    return "fired"


class Pickled:
    def __reduce__(self):
        return fire, ()


PAYLOADS = (
    {"_target_": "canary.fire"},
    {"part": "canary:fire"},
    "${mark:}",
    "${oc.create:{_target_: canary.fire}}",
    "\\${mark:}",
)
