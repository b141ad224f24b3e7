"""A fine-tuned model by itself: audio files in, labels, segments, text or embeddings out."""

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
from audiot.data.audio import SILENCE_DBFS, AudioFile, BadAudioError, as_mono, heard, read_audio, reason
from audiot.data.labels import Framing
from audiot.downstream.module import DownstreamModule
from audiot.downstream.objectives import Row
from audiot.following import finetune_command
from audiot.runs import check_archive

WINDOW = 256  # files looked at together, to find those of similar length
Item: TypeAlias = "str | Path | tuple[np.ndarray | Tensor | Sequence[float], int]"
Part = TypeVar("Part")
Answer = TypeVar("Answer")


class Classifier(nn.Module):
    """A model of a speech task, ready to be asked; `load_classifier` makes one.

    Args:
        module: What `audiot finetune` trained.

    Attributes:
        features: How it cuts audio into frames.
        objective: Of its task.
        sample_rate: Of the waveforms that it takes, Hz.
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
        """Where it lies."""
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def outputs(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the head gives: (B, frames, C) or (B, C), and lengths (B,) in frames.

        Args:
            waveforms: (B, N) in [-1, 1] at ``sample_rate``, padded at the end with anything.
            lengths: (B,) samples; None: nothing is padded.

        Raises:
            ValueError: an utterance is too short for one frame, or too long for the model, or the waveforms are no such tensor.
        """
        check_waveforms(waveforms)
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1])
        return self.module({"waveforms": waveforms.to(self.device), "lengths": lengths.cpu()})

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> list[Row]:
        """What the model says of each utterance, a dict by the kind of task.

        Of an utterance: ``label``, its ``score`` and the ``scores`` of all classes; with slots (intents), ``slots`` has them
        for each. Of frames: ``segments`` of ``label``, ``start`` and ``end`` (seconds) and ``score``, which cover the audio.
        By CTC: ``text`` and ``score``. Of speaker verification: the ``embedding``, of length 1, a list. Arguments and errors
        are those of `outputs`.
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
        """The samples (N,) of an item as in `predict`, mono, at the model's rate.

        Raises:
            BadAudioError: it can't be used; the message is the reason.
        """
        if isinstance(item, (str, Path)):
            samples = torch.from_numpy(read_audio(item, self.sample_rate, silence_dbfs))
        else:
            samples = torch.from_numpy(heard(as_mono(*_array(item)), item[1], self.sample_rate, silence_dbfs))
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
        """What the model says of audio, in its order: the dicts of `forward`, with ``file`` in front.

        Args:
            items: Paths of files, or pairs ``(samples, sample_rate)``: an array, tensor or list (N,) or (N, channels) of floats
                in [-1, 1] or of 16-bit integers, and Hz. The ``file`` of a pair is its place: ``item 3``, counted from 0.
            keep_going: Audio that can't be used gets ``error``, the reason, in place of a prediction; else it is raised.
            batch_s: Seconds of audio, padded, that are computed at a time.
            progress: Show a bar.
            silence_dbfs: An RMS below this is silence, which can't be used, as in preparation; ``-inf``: nothing is too quiet.

        Raises:
            ValueError: an item can't be used.
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
        """`predict`, as the predictions get ready."""
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
            answers = together(list(waveforms.values()), lambda chosen: self(*collate(chosen)))
            for number, answer in zip(waveforms, answers, strict=True):
                rows[number] |= {"error": answer} if isinstance(answer, str) else answer
            bar.update(len(batch))
        return rows


def _array(item: Any) -> tuple[np.ndarray, int]:
    """The samples and the rate of a pair."""
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise BadAudioError(f"an item must be a path or a pair (samples, sample_rate), found {type(item).__name__}")
    samples, rate = item
    try:
        return np.asarray(samples.detach().cpu() if isinstance(samples, Tensor) else samples), rate
    except (TypeError, ValueError, RuntimeError) as error:  # rows of unlike lengths, or a tensor that NumPy has no type for
        raise BadAudioError(f"samples are no array: {reason(error)}") from None


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
        ValueError: the run is one of pre-training, the checkpoint is of another kind or damaged, or there is no such device.
    """
    place = find_device(device, f"no device {device!r} here")
    module = DownstreamModule.from_checkpoint(_best_checkpoint(Path(run)), trusted, without_trials)
    return Classifier(module).eval().requires_grad_(False).to(place)


def without_trials(settings: dict[str, Any]) -> None:
    """Take the file of trials out of a module's settings: only the test needs it, and it may be gone."""
    if settings["objective"].get("trials"):
        settings["objective"]["trials"] = None


def _best_checkpoint(run: Path) -> Path:
    path = run / "checkpoints" / "best.ckpt"
    if path.is_file():
        return check_archive(path)
    found = sorted(str(path.parent.parent) for depth in ("*", "*/*") for path in run.glob(f"{depth}/checkpoints/best.ckpt"))
    below = f"; fine-tuned models below it: {', '.join(found)}" if found else ""
    if (run / "encoder").is_dir() or any((run / "checkpoints").glob("step=*.ckpt")):
        raise ValueError(
            f"{run} is a pre-training run, its encoder is not a classifier: fine-tune it: {finetune_command(run)}{below}"
        )
    raise FileNotFoundError(f"no fine-tuned model at {run}: expected {path}, which audiot finetune writes{below}")


def frame_edges(features: Framing, num_frames: int, num_samples: int) -> list[float]:
    """Where one frame gives way to the next, seconds, ``num_frames + 1`` of them: halfway between the frames' centres.

    The first frame begins and the last ends with the audio, so that intervals between edges cover it; read off at the frames'
    centres, as `audiot.data.labels.FrameLabels` does it, they give each frame its own.

    Args:
        features: How the audio is cut into frames.
        num_frames: T, at least one.
        num_samples: Of the audio.
    """
    centers = features.frame_centers(num_frames).double()
    middles = ((centers[1:] + centers[:-1]) / 2 / features.sample_rate).tolist()
    return [0.0, *middles, num_samples / features.sample_rate]


def collate(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Zero-padded waveforms (B, N) and their lengths (B,)."""
    return pad_sequence(list(waveforms), batch_first=True), torch.tensor([len(samples) for samples in waveforms])


def by_length(seconds: Mapping[int, float], batch_s: float) -> list[list[int]]:
    """The keys in batches of similar length, of at most ``batch_s`` seconds with padding, or of one item."""
    batches: list[list[int]] = []
    for number in sorted(seconds, key=seconds.__getitem__):
        if batches and (len(batches[-1]) + 1) * seconds[number] <= batch_s:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def together(items: Sequence[Part], compute: Callable[[Sequence[Part]], list[Answer]]) -> list[Answer | str]:
    """``compute(items)``; where that fails, each item by itself, and the reason in place of what fails alone.

    One utterance that is too long for a model must not take the others of its batch with it.
    """
    try:
        return [*compute(items)] if items else []
    except (ValueError, torch.OutOfMemoryError) as error:
        if len(items) == 1:
            return [" ".join(str(error).split())]
    return [answer for item in items for answer in together([item], compute)]
