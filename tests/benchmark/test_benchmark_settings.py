"""Settings of every benchmark."""

from __future__ import annotations

import pytest
import torch

from audiot.benchmark.settings import find_device


def test_an_unknown_device_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^benchmark.device=gpu is not here: .+$"):
        find_device("gpu")
    assert find_device("cpu") == torch.device("cpu")
