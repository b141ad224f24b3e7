"""Short trainings that find a size of batch and a learning rate."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import nsmallest
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from audiot.base.devices import free_memory, synchronise
from audiot.base.streams import key
from audiot.data.batches import Batch, FirstBatches, load, to_device
from audiot.data.datamodule import SpeechDataModule, open_pieces
from audiot.training.accumulation import WeightedSteps
from audiot.training.watch import is_out_of_memory

DISTINCT = 64  # crops that a batch repeats
GIB = 2**30


class Trial(NamedTuple):
    """What came of training with one size of batch.

    Args:
        utterances: Crops per batch.
        batch_s: Seconds of audio per batch.
        frames_per_s: Spectrogram frames per second; None: memory had no room for the batch.
        step_s: Seconds of a step; None likewise.
        peak_gib: Memory in GiB that PyTorch's tensors took at most; None where it is not known.
    """

    utterances: int
    batch_s: float
    frames_per_s: float | None = None
    step_s: float | None = None
    peak_gib: float | None = None

    @property
    def fits(self) -> bool:
        """Whether memory had room for it."""
        return self.frames_per_s is not None


def search(attempt: Callable[[int], Trial], smallest: int, largest: int, resolution: float) -> list[Trial]:
    """Try sizes of batches: doubled from the smallest on; once one does not fit, bisected between it and the last that fits.

    Args:
        attempt: Function that trains with so many utterances per batch.
        smallest, largest: First and last number of utterances.
        resolution: Share of a size that fits, within which the next size that doesn't fit is known at the end.

    Returns:
        The trials in the order of their sizes. None fits if one utterance does not.
    """
    tried = [attempt(smallest)]
    while tried[-1].fits and tried[-1].utterances < largest:
        tried.append(attempt(min(2 * tried[-1].utterances, largest)))
    if not tried[-1].fits:
        low, high = tried[-2].utterances if len(tried) > 1 else 0, tried[-1].utterances
        while high - low > max(1, resolution * low):
            tried.append(attempt((low + high) // 2))
            low, high = (tried[-1].utterances, high) if tried[-1].fits else (low, tried[-1].utterances)
    return sorted(tried)


def recommended(tried: Sequence[Trial], within: float) -> Trial:
    """The smallest batch that fits and whose throughput is within a share of the best."""
    speeds = [(trial.frames_per_s, trial) for trial in tried if trial.frames_per_s is not None]
    best = max(speed for speed, _ in speeds)
    return next(trial for speed, trial in speeds if speed >= (1 - within) * best)


class LongestCrops(pl.LightningDataModule):
    """Batches of the longest crops that pre-training takes of a corpus, which need the most memory.

    Speech is that of up to 64 utterances, chosen by the seed, which a larger batch repeats with other random keys.

    Args:
        data: Data of the pre-training.

    Attributes:
        num_samples: Samples of a crop.
        utterances: Crops per batch, to be set.
        batches: Number of batches, to be set.

    Raises:
        ValueError: the corpus has no utterance to train on.
    """

    def __init__(self, data: SpeechDataModule) -> None:
        super().__init__()
        corpus = data.corpus
        pieces = open_pieces(corpus.directory, corpus.split_for("pretrain", "train"), corpus.content)
        longest = max((piece.num_samples for piece in pieces), default=0)
        if not longest:
            raise ValueError("the training split has no utterance: bring more audio")
        if data.lengths is not None:
            place = bisect_right(data.lengths, longest)
            self.num_samples = data.lengths[place - 1] if place else longest
        else:
            self.num_samples = longest if data.crop_s is None else min(longest, round(data.crop_s * corpus.sample_rate))
        enough = (piece for piece in pieces if piece.num_samples >= self.num_samples)
        chosen = nsmallest(DISTINCT, enough, key=lambda piece: key("tune", data.seed, piece.id))
        self.speech = load([piece._replace(num_samples=self.num_samples) for piece in chosen])
        self.sample_rate = corpus.sample_rate
        self.seed = data.seed
        self.utterances = self.batches = 1

    def seconds(self, utterances: int) -> float:
        """Value of ``data.batch_s`` with which a batch has so many of these crops, in hundredths."""
        return math.ceil(100 * utterances * self.num_samples / self.sample_rate) / 100

    def most(self, batch_s: float) -> int:
        """Number of these crops in a batch of so many seconds."""
        return max(1, round(batch_s * self.sample_rate) // self.num_samples)

    def train_dataloader(self) -> FirstBatches:
        """So many batches."""
        waveforms = self.speech[torch.arange(self.utterances) % len(self.speech)]
        if torch.cuda.is_available():
            waveforms = waveforms.pin_memory()
        lengths = torch.full((self.utterances,), self.num_samples)
        batches = [
            {
                "waveforms": waveforms,
                "lengths": lengths,
                "keys": torch.tensor([key("tune", self.seed, number, row) for row in range(self.utterances)]),
                "ids": [str(row) for row in range(self.utterances)],
                "position": (0, number),
            }
            for number in range(self.batches)
        ]
        return FirstBatches(batches, self.batches)

    def val_dataloader(self) -> list[Any]:
        """Nothing: no batch is validated."""
        return []

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch as the data module of a training does."""
        return to_device(batch, device)


