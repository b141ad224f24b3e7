"""Batches and ranks of unequal size add up to the big batch's loss and gradient."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from unequal_batches import KINDS, STEPS, VALIDATIONS, batches_of, big_batch, is_pretraining, made, step, validate

from audiot.data.labels import IGNORED
from audiot.objectives.reconstruction import interpolate_masked

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")


def loss_of(kind, batch):
    """Loss of a batch with its graph, by PyTorch alone, and the module."""
    module = made(kind)
    if is_pretraining(kind):
        return module.loss(*module.inputs(batch)).value, module
    outputs, lengths = module(batch)
    return module.objective.loss(outputs, lengths, batch).value, module


def mean_over_all(kind, count):
    """Loss and gradients of all utterances of the first batches."""
    loss, module = loss_of(kind, big_batch(kind, count))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return loss.item(), gradients


@functools.cache
def state_after(kind, count):
    """State of the objective after a step of one process with all utterances in one batch."""
    return step(kind, [big_batch(kind, count)])["state"]


def check(found, kind, count):
    loss, gradients = mean_over_all(kind, count)
    assert found["loss"] == pytest.approx(loss, rel=1e-9)
    assert found["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-9, atol=1e-9 * largest, msg=name)
    expected = state_after(kind, count)
    assert found["state"].keys() == expected.keys()
    for name, value in expected.items():  # what an objective learns without gradients, such as codes
        torch.testing.assert_close(found["state"][name], value, rtol=1e-9, atol=1e-9, msg=name)
    if found["norm"] is not None:  # as it is before it is clipped
        assert found["norm"] == pytest.approx(torch.cat([each.flatten() for each in gradients.values()]).norm().item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_batches_that_are_added_up_have_the_loss_and_gradient_of_one(kind):
    check(step(kind, batches_of(kind, 3), accumulate_grad_batches=3), kind, 3)


@pytest.mark.parametrize("unlabelled", [0, 1])
def test_a_batch_without_any_label_leaves_the_others_as_they_are(unlabelled):
    batches = batches_of("frames", 2)
    batches[unlabelled]["labels"].fill_(IGNORED)
    found = step("frames", batches, accumulate_grad_batches=2)
    loss, module = loss_of("frames", batches[1 - unlabelled])
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(found["gradients"]["head.linear.weight"], module.head.linear.weight.grad)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of each of two ranks for every step."""
    folder = tmp_path_factory.mktemp("ranks")
    program = str(Path(__file__).parents[1] / "unequal_batches.py")
    started = []
    for rank in range(2):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        started.append(subprocess.Popen([sys.executable, program, str(folder), str(rank)], env=environment))
    assert [process.wait(300) for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("strategy", "kind", "count"), STEPS)
def test_ranks_with_unequal_batches_have_the_loss_and_gradient_of_one(ranks, strategy, kind, count):
    for results in ranks:
        check(results[strategy, kind, count], kind, 2 * count)


@pytest.mark.parametrize("count", VALIDATIONS)
def test_ranks_share_validation_even_where_one_has_no_batch(ranks, count):
    module, batch = made("reconstruction").eval(), big_batch("reconstruction", count)
    with torch.no_grad():
        view = module.view(batch)
    target, masked = view["target"], view["masked"]
    guesses = {
        "val_l1": view["prediction"],
        "zero_l1": torch.zeros_like(target),
        "interpolation_l1": interpolate_masked(target, masked, view["lengths"]),
    }
    expected = {f"pretrain/{name}": float((guess - target).abs()[masked].mean()) for name, guess in guesses.items()}
    assert [results["validation", count] for results in ranks] == [pytest.approx(expected, rel=1e-5)] * 2


def test_a_rank_without_a_batch_does_not_stall_a_validation_between_steps(ranks):
    _, batch = batches_of("frames", 2)
    with torch.no_grad():
        best = made("frames").eval()(batch)[0].argmax(-1)
    labelled = batch["labels"] != IGNORED
    expected = float((best == batch["labels"])[labelled].double().mean())
    assert [results["validation in training"] for results in ranks] == [pytest.approx(expected)] * 2


def test_a_validation_batch_whose_loss_is_not_a_number_is_not_left_out():
    batches = batches_of("reconstruction", 3)
    batches[1]["tokens"].fill_(torch.nan)
    assert math.isnan(validate(batches)["pretrain/val_l1"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [1, 2])
def test_weighing_compiled_steps_on_the_gpu_waits_for_nothing(count, tmp_path):
    torch._dynamo.reset()
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        module = made("reconstruction").float().cuda()
        module.log_loss = lambda loss: None
        module.compile_step(graphs=count == 1)
        module._trainer = SimpleNamespace(accumulate_grad_batches=count, world_size=2)  # the other rank adds nothing
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        inputs = []
        for batch in batches_of("reconstruction", count):
            tokens, *others, _ = module.inputs(batch)
            inputs.append((tokens.float().cuda(), *(None if each is None else each.cuda() for each in others)))
        for turn in range(4):
            torch.cuda.set_sync_debug_mode("error" if turn == 3 else "default")
            optimizer.zero_grad()
            for number, each in enumerate(inputs):
                (module.weighted(module.step_loss(*each), number) / (2 * count)).backward()
            module.on_before_optimizer_step(optimizer)
            torch.cuda.set_sync_debug_mode("default")
        loss, gradients = mean_over_all("reconstruction", count)
        assert module.latest_loss.item() == pytest.approx(loss, rel=1e-3)
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad.double().cpu(), gradients[name], rtol=1e-2, atol=1e-4, msg=name)
    finally:
        torch.distributed.destroy_process_group()
