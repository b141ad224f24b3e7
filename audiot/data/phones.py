"""ARPAbet: the 39 English phones of the CMU Pronouncing Dictionary by their class."""

from __future__ import annotations

import re
from collections.abc import Sequence

from audiot.data.labels import NOTHING, SILENCE

PHONE_CLASSES: dict[str, tuple[str, ...]] = {  # vowels from front to back, then diphthongs; consonants from the lips backwards
    "vowels": ("IY", "IH", "EH", "AE", "AH", "ER", "AA", "AO", "UH", "UW", "EY", "AY", "OY", "AW", "OW"),
    "stops": ("P", "B", "T", "D", "K", "G"),
    "affricates": ("CH", "JH"),
    "fricatives": ("F", "V", "TH", "DH", "S", "Z", "SH", "ZH", "HH"),
    "nasals": ("M", "N", "NG"),
    "liquids": ("L", "R"),
    "glides": ("W", "Y"),
}
NO_PHONES = (SILENCE, "sp", "SPN", "spn", NOTHING)


def by_phone_class(labels: Sequence[str]) -> dict[str, list[str]]:
    """Class → its labels, if all labels are ARPAbet phones, with or without stress, or silence; else empty.

    The last class, ``other``, has silence, noise and `NOTHING`.
    """
    place = {phone: number for number, phone in enumerate(phone for phones in PHONE_CLASSES.values() for phone in phones)}
    plain = {label: re.sub("[012]$", "", label) for label in labels if label not in NO_PHONES}
    if not plain or not place.keys() >= set(plain.values()):
        return {}
    found = {
        name: sorted((label for label in plain if plain[label] in phones), key=lambda label: (place[plain[label]], label))
        for name, phones in PHONE_CLASSES.items()
    }
    found["other"] = [label for label in NO_PHONES if label in labels]
    return {name: members for name, members in found.items() if members}
