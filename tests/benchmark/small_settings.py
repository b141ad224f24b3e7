"""Settings of an attention benchmark that takes a moment on a CPU."""

from __future__ import annotations

SMALL = {
    "mechanisms": ["synthesizer_random"],
    "lengths": [6, 12],
    "frames": 24,
    "embed_dim": 16,
    "num_heads": 2,
    "precisions": ["fp32"],
    "scopes": ["operator", "layer"],
    "directions": ["inference", "training"],
    "compile": [False],
    "graphs": False,
    "positions": "none",
    "padded": 0.0,
    "dropout": 0.0,
    "rounds": 2,
    "seconds": 0.0,
    "device": "cpu",
    "seed": 0,
}
