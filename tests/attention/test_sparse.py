"""Sparse Transformer attention against full attention under the masks of its definition."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from audiot.attention.sparse import SparseFixed, SparseStrided
from audiot.positions import ALiBi, RelativeBias

HEAD_DIM = 4
# The patterns of four frames a block and 16 frames, one digit a frame of the sequence: 1 = row sees column.
STRIDED_4_GLOBAL = ["1000" * 4, "0100" * 4, "0010" * 4, "0001" * 4] * 4
STRIDED_4_LOCAL = [
    "1111100000000000",
    "1111110000000000",
    "1111111000000000",
    "1111111100000000",
    "1111111110000000",
    "0111111111000000",
    "0011111111100000",
    "0001111111110000",
    "0000111111111000",
    "0000011111111100",
    "0000001111111110",
    "0000000111111111",
    "0000000011111111",
    "0000000001111111",
    "0000000000111111",
    "0000000000011111",
]
FIXED_4_GLOBAL = ["0001" * 4] * 16
FIXED_4_LOCAL = [row for block in range(4) for row in ["0000" * block + "1111" + "0000" * (3 - block)] * 4]

# Mechanism, its sizes, and lengths below, at, above, and at multiples of the block, even and odd.
CASES = [
    (SparseStrided, {"stride": 4}, (1, 3, 4, 5, 8, 11, 24)),
    (SparseStrided, {"stride": 5}, (4, 5, 6, 13, 25)),
    (SparseStrided, {"stride": 1}, (1, 2, 7)),
    (SparseStrided, {"stride": 64}, (63, 64, 65, 200)),
    (SparseStrided, {"stride": 20}, (140, 147)),
    (SparseFixed, {"block_size": 4}, (1, 3, 4, 5, 8, 11, 24)),
    (SparseFixed, {"block_size": 4, "num_summary": 2}, (1, 2, 3, 4, 7, 12)),
    (SparseFixed, {"block_size": 3, "num_summary": 3}, (1, 2, 3, 8)),
    (SparseFixed, {"block_size": 1}, (1, 5)),
    (SparseFixed, {"block_size": 64, "num_summary": 3}, (61, 62, 64, 65, 128)),
]
every_case = pytest.mark.parametrize(
    ("kind", "sizes", "num_frames"), [(kind, sizes, length) for kind, sizes, lengths in CASES for length in lengths]
)


def pattern(rows):
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def sparse(kind, num_heads=3, **options):
    return kind(num_heads * HEAD_DIM, num_heads, 10, **options)


def masks(kind, sizes, num_heads, num_frames):
    """Which frames each head sees, by the definitions, one pair of frames at a time: bool (H, T, T)."""
    mask = torch.zeros(num_heads, num_frames, num_frames, dtype=torch.bool)
    for head in range(num_heads):
        local = head < (num_heads + 1) // 2
        for i in range(num_frames):
            for j in range(num_frames):
                if kind is SparseStrided:
                    size = sizes["stride"]
                    mask[head, i, j] = abs(i - j) <= size if local else (i - j) % size == 0
                else:
                    size = sizes["block_size"]
                    mask[head, i, j] = i // size == j // size if local else j % size >= size - sizes.get("num_summary", 1)
    return mask


def tensors(num_sequences, num_frames, num_heads=3, seed=0, **kwargs):
    """Queries, keys and values (B, H, T, D), laid out as projections do: frames before heads."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_sequences, num_frames, num_heads, HEAD_DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, **kwargs) for _ in range(3)]


def attend(mechanism, query, key, value, **kwargs):
    return mechanism(query=query.transpose(1, 2), key=key.transpose(1, 2), value=value.transpose(1, 2), **kwargs)


def full_attention(query, key, value, mask, bias=0.0):
    """Softmax over all frames, of which `mask` leaves some; zeros where it leaves none."""
    exp = (torch.einsum("bihd,bjhd->bhij", query, key) / HEAD_DIM**0.5 + bias).exp() * mask
    return torch.einsum("bhij,bjhd->bhid", exp / exp.sum(-1, keepdim=True).clamp(min=1e-300), value)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def agree_with_gradients(fast, slow, leaves):
    close(fast, slow)
    direction = torch.randn_like(slow)
    for got, expected in zip(
        torch.autograd.grad(fast, leaves, direction), torch.autograd.grad(slow, leaves, direction), strict=True
    ):
        close(got, expected)


