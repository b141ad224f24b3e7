"""A result over few utterances is reported with its uncertainty."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from audiot.commands.few import say_few, say_little, worth


def said(caplog, counts, data=None, **options):
    corpus = SimpleNamespace(counts=counts, split_for=lambda task, role: role)
    with caplog.at_level("INFO", "audiot"):
        say_few(OmegaConf.create({"data": data or {}}), corpus, "keyword", ("valid", "test"), **options)
    return caplog.messages


def test_an_utterance_is_so_many_points_of_accuracy():
    assert worth("valid", 4, counted=True) == "only 4 validation utterances, each is 25 points of accuracy"
    assert worth("valid", 1, counted=True) == "only 1 validation utterance, each is 100 points of accuracy"


@pytest.mark.parametrize(
    # Wilson's interval as published for x of n: 2 of 4 (0.150 to 0.850), 5 of 10 (0.237 to 0.763).
    ("count", "interval"),
    [(4, "15 to 85%"), (10, "24 to 76%")],
)
def test_a_tests_interval_is_wilsons(count, interval):
    assert f"an accuracy of 50% stands for {interval} (95% interval)" in worth("test", count, counted=True)


def test_enough_utterances_need_no_word(caplog):
    assert said(caplog, {"train": 100, "valid": 20, "test": 20}) == []


def test_the_remedy_is_a_larger_share_where_the_split_is_held_out(caplog):
    messages = said(caplog, {"train": 195, "valid": 5, "test": 5}, {"valid_fraction": 0.025, "valid": None, "test": "take<5"})
    assert [message.split("trial run's: ")[1] for message in messages] == [
        "data.valid_fraction=0.1 or more audio says more",
        "more test audio says more",
    ]


def test_few_utterances_in_all_have_none_to_spare(caplog):
    (message,) = said(caplog, {"train": 20, "valid": 1, "test": 30}, {"valid_fraction": 0.05})
    assert message == "few     only 1 validation utterance, take its figure for a trial run's: more audio says more"


@pytest.mark.parametrize(
    ("hours", "steps", "batches", "data", "rate", "words"),
    [
        (0.1, 600, 1, {}, 3e-3, "83 times over 0.1 h of audio: more audio is better; data.batch_s=25 optimizer.lr=0.001 learns"),
        (0.1, 300, 2, {}, 1e-3, "83 times over 0.1 h of audio: more audio is better; data.batch_s=25 learns it more surely"),
        (
            0.1,
            600,
            8,
            {"global_batch_s": 50.0},
            1e-3,
            "83 times over 0.1 h of audio: more audio is better; data.global_batch_s=25 ",
        ),
        (0.05, 600, 1, {"batch_s": 25.0}, 1e-3, "83 times over 0.05 h of audio: more audio is better"),
        (0.1, 600, 2, {"batch_s": 25.0}, 1e-3, "83 times over 0.1 h of audio: more audio is better"),  # as small as it says
        (0.1, 300, 1, {}, 3e-3, None),  # 42 times
        (1.0, 60000, 1, {}, 3e-3, None),
    ],
)
def test_many_passes_over_little_audio_are_told_with_what_learns_it_more_surely(caplog, hours, steps, batches, data, rate, words):
    cfg = OmegaConf.create({"data": {"batch_s": 50.0, "global_batch_s": None} | data, "optimizer": {"lr": rate}})
    with caplog.at_level("INFO", "audiot"):
        say_little(cfg, hours, steps, batches)
    if words is None:
        assert caplog.messages == []
    else:
        (message,) = caplog.messages
        assert message.startswith(f"little  training passes {words}")
        assert ("learns it more surely" in message) == (";" in words)


def test_the_config_of_an_earlier_run_has_the_batches_of_its_processes_alone(caplog):
    cfg = OmegaConf.create({"data": {"batch_s": 50.0}, "optimizer": {"lr": 1e-3}})
    OmegaConf.set_struct(cfg, True)
    with caplog.at_level("INFO", "audiot"):
        say_little(cfg, hours=0.1, steps=600, batches=1)
    (message,) = caplog.messages
    assert message.endswith("83 times over 0.1 h of audio: more audio is better; data.batch_s=25 learns it more surely")
