"""From the records of analyses to what the report says of them. The records are made up."""

from __future__ import annotations

import functools

import pytest
import torch
from hydra import initialize_config_module
from test_design import made

from audiot.study.gathering import gather
from audiot.study.records import Arrays, Record

SEEDS = [0, 1]


@pytest.fixture(autouse=True)
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield


def analysed(seed):
    """Figures of an analysis: layer 2 attends farther by its own number, and so does seed 1."""
    figures = {"codes/targets/pnmi": 0.5 + 0.1 * seed, "codes/predicted/frames": 99.0}
    for layer in (1, 2):
        for head in (1, 2, 3):
            figures[f"heads/{layer}/{head}/distance_s"] = layer + 0.1 * head + seed
            figures[f"untrained_heads/{layer}/{head}/distance_s"] = 5.0
        for head, moved in (("current", 0.2 + 0.4 * seed), ("2", 0.1), ("3", 0.3)):
            own = {"moved": moved, "entropy_before": 1.0, "entropy_after": 2.0 + seed, "survives": float(moved <= 0.5)}
            figures |= {f"tables/{layer}/{head}/{name}": value for name, value in own.items()}
    return figures | {f"pruning/removed/{number}": 1.0 + 0.1 * number + seed for number in range(7)}


@functools.cache
def found(frames=lambda mechanism: "same", learned=True):
    """Findings of two mechanisms. Their states differ by a rotation in layer 1 and share nothing in layer 2."""
    study = made(
        mechanisms=["query_key", "local"],
        control_mechanisms=[],
        seeds=SEEDS,
        budgets=["steps"],
        controls=[],
        learning_rates=[1e-3],
        learned=learned,
    )
    states = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    waves = torch.stack([torch.sin(torch.arange(12) * turns * torch.pi / 6) for turns in (1, 2, 3, 4)], dim=1)
    records, arrays = {}, {}
    for _ in range(3):
        for job in study.jobs(records):
            seed, mechanism = int(job.name.split("seed=")[1].split("/")[0]), job.name.split("/")[1]
            figures = {"validation": 1.0, "frames_per_s": 1.0, "steps": 1.0, "value": 0.5}
            if job.command == "analyze":
                figures = analysed(seed)
                rotated = mechanism == "local"
                first = states[seed].flip(1) * -3 if rotated else states[seed]
                second = waves[:, 2:] if rotated else waves[:, :2]
                tables = torch.tensor([[[0, 255], [17, 136]]], dtype=torch.uint8).expand(3, 3, 2, 2)
                both = torch.stack([states[seed], first, torch.nn.functional.pad(second, (0, 2))])
                arrays[job.key] = Arrays({"states": both, "tables": tables}, frames(mechanism))
            records[job.key] = Record(job.name, job.folder, (), figures)
    return gather(study, records, {}, "audiot study", arrays.get)


def test_figures_of_heads_are_means_over_heads_and_then_over_seeds():
    learned = found().learned[0]
    assert (learned.objective, learned.mechanism) == ("mockingjay", "query_key")
    assert [layer.mean for layer in learned.heads["distance_s"]] == pytest.approx([1.7, 2.7])
    assert [(layer.low, layer.high) for layer in learned.heads["distance_s"]] == [
        (pytest.approx(layer - 0.5), pytest.approx(layer + 0.5)) for layer in (1.7, 2.7)
    ]
    assert [layer.mean for layer in learned.untrained["distance_s"]] == [5, 5]
    assert learned.heads.keys() == {"distance_s"}
    assert [each.mean for each in learned.removed] == pytest.approx([1.5 + 0.1 * number for number in range(7)])
    assert {name: each.mean for name, each in learned.codes.items()} == {"targets/pnmi": pytest.approx(0.55)}


def test_heads_of_tables_are_told_by_pattern_and_the_others_together():
    moved = found().learned[0].moved
    assert [(each.layer, each.pattern, each.survivors, each.heads) for each in moved] == [
        (1, "current", 1, 2),
        (1, "", 4, 4),
        (2, "current", 1, 2),
        (2, "", 4, 4),
    ]
    assert [each.moved.mean for each in moved] == pytest.approx([0.4, 0.2, 0.4, 0.2])
    assert [(each.entropy_before, each.entropy_after) for each in moved] == [(1, 2.5)] * 4


def test_pictures_have_a_digit_for_each_cell_and_the_names_of_patterns():
    pictures = found().learned[0].pictures
    assert [(each.layer, each.head) for each in pictures[:4]] == [(0, "1 current"), (0, "2"), (0, "3"), (1, "1 current")]
    assert {each.rows for each in pictures} == {("0f", "18")}


def test_similarity_is_between_runs_of_one_seed_and_on_the_diagonal_between_seeds():
    first, second = found().similarities
    assert (first.layer, second.layer) == (1, 2)
    assert first.mechanisms == ("query_key", "local")
    assert first.means[0][1] == first.means[1][0] == pytest.approx(1, abs=1e-5)  # a rotation
    assert first.means[0][0] == pytest.approx(first.means[1][1])  # the same two seeds, rotated
    assert first.means[0][0] < 0.9
    assert second.means[0][1] == pytest.approx(0, abs=1e-5)
    assert second.means[0][0] == pytest.approx(1)


def test_states_of_other_frames_are_not_compared():
    first, _ = found(frames=lambda mechanism: mechanism).similarities
    assert first.means[0][1] is None
    assert first.means[0][0] is not None


def test_a_study_that_does_not_ask_has_nothing_learned():
    findings = found(learned=False)
    assert (findings.learned, findings.similarities) == ((), ())
