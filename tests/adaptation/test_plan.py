"""What is chosen by the size of a folder."""

from __future__ import annotations

import pytest

from audiot.adaptation.labelled import Labelled
from audiot.adaptation.plan import Plan, Size, plan_data, plan_encoder, plan_pretraining, plan_training

DIGITS = Labelled("classification", "digit", "one label per file, in digit", {"0": 50, "1": 50}, 100, 0, {})


def test_what_is_given_is_not_chosen():
    plan = Plan({"data.valid_fraction", "downstream.labels.field"})
    plan_data(plan, DIGITS, "auto")
    assert plan.chosen == {"downstream": "keyword", "+data.corpus.label": "digit"}
    assert plan.lines == ["downstream=keyword: one label per file, in digit"]


def test_a_column_of_splits_is_followed():
    plan, splits = Plan(set()), {"train": ["train"], "valid": ["dev", "val"], "test": ["test"]}
    plan_data(plan, Labelled("speakers", "speaker", "", {}, 10, 3, splits), True)
    assert plan.chosen["data.valid"] == "split=='dev' or split=='val'"
    assert plan.chosen["data.test"] == "split=='test'"
    assert "data.valid_fraction" not in plan.chosen


def test_the_alphabet_is_that_of_all_transcripts():
    plan = Plan(set())
    plan_data(plan, Labelled("transcription", "text", "", {}, 10, 0, {}, "aB ?ß"), "auto")
    assert plan.chosen["downstream.labels.alphabet"] == " ABS"


@pytest.mark.parametrize(
    ("hours", "init", "wanted", "has_upstream", "pretrains", "chosen"),
    [
        (0.05, None, "auto", False, False, {"upstream": "features"}),
        (0.5, None, "auto", False, True, {}),
        (0.05, None, True, False, True, {}),
        (5, None, False, False, False, {"upstream": "features"}),
        (0.05, "RUN/encoder", "auto", False, True, {}),
        (5, None, "auto", True, False, {}),
    ],
)
def test_an_encoder_is_pretrained_where_none_is_given_and_there_is_enough_audio(
    hours, init, wanted, has_upstream, pretrains, chosen
):
    plan = Plan(set())
    assert plan_encoder(plan, hours, init, wanted, 0.1, has_upstream) is pretrains
    assert plan.chosen == chosen


@pytest.mark.parametrize(
    ("audio_h", "on_gpu", "batch_s", "steps", "rate"),
    [
        (0.1, False, 25, 300, 1e-3),
        (0.2, False, 25, 576, 1e-3),
        (10, False, 25, 3000, None),
        (0.1, True, 25, 300, 1e-3),
        (1, True, 25, 2880, None),
        (5, True, 120, 3000, None),
        (100, True, 200, 36_000, None),
        (200, True, 200, 40_000, None),
    ],
)
def test_pretraining_passes_twenty_times_within_limits(audio_h, on_gpu, batch_s, steps, rate):
    plan = Plan(set())
    plan_pretraining(plan, Size(0, 0, audio_h, on_gpu), "auto")
    assert (plan.chosen["data.batch_s"], plan.chosen["trainer.max_steps"]) == (batch_s, steps)
    assert plan.chosen.get("optimizer.lr") == rate
    plan = Plan(set())
    plan_pretraining(plan, Size(0, 0, audio_h, on_gpu), 7)
    assert plan.chosen["trainer.max_steps"] == 7


@pytest.mark.parametrize(
    ("utterances", "upstream", "width", "parameters", "on_gpu", "trains", "rate"),
    [
        (500, "checkpoint", 192, 1e6, False, True, 1e-3),
        (500, "checkpoint", 768, 15e6, False, True, 2e-4),
        (500, "hf", 768, 95e6, False, False, 1e-2),
        (500, "hf", 768, 95e6, True, True, 5e-5),
        (50, "checkpoint", 192, 1e6, True, False, 1e-2),
    ],
)
def test_an_encoder_is_trained_with_enough_labels_if_it_is_small_or_there_is_a_gpu(
    utterances, upstream, width, parameters, on_gpu, trains, rate
):
    plan = Plan(set())
    plan_training(plan, DIGITS, Size(2.0 * utterances, utterances, 1, on_gpu), upstream, width, int(parameters), {})
    assert plan.chosen["downstream.train_encoder"] is trains
    assert plan.chosen["optimizer.lr"] == rate
    assert plan.chosen["downstream.head.pooling"] == "statistics"
    assert plan.chosen["downstream.layers"] == ("last" if trains else "weighted_sum")


def test_given_values_count_where_others_follow_from_them():
    plan = Plan({"trainer.max_steps", "data.batch_s"})
    plan_training(plan, DIGITS, Size(1000, 500, 1, False), "features", 0, 0, {"trainer.max_steps": 50, "data.batch_s": 20.0})
    assert plan.chosen["trainer.val_check_interval"] == 5
    assert not {"trainer.max_steps", "data.batch_s"} & plan.chosen.keys()
