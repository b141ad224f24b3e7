"""Connectionist temporal classification: phones or characters of an utterance without times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import jiwer
import torch
from torch import Tensor, nn

from audiot.analysis.plots import plot_confusion
from audiot.base.devices import at_least_float32
from audiot.base.files import write_csv
from audiot.base.pairing import torchaudio
from audiot.data.batches import Batch
from audiot.data.labels import BLANK_TOKEN, IGNORED, NOTHING, SPACE
from audiot.data.phones import by_phone_class
from audiot.data.text import lines
from audiot.downstream.bootstrap import Measured, Metrics, Sums
from audiot.downstream.objectives import Objective, Row
from audiot.training.accumulation import Mean

BLANK = 0  # output of the blank; class k is output k + 1
KINDS = {"substituted": "substitute", "deleted": "delete", "inserted": "insert"}  # our name → jiwer's


class CTC(Objective):
    """Connectionist temporal classification (Graves et al. 2006), measured by phone, or character and word error rate.

    Validation decodes greedily. Test and prediction use the beam, if one is given.

    Args:
        classes: Tokens without the blank.
        unit: Unit of the tokens, ``phone`` or ``character``.
        beam: Arguments of `BeamDecoder`; None decodes greedily.
        blank_prior: Probability of the blank before training, between 0 and 1; None leaves heads as they are. Most frames of a
            path are blanks: a head that begins with equal outputs first learns to say nothing else, and some never leave that.
    """

    def __init__(
        self, classes: Sequence[str], unit: str = "phone", beam: Mapping[str, Any] | None = None, blank_prior: float | None = None
    ) -> None:
        super().__init__(classes)
        if unit not in ("phone", "character"):
            raise ValueError(f"downstream.objective.unit must be phone or character, found {unit!r}")
        if blank_prior is not None and not 0 < blank_prior < 1:
            raise ValueError(
                f"downstream.objective.blank_prior must be null or a probability between 0 and 1, found {blank_prior}"
            )
        self.unit = unit
        self.blank_prior = blank_prior
        self.num_outputs = len(self.classes) + 1
        self.beam = None if beam is None else BeamDecoder(self.classes, **beam)
        self.stage = "test"

    def begin(self, head: nn.Module) -> None:
        """Let the blank begin with its prior, and tokens with equal shares of the rest, as Lin et al. 2017 (arXiv:1708.02002) do.

        Args:
            head: A head. It is the bias of its last linear layer that changes; a head without one stays as it is.
        """
        if self.blank_prior is None:
            return
        last = [layer for layer in head.modules() if isinstance(layer, nn.Linear) and layer.out_features % self.num_outputs == 0]
        if last and last[-1].bias is not None:
            odds = self.blank_prior / (1 - self.blank_prior)
            with torch.no_grad():
                last[-1].bias.view(-1, self.num_outputs)[:, BLANK] += math.log(odds * len(self.classes))

    def loss(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> Mean:
        """Negative log-likelihood per token, averaged over utterances."""
        labels = batch["labels"]
        log_probabilities = at_least_float32(outputs).log_softmax(-1).transpose(0, 1)  # T, B, C
        counts = (labels != IGNORED).sum(1)
        targets = labels.clamp(min=0) + 1
        loss = nn.functional.ctc_loss(log_probabilities, targets, lengths.to(labels.device), counts, blank=BLANK)
        return Mean(loss, loss.new_full((), len(labels)))

    def update(self, outputs: Tensor, lengths: Tensor, batch: Batch) -> None:
        """Decode, and store references and hypotheses."""
        beam = self.stage == "test"
        hypotheses = self._decode(outputs, lengths, beam)
        for name, labels, hypothesis in zip(batch["ids"], batch["labels"].tolist(), hypotheses, strict=True):
            reference = [self.classes[label] for label in labels if label != IGNORED]
            self.rows.append({"utterance": name, "reference": self.join(reference), "hypothesis": self.join(hypothesis)})

    def reset(self, stage: str) -> None:
        """Clear the stored utterances."""
        super().reset(stage)
        self.stage = stage

    def join(self, tokens: Sequence[str]) -> str:
        """Text of tokens. Phones are separated by spaces, characters are not."""
        return " ".join(tokens) if self.unit == "phone" else " ".join("".join(tokens).split())

    def split(self, text: str) -> list[str]:
        """Tokens of a text."""
        return text.split() if self.unit == "phone" else list(text)

    def _decode(self, outputs: Tensor, lengths: Tensor, beam: bool) -> list[list[str]]:
        if beam and self.beam is not None:
            return self.beam(outputs, lengths)
        return [[self.classes[number] for number in best] for best in greedy(outputs, lengths)]

    def predict(self, outputs: Tensor, lengths: Tensor) -> list[Row]:
        """``text`` of each utterance, and ``score``, the mean over frames of the best output's probability."""
        best = outputs.float().softmax(-1).amax(-1)
        texts = [self.join(hypothesis) for hypothesis in self._decode(outputs, lengths, beam=True)]
        scores = [float(row[:length].mean()) for row, length in zip(best, lengths.tolist(), strict=True)]
        return [{"text": text, "score": score} for text, score in zip(texts, scores, strict=True)]

    def compute(self) -> dict[str, float]:
        """``per``, or ``wer`` and ``cer``: errors per token of the reference, over all utterances."""
        return {name: _error_rate(output) for name, output in self._outputs(self.all_rows()).items()}

    def _outputs(self, rows: Sequence[Row]) -> dict[str, jiwer.WordOutput]:
        """Alignments of each metric."""
        if self.unit == "phone":
            return {"per": self._aligned(rows)}
        words = jiwer.process_words([row["reference"] for row in rows], [row["hypothesis"] for row in rows])
        return {"wer": words, "cer": self._aligned(rows)}

    def measured(self) -> Measured:
        """Errors and tokens of every utterance."""
        rows = self.all_rows()
        outputs = self._outputs(rows) if rows else {}
        columns = [column for output in outputs.values() for column in _errors_and_tokens(output)]

        def figures(sums: Tensor) -> Metrics:
            return {name: sums[:, 2 * place] / sums[:, 2 * place + 1] for place, name in enumerate(outputs)}

        return Sums.of([row["utterance"] for row in rows], list(zip(*columns, strict=True)), figures)

    def _aligned(self, rows: Sequence[Row]) -> jiwer.WordOutput:
        """Alignment of the tokens of references and hypotheses."""
        spelt = [
            [" ".join(SPACE if token == " " else token for token in self.split(row[side])) for row in rows]
            for side in ("reference", "hypothesis")
        ]
        return jiwer.process_words(spelt[0], spelt[1])

    def write(self, folder: Path, title: str, plots: bool = True) -> list[str]:
        """Write ``per_class.csv`` of the tokens, ``per_utterance.csv`` and ``confusion.png``."""
        rows = self.all_rows()
        aligned = self._aligned(rows)
        pairs: Counter[tuple[str, str]] = Counter()
        table = []
        for row, reference, hypothesis, chunks in zip(
            rows, aligned.references, aligned.hypotheses, aligned.alignments, strict=True
        ):
            errors: Counter[str] = Counter()
            for chunk in chunks:
                true = reference[chunk.ref_start_idx : chunk.ref_end_idx] or [NOTHING] * (chunk.hyp_end_idx - chunk.hyp_start_idx)
                found = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx] or [NOTHING] * len(true)
                pairs.update(zip(true, found, strict=True))
                if chunk.type != "equal":
                    errors[chunk.type] += len(true)
            counted = {name: errors[kind] for name, kind in KINDS.items()}
            table.append({**row, "tokens": len(reference), **counted})
        names = [*sorted({SPACE if name == " " else name for name in self.classes}), NOTHING]
        counts = torch.tensor([[pairs[true, found] for found in names] for true in names], dtype=torch.float64)
        per_class = []
        for number, name in enumerate(names[:-1]):
            count, right, deleted = counts[number].sum(), counts[number, number], counts[number, -1]
            inserted = counts[-1, number]
            figures = {"count": count, "correct": right, "substituted": count - right - deleted, "deleted": deleted}
            per_class.append({"class": name} | {key: int(value) for key, value in (figures | {"inserted": inserted}).items()})
        write_csv(folder / "per_class.csv", per_class)
        write_csv(folder / "per_utterance.csv", table)
        if plots:
            plot_confusion(counts, names, title, folder / "confusion.png", by_phone_class(names))
        return ["per_class.csv", "per_utterance.csv", *(["confusion.png"] if plots else [])]


