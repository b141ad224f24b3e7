"""Learning-rate schedule and weight-decay groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, pi, sqrt
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from audiot.attention import mechanisms
from audiot.base.parts import make
from audiot.base.private import unscale_before_clipping


class Schedule(LambdaLR):
    """Learning-rate schedule that depends on the step alone.

    A checkpoint restores only the step. From its first step on, a resumed training uses the rates of its own settings, whatever
    they were before.

    Args:
        factor: Function from the step, counted from 0, to a factor of the learning rate.
        description: The schedule in words that follow "the learning rate goes …".
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], description: str) -> None:
        self.description = description
        super().__init__(optimizer, factor)

    def rate(self, step: int) -> float:
        """Learning rate of the first parameter group at a step, counted from 1."""
        return float(self.base_lrs[0] * self.lr_lambdas[0](step - 1))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of a checkpoint. Load the optimiser's state before."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = [base * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group["initial_lr"], group["lr"] = base, rate


DECAYS: dict[str, tuple[Callable[[float], float], str]] = {  # share of the decay that is left → factor of the rate; in words
    "linear": (lambda left: left, "linearly"),
    "cosine": (lambda left: (1 - cos(pi * left)) / 2, "along a cosine"),
    "sqrt": (lambda left: 1 - sqrt(1 - left), "as 1 minus a square root"),
}


def linear_warmup_decay(optimizer: Optimizer, total_steps: int, warmup_proportion: float = 0.07) -> Schedule:
    """Linear warm-up, then linear decay (Devlin et al. 2019, as in Mockingjay).

    With T = ``total_steps``, W = T · ``warmup_proportion`` rounded, and the optimiser's rate r, step s = 1, …, T has the rate

        r · s / W                      in the warm-up, s ≤ W
        r · (T − s + 1) / (T − W)      after it.

    So steps W and W + 1 have the full rate. The first and the last step have a rate above 0, and a step T + 1 would have 0.

    Raises:
        ValueError: ``warmup_proportion`` isn't in [0, 1).
    """
    warmup_steps = _warmup_steps(total_steps, warmup_proportion)
    return _in_stages(optimizer, total_steps, warmup_steps, total_steps - warmup_steps, "linear")


def linear_warmup_cosine(optimizer: Optimizer, total_steps: int, warmup_proportion: float = 0.07) -> Schedule:
    """Linear warm-up, then decay along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts).

    With the T, W and r of `linear_warmup_decay`, step s has the rate

        r · s / W                                             in the warm-up, s ≤ W
        r · (1 − cos(π · (T − s + 1) / (T − W))) / 2          after it.

    Raises:
        ValueError: ``warmup_proportion`` isn't in [0, 1).
    """
    warmup_steps = _warmup_steps(total_steps, warmup_proportion)
    return _in_stages(optimizer, total_steps, warmup_steps, total_steps - warmup_steps, "cosine")


