"""CKA against its definition by kernel matrices, and what it must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from audiot.measures.similarity import cka, principal


def states(rows=40, columns=7, seed=0):
    noise = np.random.default_rng(seed)
    return torch.from_numpy(noise.normal(size=(rows, columns)) * noise.uniform(0.1, 3, columns) + noise.normal(size=columns))


def by_kernels(one, other):
    """HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) with K = XXᵀ and L = YYᵀ (Kornblith et al. 2019, equations 3 and 4)."""
    n = len(one)
    centring = np.eye(n) - 1 / n

    def hsic(k, m):
        return np.trace(k @ centring @ m @ centring) / (n - 1) ** 2

    k, m = (each.numpy() @ each.numpy().T for each in (one, other))
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_is_that_of_the_kernels():
    one, noise = states(), states(40, 5, seed=1)
    for other in (noise, one[:, :5] + 0.3 * noise, torch.cat([one, noise], dim=1)):
        assert cka(one, other) == pytest.approx(by_kernels(one, other), rel=1e-10)


def test_cka_does_not_depend_on_axes_scale_shift_or_order():
    one, other = states(), states(40, 9, seed=1)
    rotation, _ = torch.linalg.qr(states(9, 9, seed=2))
    assert cka(one, -3 * one + 5) == pytest.approx(1)
    assert cka(one, 2 * other @ rotation - 7) == pytest.approx(cka(one, other))
    assert cka(other, one) == pytest.approx(cka(one, other))
    assert cka(one, other) < 0.5  # other noise
    assert cka(one, one * torch.arange(1.0, 8.0)) < 0.999  # stretched axes


def test_states_without_a_common_direction_are_not_alike():
    angle = torch.arange(12) * 2 * math.pi / 12
    one, other = angle.sin()[:, None], angle.cos()[:, None]
    assert cka(one, other) == pytest.approx(0, abs=1e-12)
    assert math.isnan(cka(one, torch.ones(12, 3)))


def test_states_of_other_frames_are_refused():
    with pytest.raises(ValueError, match="states of the same frames, found 40 and 39"):
        cka(states(), states(39))


def test_principal_axes_keep_the_similarity():
    one, other = states(), states(40, 9, seed=1)
    other[:, :4] += 2 * one[:, :4]
    assert cka(principal(one, 99), principal(other, 99)) == pytest.approx(cka(one, other))
    found = principal(one, 3)
    assert found.shape == (40, 3)
    assert float(found.abs().max()) == pytest.approx(1)
    # A cut at k axes leaves the first k eigenvalues of the Gram matrix.
    values = torch.linalg.svdvals(one - one.mean(0)) ** 2
    assert cka(found, one) == pytest.approx(float((values[:3] ** 2).sum().sqrt() / (values**2).sum().sqrt()))
