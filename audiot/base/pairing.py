"""torchaudio, loaded where it is needed alone: a release of it loads beside some releases of PyTorch and not beside others."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Tried on Linux with PyPI's builds: what loads beside which release of PyTorch.
LATER = "2.11.1"  # wants a symbol that PyTorch 2.11 lacks
FIRST = ("2.11.", "2.11.0")  # releases of PyTorch that begin so, and torchaudio for them


def torchaudio(part: str) -> Any:
    """A module of torchaudio: ``functional``, ``compliance.kaldi``, …

    Raises:
        ImportError: torchaudio is not installed, or does not load beside this PyTorch; the message has pip's command.
    """
    try:
        return importlib.import_module(f"torchaudio.{part}")
    except (OSError, ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("torchaudio"):
            raise  # something else is missing: flashlight-text, say
        raise ImportError(_remedy()) from error


def _remedy() -> str:
    torch = version("torch")
    public, _, build = torch.partition("+")
    wanted = FIRST[1] if public.startswith(FIRST[0]) else LATER
    try:
        found = version("torchaudio")
    except PackageNotFoundError:
        return f"torchaudio is not installed: pip install torchaudio=={wanted}"
    problem = f"torchaudio {found} does not load beside torch {torch}"
    if found.partition("+")[0] != wanted:
        return f"{problem}: pip install torchaudio=={wanted}"
    if build != found.partition("+")[2]:  # a build of PyTorch for CPUs beside PyPI's torchaudio, say
        return f"{problem}, a build of another kind: pip install --force-reinstall torch=={public} torchaudio=={wanted}"
    return f"{problem}: pip install --force-reinstall --no-deps torchaudio=={wanted}"
