"""One optimiser step over several batches, of one process or many, equal to a step over one big batch."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from audiot.attention import AttentionMechanism, mechanisms
from audiot.base.private import scale
from audiot.data.batches import Batch
from audiot.training.fsdp import full_tensor, local_part
from audiot.training.optimization import skip_step


class Mean(NamedTuple):
    """The loss of a batch.

    Args:
        value: Mean over the scored elements, a scalar.
        scored: Number of scored elements, frames or utterances, a scalar on the same device.
    """

    value: Tensor
    scored: Tensor


class WeightedSteps(pl.LightningModule):
    """LightningModule whose steps have the loss and gradient of one big batch: the sum over all scored elements by their number.

    A step adds up the gradients of k batches (``trainer.accumulate_grad_batches``) of N processes. Lightning divides each by k
    and the strategy by N, as if all batches scored the same number of elements. `weighted` therefore multiplies the mean of each
    batch by its count / unit. Before clipping, the gradients are divided by the mean count of all kN batches / unit. The unit is
    the mean count of the first batch of each process. It keeps numbers in the range of float16, and with k = 1 no division is
    left. Counts stay on the device, so no process waits for it.

    A step whose loss or gradient is not finite is skipped: it changes no parameter, nothing that the optimiser keeps, and nothing
    that is learned without gradients. All processes agree, since loss and gradient norm are those of all of them. Steps are
    counted and the learning rate goes on as if it had been taken. `audiot.training.watch.FiniteSteps` counts such steps.
    """

    SIZES: ClassVar[tuple[str, ...]]  # config keys that make batches smaller

    latest_loss: Tensor | None = None  # loss of the latest step, on the device
    latest_skipped: Tensor | None = None  # whether the latest step was skipped, bool (), on the device

    _mechanisms: list[AttentionMechanism] | None = None
    _unit: Tensor
    _sums: Tensor

    @property
    @abstractmethod
    def sample_rate(self) -> int:
        """Samples per second of the waveforms."""

    @abstractmethod
    def frames(self, batch: Batch) -> int:
        """Number of spectrogram frames in a batch, without padding."""

    @abstractmethod
    def log_loss(self, loss: Tensor) -> None:
        """Log the loss of a step."""

    def weighted(self, mean: Mean, batch_idx: int) -> Tensor:
        """Weighted loss of a batch, which a training step returns. It is the mean itself if a step has one batch."""
        if self._batches_per_step == 1:
            self._note(mean.value.detach())
            return mean.value
        count = mean.scored.to(mean.value.dtype)
        sums = torch.stack([mean.value.detach() * count, count])
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._sums = sums
            total = self._of_all_processes(sums)
            self._unit = total[1].clamp(min=1) / self.trainer.world_size
            if self.trainer.accumulate_grad_batches == 1:
                self._note(total[0] / total[1].clamp(min=1))
        else:
            self._sums = self._sums + sums
        return mean.value * (count / self._unit)

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Rescale the gradients to those of the mean over all batches of the step."""
        if self._trainer is None or self.trainer.accumulate_grad_batches == 1:
            return
        total = self._of_all_processes(self._sums)
        count = total[1].clamp(min=1)
        self._note(total[0] / count)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
        scale(gradients, self._unit * self._batches_per_step / count)

    def on_validation_start(self) -> None:
        """Let a process have no batch to validate on.

        DDP sends rank 0's buffers before the first batch of a validation too, and would wait for a process that has none. They
        are equal without that: what changes buffers adds up over all processes.
        """
        replicated = self.trainer.strategy.model
        if isinstance(replicated, DistributedDataParallel):
            replicated.broadcast_buffers = False

    def log_norm(self, norm: Tensor) -> None:
        """Log the norm of a step's gradient before clipping."""

    def discard(self, skipped: Tensor) -> None:
        """Forget what the batches of a step have left for the time after it, where the step is skipped.

        Args:
            skipped: Whether the step is skipped, bool (), on the device.
        """
        if self._mechanisms is None:  # found once: a walk through all modules takes a small model as long as a layer
            self._mechanisms = mechanisms(self)
        for mechanism in self._mechanisms:
            mechanism.discard(skipped)

    @torch.no_grad()
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Skip a step whose loss or gradient is not finite. Clip as the trainer says."""
        assert self.latest_loss is not None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = full_tensor(get_total_norm(gradients))
        self.log_norm(norm)
        defined = self.latest_loss.isfinite()
        skipped = ~(defined & norm.isfinite())
        self.discard(skipped)
        skip_step(optimizer, skipped)
        # With float16, gradients overflow while the scaler looks for the largest scale. It skips these steps itself.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.latest_skipped = ~defined if scaled else skipped
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):  # Lightning would compute the norm again
            scale([local_part(each) for each in gradients], (gradient_clip_val / (norm + 1e-6)).clamp(max=1))
        else:
            self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    @property
    def _batches_per_step(self) -> int:
        return 1 if self._trainer is None else self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _of_all_processes(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        return sums

    def _note(self, loss: Tensor) -> None:
        self.latest_loss = loss
        self.log_loss(loss)
