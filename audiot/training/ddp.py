"""Distributed data parallel training (DDP): processes have the same parameters and share the data.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", arXiv:2006.15704.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_warn

from audiot.base.private import DDPWithoutDevice

LOST = ("Connection reset by peer", "Connection closed by peer", "gloo/transport")  # in RuntimeErrors of gloo


class ReplicatedStrategy(DDPWithoutDevice):
    """Lightning's DDP strategy, except that batches stay where they are.

    If DDP knows its device, it moves the whole batch there, even the lengths, which `audiot.data.batches.to_device` leaves on the
    CPU. On the CPU, they tell without synchronisation that nothing is padded. On the device, every step would need a mask.

    Args:
        options: Arguments of Lightning's `DDPStrategy`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"gradient_as_bucket_view": True, **options})


def lost_a_process(error: BaseException) -> bool:
    """Whether an error says that another process of a training has ended, or can't be reached any more."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    return isinstance(error, dist.DistBackendError) or any(words in str(error) for words in LOST)


def warn_of_slow_strategy(strategy: Strategy) -> None:
    """Warn if Lightning's own DDP is used on GPUs, since `ReplicatedStrategy` avoids its synchronisation."""
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, ReplicatedStrategy) and strategy.root_device.type == "cuda":
        rank_zero_warn(
            "Lightning's DDP moves the lengths of utterances to the GPU, where every step waits for them: use trainer=ddp, whose "
            "strategy, audiot.training.ddp.ReplicatedStrategy, takes the same arguments (+trainer.strategy.KEY=VALUE)"
        )
