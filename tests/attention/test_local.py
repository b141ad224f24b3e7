"""Attention within a window against full attention under a band of ones."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from audiot.attention import build
from audiot.attention.local import Local
from audiot.positions import ALiBi, RelativeBias

NUM_HEADS, HEAD_DIM = 3, 4
# Windows with a halo shorter than half a chunk, of half a chunk, and longer; lengths at and around the chunks, and so short
# that all frames are one chunk.
WINDOWS_AND_LENGTHS = [(1, 81), (3, 64), (3, 65), (3, 129), (3, 192), (20, 113), (32, 128), (32, 129), (32, 200), (40, 121)]
WINDOWS_AND_LENGTHS += [(40, 160), (64, 192), (64, 193), (64, 256), (64, 300), (100, 313), (64, 1), (64, 33), (90, 90)]
every_window = pytest.mark.parametrize(("window", "num_frames"), WINDOWS_AND_LENGTHS)


def tensors(num_sequences, num_frames, seed=0, **kwargs):
    """Queries, keys and values (B, H, T, D), laid out as projections do: frames before heads."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_sequences, num_frames, NUM_HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, **kwargs) for _ in range(3)]


def local(window, **options):
    return Local(NUM_HEADS * HEAD_DIM, NUM_HEADS, 10, window=window, **options)


def attend(mechanism, query, key, value, **kwargs):
    return mechanism(query=query.transpose(1, 2), key=key.transpose(1, 2), value=value.transpose(1, 2), **kwargs)


def band(num_frames, window):
    """Row i has ones in columns i − window to i + window."""
    mask = torch.zeros(num_frames, num_frames, dtype=torch.bool)
    for i in range(num_frames):
        mask[i, max(0, i - window) : i + window + 1] = True
    return mask


def full_attention(query, key, value, mask, bias=0.0):
    """Softmax over all frames, of which `mask` (T, T) or (B, 1, T, T) leaves some."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / HEAD_DIM**0.5 + bias
    exp = scores.exp() * mask
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


@every_window
def test_equals_full_attention_under_a_band_with_gradients(window, num_frames):
    leaves = tensors(2, num_frames, requires_grad=True)
    agree_with_gradients(attend(local(window), *leaves), full_attention(*leaves, band(num_frames, window)), leaves)


@every_window
def test_equals_full_attention_under_a_band_of_the_real_frames(window, num_frames):
    leaves = tensors(4, num_frames, requires_grad=True)
    valid = torch.rand(4, num_frames, generator=torch.Generator().manual_seed(1)) < 0.5
    valid[1] = torch.arange(num_frames) < num_frames // 2  # windows without any real frame
    valid[2], valid[3] = True, False
    rows = valid[:, None, :, None]
    mask = band(num_frames, window) & valid[:, None, None]
    fast = attend(local(window), *leaves, valid=valid)
    assert fast.isfinite().all()
    assert (fast[3] == 0).all()
    agree_with_gradients(fast * rows, full_attention(*leaves, mask) * rows, leaves)


@pytest.mark.parametrize(("window", "num_frames"), [(3, 129), (64, 256), (64, 300), (64, 33)])
@pytest.mark.parametrize("padded", [False, True])
def test_carries_the_bias_of_the_positions(window, num_frames, padded):
    alibi = ALiBi(NUM_HEADS * HEAD_DIM, NUM_HEADS, 10).double()
    trained = RelativeBias(NUM_HEADS * HEAD_DIM, NUM_HEADS, 10, max_offset=5).layer_part().double()
    torch.nn.init.normal_(trained.table, generator=torch.Generator().manual_seed(2))
    distance = torch.arange(num_frames) - torch.arange(num_frames)[:, None]
    expected = {
        alibi: -alibi.slopes[:, None, None] * distance.abs(),
        trained: trained.table[:, distance.clamp(-5, 5) + 5],
    }
    valid = torch.ones(2, num_frames, dtype=torch.bool)
    valid[1, num_frames // 3 :] = not padded
    rows = valid[:, None, :, None]
    for positions, bias in expected.items():
        leaves = tensors(2, num_frames, requires_grad=True)
        fast = attend(local(window), *leaves, positions=positions, valid=valid if padded else None)
        slow = full_attention(*leaves, band(num_frames, window) & valid[:, None, None], bias)
        agree_with_gradients(fast * rows, slow * rows, [*leaves, *positions.parameters()])


@pytest.mark.parametrize("num_frames", [150, 300])
def test_no_softmax_is_over_no_frame_at_all(num_frames, monkeypatch):
    """It would be NaN in some kernels, though not in all."""
    masks = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors, attn_mask, **kwargs):
        masks.append(attn_mask)
        return fused(*tensors, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    attend(local(64), *tensors(2, num_frames), valid=torch.arange(num_frames) < torch.tensor([[5], [0]]))
    (mask,) = masks
    assert (mask > -torch.inf).any(-1).all()


def test_sequences_of_a_batch_do_not_meet_where_chunks_do():
    query, key, value = tensors(3, 200)
    batch = attend(local(64), query, key, value)
    for one in range(3):
        alone = attend(local(64), *(frames[one : one + 1] for frames in (query, key, value)))
        close(batch[one : one + 1], alone)


def test_shared_queries_serve_as_keys():
    query, _, value = tensors(2, 150)
    shared = local(20, share_query_key=True)
    got = shared(query=query.transpose(1, 2), value=value.transpose(1, 2))
    close(got, full_attention(query, query, value, band(150, 20)))


def test_weights_and_chosen_keys_are_the_band_of_the_real_frames():
    query, key, _ = tensors(2, 30)
    valid = torch.arange(30) < torch.tensor([[30], [11]])
    given = {"query": query.transpose(1, 2), "key": key.transpose(1, 2)}
    expected = (band(30, 4) & valid[:, None]).unsqueeze(1).expand(-1, NUM_HEADS, -1, -1)
    assert torch.equal(local(4).chosen_keys(**given, valid=valid), expected)
    assert torch.equal(local(4).weights(**given, valid=valid) > 0, expected)
    assert torch.equal(local(4).chosen_keys(**given)[1], expected[0])


def test_heads_before_frames_give_the_same():
    query, key, value = tensors(2, 200)
    contiguous = [frames.transpose(1, 2).contiguous() for frames in (query, key, value)]
    got = local(64)(query=contiguous[0], key=contiguous[1], value=contiguous[2])
    close(got, attend(local(64), query, key, value))


def test_training_drops_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    query, key, value = (frames.float() for frames in tensors(1, 200))
    mechanism = local(3, dropout=0.5)
    drawn = torch.stack([attend(mechanism, query, key, value) for _ in range(400)])
    spread = drawn.std(0) / 400**0.5
    expected = attend(mechanism.eval(), query, key, value)
    assert ((drawn.mean(0) - expected).abs() < 6 * spread).all()
    assert (spread > 0).all()


@torch._dynamo.config.patch(fake_tensor_cache_enabled=False)  # which costs more than one graph gets back
def test_compiles_a_few_times_for_all_lengths():
    attention = build("local", 12, 3, 10, dropout=0.0).double()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for num_frames in (20, 192, 200, 256, 300, 320):
        hidden = torch.randn(2, num_frames, 12, generator=generator, dtype=torch.float64)
        valid = torch.arange(num_frames) < torch.tensor([[num_frames], [7]])
        close(compiled(hidden, valid), attention(hidden, valid))
    assert len(graphs) <= 3  # all frames one chunk; whole chunks; a chunk that is filled up


def test_impossible_window_is_refused():
    with pytest.raises(ValueError, match="window is 0: set it to 1 or more"):
        local(0)
