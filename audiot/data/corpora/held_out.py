"""Holding out utterances for validation and test where a corpus has no such splits: by a hash, if possible by speaker."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

FEWEST_SPEAKERS = 4
SPEAKER_TASKS = ("speaker", "speaker_identification")  # tasks about speakers of the training split

Split = dict[str, list[str]]  # role or split name → ids of utterances


def hold_out(
    utterances: Sequence[str], fraction: float, seed: int, roles: Sequence[str], speaker_of: Mapping[str, str] | None = None
) -> Split:
    """Take a share of the utterances for each of ``roles``, at least one each. The rest is ``train``.

    A hash of seed and utterance chooses them, so the choice depends neither on order nor on platform.

    Args:
        utterances: Ids of the utterances.
        fraction: Share of the utterances for each role.
        seed: Seed of the choice.
        roles: Roles to fill: ``valid``, ``test`` or both.
        speaker_of: Speaker of each utterance. Training keeps at least one utterance per speaker. None ignores speakers.

    Raises:
        ValueError: the fraction is out of range, or there are too few utterances.
    """
    if not 0 < fraction < 0.5:
        raise ValueError(f"data.valid_fraction must be above 0 and below 0.5, found {fraction}")
    size = max(1, round(fraction * len(utterances)))
    by_hash = sorted(utterances, key=lambda name: _hash(seed, name))
    last = {"" if speaker_of is None else speaker_of[name]: name for name in by_hash}  # training keeps this one of each speaker
    kept = set(last.values())
    free = [name for name in by_hash if name not in kept]
    if len(free) < size * len(roles):
        raise ValueError(
            f"{len(utterances)} utterances are too few to take {size} each for {' and '.join(roles)}: "
            "add some, or name the splits yourself"
        )
    role_of = {name: role for at, role in enumerate(roles) for name in free[at * size : (at + 1) * size]}
    split: Split = {role: [] for role in ("train", *roles)}
    for name in utterances:
        split[role_of.get(name, "train")].append(name)
    return split


def hold_out_of_each(
    utterances: Sequence[str], fraction: float, seed: int, roles: Sequence[str], label_of: Mapping[str, str]
) -> Split:
    """Take a share of the utterances of every label for each of ``roles``, at least one each. The rest is ``train``.

    Args:
        utterances: Ids of the utterances.
        fraction: Share of the utterances for each role.
        seed: Seed of the choice.
        roles: Roles to fill: ``valid``, ``test`` or both.
        label_of: Label of each utterance.

    Raises:
        ValueError: the fraction is out of range, or a label has too few utterances.
    """
    of_label: dict[str, list[str]] = defaultdict(list)
    for name in utterances:
        of_label[label_of[name]].append(name)
    role_of: dict[str, str] = {}
    for label, names in of_label.items():
        if len(names) <= len(roles):
            raise ValueError(
                f"label {label!r} has {len(names)} usable file{'s' if len(names) > 1 else ''}, and training, "
                f"{' and '.join(roles)} need one each: add files of it, or leave it out"
            )
        parts = hold_out(names, fraction, seed, roles)
        role_of |= {name: role for role, own in parts.items() for name in own}
    return {role: [name for name in utterances if role_of[name] == role] for role in ("train", *roles)}


def hold_out_speakers(
    labels_of: Mapping[str, Mapping[str, str]], fraction: float, seed: int, roles: Sequence[str]
) -> Split | None:
    """Hold out whole speakers, as many as make up the share, at least one per role. None if there are too few speakers.

    A hash of seed and speaker chooses them. A speaker is skipped if training would keep less than half of the utterances. As far
    as possible, a speaker is also skipped if training would lose a label that several speakers have.

    Args:
        labels_of: Labels of each utterance, with ``speaker`` among them.
        fraction: Share of the utterances for each role.
        seed: Seed of the choice.
        roles: Roles to fill: ``valid``, ``test`` or both.
    """
    of_speaker: dict[str, list[str]] = defaultdict(list)
    speakers_with: dict[tuple[str, str], set[str]] = defaultdict(set)  # label → its speakers
    for name, labels in labels_of.items():
        of_speaker[labels["speaker"]].append(name)
        for field, value in labels.items():
            if field not in ("path", "text"):
                speakers_with[field, value].add(labels["speaker"])
    if len(of_speaker) < FEWEST_SPEAKERS:
        return None
    shared = [speakers for speakers in speakers_with.values() if len(speakers) > 1]
    wanted, left = fraction * len(labels_of), len(labels_of)
    held: dict[str, str] = {}
    candidates = sorted(of_speaker, key=lambda speaker: _hash(seed, speaker))
    for role in roles:
        taken = 0
        for speaker, strict in [(speaker, strict) for strict in (True, False) for speaker in candidates]:
            if taken >= wanted or (taken and not strict):
                break
            count, gone = len(of_speaker[speaker]), {*held, speaker}
            is_last = strict and any(speaker in speakers and speakers <= gone for speakers in shared)
            if speaker not in held and not is_last and 2 * (left - count) >= len(labels_of):
                held[speaker] = role
                taken, left = taken + count, left - count
        if not taken:
            return None
    split: Split = {role: [] for role in ("train", *roles)}
    for name, labels in labels_of.items():
        split[held.get(labels["speaker"], "train")].append(name)
    return split


def divide(
    given: Mapping[str, Sequence[str]],
    labels_of: Mapping[str, Mapping[str, str]],
    fraction: float,
    seed: int,
    label: str | None = None,
    by_speaker: bool = True,
) -> tuple[Split, dict[str, dict[str, str]]]:
    """The splits, and the splits of each task, with ``valid``, ``test`` or both held out of ``train``.

    If every utterance has a speaker, whole speakers are held out, so that results hold for new speakers. Tasks about known
    speakers then get their own splits, unless too few speakers have a second utterance. So does pre-training, which must not see
    the test data of any task. A given split is followed as an example: if it shares speakers with training, held-out splits do
    too.

    Args:
        given: Utterances of the given splits by role, with ``train`` among them.
        labels_of: Labels of each utterance.
        fraction: Share of ``train`` for each missing split.
        seed: Seed of the choice.
        label: Label of which every held-out split takes its share of each value, where no speakers are held out; None: of none.
        by_speaker: Whether speakers are held out at all.

    Raises:
        ValueError: the fraction is out of range, or there are too few utterances.
    """
    roles = [role for role in ("valid", "test") if role not in given]
    splits: Split = {role: list(given.get(role, ())) for role in ("train", "valid", "test")}
    if not roles:
        return splits, {}

    def with_known() -> tuple[Split, dict[str, dict[str, str]]]:
        if label is None:
            return splits | hold_out(splits["train"], fraction, seed, roles), {}
        value_of = {name: labels_of[name][label] for name in splits["train"]}
        return splits | hold_out_of_each(splits["train"], fraction, seed, roles, value_of), {}

    speakers = {role: {labels_of[name].get("speaker") or None for name in names} for role, names in given.items()}
    follows = any(speakers["train"] & own for role, own in speakers.items() if role != "train")
    if not by_speaker or speakers["train"] == {None} or follows:
        return with_known()
    what = " and ".join({"valid": "validation", "test": "test"}[role] for role in roles)
    if None in speakers["train"]:
        print(f"some utterances have no speaker: {what} may have speakers of training", flush=True)
        return with_known()
    new = hold_out_speakers({name: labels_of[name] for name in splits["train"]}, fraction, seed, roles)
    if new is None:
        few = "1 speaker is" if len(speakers["train"]) == 1 else f"{len(speakers['train'])} speakers are"
        print(f"{few} too few to hold some out: {what} will have speakers of training", flush=True)
        return with_known()
    if len(roles) < 2:
        return splits | new, {}
    try:
        known = hold_out(splits["train"], fraction, seed, roles, {name: labels_of[name]["speaker"] for name in splits["train"]})
    except ValueError:  # too few; other errors were raised above
        print("too few speakers have a second utterance: there are no splits for tasks about known speakers", flush=True)
        return splits | new, {}
    splits |= new | {f"speaker_{role}": names for role, names in known.items()}
    kept = set(known["train"])
    splits["pretrain"] = [name for name in new["train"] if name in kept]
    same = {role: f"speaker_{role}" for role in ("train", *roles)}
    return splits, {"pretrain": {"train": "pretrain", "valid": "valid"}, **dict.fromkeys(SPEAKER_TASKS, same)}


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
