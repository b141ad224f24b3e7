"""Pre-training with parameters, gradients and optimiser state shared out among processes: fully sharded data parallel (FSDP2).

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv:2304.11277.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from audiot.base.private import AllProcessesShareData
from audiot.model import Encoder


class ShardedStrategy(AllProcessesShareData):
    """Lightning's strategy for FSDP2, all processes of which share the data; a checkpoint is one file, as of one device.

    Args:
        options: Arguments of Lightning's `ModelParallelStrategy`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)


def shard(encoder: Encoder, head: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the parameters over a mesh, in place: layer by layer, or the encoder at once where layers have some in common."""
    owners = [*encoder.layers, encoder.positions]
    parameters = [id(parameter) for owner in owners for parameter in owner.parameters()]
    if len(set(parameters)) == len(parameters):
        for layer in encoder.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    fully_shard(head, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on parts of a module."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def gather(module: nn.Module) -> None:
    """Give every process all parameters, until `release`: each may then compute forward passes when it likes."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def release(module: nn.Module) -> None:
    """Keep a share of the parameters alone again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be shared out, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out among processes, in one piece; all of them have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
