"""Inference with a fine-tuned model: from audio files to labels, segments, text or embeddings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from audiot.base.devices import find_device
from audiot.checkpoint import check_waveforms
from audiot.data.audio import SILENCE_DBFS, AudioFile, BadAudioError, as_mono, read_audio, reason, resample_checked
from audiot.data.labels import Framing
from audiot.downstream.module import DownstreamModule
from audiot.downstream.objectives import Row
from audiot.following import finetune_command
from audiot.runs import check_archive, has_checkpoints

WINDOW = 256  # files among which similar lengths are batched
Item: TypeAlias = "str | Path | tuple[np.ndarray | Tensor | Sequence[float], int]"
Part = TypeVar("Part")
Answer = TypeVar("Answer")


class Classifier(nn.Module):
    """A trained model of a speech task for inference. `load_classifier` makes one.

    Args:
        module: Module that `audiot finetune` trained.

    Attributes:
        features: Front end of the upstream, which divides audio into frames.
        objective: Objective of the task.
        sample_rate: Sample rate of the input in Hz.
        classes: Label names.
    """

    def __init__(self, module: DownstreamModule) -> None:
        super().__init__()
        self.module = module.eval()
        self.features = module.upstream.features
        self.objective = module.objective
        self.sample_rate: int = self.features.sample_rate
        self.classes = self.objective.classes

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def outputs(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the head, (B, frames, C) or (B, C), and lengths (B,) in frames.

        Args:
            waveforms: Samples (B, N) in [-1, 1] at ``sample_rate``. The padding at the end may have any value.
            lengths: Samples of each utterance (B,); None if nothing is padded.

        Raises:
            ValueError: an utterance is too short for one frame or too long for the model, or the waveforms have a wrong shape or
                type.
        """
        check_waveforms(waveforms)
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1])
        return self.module({"waveforms": waveforms.to(self.device), "lengths": lengths.cpu()})

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> list[Row]:
        """Predict each utterance. The kind of task decides the keys of its dict.

        Utterance tasks give ``label``, its ``score`` and the ``scores`` of all classes. With slots (intents), ``slots`` has these
        for each slot. Frame tasks give ``segments`` that cover the audio, with ``label``, ``start`` and ``end`` (seconds) and
        ``score``. CTC gives ``text`` and ``score``. Speaker verification gives the ``embedding``, a list of length 1 as a vector.
        Arguments and errors are those of `outputs`.
        """
        outputs, num_frames = self.outputs(waveforms, lengths)
        rows = self.objective.predict(outputs, num_frames)
        samples = [waveforms.shape[1]] * len(waveforms) if lengths is None else lengths.tolist()
        for row, count, num_samples in zip(rows, num_frames.tolist(), samples, strict=True):
            if "segments" in row:
                edges = frame_edges(self.features, count, num_samples)
                for segment in row["segments"]:
                    segment |= {"start": round(edges[segment["start"]], 4), "end": round(edges[segment["end"]], 4)}
        return rows

    def read(self, item: Item, silence_dbfs: float = SILENCE_DBFS) -> Tensor:
        """Mono samples (N,) of an item as in `predict`, at the model's sample rate.

        Raises:
            BadAudioError: the audio cannot be used. The message is the reason.
        """
        if isinstance(item, (str, Path)):
            samples = torch.from_numpy(read_audio(item, self.sample_rate, silence_dbfs))
        else:
            samples = torch.from_numpy(resample_checked(as_mono(*_array(item)), item[1], self.sample_rate, silence_dbfs))
        if self.features.num_tokens(len(samples)) < 1:
            raise BadAudioError(f"too short: {len(samples) / self.sample_rate:.3f} s do not fill a frame of the model")
        return samples

    def predict(
        self,
        items: Sequence[Item],
        *,
        keep_going: bool = False,
        batch_s: float = 60.0,
        progress: bool = False,
        silence_dbfs: float = SILENCE_DBFS,
    ) -> list[Row]:
        """Predictions for audio, in its order: the dicts of `forward` with ``file`` as first key.

        Args:
            items: Paths of files, or pairs ``(samples, sample_rate)``. Samples are an array, tensor or list (N,) or (N, channels)
                of floats in [-1, 1] or 16-bit integers. The ``file`` of a pair is its index: ``item 3``, counted from 0.
            keep_going: Whether audio that cannot be used gets the reason as ``error`` instead of a prediction. Otherwise it
                raises.
            batch_s: Seconds of padded audio per batch.
            progress: Whether to show a progress bar.
            silence_dbfs: RMS below which audio is silent and cannot be used, as in preparation; ``-inf`` accepts all.

        Raises:
            ValueError: an item cannot be used.
        """
        stream = self.stream(items, keep_going=keep_going, batch_s=batch_s, progress=progress, silence_dbfs=silence_dbfs)
        return list(stream)

    def stream(
        self,
        items: Sequence[Item],
        *,
        keep_going: bool = False,
        batch_s: float = 60.0,
        progress: bool = False,
        silence_dbfs: float = SILENCE_DBFS,
    ) -> Iterator[Row]:
        """`predict`, yielding predictions when they are ready."""
        if isinstance(items, (str, Path)):
            raise ValueError(f"predict takes a list of files, found one: [{str(items)!r}]")
        with tqdm(total=len(items), desc="predict", unit="file", disable=not progress, leave=False, delay=1) as bar:
            for first in range(0, len(items), WINDOW):
                window = items[first : first + WINDOW]
                rows: list[Row] = [
                    {"file": str(item) if isinstance(item, (str, Path)) else f"item {place}"}
                    for place, item in enumerate(window, start=first)
                ]
                for row in self._window(window, rows, batch_s, silence_dbfs, bar):
                    if "error" in row and not keep_going:
                        raise ValueError(f"{row['file']}: {row['error']}")
                    yield row

    def _window(self, items: Sequence[Item], rows: list[Row], batch_s: float, silence_dbfs: float, bar: tqdm) -> list[Row]:
        seconds: dict[int, float] = {}
        for number, item in enumerate(items):
            try:
                seconds[number] = _seconds(item)
            except BadAudioError as reason:
                rows[number]["error"] = str(reason)
        bar.update(len(items) - len(seconds))
        for batch in by_length(seconds, batch_s):
            waveforms: dict[int, Tensor] = {}
            for number in batch:
                try:
                    waveforms[number] = self.read(items[number], silence_dbfs)
                except BadAudioError as reason:
                    rows[number]["error"] = str(reason)
            answers = compute_with_fallback(list(waveforms.values()), lambda chosen: self(*collate(chosen)))
            for number, answer in zip(waveforms, answers, strict=True):
                rows[number] |= {"error": answer} if isinstance(answer, str) else answer
            bar.update(len(batch))
        return rows


