"""Choices that depend on the device."""

from __future__ import annotations

import pytest
import torch

from audiot.base.devices import fast_precision, is_cuda


@pytest.mark.parametrize(
    ("accelerator", "cpu", "cuda", "expected"),
    [
        ("cpu", {"avx2": True, "avx512_bf16": True}, None, "bf16-mixed"),
        ("cpu", {"amx_bf16": True}, True, "bf16-mixed"),
        ("cpu", {"avx2": True, "avx512_bf16": False}, True, "32-true"),
        ("auto", {"avx512_bf16": True}, None, "bf16-mixed"),
        ("auto", {}, None, "32-true"),
        ("auto", {}, True, "bf16-mixed"),
        ("gpu", {"avx512_bf16": True}, False, "32-true"),  # a GPU from before Ampere
        ("gpu", {"avx512_bf16": True}, None, "32-true"),  # none there: Lightning will say so
        ("mps", {"avx512_bf16": True}, None, "32-true"),
    ],
)
def test_bfloat16_where_the_device_has_instructions_for_it(monkeypatch, accelerator, cpu, cuda, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert fast_precision(accelerator) == expected


@pytest.mark.parametrize(
    ("accelerator", "available", "expected"),
    [
        ("auto", True, True),
        ("gpu", True, True),
        ("cuda", True, True),
        ("auto", False, False),
        ("cpu", True, False),
        ("mps", True, False),
    ],
)
def test_lightning_computes_on_cuda_where_there_is_one_and_nothing_else_was_asked_for(
    monkeypatch, accelerator, available, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert is_cuda(accelerator) == expected
