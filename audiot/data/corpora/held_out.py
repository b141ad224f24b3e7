"""Utterances held out for validation and test where a corpus names none: by a hash, of new speakers where there are enough."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

FEWEST_SPEAKERS = 4
SPEAKER_TASKS = ("speaker", "speaker_identification")  # which can only be asked about speakers that training has heard

Split = dict[str, list[str]]  # role or name of a split → ids of its utterances


def hold_out(
    utterances: Sequence[str], fraction: float, seed: int, roles: Sequence[str], speaker_of: Mapping[str, str] | None = None
) -> Split:
    """Take a share of the utterances for each of ``roles`` (at least one each) and leave the rest to ``train``.

    Which ones is a hash of seed and utterance, so that it depends neither on order nor on platform.

    Args:
        utterances: Their ids.
        fraction: Share of them for each role.
        seed: Seed of the choice.
        roles: ``valid``, ``test`` or both.
        speaker_of: Utterance → its speaker, of whom training keeps at least one utterance; None: speakers don't count.

    Raises:
        ValueError: the fraction is out of range, or too few utterances are there.
    """
    if not 0 < fraction < 0.5:
        raise ValueError(f"data.valid_fraction must be above 0 and below 0.5, found {fraction}")
    size = max(1, round(fraction * len(utterances)))
    by_hash = sorted(utterances, key=lambda name: _hash(seed, name))
    last = {"" if speaker_of is None else speaker_of[name]: name for name in by_hash}  # what training keeps of each speaker
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


def hold_out_speakers(
    labels_of: Mapping[str, Mapping[str, str]], fraction: float, seed: int, roles: Sequence[str]
) -> Split | None:
    """The same with whole speakers: as many as make the share up, at least one each.

    Which ones is a hash of seed and speaker. A speaker is passed over without whom training would have less than half of the
    utterances, and, as far as others can be had, one without whom it would lack a label that several speakers have. None: there
    are too few speakers.

    Args:
        labels_of: Utterance → its labels, the ``speaker`` among them.
        fraction: Share of the utterances for each role.
        seed: Seed of the choice.
        roles: ``valid``, ``test`` or both.
    """
    of_speaker: dict[str, list[str]] = defaultdict(list)
    heard: dict[tuple[str, str], set[str]] = defaultdict(set)  # label → speakers that have it
    for name, labels in labels_of.items():
        of_speaker[labels["speaker"]].append(name)
        for field, value in labels.items():
            if field not in ("path", "text"):
                heard[field, value].add(labels["speaker"])
    if len(of_speaker) < FEWEST_SPEAKERS:
        return None
    shared = [speakers for speakers in heard.values() if len(speakers) > 1]
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
    given: Mapping[str, Sequence[str]], labels_of: Mapping[str, Mapping[str, str]], fraction: float, seed: int
) -> tuple[Split, dict[str, dict[str, str]]]:
    """Splits, and the splits of each task, where ``valid``, ``test`` or both are held out of ``train``.

    With a speaker to every utterance, whole speakers are held out: what is said of new utterances is then true of new speakers.
    Tasks about known speakers, and pre-training, which is to hear no test of either kind, have splits of their own, unless too
    few speakers have a second utterance. A split that is given counts as an example: where it shares speakers with training, so
    does what is held out.

    Args:
        given: Role → utterances of the splits that are named, ``train`` among them.
        labels_of: Utterance → its labels.
        fraction: Share of ``train`` for each split that is not given.
        seed: Seed of the choice.

    Raises:
        ValueError: the fraction is out of range, or too few utterances are there.
    """
    roles = [role for role in ("valid", "test") if role not in given]
    splits: Split = {role: list(given.get(role, ())) for role in ("train", "valid", "test")}
    if not roles:
        return splits, {}
    known = splits | hold_out(splits["train"], fraction, seed, roles)
    speakers = {role: {labels_of[name].get("speaker") or None for name in names} for role, names in given.items()}
    if speakers["train"] == {None} or any(speakers["train"] & own for role, own in speakers.items() if role != "train"):
        return known, {}
    what = " and ".join({"valid": "validation", "test": "test"}[role] for role in roles)
    if None in speakers["train"]:
        print(f"some utterances have no speaker: {what} may hear speakers of training", flush=True)
        return known, {}
    new = hold_out_speakers({name: labels_of[name] for name in splits["train"]}, fraction, seed, roles)
    if new is None:
        few = "1 speaker is" if len(speakers["train"]) == 1 else f"{len(speakers['train'])} speakers are"
        print(f"{few} too few to hold some out: {what} will hear speakers of training", flush=True)
        return known, {}
    if len(roles) < 2:
        return splits | new, {}
    try:
        known = hold_out(splits["train"], fraction, seed, roles, {name: labels_of[name]["speaker"] for name in splits["train"]})
    except ValueError:  # too few: all else was looked at above
        print("too few speakers have a second utterance: there are no splits for tasks about known speakers", flush=True)
        return splits | new, {}
    splits |= new | {f"speaker_{role}": names for role, names in known.items()}
    heard = set(known["train"])
    splits["pretrain"] = [name for name in new["train"] if name in heard]
    same = {role: f"speaker_{role}" for role in ("train", *roles)}
    return splits, {"pretrain": {"train": "pretrain", "valid": "valid"}, **dict.fromkeys(SPEAKER_TASKS, same)}


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