def greedy(outputs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Classes of each utterance: the best output of each frame, with repetitions merged and blanks removed."""
    found = []
    for row, length in zip(outputs.argmax(-1).cpu(), lengths.tolist(), strict=True):
        merged = torch.unique_consecutive(row[:length])
        found.append((merged[merged != BLANK] - 1).tolist())
    return found


class BeamDecoder:
    """Beam search with torchaudio's ``ctc_decoder``, optionally with a lexicon and a KenLM language model.

    Args:
        classes: Tokens without the blank.
        lexicon: File with lines ``WORD TOKEN TOKEN …``. Only its words are found, with ``|`` as token between words. None allows
            any sequence of tokens.
        language_model: KenLM file (.arpa or .bin), over words if there is a lexicon, else over tokens; None for none.
        beam_size: Number of hypotheses to keep.
        lm_weight: Weight of the language model's score.
        word_score: Score added per word.

    Raises:
        ImportError: flashlight-text is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file is broken.
    """

    def __init__(
        self,
        classes: Sequence[str],
        lexicon: str | None = None,
        language_model: str | None = None,
        beam_size: int = 50,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
    ) -> None:
        for name, path in (("lexicon", lexicon), ("language_model", language_model)):
            if path is not None and not Path(path).is_file():
                raise FileNotFoundError(f"downstream.objective.beam.{name}: there is no file {path}")
        try:
            ctc_decoder = torchaudio("models.decoder").ctc_decoder
        except RuntimeError as error:
            raise ImportError("downstream.objective.beam needs flashlight-text: pip install 'audiot[beam]'") from error
        self.classes = list(classes)
        tokens = [SPACE if name == " " else name for name in classes]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"{SPACE!r} stands for the space between words: leave it out by downstream.labels.remove")
        self.space = tokens.index(SPACE) + 1 if SPACE in tokens else None
        outputs = [BLANK_TOKEN, *tokens]
        words = "" if lexicon is None else _checked_lexicon(lexicon, tokens)
        try:
            with NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as copy:
                copy.write(words)
                copy.flush()
                self.decoder = ctc_decoder(
                    lexicon=None if lexicon is None else copy.name,
                    tokens=outputs,
                    lm=_token_model(language_model, outputs) if language_model and lexicon is None else language_model,
                    beam_size=beam_size,
                    lm_weight=lm_weight,
                    word_score=word_score,
                    blank_token=BLANK_TOKEN,
                    sil_token=BLANK_TOKEN if self.space is None else SPACE,
                )
        except (RuntimeError, ValueError) as error:  # a language model in another format
            reason = str(error).splitlines()[-1]
            raise ValueError(f"downstream.objective.beam, lexicon={lexicon} language_model={language_model}: {reason}") from error

    def __call__(self, outputs: Tensor, lengths: Tensor) -> list[list[str]]:
        """Tokens of each utterance, for outputs (B, T, C)."""
        log_probabilities, lengths = outputs.float().log_softmax(-1).cpu(), lengths.cpu()
        if self.space is not None:
            # A word of the lexicon ends with the token between words. The last word of an utterance may have no frame for it.
            log_probabilities = nn.functional.pad(log_probabilities, (0, 0, 0, 1))
            rows = torch.arange(len(lengths))
            log_probabilities[rows, lengths] = -1e4
            log_probabilities[rows, lengths, self.space] = 0.0
            lengths = lengths + 1
        found = self.decoder(log_probabilities.contiguous(), lengths)
        return [[self.classes[number - 1] for number in best.tokens.tolist()] if best else [] for best in map(_first, found)]


def _checked_lexicon(path: str, tokens: Sequence[str]) -> str:
    """Checked lines of a lexicon in UTF-8. torchaudio would read a byte order mark as part of the first word.

    Raises:
        ValueError: a word has no tokens, or a token that the model lacks. The message has the line.
    """
    known, found = frozenset(tokens), []
    for number, line in lines(path):
        word, *spelt = line.split()
        if not spelt:
            raise ValueError(f"{path}:{number}: the word {word!r} has no tokens")
        if unknown := [token for token in spelt if token not in known]:
            raise ValueError(
                f"{path}:{number}: {unknown[0]!r} of the word {word!r} is not one of the model's {len(known)} tokens"
            )
        found.append(f"{' '.join([word, *spelt])}\n")
    if not found:
        raise ValueError(f"{path} has no word: lines of WORD TOKEN TOKEN … are expected there")
    return "".join(found)


def _token_model(path: str, tokens: Sequence[str]) -> Any:
    """KenLM model over tokens. Given only a path, torchaudio 2.11 would number the tokens in the order of a hash table."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    return KenLM(path, Dictionary(list(tokens)))


def _first(hypotheses: Sequence[Any]) -> Any:
    return hypotheses[0] if hypotheses else None


def _error_rate(output: Any) -> float:
    errors = output.substitutions + output.deletions + output.insertions
    return errors / max(1, output.hits + output.substitutions + output.deletions)


def _errors_and_tokens(output: Any) -> tuple[list[int], list[int]]:
    """Number of errors, and of tokens of the reference, in each utterance."""
    errors = [
        sum(
            max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            for chunk in chunks
            if chunk.type != "equal"
        )
        for chunks in output.alignments
    ]
    return errors, [len(reference) for reference in output.references]