def _array(item: Any) -> tuple[np.ndarray, int]:
    """Samples and sample rate of a pair."""
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise BadAudioError(f"an item must be a path or a pair (samples, sample_rate), found {type(item).__name__}")
    samples, rate = item
    try:
        return np.asarray(samples.detach().cpu() if isinstance(samples, Tensor) else samples), rate
    except (TypeError, ValueError, RuntimeError) as error:  # rows of unequal lengths, or a dtype that NumPy lacks
        raise BadAudioError(f"samples are not an array: {reason(error)}") from None


def _seconds(item: Item) -> float:
    if isinstance(item, (str, Path)):
        with AudioFile(item) as file:
            return file.num_samples / file.sample_rate
    samples, rate = _array(item)
    return len(as_mono(samples, rate)) / rate


def load_classifier(run: str | Path, device: str = "cpu", trusted: Collection[str] = ()) -> Classifier:
    """Load the best checkpoint of a fine-tuning run, in evaluation mode. No code of the file is run.

    Args:
        run: Its folder, or that of a probe (``RUN/probes/NAME``).
        device: ``cpu``, ``cuda``, …; ``auto``: a GPU if there is one.
        trusted: Packages from outside audiot whose classes the checkpoint may name: those of your own heads and mechanisms.

    Raises:
        FileNotFoundError: there is no fine-tuned model.
        ValueError: the run is a pre-training run, the checkpoint is damaged or of another kind, or the device does not exist.
    """
    place = find_device(device, f"no device {device!r} here")
    module = DownstreamModule.from_checkpoint(_best_checkpoint(Path(run)), trusted, without_trials)
    return Classifier(module).eval().requires_grad_(False).to(place)


def without_trials(settings: dict[str, Any]) -> None:
    """Take the file of trials out of a module's settings: only the test needs it, and it may be gone."""
    objective = settings["objective"]
    if isinstance(objective, dict) and objective.get("trials"):
        objective["trials"] = None


def _best_checkpoint(run: Path) -> Path:
    path = run / "checkpoints" / "best.ckpt"
    if path.is_file():
        return check_archive(path)
    found = sorted(str(path.parent.parent) for depth in ("*", "*/*") for path in run.glob(f"{depth}/checkpoints/best.ckpt"))
    below = f"; fine-tuned models below it: {', '.join(found)}" if found else ""
    if (run / "encoder").is_dir() or has_checkpoints(run):
        raise ValueError(
            f"{run} is a pre-training run, whose encoder is not a classifier: fine-tune it with {finetune_command(run)}{below}"
        )
    raise FileNotFoundError(f"no fine-tuned model at {run}: expected {path}, which audiot finetune writes{below}")


def frame_edges(features: Framing, num_frames: int, num_samples: int) -> list[float]:
    """The ``num_frames + 1`` edges of frames in seconds, halfway between the frames' centres.

    The first frame begins and the last ends with the audio, so the frames cover it. Reading intervals between edges at the
    frames' centres, as `audiot.data.labels.FrameLabels` does, returns each frame's own interval.

    Args:
        features: Front end that divides the audio into frames.
        num_frames: Number of frames T, at least one.
        num_samples: Samples of the audio.
    """
    centers = features.frame_centers(num_frames).double()
    middles = ((centers[1:] + centers[:-1]) / 2 / features.sample_rate).tolist()
    return [0.0, *middles, num_samples / features.sample_rate]


def collate(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Zero-padded waveforms (B, N) and their lengths (B,)."""
    return pad_sequence(list(waveforms), batch_first=True), torch.tensor([len(samples) for samples in waveforms])


def by_length(seconds: Mapping[int, float], batch_s: float) -> list[list[int]]:
    """Keys in batches of similar length. A batch has at most ``batch_s`` seconds with padding, or one item."""
    batches: list[list[int]] = []
    for number in sorted(seconds, key=seconds.__getitem__):
        if batches and (len(batches[-1]) + 1) * seconds[number] <= batch_s:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def compute_with_fallback(items: Sequence[Part], compute: Callable[[Sequence[Part]], list[Answer]]) -> list[Answer | str]:
    """Return ``compute(items)``. If it fails, compute each item alone and return the reasons of those that fail.

    So one utterance that is too long for the model does not prevent the others of its batch.
    """
    try:
        return [*compute(items)] if items else []
    except (ValueError, torch.OutOfMemoryError) as error:
        if len(items) == 1:
            return [" ".join(str(error).split())]
    return [answer for item in items for answer in compute_with_fallback([item], compute)]