class Interruptible(Callback):
    """Let Ctrl-C end the command, where Lightning would end the process without a word."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Pass Ctrl-C on."""
        if isinstance(exception, KeyboardInterrupt):
            raise exception


class StepTimes(Interruptible):
    """Time the steps after the first ones.

    Args:
        warmup: Number of batches that are not timed, since they compile, tune and allocate.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.begin = self.seconds = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock."""
        if batch_idx == self.warmup:
            synchronise(pl_module.device)
            self.begin = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        synchronise(pl_module.device)
        self.seconds = time.monotonic() - self.begin


@contextmanager
def limited_memory(device: torch.device, margin: float) -> Iterator[None]:
    """Let PyTorch take only a share of a GPU's memory: more is out of memory. Other devices have no such limit."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(1 - margin, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class BatchTrials:
    """Train a module for a few steps with batches of any size, each time from the same weights.

    Args:
        make_trainer: Function from a number of steps to a trainer without callbacks.
        module: The module. It ends as it began.
        crops: The batches.
        warmup, steps: Number of steps at each size, before the clock starts and after.
        margin: Share of a GPU's memory that no batch may use.
    """

    def __init__(
        self,
        make_trainer: Callable[[int], pl.Trainer],
        module: WeightedSteps,
        crops: LongestCrops,
        warmup: int,
        steps: int,
        margin: float,
    ) -> None:
        self.make_trainer = make_trainer
        self.module = module
        self.crops = crops
        self.warmup = warmup
        self.steps = steps
        self.margin = margin
        self._weights = {name: value.clone() for name, value in module.state_dict().items()}

    def __call__(self, utterances: int) -> Trial:
        """Train with so many utterances per batch.

        Raises:
            RuntimeError: the training failed, other than for lack of memory.
        """
        trainer = self.make_trainer(self.warmup + self.steps)
        device, each = trainer.strategy.root_device, trainer.accumulate_grad_batches
        times = StepTimes(self.warmup * each)
        trainer.callbacks.append(times)  # type: ignore[attr-defined]
        self.crops.utterances, self.crops.batches = utterances, trainer.max_steps * each
        batch_s, fits, peak = self.crops.seconds(utterances), True, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            with limited_memory(device, self.margin):
                trainer.fit(self.module, self.crops)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if fits and device.type == "cuda":
            peak = round(torch.cuda.max_memory_allocated(device) / GIB, 3)
        del trainer
        self._restore()
        if not fits:
            return Trial(utterances, batch_s)
        features: Any = self.module.get_submodule("model.features")
        frames = utterances * features.num_tokens(self.crops.num_samples) * features.stack * each
        step_s = times.seconds / self.steps
        return Trial(utterances, batch_s, frames / step_s, step_s, peak)

    def _restore(self) -> None:
        """Give the module its first weights, on the CPU, and free what the training took. Its errors are gone by now."""
        module = self.module
        module.trainer = self.crops.trainer = None  # type: ignore[assignment]  # with its optimiser's state
        module.zero_grad()
        module.cpu()
        module.load_state_dict(self._weights)
        free_memory()


class RangeTest(Interruptible):
    """Raise the learning rate exponentially, from step to step, and note the loss (Smith 2017, arXiv:1506.01186, section 3.3).

    Differs from the paper: the rate rises exponentially, and the loss of training is noted in place of the accuracy of
    validation, as is usual by now. It ends with the last step, at a loss that is not finite, or when the mean of the latest
    losses is far above the lowest such mean.

    Args:
        lowest, highest: Rates of the first and the last step.
        steps: Number of steps.
        window: Number of losses in a mean.
        stop: Factor of the lowest mean at which the test ends.
    """

    def __init__(self, lowest: float, highest: float, steps: int, window: int, stop: float) -> None:
        self.schedule = np.geomspace(lowest, highest, steps).tolist()
        self.window = window
        self.stop = stop
        self.losses: list[float] = []
        self.lowest_mean = math.inf

    @property
    def rates(self) -> list[float]:
        """Rates of the steps that were taken."""
        return self.schedule[: len(self.losses)]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Set the step's rate."""
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.schedule[trainer.global_step]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: WeightedSteps, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Note the loss of a step after its last batch."""
        if trainer.global_step > len(self.losses):
            assert pl_module.latest_loss is not None
            trainer.should_stop = self.take(float(pl_module.latest_loss))

    def take(self, loss: float) -> bool:
        """Note the loss of a step; whether the test ends with it."""
        self.losses.append(loss)
        if not math.isfinite(loss):
            return True
        if len(self.losses) >= self.window:
            mean = sum(self.losses[-self.window :]) / self.window
            self.lowest_mean = min(self.lowest_mean, mean)
            return mean > self.stop * abs(self.lowest_mean)
        return False


class Suggestion(NamedTuple):
    """What a range test suggests.

    Args:
        rate: The rate at which the smoothed loss falls most steeply.
        low, high: Ends of the rates around it at which it falls at least half as steeply.
        best: The rate at which the smoothed loss is lowest.
    """

    rate: float
    low: float
    high: float
    best: float


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Mean of the losses around each step, over ``window`` steps (odd) or, near the ends, as many as lie on both sides."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    halves = [min(window // 2, place, len(losses) - 1 - place) for place in range(len(losses))]
    return [float(sums[place + half + 1] - sums[place - half]) / (2 * half + 1) for place, half in enumerate(halves)]


def suggestion(rates: Sequence[float], losses: Sequence[float], window: int) -> Suggestion | None:
    """The rate at which the smoothed loss falls most steeply over the logarithm of the rate, before it is lowest.

    Args:
        rates: Rates of the steps, rising.
        losses: Their losses. One that is not finite may be the last.
        window: Number of losses in a mean.

    Returns:
        The suggestion; None where the loss does not fall.
    """
    kept = len(losses) if not losses or math.isfinite(losses[-1]) else len(losses) - 1
    curve = smoothed(losses[:kept], window)
    begin = window // 2  # before it, fewer losses are in a mean
    if kept < begin + 2:
        return None
    end = int(np.argmin(curve))
    slopes = np.gradient(curve, np.log(rates[:kept]))
    if end <= begin or (at := begin + int(np.argmin(slopes[begin : end + 1]))) == 0 or slopes[at] >= 0:
        return None
    first = last = at
    while first > begin and slopes[first - 1] <= slopes[at] / 2:
        first -= 1
    while last < end and slopes[last + 1] <= slopes[at] / 2:
        last += 1
    return Suggestion(rates[at], rates[first], rates[last], rates[end])
