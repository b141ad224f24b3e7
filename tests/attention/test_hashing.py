"""Transforms and hashes against their published formulas, written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from audiot.attention import hashing

B, H, T, D = 2, 3, 40, 5
U, TERMS = 0.75, 3


@pytest.fixture
def vectors():
    """Queries and keys (B, H, T, D) of very different norms."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, B, H, T, D, dtype=torch.float64, generator=generator)
    scale = torch.rand(2, B, H, T, 1, dtype=torch.float64, generator=generator) * 3 + 0.1
    return query * scale[0], key * scale[1]


def joined(transformed):
    return torch.cat([transformed.vectors * transformed.scale, transformed.extra], dim=-1)


def transforms(query, key):
    """Every pair of transforms by name."""
    largest, largest_query = hashing.largest_norm(key, None), hashing.largest_norm(query, None)
    xbox_key = hashing.xbox_key(key, largest)
    return {
        "simple_lsh": (hashing.simple_lsh_query(query), hashing.simple_lsh_key(key, largest)),
        "simple_alsh": (hashing.simple_alsh_query(query, largest_query), hashing.simple_alsh_key(key, largest)),
        "xbox": (hashing.xbox_query(query), xbox_key),
        "xbox_qnf": (hashing.xbox_qnf_query(query, largest), xbox_key),
        "sign_alsh": (hashing.sign_alsh_query(query, TERMS), hashing.sign_alsh_key(key, largest, TERMS, U)),
    }


def published(name, q, x, M, M_q):
    """The formulas for one query q and one key x."""

    def root(number):
        return math.sqrt(max(0.0, number))

    q_norm, x_norm = q.norm().item(), x.norm().item()
    a, b = {
        "simple_lsh": ([*q / q_norm, 0], [*x / M, root(1 - (x_norm / M) ** 2)]),
        "simple_alsh": ([*q / M_q, root(1 - (q_norm / M_q) ** 2), 0], [*x / M, 0, root(1 - (x_norm / M) ** 2)]),
        "xbox": ([*q, 0], [*x, root(M**2 - x_norm**2)]),
        "xbox_qnf": ([*q * M / q_norm, 0], [*x, root(M**2 - x_norm**2)]),
        "sign_alsh": (
            [*q / q_norm, *[0] * TERMS],
            [*U * x / M, *(0.5 - (U * x_norm / M) ** (2**i) for i in range(1, TERMS + 1))],
        ),
    }[name]
    return torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)


NAMES = ["simple_lsh", "simple_alsh", "xbox", "xbox_qnf", "sign_alsh"]


