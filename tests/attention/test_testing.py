"""The contract finds what is wrong with a mechanism; SummaryMixing, which has no weights, keeps it."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from stranger import copy_example

from audiot.attention import AttentionMechanism, SelfAttention
from audiot.attention.query_key import QueryKey
from audiot.attention.testing import check


@pytest.fixture(scope="module")
def summary_mixing(tmp_path_factory):
    """The class that CONTRIBUTING.md shows."""
    folder = tmp_path_factory.mktemp("mine")
    assert copy_example(folder) == ["summary_mixing.py", "attention/summary_mixing.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("summary_mixing").SummaryMixing


def test_the_example_of_the_document_keeps_the_contract(summary_mixing):
    check(summary_mixing)


def test_the_example_is_summary_mixing_as_published(summary_mixing):
    torch.manual_seed(0)
    layer = SelfAttention(4, 1, summary_mixing(4, 1, 8))  # one head: f, s and c are dense layers
    hidden = torch.randn(1, 3, 4)
    local = F.gelu(layer.mechanism.local(hidden))
    mean = F.gelu(layer.value(hidden)).mean(1, keepdim=True).expand(-1, 3, -1)
    expected = layer.output(F.gelu(torch.cat([local, mean], -1) @ layer.mechanism.combine[0]))
    torch.testing.assert_close(layer(hidden), expected)
    torch.testing.assert_close(layer.reference(hidden), expected)


def test_a_layer_says_that_there_are_no_weights(summary_mixing):
    layer = SelfAttention(8, 2, summary_mixing(8, 2, 10))
    assert not layer.has_weights
    with pytest.raises(ValueError, match=r"^SummaryMixing has no attention weights: ask has_weights before weights\(\)$"):
        layer.weights(torch.zeros(1, 3, 8))
    assert layer.chosen_keys(torch.zeros(1, 3, 8)) is None
    assert SelfAttention(8, 2, QueryKey(8, 2, 10)).has_weights


def test_a_mechanism_without_its_plain_form_is_refused_when_it_is_built():
    class Fast(AttentionMechanism):
        inputs = frozenset({"value"})

        def attend(self, value, valid):
            return value

    class Weightless(Fast):
        has_weights = False

    for kind in (Fast, Weightless):
        with pytest.raises(ValueError, match=rf"^{kind.__name__} has no plain form .*: write dense_weights, or set .* naive$"):
            kind(8, 2, 10)


def test_every_kind_of_mistake_breaks_its_own_rule(summary_mixing):
    class OtherGradient(summary_mixing):
        def attend(self, hidden, value, valid):
            return super().attend(hidden, value.detach(), valid)

    class HearsPadding(summary_mixing):
        def attend(self, hidden, value, valid):
            context = super().attend(hidden, value, None)
            return context if valid is None else context * valid.any(-1)[:, None, None, None]

        def naive(self, hidden, value, valid):
            return self.attend(hidden, value, valid)

    class HearsTheBatch(summary_mixing):
        def attend(self, hidden, value, valid):
            return super().attend(hidden, value, valid) * hidden.shape[0]

        def naive(self, hidden, value, valid):
            return super().naive(hidden, value, valid) * hidden.shape[0]

    class Drawn(summary_mixing):
        def attend(self, hidden, value, valid):
            return super().attend(hidden, F.dropout(value, self.dropout), valid)

    class DropsNothing(summary_mixing):
        dropout_now = 0.0

    class Forgets(summary_mixing):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.scale = torch.rand(1).item()

        def attend(self, hidden, value, valid):
            return self.scale * super().attend(hidden, value, valid)

        def naive(self, hidden, value, valid):
            return self.scale * super().naive(hidden, value, valid)

    class ComputesTooMuch(summary_mixing):
        inputs = frozenset({"hidden", "value", "query"})

        def attend(self, hidden, value, query, valid):
            return super().attend(hidden, value, valid)

        def naive(self, hidden, value, query, valid):
            return super().naive(hidden, value, valid)

    class BreaksTheGraph(summary_mixing):
        def attend(self, hidden, value, valid):
            return super().attend(hidden, value, valid) * (1 if value.abs().sum() > 0 else 2)

    class Quadratic(summary_mixing):
        def attend(self, hidden, value, valid):
            return super().attend(hidden, value, valid) + 0 * (value @ value.transpose(-2, -1)).sum()

    class DecaysNothing(summary_mixing):
        no_weight_decay = frozenset({"table"})

    expected = {
        OtherGradient: "fast_form_equals_the_plain_form",
        HearsPadding: "padding_changes_neither_real_frames_nor_gradients",
        HearsTheBatch: "a_batch_equals_its_sequences_one_at_a_time",
        Drawn: "evaluation_is_deterministic_and_training_drops",
        DropsNothing: "evaluation_is_deterministic_and_training_drops",
        Forgets: "state_dict_carries_everything",
        ComputesTooMuch: "positions_act_alike_in_both_forms",  # which would be lost without a word
        DecaysNothing: "undecayed_parameters_exist",
        BreaksTheGraph: "compiles_once_for_all_lengths",
        Quadratic: "holds_no_matrix_of_all_frames",
    }
    for mistaken, rule in expected.items():
        with pytest.raises(AssertionError) as found:
            check(mistaken)
        assert str(found.value).startswith(f"{rule}: "), (mistaken.__name__, str(found.value))


def test_weights_beyond_one_are_found():
    class TwiceAsMuch(QueryKey):
        def attend(self, **inputs):
            return 2 * super().attend(**inputs)

        def dense_weights(self, *arguments, **inputs):
            return 2 * super().dense_weights(*arguments, **inputs)

    with pytest.raises(AssertionError, match=r"^weights_of_real_frames_sum_to_one: "):
        check(TwiceAsMuch)
