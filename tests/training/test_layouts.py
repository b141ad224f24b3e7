"""Processes and workers change nothing but speed: a training is the same whoever does it, and on CPUs as on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import KINDS, LAYOUTS, all_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:::torchmetrics")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]
SEVERAL = [layout for layout, (processes, _) in LAYOUTS.items() if processes > 1]


@pytest.fixture(scope="module", params=DEVICES)
def trained(request, demo_corpus, tmp_path_factory):
    """What came of each layout on a device, rank by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    program = str(Path(__file__).parents[1] / "layouts.py")
    started = []
    for rank in range(2):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        command = [sys.executable, program, str(folder), str(demo_corpus.directory), request.param, str(rank)]
        started.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(600) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    alone = all_of("one process", demo_corpus, request.param, folder)
    return alone, {layout: [results[layout] for results in ranks] for layout in SEVERAL}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_and_their_workers_share_the_batches_of_one(trained, kind):
    alone, several = trained
    for dtype in (torch.float64, torch.float32):
        expected = alone[kind, dtype]
        for layout in SEVERAL:
            shares = [results[kind, dtype] for results in several[layout]]
            for part in ("positions", "sizes"):
                assert [each for turn in zip(*(share[part] for share in shares), strict=True) for each in turn] == expected[part]
    epochs = [epoch for epoch, _ in expected["positions"]]
    assert epochs.count(0) % 2 == 1 < epochs[-1], "a step of batches of two epochs"
    assert len({*expected["sizes"]}) > 2
    validated = [several[layout][rank][kind, torch.float32]["validated"] for layout in SEVERAL for rank in range(2)]
    assert validated[:2] == validated[2:]


@pytest.mark.parametrize("layout", SEVERAL)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_float64_has_the_loss_gradient_and_weights_of_one_process(trained, kind, layout):
    alone, several = trained
    expected = alone[kind, torch.float64]
    for results in several[layout]:
        found = results[kind, torch.float64]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        for part in ("gradients", "state"):
            assert found[part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                size = float(value.double().abs().max())
                torch.testing.assert_close(found[part][name], value, rtol=1e-9, atol=1e-9 * size, msg=f"{part} {name}")
        assert found["validations"] == [pytest.approx(each, rel=1e-5) for each in expected["validations"]]


@pytest.mark.parametrize("layout", SEVERAL)
@pytest.mark.parametrize("kind", KINDS)
def test_curves_in_float32_are_those_of_one_process(trained, kind, layout):
    alone, several = trained
    expected = alone[kind, torch.float32]
    assert len(expected["losses"]) == 32
    assert len(expected["validations"]) == 2
    for results in several[layout]:
        found = results[kind, torch.float32]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["validations"] == [pytest.approx(each, rel=1e-5) for each in expected["validations"]]
