"""Words of version 1: what the command line says in their place, and what they mean in saved files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Form = tuple[str, str, tuple[str, ...]]

RANDOM = "audiot.attention.synthesizer_random.SynthesizerRandom"
# `form` of the random synthesizer → the mechanism that it is now, its class, and the parameters that it ignored.
FORMS: dict[str, Form] = {
    "full": ("synthesizer_random", RANDOM, ("rank",)),
    "relative": ("synthesizer_relative", "audiot.attention.synthesizer_relative.SynthesizerRelative", ("rank", "anchor")),
    "factorized": (
        "synthesizer_factorized",
        "audiot.attention.synthesizer_factorized.SynthesizerFactorized",
        ("init", "init_floor", "anchor"),
    ),
}
# `search` of a mechanism that hashes → its class, and the parameters that are its own.
SEARCHES = {
    "topk": ("audiot.attention.search.TopK", ("attended_keys",)),
    "chunked": ("audiot.attention.search.Chunked", ("chunk_size", "num_rounds")),
}
OF_SEARCHES = {parameter: search for search, (_, own) in SEARCHES.items() for parameter in own}


def instead(key: str, value: str) -> str | None:
    """What to write in place of ``key=value``, an override of version 1; None where it is none."""
    owner, _, word = key.lstrip("+").rpartition(".")
    if owner != "attention":
        return None
    if word == "form":
        return f"attention={FORMS[value][0]}" if value in FORMS else f"attention={'|'.join(new for new, _, _ in FORMS.values())}"
    if word == "search" and value in SEARCHES:
        return f"attention/search={value}"
    if word in OF_SEARCHES:
        return f"attention/search={OF_SEARCHES[word]} attention.search.{word}={value}"
    return None


def translate_v1(target: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A mechanism of a config of version 1, in today's words.

    - `SynthesizerRandom` with a `form` becomes the class of that form, without the parameters that the form ignored. The names of
      its tensors are the same.
    - In the classes of `audiot.attention.lsh`, the word `search` and the parameters of both searches become one nested config,
      ``{"_target_": "audiot.attention.search.TopK", "attended_keys": 32}``. The parameters of the other search are left out.

    Anything else, today's words among it, comes back as it is.

    Args:
        target: Import path of the class.
        parameters: Its parameters, without ``_target_``.

    Returns:
        Import path and parameters, a new dict.

    Raises:
        ValueError: an unknown form or search.
    """
    if target == RANDOM:
        return _of_form(parameters, lambda form: form[1])
    if target.startswith("audiot.attention.lsh."):
        return target, _with_search(parameters, lambda word: {"_target_": SEARCHES[word][0]})
    return target, dict(parameters)


def translate_record(name: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The same for a mechanism that is recorded by its name in `conf/attention`; a search becomes ``{"name": "topk", …}``."""
    if name == "synthesizer_random":
        return _of_form(parameters, lambda form: form[0])
    return name, _with_search(parameters, lambda word: {"name": word})


def _of_form(
    parameters: Mapping[str, Any], called: Callable[[tuple[str, str, tuple[str, ...]]], str]
) -> tuple[str, dict[str, Any]]:
    form = parameters.get("form", "full")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: expected one of {', '.join(FORMS)}")
    ignored = ("form", *FORMS[form][2])
    return called(FORMS[form]), {key: value for key, value in parameters.items() if key not in ignored}


def _with_search(parameters: Mapping[str, Any], named: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    given = dict(parameters)
    flat = {word: given.pop(word) for word in OF_SEARCHES if word in given}
    word = given.get("search", "topk")
    if isinstance(word, Mapping) or not (flat or "search" in given):  # today's words
        return dict(parameters)
    if word not in SEARCHES:
        raise ValueError(f"search is {word!r}: expected one of {', '.join(SEARCHES)}")
    return given | {"search": named(word) | {key: value for key, value in flat.items() if OF_SEARCHES[key] == word}}
