"""A module in a Lightning checkpoint: its settings by name, its weights, nothing that runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from audiot.base.parts import FORMAT_VERSION, check_version, named, resolved
from audiot.checkpoint import check_sizes, check_tensors
from audiot.runs import check_archive

SelfSaved = TypeVar("SelfSaved", bound="Saved")
UPSTREAMS = {  # of the first format
    "encoder": "audiot.downstream.upstream.untrained_encoder",
    "features": "audiot.downstream.upstream.FeaturesUpstream",
    "hf": "audiot.interop.hf_upstream.untrained_model",
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint. No code of the file is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that was made to harm may raise anything
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged or holds more than weights and settings: {words}") from error
    if not isinstance(content, dict) or not {"hyper_parameters", "state_dict"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of audiot: expected hyper_parameters and state_dict")
    return content


def settings_of(content: Mapping[str, Any], where: object, trusted: Collection[str] = ()) -> dict[str, Any]:
    """Arguments of a checkpoint's module.

    Raises:
        ValueError: they are of another version, or name parts that may not be built.
    """
    check_version(content.get("audiot_format_version", 1), where)
    settings = content["hyper_parameters"]
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: hyper_parameters are no settings")
    settings = dict(settings)
    upstream = settings.get("upstream")
    if isinstance(upstream, dict) and "kind" in upstream:  # as the first format says it
        rest = {name: value for name, value in upstream.items() if name != "kind"}
        settings["upstream"] = {"_target_": UPSTREAMS.get(str(upstream["kind"]), str(upstream["kind"])), **rest}
    return {name: resolved(value, where, trusted, name) for name, value in settings.items()}


class Saved(pl.LightningModule):
    """LightningModule whose checkpoints name its parts as the config groups do."""

    SETTINGS: ClassVar[tuple[str, ...]]
    """Arguments by which a checkpoint of this class is known."""

    COMMAND: ClassVar[str]
    """The command that writes its checkpoints."""

    @classmethod
    def translated(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of an earlier version with today's names."""
        return dict(state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the settings as `settings_of` reads them."""
        checkpoint["audiot_format_version"] = FORMAT_VERSION
        checkpoint["hyper_parameters"] = named(dict(self.hparams))

    @classmethod
    def load_from_checkpoint(cls, *arguments: Any, **options: Any) -> Any:
        """Refused: Lightning would hand the names of parts to the module, and take any pickle.

        Raises:
            TypeError: always, with what to call instead.
        """
        raise TypeError(f"{cls.__name__}.from_checkpoint(path, trusted=…) reads a checkpoint of audiot")

    @classmethod
    def from_checkpoint(
        cls: type[SelfSaved],
        path: Path,
        trusted: Collection[str] = (),
        change: Callable[[dict[str, Any]], object] = lambda settings: None,
    ) -> SelfSaved:
        """The module of a checkpoint, in evaluation mode, on the CPU.

        Args:
            path: The checkpoint.
            trusted: Packages from outside audiot whose parts it may name.
            change: Called with the settings before they are used.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, of another kind or version, or names parts that may not be built.
        """
        content = read_checkpoint(path)
        settings = settings_of(content, path, trusted)
        missing = [name for name in cls.SETTINGS if name not in settings]
        if missing:
            raise ValueError(f"{path} is no checkpoint of audiot {cls.COMMAND}: it has no {missing[0]}")
        change(settings)
        state = cls.translated(check_tensors(content["state_dict"], path))
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        check_sizes(lambda: cls(**settings), settings, shapes, path)
        module = cls(**settings)
        module.load_state_dict(state)
        module.on_load_checkpoint(content)
        return module.eval()
