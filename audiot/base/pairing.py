"""Import torchaudio only where it is needed, because each release of it works with certain PyTorch releases only."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Found by trying PyPI's builds on Linux.
LATER = "2.11.1"  # needs a symbol that PyTorch 2.11 lacks
FIRST = ("2.11.", "2.11.0")  # prefix of PyTorch releases, and the torchaudio release for them


def torchaudio(part: str) -> Any:
    """Import a module of torchaudio: ``functional``, ``compliance.kaldi``, …

    Raises:
        ImportError: torchaudio is not installed or does not work with this PyTorch. The message has pip's command.
    """
    try:
        return importlib.import_module(f"torchaudio.{part}")
    except (OSError, ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("torchaudio"):
            raise  # another package is missing, such as flashlight-text
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
    if build != found.partition("+")[2]:  # such as a CPU build of PyTorch with PyPI's torchaudio
        return f"{problem}, a build of another kind: pip install --force-reinstall torch=={public} torchaudio=={wanted}"
    return f"{problem}: pip install --force-reinstall --no-deps torchaudio=={wanted}"
