"""Names that PyTorch and Lightning may change. They are used only here, and each has a fallback.

Tested with PyTorch 2.11.0, 2.14.1 and 2.15.0, and with Lightning 2.6.0 and 2.6.6.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def graph_pass() -> tuple[type, Any] | None:
    """Base class of a pass over `torch.compile`'s graphs, and the function that hashes files for its cache.

    None if this PyTorch has no such class. Graphs then stay as Inductor makes them, which costs a few per cent of a step.
    """
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    except ImportError:
        return None
    return CustomGraphPass, get_hash_for_files


def compile_ddp_whole() -> None:
    """Compile a DDP step as one graph. By default Dynamo splits it wherever a gradient bucket is full.

    If PyTorch lacks the setting, the graph is split: the results are the same, but slower.
    """
    _set_dynamo("optimize_ddp", False)


def many_compilations() -> AbstractContextManager:
    """Context in which one function may be compiled 100 times. It does nothing where Dynamo has no such limit."""
    config: Any = getattr(getattr(torch, "_dynamo", None), "config", None)
    return config.patch(recompile_limit=100) if hasattr(config, "recompile_limit") else nullcontext()


@contextmanager
def without_shape_cache() -> Iterator[None]:
    """A context without the cache of operations' shapes, which costs more than a small graph gets back from it.

    If Dynamo has no such setting, the cache stays.
    """
    config: Any = getattr(getattr(torch, "_dynamo", None), "config", None)
    with config.patch(fake_tensor_cache_enabled=False) if hasattr(config, "fake_tensor_cache_enabled") else nullcontext():
        yield


def compile_error() -> type[Exception]:
    """The error that `torch.compile` raises when generated code cannot be built, or its base class in PyTorch without it."""
    try:
        from torch._dynamo.exc import BackendCompilerFailed
    except ImportError:
        return RuntimeError
    return BackendCompilerFailed


def dispatch_mode() -> type:
    """Base class of a context that sees every operation of PyTorch.

    Raises:
        RuntimeError: this PyTorch has no such class. Benchmarks then leave out the operations they would count.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        raise RuntimeError("this PyTorch has no TorchDispatchMode: operations can't be counted") from error
    return TorchDispatchMode


def shared_storage(num_bytes: int) -> torch.UntypedStorage:
    """Uninitialised memory that other processes can map. Where PyTorch cannot allocate it directly, a tensor provides it."""
    make = getattr(torch.UntypedStorage, "_new_shared", None)
    if make is not None:
        return make(num_bytes, device="cpu")
    return torch.empty(num_bytes, dtype=torch.uint8).share_memory_().untyped_storage()


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place with a few kernels for all of them, or one by one where PyTorch has no such function."""
    together = getattr(torch, "_foreach_mul_", None)
    if together is not None:
        together(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def approach(tensors: Sequence[Tensor], others: Sequence[Tensor], rate: Tensor) -> None:
    """Move tensors in place a part `rate` of the way to others, with a few kernels for all of them or one by one."""
    subtract, multiply, add = (getattr(torch, f"_foreach_{name}", None) for name in ("sub", "mul_", "add_"))
    if subtract is not None and multiply is not None and add is not None:
        differences = subtract(others, tensors)
        multiply(differences, rate)
        add(tensors, differences)
        return
    for tensor, other in zip(tensors, others, strict=True):
        tensor.add_((other - tensor) * rate)


def unscale_before_clipping(optimizer: Optimizer) -> None:
    """Tell Lightning that the optimiser does not unscale float16 gradients itself, although fused optimisers claim to.

    Lightning then unscales them before it clips. A Lightning that ignores this attribute is not affected.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


class DDPWithoutDevice(DDPStrategy):
    """Lightning's DDP strategy that does not tell DDP its device, so that batches stay where they are.

    If Lightning creates the DDP wrapper in another method, this one is not called. Lengths then go to the GPU and steps wait.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ddp_kwargs: dict[str, Any] = getattr(self, "_ddp_kwargs", options)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(model, **self._ddp_kwargs)


class AllProcessesShareData(ModelParallelStrategy):
    """Lightning's FSDP2 strategy in which every process has its own data. Lightning itself counts one data part per machine.

    If Lightning keeps that number under another name, it refuses the mesh because of its size.
    """

    def setup_environment(self) -> None:
        """Set the number before Lightning builds the mesh from it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def watch_processes_with(watch: Callable[[list[Any]], None]) -> None:
    """Have a function look after the processes that Lightning starts on this machine, in place of Lightning's own.

    If Lightning looks after them elsewhere, its own stays: it kills all of them without a word when one has ended.
    """
    from pytorch_lightning.strategies.launchers import subprocess_script

    if hasattr(subprocess_script, "_launch_process_observer"):
        subprocess_script._launch_process_observer = watch  # type: ignore[assignment]


def requeue_by_hand(trainer: pl.Trainer) -> None:
    """Stop Lightning from putting a job of SLURM back into the queue on SIGUSR1, with a checkpoint of its own in another place.

    If Lightning keeps its environment elsewhere, a signal that comes before training begins still has that effect.
    """
    environment: Any = getattr(getattr(trainer, "_accelerator_connector", None), "cluster_environment", None)
    if environment is not None and hasattr(environment, "auto_requeue"):
        environment.auto_requeue = False


def skip_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Stop Lightning from asking all processes about SIGTERM in every batch, which waits for the GPU (Lightning issue 21487).

    If Lightning asks in another way, training still waits.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def worker_processes(batches: Iterator[Any]) -> list[Any]:
    """Processes of a DataLoader's iterator. None if PyTorch keeps them elsewhere: a fault is then told without its process."""
    return list(getattr(batches, "_workers", []))


def validate_now(trainer: pl.Trainer) -> None:
    """Validate amid training, as Lightning does where a validation is due.

    If Lightning's loops have other names, that validation is left out, with a warning.
    """
    loop, connector = getattr(trainer.fit_loop.epoch_loop, "val_loop", None), getattr(trainer, "_logger_connector", None)
    if loop is None:
        rank_zero_warn("this Lightning has no loop of validation in that of training: the validation that was due is left out")
        return
    first = getattr(connector, "_first_loop_iter", None)
    trainer.validating = True
    loop.run()
    trainer.training = True
    if connector is not None:
        connector._first_loop_iter = first


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """A context to import torchao in. It tells of compiled code that this PyTorch can't load, of which training needs none."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _set_dynamo(name: str, value: Any) -> None:
    import torch._dynamo

    if hasattr(torch._dynamo.config, name):
        setattr(torch._dynamo.config, name, value)