@every_case
def test_equals_full_attention_under_its_mask_with_gradients(kind, sizes, num_frames):
    leaves = tensors(2, num_frames, requires_grad=True)
    mask = masks(kind, sizes, 3, num_frames)
    agree_with_gradients(attend(sparse(kind, **sizes), *leaves), full_attention(*leaves, mask), leaves)


@every_case
def test_equals_full_attention_under_its_mask_of_the_real_frames(kind, sizes, num_frames):
    leaves = tensors(4, num_frames, requires_grad=True)
    valid = torch.rand(4, num_frames, generator=torch.Generator().manual_seed(1)) < 0.4
    valid[1] = torch.arange(num_frames) < max(1, num_frames // 2)
    valid[2], valid[3] = True, False
    fast = attend(sparse(kind, **sizes), *leaves, valid=valid)
    assert fast.isfinite().all()
    assert (fast[3] == 0).all()
    mask = masks(kind, sizes, 3, num_frames) & valid[:, None, None]
    rows = valid[:, None, :, None]
    agree_with_gradients(fast * rows, full_attention(*leaves, mask) * rows, leaves)


@pytest.mark.parametrize(
    ("kind", "sizes", "local", "distant"),
    [
        (SparseStrided, {"stride": 4}, STRIDED_4_LOCAL, STRIDED_4_GLOBAL),
        (SparseFixed, {"block_size": 4}, FIXED_4_LOCAL, FIXED_4_GLOBAL),
    ],
)
def test_patterns_of_sixteen_frames_in_blocks_of_four(kind, sizes, local, distant):
    query, key, _ = tensors(1, 16, num_heads=4)
    given = {"query": query.transpose(1, 2), "key": key.transpose(1, 2)}
    expected = torch.stack([pattern(local), pattern(local), pattern(distant), pattern(distant)])
    mechanism = sparse(kind, num_heads=4, **sizes)
    assert torch.equal(mechanism.chosen_keys(**given)[0], expected)
    assert torch.equal(mechanism.weights(**given)[0] > 0, expected)
    valid = torch.arange(16)[None] % 5 != 3
    assert torch.equal(mechanism.chosen_keys(**given, valid=valid)[0], expected & valid[:, None])


@pytest.mark.parametrize(("kind", "name", "option"), [(SparseStrided, "strided", "stride"), (SparseFixed, "fixed", "block_size")])
@pytest.mark.parametrize(("size", "num_frames"), [(4, 16), (6, 36)])
def test_patterns_equal_the_reference_masks(kind, name, option, size, num_frames):
    if "AUDIOT_TEST_DATA" not in os.environ:
        pytest.skip("AUDIOT_TEST_DATA is not set")
    reference = np.load(Path(os.environ["AUDIOT_TEST_DATA"]) / "reference" / "reference.npz")
    query, key, _ = tensors(1, num_frames, num_heads=4)
    choice = sparse(kind, num_heads=4, **{option: size}).chosen_keys(query=query.transpose(1, 2), key=key.transpose(1, 2))
    assert torch.equal(choice[0], torch.from_numpy(reference[f"{name}_l{size}_T{num_frames}"]))


@pytest.mark.parametrize("num_heads", [1, 2, 5])
@pytest.mark.parametrize(("kind", "sizes"), [(SparseStrided, {"stride": 4}), (SparseFixed, {"block_size": 4})])
def test_any_number_of_heads_the_odd_one_local(kind, sizes, num_heads):
    leaves = tensors(2, 11, num_heads=num_heads, requires_grad=True)
    expected = full_attention(*leaves, masks(kind, sizes, num_heads, 11))
    agree_with_gradients(attend(sparse(kind, num_heads, **sizes), *leaves), expected, leaves)


@pytest.mark.parametrize("kind", [SparseStrided, SparseFixed])
@pytest.mark.parametrize("num_frames", [1, 2, 63])
def test_sequences_shorter_than_a_block(kind, num_frames):
    query, key, value = tensors(1, num_frames, num_heads=2)
    local, distant = attend(sparse(kind, num_heads=2), query, key, value)[0]
    close(local, full_attention(query, key, value, torch.ones(num_frames, num_frames))[0, 0])
    # One frame a residue class: itself. No summary frame: nothing.
    close(distant, value[0, :, 1] if kind is SparseStrided else torch.zeros(num_frames, HEAD_DIM, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "sizes"), [(SparseStrided, {"stride": 4}), (SparseStrided, {}), (SparseFixed, {"block_size": 4, "num_summary": 2})]
)
@pytest.mark.parametrize("num_frames", [12, 15])
@pytest.mark.parametrize("padded", [False, True])
def test_carries_the_bias_of_the_positions(kind, sizes, num_frames, padded):
    alibi = ALiBi(12, 3, 10).double()
    trained = RelativeBias(12, 3, 10, max_offset=5).layer_part().double()
    torch.nn.init.normal_(trained.table, generator=torch.Generator().manual_seed(2))
    distance = torch.arange(num_frames) - torch.arange(num_frames)[:, None]
    expected = {
        alibi: -alibi.slopes[:, None, None] * distance.abs(),
        trained: trained.table[:, distance.clamp(-5, 5) + 5],
    }
    valid = torch.ones(2, num_frames, dtype=torch.bool)
    valid[1, num_frames // 3 :] = not padded
    rows = valid[:, None, :, None]
    mask = masks(kind, sizes or {"stride": 64}, 3, num_frames) & valid[:, None, None]
    for positions, bias in expected.items():
        leaves = tensors(2, num_frames, requires_grad=True)
        fast = attend(sparse(kind, **sizes), *leaves, positions=positions, valid=valid if padded else None)
        agree_with_gradients(fast * rows, full_attention(*leaves, mask, bias) * rows, [*leaves, *positions.parameters()])


@pytest.mark.parametrize(("kind", "sizes"), [(SparseStrided, {"stride": 4}), (SparseFixed, {"block_size": 4})])
def test_shared_queries_serve_as_keys(kind, sizes):
    query, _, value = tensors(2, 11)
    got = sparse(kind, share_query_key=True, **sizes)(query=query.transpose(1, 2), value=value.transpose(1, 2))
    close(got, full_attention(query, query, value, masks(kind, sizes, 3, 11)))


@pytest.mark.parametrize(("kind", "sizes"), [(SparseStrided, {"stride": 4}), (SparseFixed, {"block_size": 4})])
def test_training_drops_weights_and_keeps_their_mean(kind, sizes):
    torch.manual_seed(0)
    query, key, value = (frames.float() for frames in tensors(1, 15))
    mechanism = sparse(kind, dropout=0.5, **sizes)
    drawn = torch.stack([attend(mechanism, query, key, value) for _ in range(400)])
    spread = drawn.std(0) / 400**0.5
    expected = attend(mechanism.eval(), query, key, value)
    assert ((drawn.mean(0) - expected).abs() < 6 * spread).all()
    assert (spread > 0).all()


@pytest.fixture
def fused_calls(monkeypatch):
    """The queries and masks of every call of fused attention."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **kwargs):
        calls.append((query, kwargs["attn_mask"]))
        return fused(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return calls


def test_fixed_attention_of_whole_blocks_neither_copies_queries_nor_masks(fused_calls):
    query, key, value = tensors(2, 256, num_heads=2)
    attend(sparse(SparseFixed, num_heads=2), query, key, value)
    assert len(fused_calls) == 2
    for given, mask in fused_calls:
        assert given.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()
        assert mask is None


def test_strided_attention_of_whole_blocks_needs_no_mask_in_global_heads(fused_calls):
    attend(sparse(SparseStrided, num_heads=2), *tensors(2, 256, num_heads=2))
    (_, band), (_, mask) = fused_calls
    assert band.numel() < 2 * 256 * 200  # a row a query, of a chunk and its halo
    assert mask is None


@pytest.mark.parametrize(("kind", "sizes"), [(SparseStrided, {"stride": 4}), (SparseFixed, {"block_size": 4})])
def test_no_softmax_is_over_no_frame_at_all(kind, sizes, fused_calls):
    """It would be NaN in some kernels, though not in all."""
    attend(sparse(kind, **sizes), *tensors(2, 18), valid=torch.arange(18) < torch.tensor([[3], [0]]))
    for _, mask in fused_calls:
        assert (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SparseStrided, {"stride": 0}, "stride is 0: set it to 1 or more"),
        (SparseFixed, {"block_size": 0}, "block_size is 0: set it to 1 or more"),
        (SparseFixed, {"num_summary": 0}, "num_summary is 0: set it to 1 or more"),
        (
            SparseFixed,
            {"block_size": 4, "num_summary": 5},
            "num_summary is 5 but a block has block_size = 4 frames: set num_summary to 4 or less, or raise block_size",
        ),
    ],
)
def test_impossible_sizes_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        sparse(kind, **options)
