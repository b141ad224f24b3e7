"""Learning-rate schedule and weight-decay groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from audiot.attention import after_step


def linear_warmup_decay(optimizer: Optimizer, total_steps: int, warmup_proportion: float = 0.07) -> LambdaLR:
    """Linear warm-up to the learning rate, then linear decay to 0 at ``total_steps`` (Devlin et al. 2019, as in Mockingjay)."""
    if not 0 <= warmup_proportion < 1:
        raise ValueError(f"scheduler.warmup_proportion must be in [0, 1), found {warmup_proportion}")
    warmup_steps = round(total_steps * warmup_proportion)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The learning rate as it is, from the first step to the last."""
    return LambdaLR(optimizer, lambda step: 1.0)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases, norms and what a mechanism names in ``no_weight_decay`` without.

    Parameters that need no gradient are left out.
    """
    decays: dict[nn.Parameter, bool] = {}  # a parameter that two modules share counts once
    for part in module.modules():
        exempt: frozenset[str] = getattr(part, "no_weight_decay", frozenset())
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays[parameter] = decays.get(parameter, True) and parameter.ndim >= 2 and name not in exempt
    decayed = [parameter for parameter, decay in decays.items() if decay]
    plain = [parameter for parameter, decay in decays.items() if not decay]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def configure(
    module: nn.Module,
    optimizer: Callable[..., Optimizer],
    scheduler: Callable[..., LambdaLR],
    weight_decay: float,
    total_steps: float,
) -> dict[str, Any]:
    """Optimiser and schedule as Lightning's ``configure_optimizers`` returns them.

    Args:
        optimizer: Makes an optimiser of parameter groups.
        scheduler: Makes a schedule of an optimiser and ``total_steps``.
        total_steps: Optimiser steps of the whole training.

    Raises:
        ValueError: the training has no fixed number of steps.
    """
    if total_steps in (-1, float("inf")):
        raise ValueError("the learning-rate schedule needs a length: set trainer.max_steps")
    built = optimizer(parameter_groups(module, weight_decay))
    # Lightning clips scaled gradients (float16) only after the scaler has undone the scale, which fused optimisers claim to do.
    built._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    # State of attention mechanisms that no gradient trains, such as centroids.
    built.register_step_post_hook(lambda *_: after_step(module))
    schedule = scheduler(built, total_steps=int(total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
