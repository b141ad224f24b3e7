"""Training by several processes that have the same parameters and share the data: distributed data parallel (DDP).

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", arXiv:2006.15704.
"""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_warn

from audiot.base.private import DDPWithoutDevice


class ReplicatedStrategy(DDPWithoutDevice):
    """Lightning's strategy for DDP, but batches stay where they lie.

    Told of its device, DDP moves all of a batch there, also the lengths, which `audiot.data.batches.to_device` leaves on the CPU:
    there they tell without waiting for the device that nothing is padded. Every step would attend with a mask.

    Args:
        options: Arguments of Lightning's `DDPStrategy`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"gradient_as_bucket_view": True, **options})


def warn_of_slow_strategy(strategy: Strategy) -> None:
    """Tell who chose Lightning's own DDP for GPUs that `ReplicatedStrategy` does not wait for them."""
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, ReplicatedStrategy) and strategy.root_device.type == "cuda":
        rank_zero_warn(
            "Lightning's DDP moves the lengths of utterances to the GPU, where every step waits for them: use trainer=ddp, whose "
            "strategy, audiot.training.ddp.ReplicatedStrategy, takes the same arguments (+trainer.strategy.KEY=VALUE)"
        )