def wsd(
    optimizer: Optimizer,
    total_steps: int,
    warmup_proportion: float = 0.07,
    decay_proportion: float = 0.1,
    decay: str = "linear",
) -> Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, arXiv:2404.06395, section 4.2).

    With the T, W and r of `linear_warmup_decay`, and D = T · ``decay_proportion`` rounded, step s has the rate

        r · s / W                           in the warm-up, s ≤ W
        r                                   then, s ≤ T − D
        r · f((T − s + 1) / D)              in the last D steps.

    So the first step of the decay has the full rate, and a step T + 1 would have 0. ``decay`` names f:

        linear      f(u) = u
        cosine      f(u) = (1 − cos(π · u)) / 2
        sqrt        f(u) = 1 − √(1 − u)          (Hägele et al. 2024, arXiv:2405.18392, "1-sqrt")

    Differs from the paper: its f halves the rate every 5,000 steps and does not reach 0.

    Raises:
        ValueError: a proportion is out of range, or ``decay`` is another word.
    """
    warmup_steps = _warmup_steps(total_steps, warmup_proportion)
    if not 0 <= decay_proportion <= 1 - warmup_proportion:
        raise ValueError(
            f"scheduler.decay_proportion must be in [0, 1 − scheduler.warmup_proportion={warmup_proportion}], "
            f"found {decay_proportion}"
        )
    if decay not in DECAYS:
        raise ValueError(f"scheduler.decay must be one of {', '.join(DECAYS)}, found {decay}")
    decay_steps = min(round(total_steps * decay_proportion), total_steps - warmup_steps)
    return _in_stages(optimizer, total_steps, warmup_steps, decay_steps, decay)


def inverse_square_root(optimizer: Optimizer, total_steps: int, warmup_steps: int = 100) -> Schedule:
    """Linear warm-up, then decay with the inverse square root of the step (Vaswani et al. 2017, arXiv:1706.03762, equation 3).

    With W = ``warmup_steps`` and the optimiser's rate r, step s = 1, 2, … has the rate

        r · min(s / W, √(W / s)).

    It does not depend on ``total_steps``. Differs from the paper: r takes the place of 1 / √(embed_dim · W), so that it is the
    highest rate.

    Raises:
        ValueError: ``warmup_steps`` isn't between 1 and ``total_steps``.
    """
    if not 1 <= warmup_steps <= total_steps:
        raise ValueError(
            f"scheduler.warmup_steps must be between 1 and the number of steps, trainer.max_steps={total_steps}, "
            f"found {warmup_steps}"
        )

    def factor(step: int) -> float:
        return min((step + 1) / warmup_steps, sqrt(warmup_steps / (step + 1)))

    description = f"linearly up to step {warmup_steps:,}, then with the inverse square root of the step"
    return Schedule(optimizer, factor, description)


def _warmup_steps(total_steps: int, proportion: float) -> int:
    if not 0 <= proportion < 1:
        raise ValueError(f"scheduler.warmup_proportion must be in [0, 1), found {proportion}")
    return round(total_steps * proportion)


def _in_stages(optimizer: Optimizer, total_steps: int, warmup_steps: int, decay_steps: int, decay: str) -> Schedule:
    """Linear warm-up, the full rate, then a decay to 0 after the last step."""
    shape, words = DECAYS[decay]
    stable_until = total_steps - decay_steps

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if step < stable_until:
            return 1.0
        return shape(max(0.0, (total_steps - step) / max(1, decay_steps)))

    stages = [f"linearly up to step {warmup_steps:,}"] if warmup_steps else []
    stages += [f"on as it is to step {stable_until:,}"] if stable_until > warmup_steps else []
    return Schedule(optimizer, factor, ", then ".join([*stages, f"{words} to 0 after step {total_steps:,}"]))


def constant(optimizer: Optimizer, total_steps: int) -> Schedule:
    """Constant learning rate."""
    return Schedule(optimizer, lambda step: 1.0, f"on as it is to step {total_steps:,}")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases, norms and a mechanism's ``no_weight_decay`` parameters without it.

    Parameters that need no gradient are left out.
    """
    decays: dict[nn.Parameter, bool] = {}  # a shared parameter counts once
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
    """Optimiser and schedule in the form that Lightning's ``configure_optimizers`` returns.

    A checkpoint restores the optimiser's state, such as its moments, but not its settings. The scheduler sets the learning rate:
    a `Schedule` computes it again, any other scheduler continues with the rate of the checkpoint.

    Args:
        module: Module whose parameters are trained.
        optimizer: Function from parameter groups to an optimiser.
        scheduler: Function from an optimiser and ``total_steps`` to a schedule.
        weight_decay: Weight decay of matrices.
        total_steps: Optimiser steps of the whole training.

    Raises:
        ValueError: the training has no fixed number of steps.
    """
    if total_steps in (-1, float("inf")):
        raise ValueError("the learning-rate schedule needs a length: set trainer.max_steps")
    built = optimizer(parameter_groups(module, weight_decay))
    unscale_before_clipping(built)
    settings = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in built.param_groups]

    def with_settings(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        saved = state["param_groups"]
        if len(saved) != len(settings):  # PyTorch raises the error
            return state
        return state | {"param_groups": [group | own for group, own in zip(saved, settings, strict=True)]}

    built.register_load_state_dict_pre_hook(with_settings)
    # Updates state of attention mechanisms that has no gradient, such as centroids.
    acting = mechanisms(module)

    def act(*_: Any) -> None:
        for mechanism in acting:
            mechanism.after_step()

    built.register_step_post_hook(act)
    schedule = scheduler(built, total_steps=int(total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def skip_step(optimizer: Optimizer, skipped: Tensor) -> None:
    """Let the coming step of an optimiser change neither parameters nor its state, if a flag is set.

    Fused Adam and AdamW read the flag on the device. Any other optimiser makes the host wait for it, and finds no gradients.

    Args:
        optimizer: The optimiser, before its step.
        skipped: Whether to skip the step, bool ().
    """
    if _reads_flag(optimizer):
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    elif skipped:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _reads_flag(optimizer: Optimizer) -> bool:
    """Whether a step leaves everything as it is where ``found_inf``, the flag of `torch.amp.GradScaler`, is 1.

    Fused SGD reads it too, but a first step that is skipped leaves it momentum of arbitrary numbers.
    """
    return type(optimizer) in (Adam, AdamW) and all(group["fused"] for group in optimizer.param_groups)


def configure_from(module: nn.Module, settings: Mapping[str, Any], total_steps: float) -> dict[str, Any]:
    """`configure` with the ``optimizer`` and the ``scheduler`` of a module's settings, which are configs."""
    optimizer, scheduler = settings["optimizer"], settings["scheduler"]
    weight_decay = optimizer.get("weight_decay", 0.0)
    return configure(module, make(optimizer), make(scheduler), weight_decay, total_steps)


def schedule(cfg: DictConfig) -> Any:
    """The schedule of a config, attached to an optimiser without a model."""
    return instantiate(cfg.scheduler)(
        instantiate(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))]), total_steps=cfg.trainer.max_steps
    )