@pytest.mark.parametrize("name", NAMES)
def test_transforms_equal_the_published_formulas(vectors, name):
    query, key = vectors
    got_query, got_key = (joined(side) for side in transforms(query, key)[name])
    for b, h in itertools.product(range(B), range(H)):
        M, M_q = key[b, h].norm(dim=-1).max(), query[b, h].norm(dim=-1).max()
        for t in range(T):
            expected_query, expected_key = published(name, query[b, h, t], key[b, h, t], M.item(), M_q.item())
            torch.testing.assert_close(got_query[b, h, t], expected_query, rtol=0, atol=1e-7)
            torch.testing.assert_close(got_key[b, h, t], expected_key, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_transformed_neighbours_of_a_query_come_in_the_order_of_inner_products(vectors, name):
    query, key = vectors
    if name == "sign_alsh":  # the norm of P(x) tends to a constant as terms are added
        largest = hashing.largest_norm(key, None)
        sides = hashing.sign_alsh_query(query, 9), hashing.sign_alsh_key(key, largest, 9, U)
    else:
        sides = transforms(query, key)[name]
    one, other = (joined(side) for side in sides)
    nearness = -torch.cdist(one, other) if "xbox" in name else one @ torch.nn.functional.normalize(other, dim=-1).mT
    expected = (query @ key.mT).sort(dim=-1, descending=True)
    apart = (expected.values[..., :-1] - expected.values[..., 1:]) > 1e-4  # of equal ones rounding decides
    gaps = nearness.gather(-1, expected.indices).diff(dim=-1)
    assert (gaps[apart] < 0).all()


def test_transformed_keys_have_one_norm(vectors):
    query, key = vectors
    pairs = transforms(query, key)
    for name in ("simple_lsh", "simple_alsh", "xbox"):
        norms = joined(pairs[name][1]).norm(dim=-1)
        expected = torch.ones(()) if name != "xbox" else hashing.largest_norm(key, None)[..., 0]
        torch.testing.assert_close(norms, expected.double().expand_as(norms))


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_the_largest_norm_and_zeros_stay_finite_in_float32(name):
    sphere = torch.nn.functional.normalize(torch.randn(B, H, 500, D, generator=torch.Generator().manual_seed(1)), dim=-1)
    for query, key in ((sphere, sphere), (sphere * 0, sphere), (sphere, sphere * 0), (sphere * 0, sphere * 0)):
        for side in transforms(query, key)[name]:
            assert joined(side).isfinite().all()


def test_padded_frames_have_no_part_in_the_largest_norm_and_in_the_mean(vectors):
    _, key = vectors
    valid = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.6
    largest = hashing.largest_norm(key, valid)
    transformed = hashing.simple_lsh_key(key, largest)
    mean = hashing.centred(transformed, valid).extra
    for b, h in itertools.product(range(B), range(H)):
        torch.testing.assert_close(largest[b, h].squeeze(), key[b, h, valid[b]].norm(dim=-1).max())
        extra = transformed.extra[b, h]
        torch.testing.assert_close(mean[b, h], extra - extra[valid[b]].mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_centring_changes_no_inner_product(vectors, name):
    query, key = transforms(*vectors)[name]
    expected = joined(query) @ joined(key).mT
    centred = [joined(hashing.centred(side, None)) for side in (query, key)]
    torch.testing.assert_close(centred[0] @ centred[1].mT, expected)
    assert not torch.allclose(centred[1], joined(key))


def test_projecting_the_parts_equals_projecting_the_joined_vectors(vectors):
    for pair in transforms(*vectors).values():
        for side in pair:
            whole = joined(side)
            projections = torch.randn(H, whole.shape[-1], 7, dtype=torch.float64)
            torch.testing.assert_close(hashing.project(side, projections), whole @ projections)


def test_sign_random_projections_collide_with_probability_one_minus_angle_over_pi():
    generator = torch.Generator().manual_seed(3)
    num_bits = 20000
    projections = torch.randn(1, 2, num_bits, dtype=torch.float64, generator=generator)
    nothing = torch.zeros(1, 1, 1, 0, dtype=torch.float64)
    for angle in (0.1, 0.7, math.pi / 2, 2.0, 3.0):
        codes = [
            hashing.srp_code(
                hashing.project(hashing.Transformed(torch.tensor(v).double().view(1, 1, 1, 2), 1.0, nothing), projections)
            )
            for v in ([1.0, 0.0], [math.cos(angle), math.sin(angle)])
        ]
        collisions = num_bits - hashing.hamming_distance(*codes).item()
        probability = 1 - angle / math.pi
        assert abs(collisions - num_bits * probability) < 4.5 * math.sqrt(num_bits * probability * (1 - probability))


@pytest.mark.parametrize("num_bits", [1, 2, 63, 64, 301])
def test_hamming_distance_counts_different_bits(num_bits):
    projected = torch.randn(2, 9, num_bits, generator=torch.Generator().manual_seed(4)).round()  # a third are zeros
    one, other = projected
    expected = [[sum((a >= 0) != (b >= 0) for a, b in zip(q, x, strict=True)) for x in other.tolist()] for q in one.tolist()]
    distance = hashing.hamming_distance(hashing.srp_code(one), hashing.srp_code(other))
    assert distance.dtype == torch.int32
    assert distance.tolist() == expected


def test_the_sign_of_zero_is_plus():
    assert hashing.srp_code(torch.tensor([-0.5, -0.0, 0.0, 0.5])).tolist() == [-1, 1, 1, 1]


def test_l2_collisions_count_projections_within_half_the_width():
    one, other = torch.randn(2, 9, 17, generator=torch.Generator().manual_seed(5)).mul(2).round()  # differences of exactly w/2
    expected = [[sum(abs(a - b) <= 2 for a, b in zip(q, x, strict=True)) for x in other.tolist()] for q in one.tolist()]
    assert hashing.l2_collisions(one, other, torch.tensor([[4.0]])).tolist() == expected
    compiled = torch.compile(hashing.l2_collisions, backend="eager", fullgraph=True)
    assert compiled(one, other, torch.tensor([[4.0]])).tolist() == expected


def test_xbox_has_the_codes_of_simple_lsh_under_sign_random_projections(vectors):
    pairs = transforms(*vectors)
    projections = torch.randn(H, D + 1, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    names = ("simple_lsh", "xbox", "xbox_qnf")
    codes = {name: [hashing.srp_code(hashing.project(side, projections)) for side in pairs[name]] for name in names}
    for name in ("xbox", "xbox_qnf"):
        for got, expected in zip(codes[name], codes["simple_lsh"], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("base", "num_digits"), [(2, 1), (2, 8), (4, 3), (6, 2)])
def test_neighbours_in_a_gray_code_differ_by_one_in_one_digit(base, num_digits):
    digits = torch.tensor(list(itertools.product(range(base), repeat=num_digits)), dtype=torch.int16)
    ranks = hashing.gray_rank(digits, base).tolist()
    assert sorted(ranks) == list(range(base**num_digits))
    by_rank = [digits[ranks.index(rank)].tolist() for rank in range(base**num_digits)]
    for one, following in itertools.pairwise(by_rank):
        assert sum(abs(a - b) for a, b in zip(one, following, strict=True)) == 1


def test_the_cross_polytope_bucket_is_the_largest_of_plus_and_minus():
    projected = torch.randn(50, 6, generator=torch.Generator().manual_seed(7))
    assert torch.equal(hashing.cross_polytope(projected), torch.cat([projected, -projected], dim=-1).argmax(-1).int())


def test_the_l2_hash_is_the_cell_of_a_projection():
    projected = torch.tensor([-9.0, -2.1, -2.0, -0.1, 0.0, 1.9, 2.0, 3.9, 4.0, 9.0])
    assert hashing.l2_hash(projected, torch.tensor([2.0]), 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
