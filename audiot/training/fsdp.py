"""Fully sharded data parallel training (FSDP2): processes share parameters, gradients and optimiser state out among them.

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from audiot.base.private import AllProcessesShareData
from audiot.model import Encoder


class ShardedStrategy(AllProcessesShareData):
    """Lightning's FSDP2 strategy, with all processes sharing the data. A checkpoint is one file, as on one device.

    Args:
        options: Arguments of Lightning's `ModelParallelStrategy`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)


def shard(encoder: Encoder, others: Iterable[tuple[nn.Module, Iterable[str]]], mesh: DeviceMesh) -> None:
    """Shard the parameters over a mesh, in place: layer by layer, or the encoder as one if layers share parameters.

    Args:
        encoder: The encoder.
        others: Other modules, and the methods that compute with their parameters.
        mesh: The mesh.
    """
    owners = [*encoder.layers, encoder.positions]
    parameters = [id(parameter) for owner in owners for parameter in owner.parameters()]
    if len(set(parameters)) == len(parameters):
        for layer in encoder.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    for module, methods in others:
        fully_shard(module, mesh=mesh)
        for method in methods:
            register_fsdp_forward_method(module, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on parts of a module."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def gather(module: nn.Module) -> None:
    """Give every process all parameters until `release`, so that each may run forward passes at any time."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def release(module: nn.Module) -> None:
    """Keep only this process's share of the parameters again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded. It shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
