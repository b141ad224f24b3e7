"""The figures of an analysis, and what travels beside them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from audiot.base.files import replacing
from audiot.measures.similarity import cka
from audiot.study.records import Arrays, Record, Records, _seconds, flattened, read_arrays, travelling


def test_an_analysis_becomes_figures_by_name():
    analysis = {
        "token_s": 0.03,
        "heads": [{"layer": 2, "head": 7, "distance_s": 0.1, "entropy": 2}],
        "tables": [
            {"layer": 1, "head": 2, "pattern": "previous", "moved": 0.2},
            {"layer": 1, "head": 8, "pattern": None, "moved": 0.3},
        ],
        "pruning": {"loss": "val_l1", "alone": [{"layer": 1, "head": 1, "loss": 0.5}], "order": [[1, 1]], "removed": [0.4, 0.5]},
        "codes": {"targets": {"pnmi": 0.6}},
        "absent": {"nothing": "words"},
    }
    assert flattened(analysis) == {
        "token_s": 0.03,
        "heads/2/7/distance_s": 0.1,
        "heads/2/7/entropy": 2.0,
        "tables/1/previous/moved": 0.2,
        "tables/1/8/moved": 0.3,
        "pruning/alone/1/1/loss": 0.5,
        "pruning/order/0/0": 1.0,
        "pruning/order/0/1": 1.0,
        "pruning/removed/0": 0.4,
        "pruning/removed/1": 0.5,
        "codes/targets/pnmi": 0.6,
    }


def test_states_travel_in_few_axes_and_stay_as_alike(tmp_path):
    noise = torch.Generator().manual_seed(0)
    spread = torch.arange(1.0, 97.0) ** -1
    states = (torch.randn(3, 512, 96, generator=noise) * spread).half()
    states[1] += states[0]
    save_file(
        {"states": states, "tables": torch.zeros(4, 2, 3, 3, dtype=torch.uint8)},
        tmp_path / "analysis.safetensors",
        {"frames": "f"},
    )
    records = Records(tmp_path)
    records.write("0a", Record("a", "runs/a", (), {}), travelling(tmp_path))
    found = Records(tmp_path).arrays("0a")
    assert found.frames == "f"
    assert found.tensors["states"].shape == (3, 512, 32)
    assert found.tensors["states"].dtype == torch.float16
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert cka(*found.tensors["states"][[one, other]]) == pytest.approx(cka(*states[[one, other]]), abs=0.005)
    assert records.arrays("0b") is None


@pytest.mark.parametrize("tensors", [{"states": torch.zeros(2, 2)}, {"other": torch.zeros(1)}, {}])
def test_a_file_of_something_else_is_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors holds no states and tables of an analysis"):
        read_arrays(tmp_path / "a.safetensors")


def test_a_damaged_file_of_arrays_is_named(tmp_path):
    Records(tmp_path).write("0a", Record("a", "runs/a", (), {}), Arrays({"states": torch.zeros(1, 2, 3)}, "f"))
    path = tmp_path / "results" / "0a.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"0a\.safetensors is no readable file of arrays .* delete it with its record") as error:
        Records(tmp_path).arrays("0a")
    assert "\n" not in str(error.value)


def test_the_time_of_a_training_is_the_median_of_its_second_half_without_waiting(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [
        (100, 0.0),
        ("", ""),
        (200, 0.0),
        (1000, 0.5),
        (2000, 0.5),
        (4000, 0.5),
        (500, 0.5),
    ]  # the second half: the last three
    path.write_text("frames_per_s,data_wait\n" + "".join(f"{rate},{wait}\n" for rate, wait in rows))
    assert _seconds(path) == 0.5 * 1e6 / 2000
    path.write_text("frames_per_s,data_wait\n")
    with pytest.raises(
        ValueError, match=r"metrics\.csv has no speed: study\.cost needs at least trainer\.log_every_n_steps steps$"
    ):
        _seconds(path)


def test_a_record_that_another_process_still_writes_is_not_read(tmp_path):
    records = Records(tmp_path)
    records.write("0" * 16, Record("one", "runs/one", (), {"value": 1.0}))
    with replacing(tmp_path / "results" / f"{'1' * 16}.json") as temporary:
        temporary.write_text('{"format": ')
        assert list(records.load()) == ["0" * 16]
