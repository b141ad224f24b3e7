"""``audiot align``: write phone or character times of a transcribed corpus."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from audiot.base.config import plain
from audiot.base.console import say, table
from audiot.base.files import replacing_gzip, replacing_text
from audiot.base.quoting import argument, quoted
from audiot.data.labels import CharacterLabels, TokenLabels
from audiot.data.opening import open_corpus
from audiot.data.prepare import ROLES, PreparedCorpus
from audiot.downstream.alignment import Aligned, Aligner
from audiot.downstream.classifier import WINDOW, Classifier, load_classifier
from audiot.downstream.ctc import CTC
from audiot.following import RATE
from audiot.runs import run_config, run_overrides


@dataclass
class Result:
    """What became of a corpus: utterances aligned in each split, tokens, frames and the sum of their confidence, rejections."""

    counts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    frames: int = 0
    confidence: float = 0.0
    rejected: list[tuple[str, str, str]] = field(default_factory=list)


def main(cfg: DictConfig) -> None:
    """Align every split of the corpus; say how sure the model was, and how its times agree with those that were there."""
    if cfg.min_silence_s < 0:
        raise ValueError(f"min_silence_s must be at least 0, found {cfg.min_silence_s}")
    run = Path(cfg.run)
    classifier = load_classifier(run, cfg.device, cfg.trusted)
    labels = token_labels(run, classifier, cfg.lexicon, cfg.trusted)
    corpus = open_corpus(cfg)
    corpus.check_files("alignment writes manifests of")
    if corpus.sample_rate != classifier.sample_rate:
        raise ValueError(
            f"the corpus is at {corpus.sample_rate} Hz and the model of run={run} at {classifier.sample_rate} Hz: "
            f"set data.prepare.sample_rate={classifier.sample_rate}"
        )
    aligner = Aligner(classifier, labels, cfg.min_silence_s, cfg.data.batch_s)
    output = Path(cfg.output).absolute()
    result = align_corpus(corpus, aligner, output)
    unit = "characters" if isinstance(labels, CharacterLabels) else "phones"
    count, left_out = sum(result.counts.values()), len(result.rejected)
    why = f", {left_out:,} left out: see {output / 'rejected.csv'}" if left_out else ", none left out"
    rows = {
        "aligned": f"{count:,} utterances, {result.tokens:,} {unit}{why}",
        "confidence": f"{result.confidence / result.frames:.3f}, the mean probability of a frame on the best path",
    }
    rows |= {f"{tier} tier": f"{agreement} (against the corpus's own)" for tier, agreement in aligner.agreement.items()}
    files = [f"{split}.jsonl.gz" for split, number in result.counts.items() if number]
    say(table(rows | {"wrote": f"{output}: {', '.join([*files, 'alignments.csv', 'rejected.csv'])}"}))
    say(f"next:   {next_command(run, corpus, result, output, 'phone' if unit == 'phones' else 'character')}")


def token_labels(run: Path, classifier: Classifier, lexicon: str | None, trusted: Sequence[str]) -> TokenLabels:
    """The labels of a run's task, its lexicon replaced if one is given.

    Raises:
        ValueError: the run's task is not one of CTC, or has no use for a lexicon.
    """
    settings = run_config(run, trusted=trusted)
    if not isinstance(classifier.objective, CTC):
        raise ValueError(
            f"run={run} is a run of downstream={settings.downstream.task}: alignment needs one with CTC, "
            "downstream=phone_recognition or downstream=asr"
        )
    config = plain(settings.downstream.labels)
    if lexicon is not None:
        if classifier.objective.unit != "phone":
            raise ValueError(f"lexicon={lexicon}: run={run} knows characters, not phones: take a run of phone_recognition")
        config["lexicon"] = lexicon
    labels = instantiate(config, features=classifier.features)
    assert isinstance(labels, TokenLabels)
    return labels


def align_corpus(corpus: PreparedCorpus, aligner: Aligner, output: Path) -> Result:
    """Write ``SPLIT.jsonl.gz``, ``alignments.csv`` and ``rejected.csv``; all of them or, if nothing could be aligned, the last.

    Raises:
        ValueError: no utterance could be aligned.
    """
    result = Result()
    with (
        ExitStack() as files,
        tqdm(total=sum(corpus.counts.values()), desc="align", unit="utt", leave=False) as bar,
    ):
        table = csv.writer(files.enter_context(replacing_text(output / "alignments.csv")), lineterminator="\n")
        table.writerow(("split", "utterance", "seconds", "tokens", "score", "worst_token", "worst_score"))
        for split in corpus.counts:
            manifest = files.enter_context(replacing_gzip(output / f"{split}.jsonl.gz"))
            result.counts[split] = 0
            cuts = iter(corpus.cuts(split))
            while window := list(islice(cuts, WINDOW)):
                for cut, found in zip(window, aligner(window), strict=True):
                    if isinstance(found, str):
                        result.rejected.append((split, cut.id, found))
                    else:
                        manifest.write(json.dumps(found.cut.to_dict(), ensure_ascii=False).encode() + b"\n")
                        table.writerow(_row(split, found))
                        result.counts[split] += 1
                        result.tokens += len(found.spans)
                        result.frames += found.frames
                        result.confidence += found.frames * found.confidence
                bar.update(len(window))
        with replacing_text(output / "rejected.csv") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("split", "utterance", "reason"), *result.rejected])
        if not result.frames:
            raise ValueError(f"no utterance could be aligned, see {output / 'rejected.csv'}; the first: {result.rejected[0][2]}")
    return result


def _row(split: str, found: Aligned) -> tuple[str | int | float, ...]:
    scores = [span.score for span in found.spans]
    worst = min(range(len(scores)), key=scores.__getitem__)
    mean = sum(scores) / len(scores)
    duration = round(found.cut.duration, 3)
    return split, found.cut.id, duration, len(scores), round(mean, 4), found.names[worst], round(scores[worst], 4)


def next_command(run: Path, corpus: PreparedCorpus, result: Result, output: Path, tier: str) -> str:
    """What to run on the aligned corpus: a probe of the upstream that aligned it."""
    splits = {role: corpus.task_splits.get("phone", {}).get(role, role) for role in ROLES}
    data = [argument(f"data.{role}", f"{output / split}.jsonl.gz") for role, split in splits.items() if result.counts.get(split)]
    if corpus.sample_rate != RATE:
        data.append(argument("data.prepare.sample_rate", corpus.sample_rate))
    task = ["downstream=phone_linear", *([] if tier == "phone" else [f"downstream.labels.tier={tier}"])]
    given = [override for override in run_overrides(run) if override.startswith(("upstream", "features"))]
    upstream = given if any(override.startswith("upstream") for override in given) else [*given, "upstream=features"]
    return " ".join(["audiot finetune data=manifest", *data, *task, *map(quoted, upstream)])


if __name__ == "__main__":
    from audiot.commands.launch import run as run_command

    run_command("align", sys.argv[1:])
