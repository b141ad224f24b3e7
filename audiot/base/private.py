"""Names that PyTorch and Lightning don't promise to keep: each is used here alone, and where it is missing there is a plain way.

Tested with PyTorch 2.11.0, 2.14.1 and 2.15.0, and with Lightning 2.6.0 and 2.6.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def graph_pass() -> tuple[type, Any] | None:
    """Base class of a pass over the graphs that `torch.compile` optimises, and the function that digests files for its cache.

    None where there is no such class: the graphs stay as Inductor makes them, which costs a few per cent of a step.
    """
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    except ImportError:
        return None
    return CustomGraphPass, get_hash_for_files


def compile_ddp_whole() -> None:
    """Compile a step under DDP as one graph, where Dynamo would cut it wherever a bucket of gradients is full.

    Without that setting the graph is cut: the same results, slower.
    """
    _set_dynamo("optimize_ddp", False)


def many_compilations() -> AbstractContextManager:
    """A context in which one function may be compiled 100 times; where Dynamo has no such limit, there is nothing to do."""
    config: Any = getattr(getattr(torch, "_dynamo", None), "config", None)
    return config.patch(recompile_limit=100) if hasattr(config, "recompile_limit") else nullcontext()


def compile_error() -> type[Exception]:
    """What `torch.compile` raises where generated code can't be built; the class above it where that one is missing."""
    try:
        from torch._dynamo.exc import BackendCompilerFailed
    except ImportError:
        return RuntimeError
    return BackendCompilerFailed


def dispatch_mode() -> type:
    """Base class of a context that sees every operation of PyTorch.

    Raises:
        RuntimeError: this PyTorch has none; benchmarks leave out what is counted by it.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        raise RuntimeError("this PyTorch has no TorchDispatchMode: operations can't be counted") from error
    return TorchDispatchMode


def shared_storage(num_bytes: int) -> torch.UntypedStorage:
    """Memory that other processes can map, without values; by way of an ordinary tensor where PyTorch makes none at once."""
    make = getattr(torch.UntypedStorage, "_new_shared", None)
    if make is not None:
        return make(num_bytes, device="cpu")
    return torch.empty(num_bytes, dtype=torch.uint8).share_memory_().untyped_storage()


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place, in a few kernels for all of them; one after the other where PyTorch has no such function."""
    together = getattr(torch, "_foreach_mul_", None)
    if together is not None:
        together(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def clips_unscaled(optimizer: Optimizer) -> None:
    """Tell Lightning that an optimiser does not undo the scale of float16's gradients by itself, as fused ones claim to do.

    Lightning then undoes it before it clips. Where it no longer asks for this attribute, nothing comes of it.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


class DDPWithoutDevice(DDPStrategy):
    """Lightning's strategy for DDP, which is not told of its device and so leaves batches where they lie.

    Where Lightning makes DDP's wrapper in another method, this one is not called: lengths go to the GPU, and steps wait for them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ddp_kwargs: dict[str, Any] = getattr(self, "_ddp_kwargs", options)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(model, **self._ddp_kwargs)


class AllProcessesShareData(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, where every process has data of its own: Lightning counts one a machine.

    Where Lightning keeps that number under another name, it refuses a mesh of the wrong size.
    """

    def setup_environment(self) -> None:
        """Set the number, before the mesh is made of it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def no_question_of_sigterm(trainer: pl.Trainer) -> None:
    """Keep Lightning from asking all processes in every batch for SIGTERM, which waits for the GPU (its issue 21487).

    Where it asks in another way, training waits.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def has_begun(logger: CSVLogger) -> bool:
    """Whether a logger has opened its file, and so deleted an earlier one; taken for true where it can't be told."""
    return getattr(logger, "_experiment", logger) is not None


def _set_dynamo(name: str, value: Any) -> None:
    import torch._dynamo

    if hasattr(torch._dynamo.config, name):
        setattr(torch._dynamo.config, name, value)
