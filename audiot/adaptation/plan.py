"""What to do with a folder: overrides of ``audiot finetune`` and ``audiot pretrain`` by its size, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from audiot.adaptation.labelled import CLASSIFICATION, SPEAKERS, TASKS, TRANSCRIPTION, Labelled
from audiot.base.quoting import Value, argument, override

PUNCTUATION = '.,;:?!"'  # what downstream=asr leaves out of transcripts
SWITCH = ("auto", True, False)
MANY = 2000  # labelled files of which a tenth is enough for validation, and as much for the test
TRAINABLE = 100  # labelled training files from which an encoder is fine-tuned
LARGEST_ON_CPU = 20e6  # parameters of an encoder that is fine-tuned without a GPU
TOGETHER = 32  # utterances that a batch should hold
PASSES = {False: 30, True: 20}  # over the training files; with an encoder that is trained: True
PRETRAINING_PASSES = 20  # over the training audio
MOST_STEPS = {False: 2000, True: 20_000}  # with a GPU: True
FEWEST_STEPS = 200
PRETRAINING_STEPS = {False: (300, 3000), True: (300, 40_000)}  # fewest and most
PRETRAINING_BATCH_S = {False: (25.0, 25.0), True: (25.0, 200.0)}  # seconds of audio in a batch, least and most
ENOUGH_STEPS = 3000  # beyond which batches grow first
LITTLE_H = 1.0  # hours of audio of which less is learnt at a lower rate
LOW_RATE = 1e-3
BATCH_S = {False: 50.0, True: 200.0}  # likewise of labelled audio, most
RATES = {"checkpoint": 1e-3, "random": 1e-3, "hf": 5e-5, "s3prl": 2e-4}  # learning rates of fine-tuning
WIDE = 256  # width of an encoder from which on it is fine-tuned at 2e-4


@dataclass
class Plan:
    """Settings that were chosen, each said with its reason, beside those that were given.

    Args:
        given: Names of the keys and groups that the command line sets.
    """

    given: Collection[str]
    chosen: dict[str, Value] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def choose(self, key: str, value: Value, why: str) -> None:
        """Take a setting, unless it is given."""
        if key not in self.given:
            self.chosen[key] = value
            self.lines.append(f"{argument(key, value)}: {why}")

    def overrides(self) -> list[str]:
        """The chosen settings as overrides."""
        return [override(key, value) for key, value in self.chosen.items()]


@dataclass(frozen=True)
class Size:
    """How much there is to train on.

    Args:
        train_s: Seconds of audio in the task's training split.
        utterances: Utterances there.
        audio_h: Hours of audio that pre-training may hear.
        on_gpu: Whether there is a GPU.
    """

    train_s: float
    utterances: int
    audio_h: float
    on_gpu: bool


def plan_data(plan: Plan, found: Labelled, by_speaker: bool | str) -> None:
    """Choose the task, and how the files are split."""
    option = {CLASSIFICATION: "keyword", SPEAKERS: "speaker_utterance", TRANSCRIPTION: "asr"}[found.task]
    plan.choose("downstream", option, found.why)
    if found.task == CLASSIFICATION and found.label != "keyword":
        plan.choose("downstream.labels.field", found.label, f"{len(found.counts)} labels")
    if found.task == TRANSCRIPTION and not any(name.startswith("downstream.labels") for name in plan.given):
        letters = sorted({letter for each in found.characters for letter in each.upper()} - {*PUNCTUATION})
        plan.choose("downstream.labels.alphabet", "".join(letters), "the characters of all transcripts")
    plan.chosen["+data.corpus.label"] = found.label
    for role, values in found.splits.items():
        condition = " or ".join(f"split=={value!r}" for value in values)
        plan.choose(f"data.{role}", condition, "as the column split says")
    if {"valid", "test"} <= found.splits.keys():
        return
    share = 0.1 if found.files >= MANY else 0.15
    of_each = "of the files of each label " if found.task != TRANSCRIPTION else ""
    also = "" if "test" in found.splits or "valid" in found.splits else ", and as many to test"
    plan.choose("data.valid_fraction", share, f"{share:.0%} {of_each}to validate{also}; {found.files} files in all")
    if by_speaker is False or (found.task == SPEAKERS and found.speakers):
        plan.chosen["+data.corpus.by_speaker"] = False


def check_settings(options: Mapping[str, Any], init: str | None, has_upstream: bool) -> None:
    """Refuse settings that can't be used, before anything is read.

    Args:
        options: The settings under ``adapt``.
        init: Encoder whose pre-training goes on.
        has_upstream: Whether an upstream is given.

    Raises:
        ValueError: one of them, or settings exclude each other.
    """
    for name, words in {"task": ("auto", *TASKS), "by_speaker": SWITCH, "pretrain": SWITCH, "baseline": (True, False)}.items():
        if options[name] not in words:
            shown = [str(word).lower() for word in words]
            raise ValueError(f"adapt.{name} must be {', '.join(shown[:-1])} or {shown[-1]}, found {options[name]}")
    for name, least in {"timed_steps": 0, "clips": 0, "pretrain_steps": 1}.items():
        value = options[name]
        if (type(value) is not int or value < least) and not (name == "pretrain_steps" and value == "auto"):
            raise ValueError(f"adapt.{name} must be a whole number, at least {least}, found {value}")
    for name in ("enough_h", "clip_s"):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"adapt.{name} must be a number above 0, found {value}")
    if has_upstream and (init is not None or options["pretrain"] is True):
        what = f"init={init}" if init is not None else "adapt.pretrain=true"
        raise ValueError(
            f"{what} trains an encoder here, and upstream is given too: init=RUN/encoder goes on with its pre-training, "
            "upstream.path=RUN/encoder takes it as it is"
        )
    if init is not None and options["pretrain"] is False:
        raise ValueError(f"init={init} goes on with a pre-training, which adapt.pretrain=false leaves out: drop one of them")


def plan_encoder(plan: Plan, hours: float, init: str | None, wanted: bool | str, enough_h: float, has_upstream: bool) -> bool:
    """Choose whether an encoder is pre-trained here; if not and none is given, features alone are the input.

    Args:
        plan: The plan.
        hours: Hours of audio to pre-train on.
        init: Encoder whose pre-training goes on.
        wanted: ``adapt.pretrain``.
        enough_h: Hours from which on ``auto`` pre-trains.
        has_upstream: Whether an upstream is given.

    Returns:
        Whether to pre-train.
    """
    if has_upstream:
        return False
    if init is not None:
        plan.lines.append(f"{argument('init', init)}: its pre-training goes on with the {hours:.2f} h of audio here")
        return True
    if wanted == "auto":
        wanted = hours >= enough_h
        enough = "enough" if wanted else f"fewer than {enough_h:g} (adapt.enough_h)"
        plan.lines.append(f"adapt.pretrain={str(wanted).lower()}: no encoder is given, and {hours:.2f} h of audio are {enough}")
    if not wanted:
        plan.choose("upstream", "features", "the input of encoders is told apart by its spectrum")
    return bool(wanted)


def plan_pretraining(plan: Plan, size: Size, steps: int | str) -> None:
    """Choose how long to pre-train, in what batches, and how fast.

    Little audio is learnt in small batches: large ones would pass over it hundreds of times. At the usual rate some of its
    encoders end with states from which no label can be learnt.
    """
    audio_s = 3600 * size.audio_h
    fewest, most = PRETRAINING_STEPS[size.on_gpu]
    least_s, most_s = PRETRAINING_BATCH_S[size.on_gpu]
    batch_s = min(max(float(round(PRETRAINING_PASSES * audio_s / ENOUGH_STEPS)), least_s), most_s)
    plan.choose("data.batch_s", batch_s, f"seconds of audio in a batch, {'on a GPU' if size.on_gpu else 'without a GPU'}")
    batch_s = float(plan.chosen.get("data.batch_s", batch_s))  # type: ignore[arg-type]
    if steps == "auto":
        count = min(max(ceil(PRETRAINING_PASSES * audio_s / batch_s), fewest), most)
        passes = count * batch_s / max(1e-6, audio_s)
        plan.choose("trainer.max_steps", count, f"{passes:.3g} passes over {size.audio_h:.2f} h")
    else:
        count = int(steps)
        plan.chosen["trainer.max_steps"] = count
    plan.chosen["trainer.val_check_interval"] = max(1, count // 3)
    if size.audio_h < LITTLE_H:
        plan.choose("optimizer.lr", LOW_RATE, f"less than {LITTLE_H:g} h of audio")
    if not size.on_gpu and "trainer" not in plan.given:
        plan.choose("trainer.precision", "32-true", "float32, which every processor is quick with")


def plan_training(
    plan: Plan, found: Labelled, size: Size, upstream: str, width: int, parameters: int, cfg: Mapping[str, Value]
) -> None:
    """Choose how the labels are learnt.

    Args:
        plan: The plan.
        found: The labels.
        size: How much there is.
        upstream: Option of the group ``upstream``.
        width: Width of its hidden states.
        parameters: Number of its parameters.
        cfg: Values of given keys.
    """
    mean_s = size.train_s / max(1, size.utterances)
    batch_s = min(BATCH_S[size.on_gpu], max(4.0, round(TOGETHER * mean_s, 1)))
    plan.choose("data.batch_s", batch_s, f"some {batch_s / mean_s:.0f} files of {mean_s:.2g} s in a batch")
    batch_s = float(cfg.get("data.batch_s") or batch_s)  # type: ignore[arg-type]
    trains = False
    if upstream != "features":
        small = parameters <= LARGEST_ON_CPU or size.on_gpu
        trains = size.utterances >= TRAINABLE and small
        if trains:
            why = f"{size.utterances} labelled files can train the encoder with its head"
        elif small:
            why = f"{size.utterances} labelled files, fewer than {TRAINABLE}, train a head alone"
        else:
            why = f"the encoder has {parameters / 1e6:.0f} M parameters, and no GPU is here: a head alone is trained"
        plan.choose("downstream.train_encoder", trains, why)
        trains = bool(cfg.get("downstream.train_encoder", trains))
        plan.choose("downstream.layers", "last" if trains else "weighted_sum", "what the head reads")
    if found.task != TRANSCRIPTION and upstream != "features":
        plan.choose("downstream.head.pooling", "statistics", "mean and deviation over time")
    if found.task == TRANSCRIPTION and not size.on_gpu:
        plan.choose("downstream.head.hidden_dim", 256, "a smaller head, without a GPU")
        plan.choose("downstream.head.projector_dim", 256, "likewise")
        plan.choose("downstream.head.num_layers", 1, "likewise")
    per_batch = 32.0 if not trains and upstream != "features" else max(1.0, batch_s / mean_s)
    epoch = max(1.0, size.utterances / per_batch)
    steps = min(max(ceil(PASSES[trains] * epoch), FEWEST_STEPS), MOST_STEPS[size.on_gpu])
    plan.choose("trainer.max_steps", steps, f"{steps / epoch:.3g} passes over {size.utterances} files")
    steps = int(cfg.get("trainer.max_steps") or steps)  # type: ignore[arg-type]
    plan.choose("trainer.val_check_interval", max(1, steps // 10), "ten validations choose the checkpoint")
    if upstream == "features":
        rate = 1e-2
    elif trains:
        rate = 2e-4 if upstream == "checkpoint" and width > WIDE else RATES[upstream]
    else:
        rate = 2e-3 if found.task == TRANSCRIPTION else 1e-2
    plan.choose("optimizer.lr", rate, "for an encoder that is trained" if trains else "for a head alone")
