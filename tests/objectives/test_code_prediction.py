"""Objectives that predict codes: what counts, little audio, and steps on a GPU that wait for nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY

from audiot.data.batches import to_device
from audiot.objectives.kmeans import kmeans, nearest
from audiot.pretraining import MaskedAcousticModel

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TEACHER = {"_target_": "audiot.downstream.upstream.untrained_encoder", "features": TINY["features"], "model": TINY["model"]}
MIX = {"probability": 0.5}
OBJECTIVES = {
    "best_rq": {"_target_": "audiot.objectives.best_rq.BestRQ", "num_codes": 16},
    "clusters": {"_target_": "audiot.objectives.clusters.Clusters", "num_clusters": 16, "visible_weight": 0.5, "mix": MIX},
    "teacher": {"_target_": "audiot.objectives.clusters.Clusters", "num_clusters": 16, "teacher": TEACHER, "head_dim": 8},
}


def module(name, span=3):
    torch.manual_seed(0)
    made = MaskedAcousticModel(**TINY | {"objective": OBJECTIVES[name] | {"span": span}})
    if name != "best_rq":
        made.objective.centres.copy_(torch.randn_like(made.objective.centres))
    for part in made.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return made.train()


def batch(model, num_tokens, device):
    features = model.model.features
    waveforms = 0.1 * torch.randn(3, features.num_samples(num_tokens), generator=torch.Generator().manual_seed(num_tokens))
    lengths = torch.full((3,), waveforms.shape[1])
    return to_device({"waveforms": waveforms, "lengths": lengths, "keys": torch.arange(3) + 1}, torch.device(device))


@needs_cuda
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_compiled_step_waits_for_nothing_and_learns_what_the_eager_one_learns(name, graphs):
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = module(name, span=10).cuda()  # a window that Inductor does not unroll
        if compiled:
            model.compile_step(graphs=graphs)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        taken = []
        for step in range(12):
            given = batch(model, (24, 40, 56)[step % 3], "cuda")
            torch.cuda.set_sync_debug_mode("error" if step >= 9 else "default")
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.step_loss(*model.inputs(given)).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            taken.append(loss.detach())
        losses.append(torch.stack(taken).tolist())
    assert losses[1] == pytest.approx(losses[0], abs=0.03)


@needs_cuda
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gpu_computes_the_loss_of_the_cpu(name):
    found = []
    for device in ("cpu", "cuda"):
        model = module(name).double().to(device)
        with torch.no_grad():
            given = batch(model, 40, device)
            given["waveforms"] = given["waveforms"].double()
            found.append(model.loss(*model.inputs(given)).value.cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@needs_cuda
def test_clusters_on_the_gpu_are_those_of_the_cpu_and_the_same_each_time():
    points = torch.randn(5000, 12, generator=torch.Generator().manual_seed(0)) + 40.0
    here, there, again = (kmeans(points.to(device), 20, 0) for device in ("cpu", "cuda", "cuda"))
    assert there.equal(again)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3)
    assert (nearest(points.cuda(), there).cpu() == nearest(points, here)).float().mean() > 0.995


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_on_the_cpu_has_a_finite_loss_and_gradients(name):
    model = module(name)
    loss = model.loss(*model.inputs(batch(model, 24, "cpu"))).value
    loss.backward()
    assert loss.isfinite()
    idle = [each for each, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle


def test_visible_tokens_count_as_much_as_they_are_to():
    model, given = module("clusters"), None
    means = {}
    for weight in (0.0, 0.5, 1.0):
        model.objective.visible_weight = weight
        given = model.eval().inputs(batch(model, 40, "cpu")) if given is None else given
        means[weight] = model.loss(*given)
    masked, all_of_them = means[0.0], means[1.0]
    visible = all_of_them.value * all_of_them.scored - masked.value * masked.scored
    count = masked.scored + 0.5 * (all_of_them.scored - masked.scored)
    assert means[0.5].scored == count
    torch.testing.assert_close(means[0.5].value, (masked.value * masked.scored + 0.5 * visible) / count)


def test_little_audio_gets_fewer_clusters():
    model = module("clusters")
    figures = model.eval().objective.fit(
        model.model, lambda seconds: [(0.1 * torch.randn(2, 16000), torch.tensor([16000, 9000]))], 0
    )
    tokens = sum(model.model.features.num_tokens(count) for count in (16000, 9000))
    assert figures["targets/codes"] == 16
    assert figures["targets/used"] == tokens // 10 < 16
    loss = model.train().loss(*model.inputs(batch(model, 24, "cpu")))
    assert loss.value.isfinite()
