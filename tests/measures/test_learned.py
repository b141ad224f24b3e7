"""Frames that are sampled, tables that are drawn, and codes beside phones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_pruning import encoder

from audiot.features import LogMel
from audiot.measures.learned import (
    attention_rows,
    code_figures,
    hear,
    labelled,
    sampled_states,
    small_tables,
    table_rows,
    token_seconds,
)


def model_of(dim, step=2):
    """A model of `dim` channels, whose state at token t of utterance n is 100n + t in layer 0 and the negative in layer 1."""

    def states(waveforms, lengths):
        hidden = waveforms[:, ::step, None].expand(-1, -1, dim)
        return torch.stack([hidden, -hidden]), lengths // step

    return SimpleNamespace(model=states)


def batch_of(*numbers):
    """Utterances of 20, 22, … samples by their numbers."""
    lengths = torch.tensor([20 + 2 * number for number in numbers])
    waveforms = torch.arange(40.0).div(2, rounding_mode="floor") + 100 * torch.tensor(numbers)[:, None]
    return {"waveforms": waveforms, "lengths": lengths, "ids": [f"utt{number}" for number in numbers]}


def test_the_same_frames_are_sampled_of_every_encoder_and_in_every_batch():
    first, digest = sampled_states(model_of(3), [batch_of(0, 1), batch_of(2, 3)], 16)
    second, other = sampled_states(model_of(5), [batch_of(3), batch_of(0, 2, 1)], 16)
    assert (first.shape, second.shape) == ((2, 16, 3), (2, 16, 5))
    assert torch.equal(first[:, :, 0], second[:, :, 0])
    assert digest == other
    frames = first[0, :, 0].view(4, 4)
    assert (frames // 100 == torch.arange(4)[:, None]).all()
    assert (frames.diff(dim=1) > 0).all()  # no frame twice
    assert (frames % 100 < torch.tensor([10, 11, 12, 13])[:, None]).all()
    assert torch.equal(first[1], -first[0])


def test_frames_of_another_length_have_another_digest():
    batches = [batch_of(0, 1)]
    _, digest = sampled_states(model_of(3), batches, 8)
    _, other = sampled_states(model_of(3, step=4), batches, 8)
    assert digest != other


def test_an_utterance_with_fewer_frames_gives_all_of_them():
    states, _ = sampled_states(model_of(1), [batch_of(0, 1)], 1000)
    assert states.shape[1] == 10 + 11


def test_states_that_float16_cannot_hold_are_refused():
    batch = batch_of(0) | {"waveforms": torch.full((1, 40), 1e5)}
    with pytest.raises(ValueError, match="hidden states are not finite in float16"):
        sampled_states(model_of(1), [batch], 4)


def test_a_token_has_the_phone_that_is_spoken_in_its_middle():
    intervals = [(0.1, 0.2, "a"), (0.2, 0.3, "b"), (0.4, 0.5, "a")]
    found = labelled(np.array([0.05, 0.1, 0.19, 0.2, 0.35, 0.45, 0.5]), intervals, {"a": 0, "b": 1})
    assert found.tolist() == [-1, 0, 0, 1, -1, 0, -1]


def test_codes_that_are_the_phones_say_all_of_them_and_others_what_they_share():
    features = LogMel(n_mels=8, stack=2)
    seconds = features.num_samples(6) / features.sample_rate  # six tokens
    phones = {"one": [(0.0, seconds / 2, "a"), (seconds / 2, seconds, "b")]}
    alike, halves = torch.tensor([7, 7, 7, 4, 4, 4]), torch.tensor([0, 0, 1, 1, 2, 2])
    masked = torch.tensor([1, 1, 0, 0, 1, 1]).bool()
    view = {
        "codes": torch.stack([alike, halves], dim=-1)[None],
        "predicted": torch.stack([alike, torch.zeros_like(alike)], dim=-1)[None],
        "masked": masked.repeat_interleave(2)[None],
        "lengths": torch.tensor([12]),
    }
    module = SimpleNamespace(model=SimpleNamespace(features=features), sample_rate=features.sample_rate, view=lambda batch: view)
    found = code_figures(module, [{"ids": ["one"]}], phones)
    # Of halves, code 1 is shared by both phones: 1 − (1/3)·log 2 / log 2 of the phones' entropy is known.
    assert found["targets"]["pnmi"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["targets"]["phone_purity"] == pytest.approx((1 + 5 / 6) / 2)
    assert found["predicted"]["pnmi"] == pytest.approx((1 + 0) / 2, abs=1e-9)
    assert found["targets"]["frames"] == 6
    assert found["predicted"]["frames"] == 4


@torch.no_grad()
def test_heads_are_measured_by_layer_and_utterances_count_alike():
    model = encoder("controls.Uniform")
    features = LogMel(n_mels=4, stack=1)
    module = SimpleNamespace(model=SimpleNamespace(features=features), sample_rate=features.sample_rate)
    assert token_seconds(module) == pytest.approx(0.01)
    lengths = [features.num_samples(frames) for frames in (4, 8, 8)]
    batches = [
        {"waveforms": torch.randn(2, max(lengths)), "lengths": torch.tensor(lengths[:2])},
        {"waveforms": torch.randn(1, lengths[2]), "lengths": torch.tensor(lengths[2:])},
    ]
    rows = attention_rows(model, hear(module, batches), 0.01)
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in (1, 2) for head in (1, 2, 3)]

    def mean_distance(frames):
        return sum(abs(q - k) for q in range(frames) for k in range(frames)) / frames**2

    expected = 0.01 * (mean_distance(4) + 2 * mean_distance(8)) / 3
    assert [row["distance_s"] for row in rows] == pytest.approx([expected] * 6)
    assert [row["entropy_share"] for row in rows] == pytest.approx([1] * 6)


@torch.no_grad()
def test_tables_are_compared_with_their_patterns_and_others_only_where_their_start_is_known():
    before, after = (encoder("synthesizer_random.SynthesizerRandom", num_heads=12, embed_dim=24) for _ in range(2))
    after.layer(1).attention.mechanism.logits[1].zero_()  # the head of `previous` in layer 2
    found = table_rows(before, after, 9, all_heads=True)
    assert len(found) == 24
    (moved,) = (row for row in found if row["moved"])
    # From 0.9 on one frame (in the first row on itself) and 0.1 evenly, to an even spread.
    assert (moved["layer"], moved["head"], moved["pattern"]) == (2, 2, "previous")
    assert moved["moved"] == pytest.approx(0.9 * 8 / 9, rel=1e-5)
    assert (moved["survives"], moved["entropy_after"]) == (0, pytest.approx(np.log(9)))
    assert {row["pattern"] for row in found if row["head"] > 7} == {None}
    assert {row["head"] for row in table_rows(before, after, 9, all_heads=False)} == set(range(1, 8))


def test_small_tables_have_the_mean_of_their_cells():
    table = torch.zeros(1, 4, 4)
    table[0, :2, 2:] = 0.25
    table[0, 2:, :2] = 1.0
    assert small_tables([table], 2).tolist() == [[[[0, 128], [255, 0]]]]
