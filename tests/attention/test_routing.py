"""Routing attention: clusters, centroids and their updates."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from interpreter import run_interpreted
from torch.utils.checkpoint import checkpoint

from audiot.attention import after_step, build
from audiot.attention.routing import Routing


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def routing(seed=0, embed_dim=12, num_heads=3, max_frames=24, **options):
    torch.manual_seed(seed)
    return Routing(embed_dim, num_heads, max_frames, **options).double()


def normalised(vector):
    centred = vector - vector.mean()
    return centred / (centred.pow(2).mean() + 1e-5).sqrt()


def moved_by_hand(centroids, batches, decay):
    """Centroids after one step: batches of (frames (B, H, T, D), valid (B, T))."""
    result = centroids.clone()
    for head in range(len(centroids)):
        assigned = [[] for _ in centroids[head]]
        for frames, valid in batches:
            for sequence, real in zip(frames[:, head], valid, strict=True):
                for vector in sequence[real]:
                    vector = normalised(vector)
                    assigned[int((centroids[head] @ vector).argmax())].append(vector)
        for number, vectors in enumerate(assigned):
            if vectors:
                mean = torch.stack(vectors).mean(0)
                centroid = decay * centroids[head, number] + (1 - decay) * mean / mean.norm()
                result[head, number] = centroid / centroid.norm()
    return result


def test_centroids_move_by_the_mean_of_what_is_nearest_and_only_after_the_step():
    mechanism = routing(num_clusters=5, ema_decay=0.7)
    start = mechanism.centroids.clone()
    query, key, value = randn(3, 2, 3, 9, 4)
    valid = torch.arange(9) < torch.tensor([[9], [4]])
    mechanism(query=query, key=key, value=value, valid=valid)
    assert mechanism.centroids.equal(start)
    mechanism.after_step()
    torch.testing.assert_close(
        mechanism.centroids, moved_by_hand(start, [(query, valid), (key, valid)], 0.7), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(mechanism.centroids.norm(dim=-1), torch.ones(3, 5, dtype=torch.float64), rtol=1e-6, atol=0)
    rest = mechanism.centroids.clone()
    mechanism.after_step()  # nothing was seen since
    assert mechanism.centroids.equal(rest)


def test_centroids_that_are_nearest_to_none_stay():
    mechanism = routing(num_clusters=20, ema_decay=0.5)
    start = mechanism.centroids.clone()
    query, key, value = randn(3, 1, 3, 2, 4)
    mechanism(query=query, key=key, value=value)
    mechanism.after_step()
    stayed = (mechanism.centroids == start).all(-1).sum(-1)
    assert (stayed >= 16).all()  # four vectors move four of twenty at most
    assert (stayed < 20).all()


def test_frames_that_are_not_finite_do_not_spoil_the_centroids():
    mechanism = routing(num_clusters=3, ema_decay=0.5)
    start = mechanism.centroids.clone()
    query, key, value = randn(3, 2, 3, 9, 4)
    broken = query.clone()
    broken[0, :, 3] = torch.inf
    mechanism(query=broken, key=key, value=value)
    mechanism.after_step()
    assert mechanism.centroids.isfinite().all()
    mechanism(query=query, key=key, value=value)
    mechanism.after_step()
    assert not mechanism.centroids.equal(start)
    clean = routing(num_clusters=3, ema_decay=0.5)
    padded = routing(num_clusters=3, ema_decay=0.5)
    valid = torch.arange(9) < 7
    undefined = query.masked_fill(~valid[:, None], torch.nan)
    clean._record(query, clean._clusters(query, valid.expand(2, 9))[1], valid.expand(2, 9))
    padded._record(undefined, clean._clusters(query, valid.expand(2, 9))[1], valid.expand(2, 9))
    assert padded._sums.equal(clean._sums)


def test_looking_at_weights_or_keys_records_nothing():
    mechanism = routing(ema_decay=0.5).train()
    start = mechanism.centroids.clone()
    query, key, _ = randn(3, 2, 3, 9, 4)
    mechanism.weights(query=query, key=key)
    mechanism.chosen_keys(query=query, key=key)
    mechanism.after_step()
    assert mechanism.centroids.equal(start)


def test_memory_without_values_is_no_record():
    mechanism = routing().to("meta").to_empty(device="cpu")
    assert not mechanism._sums.any()
    assert not mechanism._counts.any()


def test_evaluation_changes_no_state():
    mechanism = routing().eval()
    start = mechanism.centroids.clone()
    query, key, value = randn(3, 2, 3, 9, 4)
    mechanism(query=query, key=key, value=value)
    mechanism.after_step()
    assert mechanism.centroids.equal(start)


def test_accumulated_batches_count_together():
    whole, parts = routing(ema_decay=0.5), routing(ema_decay=0.5)
    query, key, value = randn(3, 4, 3, 9, 4)
    whole(query=query, key=key, value=value)
    for half in (slice(0, 2), slice(2, 4)):
        parts(query=query[half], key=key[half], value=value[half])
    whole.after_step()
    parts.after_step()
    torch.testing.assert_close(parts.centroids, whole.centroids, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_neither_gradients_nor_updates(reentrant):
    plain, recomputed = routing(ema_decay=0.5), routing(ema_decay=0.5)
    frames = [randn(2, 3, 9, 4, seed=part).requires_grad_() for part in range(3)]

    def run(mechanism):
        return lambda query, key, value: mechanism(query=query, key=key, value=value)

    expected = run(plain)(*frames)
    got = checkpoint(run(recomputed), *frames, use_reentrant=reentrant)
    direction = randn(*got.shape)
    got.backward(direction)
    gradients = [frame.grad.clone() for frame in frames]
    for one, other in zip(gradients, torch.autograd.grad(expected, frames, direction), strict=True):
        torch.testing.assert_close(one, other)
    plain.after_step()
    recomputed.after_step()
    torch.testing.assert_close(recomputed.centroids, plain.centroids, rtol=1e-5, atol=1e-6)


def test_one_centroid_that_takes_all_is_full_attention_on_normalised_frames():
    mechanism = routing(num_clusters=1, cluster_size=24).eval()
    query, key, value = randn(3, 2, 3, 17, 4)
    expected = F.scaled_dot_product_attention(F.layer_norm(query, (4,)), F.layer_norm(key, (4,)), value)
    torch.testing.assert_close(mechanism(query=query, key=key, value=value), expected)


@pytest.mark.parametrize(("length", "taken"), [(24, 6), (7, 6), (4, 4), (1, 1)])
def test_clusters_are_balanced(length, taken):
    mechanism = routing(num_clusters=5, cluster_size=6)
    valid = torch.arange(24) < torch.tensor([[length], [0]])
    members = mechanism._members(F.layer_norm(randn(2, 3, 24, 4), (4,)), valid)
    assert (members[0].sum(-1) == taken).all()
    assert not members[1].any()


def attended_by_hand(mechanism, query, key, value):
    """Result (T, D) of one head's real frames (T, D): cluster by cluster."""
    num_frames, size = len(query), mechanism.cluster_size
    query, key = (torch.stack([normalised(frame) for frame in frames]) for frames in (query, key))
    results = [[] for _ in range(num_frames)]
    for centroid in mechanism.centroids[0]:
        taken = []
        for frames in (query, key):
            products = [math.floor(1024 * float(centroid @ frame)) for frame in frames]
            taken.append(sorted(range(num_frames), key=lambda number: (-products[number], number))[:size])
        queries, keys = taken
        weights = (query[queries] @ key[keys].T / math.sqrt(query.shape[1])).softmax(-1)
        for number, result in zip(queries, weights @ value[keys], strict=True):
            results[number].append(result)
    return torch.stack([sum(found) / len(found) if found else torch.zeros(value.shape[1]) for found in results])


