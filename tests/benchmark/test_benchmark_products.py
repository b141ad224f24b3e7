"""Counted matrix products, beside formulas and PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_module
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import audiot.commands.launch  # noqa: F401  its resolver
from audiot.benchmark.measure import Failed, attempt
from audiot.benchmark.products import products
from audiot.pretraining import build


@pytest.fixture
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield


def encoder(attention, *overrides):
    chosen = ["model=small", f"attention={attention}", "features.stack=1", "data.crop_s=0.4", "run_dir=run", "data_dir=data"]
    return build(compose("pretrain", [*chosen, *overrides]))


@pytest.mark.parametrize("attention", ["query_key", "synthesizer_random"])
def test_products_are_those_of_the_formula_and_of_pytorchs_counter(hydra_started, attention):
    model = encoder(attention).model.encoder
    batch, frames, channels, width, ffn, layers = 3, 24, 80, 192, 768, 3
    work = products(model, batch, frames, channels)
    projections, scores = (4, 2) if attention == "query_key" else (2, 1)
    a_frame = 2 * (layers * (projections * width**2 + 2 * width * ffn) + channels * width) + 2 * scores * frames * width * layers
    assert work.flops == batch * frames * a_frame
    values = [*model.named_parameters(), *model.named_buffers()]
    meta = {name: torch.empty_like(value, device="meta", requires_grad=value.requires_grad) for name, value in values}
    with FlopCounterMode(display=False) as counter:
        functional_call(model, meta, (torch.empty(batch, frames, channels, device="meta"),))[-1].sum().backward()
    # Forward and backward, which needs no gradient of the features; fused attention is made of its products there.
    assert counter.get_total_flops() == 3 * work.flops - 2 * batch * frames * channels * width


@pytest.mark.parametrize("attention", ["query_key", "synthesizer_random"])
def test_each_product_moves_its_operands_and_its_result_once(hydra_started, attention):
    model = encoder(attention).model.encoder
    batch, frames, channels, width, ffn, heads, layers = 3, 24, 80, 192, 768, 6, 3
    rows = batch * frames

    def linear(before, after):
        return rows * before + before * after + after + rows * after

    attended = 4 * rows * width  # queries, keys, values and the result
    if attention == "synthesizer_random":
        attended = 2 * rows * width + heads * frames**2
    projected = 3 if attention == "query_key" else 1  # in one product
    a_layer = linear(width, projected * width) + linear(width, width) + linear(width, ffn) + linear(ffn, width) + attended
    assert products(model, batch, frames, channels).elements == linear(channels, width) + layers * a_layer


def test_mechanisms_that_choose_keys_by_value_are_told_apart(hydra_started):
    counted = attempt(lambda: products(encoder("routing").model.encoder, 1, 24, 80))
    assert isinstance(counted, Failed)
