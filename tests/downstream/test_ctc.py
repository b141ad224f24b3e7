"""Connectionist temporal classification: loss, decoding, error rates, files."""

from __future__ import annotations

import csv
import itertools
import math
import random
import sys

import jiwer
import pytest
import torch
from torch import nn

from audiot.data.labels import IGNORED
from audiot.downstream.ctc import CTC, BeamDecoder, greedy
from audiot.downstream.heads import FrameClassifier, RecurrentClassifier

PHONES = ["AA", "B", "K", "S"]
CHARACTERS = [" ", "'", "A", "B", "C", "D"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(rows):
    """A batch with rows of classes as labels."""
    width = max(map(len, rows))
    labels = torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in rows])
    return {"labels": labels, "ids": [f"utt{number}" for number in range(len(rows))], "speakers": [None] * len(rows)}


def collapsed(path):
    """Classes (from 0) that a path of outputs spells: repetitions are merged and blanks (0) removed."""
    return tuple(number - 1 for number, _ in itertools.groupby(path) if number)


def peaked(paths, num_outputs, height=9.0):
    """Outputs whose best path is the one given, zeros elsewhere, and lengths."""
    outputs = torch.zeros(len(paths), max(map(len, paths)), num_outputs)
    for row, path in enumerate(paths):
        outputs[row, range(len(path)), list(path)] = height
        outputs[row, len(path) :, 1] = height  # padding says something
    return outputs, torch.tensor(list(map(len, paths)))


def spelt(text, characters=CHARACTERS):
    """A path that spells a text, a blank between equal characters."""
    path = []
    for character in text:
        number = characters.index(character) + 1
        path += [0, number] if path[-1:] == [number] else [number]
    return path