@pytest.mark.parametrize("share_query_key", [False, True])
@pytest.mark.parametrize("length", [3, 17])
def test_attention_equals_a_loop_over_clusters(length, share_query_key):
    mechanism = routing(embed_dim=4, num_heads=1, num_clusters=4, cluster_size=6, share_query_key=share_query_key).eval()
    query, key, value = randn(3, 1, 1, 20, 4)
    inputs = {"query": query, "value": value} | ({} if share_query_key else {"key": key})
    found = mechanism(**inputs, valid=torch.arange(20)[None] < length)[0, 0, :length]
    own = [frames[0, 0, :length] for frames in (query, query if share_query_key else key, value)]
    torch.testing.assert_close(found, attended_by_hand(mechanism, *own), rtol=1e-10, atol=1e-12)


def test_clusters_take_what_is_nearest():
    mechanism = routing(num_clusters=5, cluster_size=6)
    frames = F.layer_norm(randn(2, 3, 24, 4), (4,))
    members = mechanism._members(frames, None)
    scores = mechanism.centroids @ frames.transpose(-2, -1)
    inside = scores.masked_fill(~members, torch.inf).amin(-1)
    outside = scores.masked_fill(members, -torch.inf).amax(-1)
    assert (inside >= outside - 2**-10).all()


