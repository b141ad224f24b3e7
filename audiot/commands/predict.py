"""``audiot predict RUN FILE …``: what a fine-tuned model says of audio files, or of a microphone."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations

from tqdm import tqdm

from audiot.base.files import printable
from audiot.data.audio import audio_files
from audiot.downstream.answers import in_words, shortened
from audiot.downstream.classifier import load_classifier
from audiot.downstream.verification import Verification


def main(options: argparse.Namespace) -> None:
    """Print a prediction a file, in the order given; files that can't be used are listed at the end, and the exit code is 1.

    With ``--microphone``, print one for each utterance that is spoken.
    """
    if options.microphone:
        from audiot.commands.listening import listen
        from audiot.data.microphone import Microphone

        microphone = Microphone(options.input)  # tells what is missing before the model is loaded
        listen(load_classifier(options.run, options.device, options.trust), microphone, options)
        return
    classifier = load_classifier(options.run, options.device, options.trust)
    paths = [path for name in options.files for path in audio_files(name)]
    pairs = isinstance(classifier.objective, Verification) and not options.json
    if pairs and len(paths) < 2:
        raise ValueError(
            f"{options.run} compares speakers, and one file makes no pair: give two or more, or --json for its embedding"
        )
    width = max(map(len, paths))
    bad: list[str] = []
    embeddings: list[tuple[str, list[float]]] = []
    for row in classifier.stream(paths, keep_going=True, progress=True, silence_dbfs=options.silence_dbfs):
        if "error" in row:
            bad.append(f"  {row['file']}: {row['error']}")
        if options.json:
            _print(json.dumps(shortened(row, options.top), ensure_ascii=False))
        elif pairs and "embedding" in row:
            embeddings.append((row["file"], row["embedding"]))
        elif "error" not in row:
            _print(in_words(row, options.top, width))
    for (first, one), (second, other) in combinations(embeddings, 2):
        cosine = sum(ours * theirs for ours, theirs in zip(one, other, strict=True))
        _print(f"{first:<{width}}  {second:<{width}}  {cosine:6.3f}")
    if bad:
        listed = "\n".join(bad)
        sys.exit(printable(f"audiot: error: {len(bad)} of {len(paths)} files can't be used:\n{listed}"))


def _print(text: str) -> None:
    tqdm.write(printable(text), file=sys.stdout)  # above the bar