def test_the_loss_sums_over_all_paths():
    objective = CTC(PHONES)
    assert objective.num_outputs == 5
    outputs, lengths = 2 * draw(3, 5, 5), torch.tensor([5, 4, 3])
    rows = [(0, 2, 2), (3,), (1, 0)]
    losses = []
    for row, (target, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        shares = outputs[row].double().softmax(-1).tolist()
        paths = itertools.product(range(5), repeat=length)
        total = sum(math.prod(shares[t][number] for t, number in enumerate(path)) for path in paths if collapsed(path) == target)
        losses.append(-math.log(total) / len(target))
    loss = objective.loss(outputs, lengths, batch_of(rows)).value
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    noisy = outputs.clone()
    noisy[torch.arange(5) >= lengths[:, None]] = 1e3
    assert objective.loss(noisy, lengths, batch_of(rows)).value.item() == pytest.approx(loss.item(), rel=1e-6)


def test_greedy_decoding_equals_a_loop():
    outputs, lengths = draw(40, 9, 4), torch.arange(40) % 10
    expected = []
    for row, length in zip(outputs, lengths.tolist(), strict=True):
        before, found = None, []
        for scores in row[:length].tolist():
            best = scores.index(max(scores))
            if best != before and best != 0:
                found.append(best - 1)
            before = best
        expected.append(found)
    assert greedy(outputs, lengths) == expected
    assert max(map(len, expected)) >= 6


def measured(objective, said, heard, stage="valid"):
    """The objective after an update with reference and hypothesis texts."""
    objective.reset(stage)
    characters = objective.classes
    for number, (one, other) in enumerate(zip(said, heard, strict=True)):
        outputs, lengths = peaked([spelt(other, characters) or [0]], len(characters) + 1)
        batch = batch_of([[characters.index(character) for character in one]]) | {"ids": [f"utt{number:03d}"]}
        objective.update(outputs, lengths, batch)
    return objective


def texts(count, seed, empty=False):
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = ["".join(rng.choices("ABCD'", k=rng.randint(1, 4))) for _ in range(rng.randint(0 if empty else 1, 5))]
        made.append(" ".join(words))
    return made


def test_character_and_word_error_rates_are_jiwers():
    said, heard = texts(60, 0), texts(60, 1, empty=True)
    heard[:20] = said[:20]
    heard[20:30] = [text.replace("A", "B") for text in said[20:30]]
    metrics = measured(CTC(CHARACTERS, "character"), said, heard).compute()
    assert metrics == pytest.approx({"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)})
    assert next(iter(metrics)) == "wer"
    assert 0.2 < metrics["cer"] < metrics["wer"]


def test_spaces_are_merged_before_they_are_counted():
    objective = measured(CTC(CHARACTERS, "character"), ["AB CD"], ["  AB   CD "])
    assert objective.rows[0] == {"utterance": "utt000", "reference": "AB CD", "hypothesis": "AB CD"}
    assert objective.compute() == {"wer": 0.0, "cer": 0.0}


def phone_errors(objective, seed=0, count=50):
    """Update with random phones. Returns references and hypotheses, with phones joined by spaces."""
    rng = random.Random(seed)
    said, heard = [], []
    for number in range(count):
        path = [rng.randrange(5) for _ in range(rng.randint(1, 14))]
        target = [rng.randrange(4) for _ in range(rng.randint(1, 6))] if number % 2 else [*collapsed(path), 0]
        outputs, lengths = peaked([path], 5)
        objective.update(outputs, lengths, batch_of([target]) | {"ids": [f"utt{number:03d}"]})
        said.append(" ".join(PHONES[label] for label in target))
        heard.append(" ".join(PHONES[label] for label in collapsed(path)))
    return said, heard


def test_phone_error_rate_is_jiwers():
    objective = CTC(PHONES)
    said, heard = phone_errors(objective)
    assert objective.compute() == pytest.approx({"per": jiwer.wer(said, heard)})
    assert [(row["reference"], row["hypothesis"]) for row in objective.all_rows()] == list(zip(said, heard, strict=True))


def test_a_perfect_hypothesis_has_no_errors_and_silence_all():
    objective = measured(CTC(CHARACTERS, "character"), ["AB CD", "A"], ["AB CD", "A"])
    assert objective.compute() == {"wer": 0.0, "cer": 0.0}
    assert measured(objective, ["AB CD", "A"], ["", ""]).compute() == {"wer": 1.0, "cer": 1.0}


def test_what_was_measured_is_forgotten_at_a_reset():
    objective = CTC(PHONES)
    phone_errors(objective)
    objective.reset("valid")
    assert objective.rows == []


def table(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("unit", ["phone", "character"])
def test_tables_add_up_to_the_error_rate(tmp_path, unit):
    objective = CTC(PHONES if unit == "phone" else CHARACTERS, unit)
    if unit == "phone":
        said, heard = phone_errors(objective)
        expected = jiwer.process_words(said, heard)
        names = PHONES
    else:
        said, heard = texts(60, 0), texts(60, 1, empty=True)
        measured(objective, said, heard)
        expected = jiwer.process_characters(said, heard)
        names = [*CHARACTERS[1:], "|"]
    names_written = objective.write(tmp_path, unit)
    assert sorted(names_written) == sorted(path.name for path in tmp_path.iterdir())
    rows = table(tmp_path / "per_utterance.csv")
    classes = table(tmp_path / "per_class.csv")
    assert [row["class"] for row in classes] == sorted(names)
    for column, total in (
        ("substituted", expected.substitutions),
        ("deleted", expected.deletions),
        ("inserted", expected.insertions),
    ):
        assert sum(int(row[column]) for row in rows) == total
        assert sum(int(row[column]) for row in classes) == total
    tokens = expected.hits + expected.substitutions + expected.deletions
    assert sum(int(row["tokens"]) for row in rows) == sum(int(row["count"]) for row in classes) == tokens
    assert sum(int(row["correct"]) for row in classes) == expected.hits
    for row in classes:
        assert int(row["count"]) == int(row["correct"]) + int(row["substituted"]) + int(row["deleted"])
        token = row["class"]
        text = [said_row.split() if unit == "phone" else list(said_row.replace(" ", "|")) for said_row in said]
        assert int(row["count"]) == sum(tokens.count(token) for tokens in text)
    assert [(row["reference"], row["hypothesis"]) for row in rows] == list(zip(said, heard, strict=True))


def test_errors_of_an_utterance_are_told_apart(tmp_path):
    cases = [("ABCD", "ABCD", (0, 0, 0)), ("ABCD", "ACD", (0, 1, 0)), ("ABCD", "ABBCD", (0, 0, 1)), ("ABCD", "ABAD", (1, 0, 0))]
    objective = measured(CTC(CHARACTERS, "character"), [case[0] for case in cases], [case[1] for case in cases])
    assert objective.write(tmp_path, "asr", plots=False) == ["per_class.csv", "per_utterance.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["per_class.csv", "per_utterance.csv"]
    kinds = ("substituted", "deleted", "inserted")
    for row, (_, _, errors) in zip(table(tmp_path / "per_utterance.csv"), cases, strict=True):
        assert tuple(int(row[kind]) for kind in kinds) == errors
        assert row["tokens"] == "4"
    rows = {row["class"]: row for row in table(tmp_path / "per_class.csv")}
    assert [rows["B"][kind] for kind in kinds] == ["0", "1", "1"]
    assert rows["C"]["substituted"] == "1"


def test_predictions_are_texts_with_a_score():
    outputs, lengths = peaked([spelt("AB CD"), [*spelt("A'A"), 0, 0]], 7, height=3.0)
    said = CTC(CHARACTERS, "character").predict(outputs, lengths)
    assert [row["text"] for row in said] == ["AB CD", "A'A"]
    share = math.exp(3) / (math.exp(3) + 6)
    assert [row["score"] for row in said] == pytest.approx([share, share], rel=1e-5)
    assert CTC(PHONES).predict(*peaked([[1, 0, 1, 4]], 5))[0]["text"] == "AA AA S"


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match=r"downstream.objective.unit must be phone or character, found 'word'"):
        CTC(PHONES, "word")


def untrained(head, prior=0.9):
    """Shares (T, C) of a new head's outputs where it hears nothing."""
    objective = CTC(PHONES, blank_prior=prior)
    head = head(objective.num_outputs)
    with torch.no_grad():
        for tensor in head.parameters():
            tensor.zero_()
        objective.begin(head)
        return head(torch.zeros(1, 3, 6), torch.tensor([3]))[0].double().softmax(-1)


@pytest.mark.parametrize("prior", [0.2, 0.75, 0.9])
def test_a_head_begins_with_its_blank_prior_and_equal_tokens(prior):
    heads = {
        "linear": lambda outputs: FrameClassifier(6, outputs, stack=2),
        "hidden": lambda outputs: FrameClassifier(6, outputs, stack=1, hidden_dim=10),  # 10 is twice the outputs
        "recurrent": lambda outputs: RecurrentClassifier(6, outputs, stack=3, hidden_dim=5, num_layers=1, projector_dim=5),
    }
    rest = (1 - prior) / 4
    expected = torch.tensor([prior, rest, rest, rest, rest], dtype=torch.float64)
    for name, head in heads.items():
        shares = untrained(head, prior)
        torch.testing.assert_close(shares, expected.expand_as(shares), rtol=1e-6, atol=0, msg=name)


def test_a_head_without_a_prior_or_a_bias_for_each_output_begins_as_it_is():
    heads = [(nn.Linear(6, 7), 0.9), (nn.Linear(6, 5, bias=False), 0.9), (nn.Conv1d(6, 5, 1), 0.9), (nn.Linear(6, 5), None)]
    for head, prior in heads:
        before = [tensor.clone() for tensor in head.parameters()]
        CTC(PHONES, blank_prior=prior).begin(head)
        assert all(map(torch.equal, before, head.parameters()))


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1, float("nan")])
def test_a_blank_prior_that_is_no_probability_is_refused(prior):
    with pytest.raises(ValueError, match=r"objective.blank_prior must be null or a probability between 0 and 1, found "):
        CTC(PHONES, blank_prior=prior)


def loss_after(steps, prior, seed, num_classes=30, utterances=8, tokens=15, hold=8):
    """Loss of a linear head after some steps on noisy tokens, each of which lasts a while."""
    objective = CTC([str(number) for number in range(num_classes)], blank_prior=prior)
    meaning, lengths = 3 * draw(num_classes, 32), torch.full((utterances,), tokens * hold)
    torch.manual_seed(seed)
    head = FrameClassifier(32, objective.num_outputs, stack=1)
    objective.begin(head)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for step in range(steps):
        said = torch.randint(num_classes, (utterances, tokens), generator=torch.Generator().manual_seed(1000 * seed + step))
        heard = meaning[said].repeat_interleave(hold, 1) + 4.5 * draw(utterances, tokens * hold, 32, seed=1000 * seed + step)
        loss = objective.loss(head(heard, lengths), lengths, {"labels": said}).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_head_that_begins_with_blanks_learns_tokens_sooner(seed):
    assert loss_after(100, 0.9, seed) < 0.85 * loss_after(100, None, seed)


# Beam search


@pytest.fixture
def flashlight():
    return pytest.importorskip("flashlight.lib.text.decoder")


@pytest.fixture
def lexicon(tmp_path):
    """A file of some words, spelt as wav2letter does."""

    def write(*words, end=" |"):
        path = tmp_path / "lexicon.txt"
        path.write_text("".join(f"{word} {' '.join(word)}{end}\n" for word in words))
        return str(path)

    return write


@pytest.mark.usefixtures("flashlight")
@pytest.mark.parametrize("unit", ["phone", "character"])
def test_a_beam_finds_what_greedy_decoding_finds_where_outputs_are_peaked(unit):
    classes = PHONES if unit == "phone" else CHARACTERS
    plain, beam = CTC(classes, unit), CTC(classes, unit, beam={"beam_size": 20})
    rng = random.Random(0)
    paths = [[rng.randrange(len(classes) + 1) for _ in range(rng.randint(1, 20))] for _ in range(30)]
    outputs, lengths = peaked(paths, len(classes) + 1)
    expected = [row["text"] for row in plain.predict(outputs, lengths)]
    assert [row["text"] for row in beam.predict(outputs, lengths)] == expected
    assert len(set(expected)) > 20


@pytest.mark.usefixtures("flashlight")
def test_a_beam_finds_the_likeliest_text_where_the_best_path_spells_another():
    # Two frames, blank 0.4, A 0.3, B 0.3: "" is the best path and has 0.16, but A, spelt by three paths, 0.33.
    outputs = torch.tensor([[[0.5, 0.45, 0.05], [0.4, 0.55, 0.05], [0.5, 0.45, 0.05]]]).log()
    decode = BeamDecoder(["A", "B"])
    assert decode(outputs, torch.tensor([3])) == [["A"]]


@pytest.mark.usefixtures("flashlight")
def test_validation_is_greedy_and_the_test_takes_the_beam(lexicon):
    objective = CTC(CHARACTERS, "character", beam={"lexicon": lexicon("AB", "CD")})
    for stage, expected in (("valid", "AC CD"), ("test", "AB CD")):
        assert measured(objective, ["AB CD"], ["AC CD"], stage).rows[0]["hypothesis"] == expected


@pytest.mark.usefixtures("flashlight")
@pytest.mark.parametrize("end", [" |", ""])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_lexicon_allows_its_words_alone(lexicon, end, padding):
    beam = CTC(CHARACTERS, "character", beam={"lexicon": lexicon("AB", "CD", "ABC", "D'A", end=end)})
    said = ["AB CD", "D'A", "ABC AB", "A", "ADC", "AB CDD'A"]
    outputs, lengths = peaked([spelt(text) + [0] * padding for text in said], 7, height=12.0)
    found = [row["text"] for row in beam.predict(outputs, lengths)]
    assert found[:3] == said[:3]  # the last word is whole, whether or not a frame follows it
    if end:  # else nothing keeps words apart
        assert all(set(text.split()) <= {"AB", "CD", "ABC", "D'A"} for text in found)


@pytest.mark.usefixtures("flashlight")
def test_a_lexicon_of_phones_has_no_token_between_words(tmp_path):
    (tmp_path / "phones.txt").write_text("BASS B AA S\nCAB K AA B\nCABS K AA B S\n")
    beam = CTC(PHONES, beam={"lexicon": str(tmp_path / "phones.txt")})
    paths = [[2, 1, 4, 3, 1, 2, 4], [3, 3, 1, 0, 2], [3, 1, 2, 2, 4]]  # BASS CABS, CAB, CABS
    assert [row["text"] for row in beam.predict(*peaked(paths, 5))] == ["B AA S K AA B S", "K AA B", "K AA B S"]
    outputs, lengths = peaked([[3, 1, 1]], 5, height=3.0)
    outputs[0, 2, 2] = 2.5  # K AA AA, which no word begins with, or K AA B
    assert beam.predict(outputs, lengths)[0]["text"] == "K AA B"


ARPA = """\\data\\
ngram 1=6
ngram 2=3

\\1-grams:
-2.0\t<unk>
-99\t<s>\t-0.3
-1.0\t</s>
-1.0\tAB\t-0.3
-1.0\tCD\t-0.3
-1.0\tCB\t-0.3

\\2-grams:
-0.1\t<s> AB
-0.1\tAB CD
-3.0\tAB CB

\\end\\
"""


@pytest.mark.usefixtures("flashlight")
def test_a_language_model_chooses_among_words(tmp_path, lexicon):
    (tmp_path / "words.arpa").write_text(ARPA)
    options = {"lexicon": lexicon("AB", "CD", "CB")}
    outputs, lengths = peaked([spelt("AB CB")], 7)
    outputs[0, -1, CHARACTERS.index("D") + 1] = 8.5  # CD is nearly as likely as CB
    texts = []
    for model in (
        {},
        {"language_model": str(tmp_path / "words.arpa")},
        {"language_model": str(tmp_path / "words.arpa"), "lm_weight": 0},
    ):
        beam = CTC(CHARACTERS, "character", beam=options | model)
        texts.append(beam.predict(outputs, lengths)[0]["text"])
    assert texts == ["AB CB", "AB CD", "AB CB"]


TOKEN_ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-2.0\t<unk>
-99\t<s>\t-0.3
-1.0\t</s>
-1.0\tB\t-0.3
-1.0\tS\t-0.3

\\2-grams:
-0.1\tB S
-3.0\tB B

\\end\\
"""


@pytest.mark.usefixtures("flashlight")
def test_a_language_model_of_tokens_needs_no_lexicon(tmp_path):
    (tmp_path / "tokens.arpa").write_text(TOKEN_ARPA)
    outputs, lengths = peaked([[2, 0, 2]], 5)
    outputs[0, 2, 4] = 8.5
    plain, model = CTC(PHONES, beam={}), CTC(PHONES, beam={"language_model": str(tmp_path / "tokens.arpa")})
    assert [objective.predict(outputs, lengths)[0]["text"] for objective in (plain, model)] == ["B B", "B S"]


@pytest.mark.parametrize("name", ["lexicon", "language_model"])
def test_a_missing_file_of_the_beam_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"downstream.objective.beam.{name}: there is no file {tmp_path}/none"):
        CTC(PHONES, beam={name: str(tmp_path / "none")})


@pytest.mark.usefixtures("flashlight")
def test_a_lexicon_of_the_beam_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "phones.txt").write_bytes("\ufeffCAB K AA B\r\n\r\nÉK S\r\n".encode())
    beam = CTC(PHONES, beam={"lexicon": str(tmp_path / "phones.txt")})
    assert [row["text"] for row in beam.predict(*peaked([[3, 1, 2], [4]], 5))] == ["K AA B", "S"]
    assert beam.beam.decoder.word_dict.contains("CAB")


@pytest.mark.usefixtures("flashlight")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("lexicon", "WORD AA\nOTHER B Q\n", "file:2: 'Q' of the word 'OTHER' is not one of the model's 4 tokens"),
        ("lexicon", "\nWORD\n", "file:2: the word 'WORD' has no tokens"),
        ("lexicon", "\n", "file has no word"),
        ("language_model", "hello\n", 'file: .*first non-empty line was "hello" not'),
    ],
)
def test_a_file_of_another_format_is_named_with_the_reason(tmp_path, name, content, reason):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{reason}"):
        CTC(PHONES, beam={name: str(tmp_path / "file")})


@pytest.mark.usefixtures("flashlight")
def test_the_token_between_words_is_no_character_of_a_beam():
    with pytest.raises(ValueError, match=r"'\|' stands for the space between words: leave it out by downstream.labels.remove"):
        BeamDecoder([" ", "A", "|"])


def test_a_missing_package_is_named(monkeypatch):
    for name in ("ctc_decoder", "_ctc_decoder"):
        monkeypatch.delitem(
            sys.modules["torchaudio.models.decoder"].__dict__ if name == "ctc_decoder" else sys.modules, name, False
        )
    for name in [name for name in sys.modules if name.startswith(("flashlight", "torchaudio.models.decoder"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashlight", None)
    with pytest.raises(ImportError, match=r"downstream.objective.beam needs flashlight-text: pip install 'audiot\[beam\]'"):
        BeamDecoder(["A"])