@pytest.mark.parametrize("load", [1, 2])
@pytest.mark.parametrize("clustered", [True, False])
def test_few_frames_are_in_no_cluster_once_centroids_sit_in_the_data(load, clustered):
    num_frames, num_clusters = 1024, 32
    torch.manual_seed(0)
    mechanism = Routing(256, 4, num_frames, num_clusters=num_clusters, cluster_size=load * num_frames // num_clusters)
    centre = torch.randint(num_clusters, (4, 4, num_frames))
    frames = torch.randn(4, 4, num_frames, 64)
    if clustered:
        frames = 8 * mechanism.centroids[torch.arange(4)[:, None], centre] + 0.5 * frames
    members = mechanism._members(F.layer_norm(frames, (64,)), None)
    outside = (~members.any(dim=2)).double().mean()
    if clustered:
        assert outside < {1: 0.16, 2: 0.01}[load]
    else:  # as if the clusters drew their frames by lot
        assert outside == pytest.approx(math.exp(-load), abs=0.03)


KERNEL = """
import torch
from audiot.kernels.routing import centroid_scores, largest

generator = torch.Generator().manual_seed(0)
for num_frames, size in ((1, 1), (37, 5), (37, 37), (64, 9)):
    spread = 5 if size == 9 else 2**14  # many equal ones, or all the range
    steps = torch.randint(1 - spread, spread, (2, 2, 2, num_frames), generator=generator, dtype=torch.int16)  # many equal ones
    for valid in (None, torch.arange(num_frames) < torch.tensor([[num_frames // 2], [0]])):
        got = largest(steps, valid, size, 2**14 - 1)
        for b in range(2):
            real = [t for t in range(num_frames) if valid is None or valid[b, t]]
            for row, chosen in zip(steps[b].flatten(0, 1).tolist(), got[b].flatten(0, 1).tolist(), strict=True):
                expected = sorted(sorted(real, key=lambda t: (-row[t], t))[:size])
                assert chosen == expected + [-1] * (size - len(expected)), (chosen, expected)

frames = torch.randn(2, 3, 70, 20, generator=generator)
centroids = torch.nn.functional.normalize(torch.randn(3, 67, 20, generator=generator), dim=-1)
steps, nearest = centroid_scores(frames, centroids, 1024, 1500)
product = centroids.double() @ frames.double().transpose(-2, -1)
assert (steps - (product * 1024).floor().clamp(-1500, 1500)).abs().max() <= 1  # rounding at the edge of a step
assert (steps == (product * 1024).floor().clamp(-1500, 1500)).double().mean() > 0.99
assert (product.gather(2, nearest[:, :, None].long())[:, :, 0] > product.amax(2) - 1e-5).all()
"""


def test_kernels_score_frames_and_take_the_largest_and_of_equal_ones_the_earlier():
    pytest.importorskip("triton")
    run_interpreted(KERNEL)


def test_defaults_put_a_frame_in_two_clusters_on_average():
    mechanism = Routing(16, 2, 1536)
    assert mechanism.num_clusters == 39
    assert mechanism.cluster_size == 80


def test_equal_frames_fall_to_the_same_side_whatever_the_padding():
    mechanism = routing(num_clusters=3, cluster_size=5).eval()
    frames = randn(1, 3, 1, 4).expand(-1, -1, 12, -1)  # silence
    members = mechanism._members(F.layer_norm(frames, (4,)), None)
    assert members[..., :5].all()
    assert not members[..., 5:].any()
    value, junk = randn(1, 3, 12, 4, seed=1), 5 * randn(1, 3, 9, 4, seed=2)
    alone = mechanism(query=frames, key=frames, value=value)
    query, padded = torch.cat([frames, junk], 2), torch.cat([value, junk], 2)
    context = mechanism(query=query, key=query, value=padded, valid=torch.arange(21)[None] < 12)
    torch.testing.assert_close(context[:, :, :12], alone)
    assert (alone[:, :, 5:] == 0).all()  # in no cluster


def test_companions_in_the_batch_change_nothing():
    mechanism = routing(num_clusters=4, cluster_size=5).eval()
    query, key, value = randn(3, 3, 3, 12, 4)
    whole = mechanism(query=query, key=key, value=value)
    for number in range(3):
        one = slice(number, number + 1)
        torch.testing.assert_close(mechanism(query=query[one], key=key[one], value=value[one]), whole[one])


def test_centroids_are_state_and_sums_are_not():
    assert set(routing().state_dict()) == {"centroids"}


def test_sums_follow_the_module_to_another_device():
    mechanism = routing().to("meta")
    assert mechanism._sums.is_meta
    assert mechanism._counts.is_meta


def test_after_step_reaches_every_layer_of_a_model():
    layers = torch.nn.ModuleList(build("routing", 12, 3, 24, ema_decay=0.5) for _ in range(2))
    starts = [layer.mechanism.centroids.clone() for layer in layers]
    for layer in layers:
        layer(torch.randn(2, 9, 12))
    after_step(layers)
    assert not any(layer.mechanism.centroids.equal(start) for layer, start in zip(layers, starts, strict=True))


RANKS = """
import os, sys
import torch
import torch.distributed as dist
from audiot.attention.routing import Routing
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
mechanism = Routing(12, 3, 24, ema_decay=0.5)
frames = torch.randn(3, 4, 3, 9, 4, generator=torch.Generator().manual_seed(1))
query, key, value = frames[:, 2 * rank : 2 * rank + 2]
mechanism(query=query, key=key, value=value)
mechanism.after_step()
torch.save(mechanism.centroids, sys.argv[2] + f".{rank}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_move_their_centroids_together(tmp_path):
    meeting = str(tmp_path / "meeting")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, str(rank), meeting], env=environment) for rank in range(2)]
    assert [process.wait(120) for process in ranks] == [0, 0]
    torch.manual_seed(0)
    mechanism = Routing(12, 3, 24, ema_decay=0.5)
    query, key, value = torch.randn(3, 4, 3, 9, 4, generator=torch.Generator().manual_seed(1))
    mechanism(query=query, key=key, value=value)
    mechanism.after_step()
    for rank in range(2):
        torch.testing.assert_close(torch.load(f"{meeting}.{rank}"), mechanism.centroids, rtol=1e-5, atol=1e-6)


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"ema_decay is 1\.5: set it within 0 and 1"):
        Routing(12, 3, 24, ema_decay=1.5)
    with pytest.raises(ValueError, match="num_clusters is 0: set it to 1 or more"):
        Routing(12, 3, 24, num_clusters=0)
    with pytest.raises(ValueError, match="heads of at most 256 elements but embed_dim / num_heads is 512"):
        Routing(512, 1, 24)
