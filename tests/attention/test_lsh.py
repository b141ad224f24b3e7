"""Keys chosen by hashing: against slow searches, and how many of the best keys are found."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
from some import some

from audiot.attention import lsh
from audiot.attention.search import Chunked, TopK
from audiot.positions import ALiBi, Rotary

MECHANISMS = [lsh.SimpleLSH, lsh.SimpleALSH, lsh.XBOX, lsh.XBOXQNF, lsh.SignALSH, lsh.SignALSHQNF]
every_mechanism = pytest.mark.parametrize("kind", MECHANISMS)
CHUNKED = {"search": Chunked(chunk_size=4), "num_bits": 5}
both_searches = pytest.mark.parametrize("options", [{"search": TopK(5), "num_bits": 9}, CHUNKED], ids=["topk", "chunked"])
B, H, D = 2, 3, 6


def make(kind, seed=0, num_heads=H, head_dim=D, **options):
    torch.manual_seed(seed)
    return kind(num_heads * head_dim, num_heads, 100, **options).double().eval()


def heads(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def query_and_key(num_frames, seed=1):
    """Queries and keys of different norms."""
    query, key = heads(2, B, H, num_frames, D, seed=seed)
    return query * (0.5 + heads(B, H, num_frames, 1, seed=seed + 100).abs()), key * 0.7


def slow_transforms(kind, query, key):
    """Transformed queries and keys of one head (T, D), from the formulas."""
    M, M_q = key.norm(dim=-1).max(), query.norm(dim=-1).max()
    unit, x = query / query.norm(dim=-1, keepdim=True), key / M

    def rest(v):
        return (1 - v.square().sum(-1, keepdim=True)).clamp_min(0).sqrt()

    zero = torch.zeros(len(query), 1, dtype=query.dtype)
    if kind is lsh.SimpleLSH:
        sides = [unit, zero], [x, rest(x)]
    elif kind is lsh.SimpleALSH:
        sides = [query / M_q, rest(query / M_q), zero], [x, zero, rest(x)]
    elif issubclass(kind, lsh.XBOX):
        sides = [unit * M if kind is lsh.XBOXQNF else query, zero], [key, M * rest(x)]
    else:
        power = (0.75 * x).square().sum(-1, keepdim=True)
        sides = [unit, zero, zero], [0.75 * x, 0.5 - power, 0.5 - power**2]
    return *(torch.cat(side, dim=-1) for side in sides), M


@every_mechanism
@pytest.mark.parametrize("num_bits", [3, 16])  # 3: most distances are equal
def test_topk_picks_the_nearest_hashes_and_the_earlier_of_equal_ones(kind, num_bits):
    mechanism = make(kind, search=TopK(4), num_bits=num_bits)
    query, key = query_and_key(14)
    valid = torch.rand(B, 14, generator=torch.Generator().manual_seed(2)) < 0.7
    chosen = mechanism.chosen_keys(query=query, key=key, valid=valid)
    for b, h in itertools.product(range(B), range(H)):
        real = valid[b].nonzero().flatten()
        queries, keys, M = slow_transforms(kind, query[b, h, real], key[b, h, real])
        queries, keys = queries @ mechanism.projections[h], keys @ mechanism.projections[h]
        for row, i in enumerate(real.tolist()):
            if issubclass(kind, lsh.XBOX):
                distances = ((queries[row] - keys).abs() > M).sum(-1)
            else:
                distances = ((queries[row] >= 0) != (keys >= 0)).sum(-1)
            nearest = sorted(range(len(real)), key=lambda place: (distances[place].item(), place))[:4]
            assert chosen[b, h, i].nonzero().flatten().tolist() == sorted(real[nearest].tolist())


@functools.cache
def gray_ranks(base, num_digits):
    """Rank of every number of some digits in the reflected Gray code, by its construction."""
    code = [()]
    for _ in range(num_digits):
        code = [(digit, *rest) for digit in range(base) for rest in (code if digit % 2 == 0 else code[::-1])]
    return {digits: rank for rank, digits in enumerate(code)}


def slow_cells(kind, projected, M):
    cells = []
    for row in projected.tolist():
        if issubclass(kind, lsh.XBOX):
            digits = tuple(min(max(int(value // (2 * M)), -2), 1) + 2 for value in row)
            cells.append((gray_ranks(4, len(row))[digits],))
        else:
            both = row + [-value for value in row]
            cells.append((both.index(max(both)), gray_ranks(2, len(row))[tuple(int(value >= 0) for value in row)]))
    return cells


@every_mechanism
@pytest.mark.parametrize("seed", range(4))
def test_chunked_queries_see_the_keys_around_the_cell_of_their_chunks_median(kind, seed):
    mechanism = make(kind, seed, **CHUNKED)
    query, key = query_and_key(41, seed)
    valid = torch.rand(B, 41, generator=torch.Generator().manual_seed(seed)) < 0.8
    chosen = mechanism.chosen_keys(query=query, key=key, valid=valid)
    chunk_size, window = 4, 12
    for b, h in itertools.product(range(B), range(H)):
        real = valid[b].nonzero().flatten()
        *sides, M = slow_transforms(kind, query[b, h, real], key[b, h, real])
        cells = []
        for side in sides:
            appended = side[:, D:]
            side = torch.cat([side[:, :D], appended - appended.mean(0)], dim=-1)
            cells.append(slow_cells(kind, side @ mechanism.projections[h], M.item()))
        query_order, key_order = (sorted(range(len(real)), key=lambda place: (side[place], place)) for side in cells)
        sorted_cells = [cells[1][place] for place in key_order]
        for begin in range(0, len(real), chunk_size):
            chunk = query_order[begin : begin + chunk_size]
            median = cells[0][chunk[(len(chunk) - 1) // 2]]
            before = sum(cell < median for cell in sorted_cells)
            middle = before + sorted_cells.count(median) // 2
            start = max(0, min(middle - window // 2, len(real) - window))
            seen = sorted(real[key_order[start : start + window]].tolist())
            for place in chunk:
                assert chosen[b, h, real[place]].nonzero().flatten().tolist() == seen


def speech(kind, num_frames, seed, num_heads=6, head_dim=64):
    """Queries and keys: independent, or around 16 common centres."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, num_heads, num_frames, head_dim, generator=generator)
    if kind == "clustered":
        centres = torch.randn(1, num_heads, 16, head_dim, generator=generator)
        which = torch.randint(16, (2, 1, num_heads, num_frames, 1), generator=generator).expand(-1, -1, -1, -1, head_dim)
        query, key = (0.5 * frames + centres.gather(2, index) for frames, index in zip((query, key), which, strict=True))
    return query, key


def found(kind, frames, num_frames, seeds=1, **options):
    """Share of the 32 best keys that are found, a mean over draws of frames and projections."""
    recalls = [
        lsh.recall(make(kind, seed, num_heads=6, head_dim=64, **options).float(), *speech(frames, num_frames, seed))
        for seed in range(seeds)
    ]
    return torch.stack(recalls).mean().item()


@pytest.mark.parametrize(
    ("kind", "independent", "clustered"), [(lsh.SimpleLSH, 0.27, 0.86), (lsh.SimpleALSH, 0.22, 0.75), (lsh.XBOX, 0.23, 0.86)]
)
def test_64_bits_find_the_expected_share_of_the_best_keys(kind, independent, clustered):
    assert found(kind, "independent", 512) == pytest.approx(independent, abs=0.03)
    assert found(kind, "clustered", 512, seeds=2) == pytest.approx(clustered, abs=0.03)


def test_more_bits_find_more_of_the_best_keys_and_all_find_more_than_chance():
    chance = 32 / 512
    recalls = [found(lsh.SimpleLSH, "independent", 512, num_bits=num_bits) for num_bits in (4, 16, 64, 256)]
    assert all(one + 0.02 < other for one, other in itertools.pairwise([chance, *recalls]))


CLUSTERED = {lsh.SimpleLSH: 0.39, lsh.SimpleALSH: 0.39, lsh.XBOX: 0.37, lsh.XBOXQNF: 0.37, lsh.SignALSH: 0.39}


@pytest.mark.parametrize("kind", some(CLUSTERED, [lsh.SimpleLSH, lsh.XBOXQNF]))
def test_a_chunked_search_finds_many_of_the_best_keys(kind):  # chance: 0.094
    assert found(kind, "clustered", 2048, search=Chunked()) >= CLUSTERED[kind]
    assert found(kind, "independent", 2048, search=Chunked()) >= 0.15


def test_recall_is_the_share_of_the_largest_products_among_the_chosen_keys():
    mechanism = make(lsh.XBOX, search=TopK(4))
    query, key = query_and_key(11)
    chosen = mechanism.chosen_keys(query=query, key=key)
    hits = [
        chosen[b, h, i, j].item()
        for b, h, i in itertools.product(range(B), range(H), range(11))
        for j in sorted(range(11), key=lambda j: -(query[b, h, i] @ key[b, h, j]).item())[:3]
    ]
    assert lsh.recall(mechanism, query, key, num_keys=3).item() == pytest.approx(sum(hits) / len(hits))


@every_mechanism
@both_searches
def test_bases_are_abstract_and_mechanisms_choose_a_part_of_the_keys(kind, options):
    assert inspect.isabstract(lsh.LSHAttention)
    assert inspect.isabstract(lsh.SRPAttention)
    chosen = make(kind, **options).chosen_keys(**dict(zip(("query", "key"), query_and_key(30), strict=True)))
    assert 0.1 < chosen.double().mean() < 0.5


@both_searches
def test_query_normalisation_changes_no_pick_of_sign_alsh(options):
    query, key = (side.float() for side in query_and_key(60))
    one, other = (make(kind, **options).float() for kind in (lsh.SignALSH, lsh.SignALSHQNF))
    assert torch.equal(one.projections, other.projections)
    assert torch.equal(one.chosen_keys(query=query, key=key), other.chosen_keys(query=query, key=key))


@both_searches
def test_xbox_and_its_query_normalisation_pick_other_keys_than_simple_lsh(options):
    query, key = query_and_key(60)
    picks = [make(kind, **options).chosen_keys(query=query, key=key) for kind in (lsh.SimpleLSH, lsh.XBOX, lsh.XBOXQNF)]
    for one, other in itertools.combinations(picks, 2):
        assert (one != other).double().mean() > 0.02


@every_mechanism
def test_a_fresh_query_changes_its_own_keys_and_no_others(kind):
    mechanism = make(kind, search=TopK(10))
    query, key = query_and_key(40)
    query[:, :, 0] *= 12 / query[:, :, 0].norm(dim=-1, keepdim=True)  # the longest: M_q of SimpleALSH stays what it is
    before = mechanism.chosen_keys(query=query, key=key)
    for i in (1, 17, 39):
        changed = query.clone()
        fresh = heads(B, H, D, seed=i + 50)
        changed[:, :, i] = 9 * fresh / fresh.norm(dim=-1, keepdim=True)
        rows = (mechanism.chosen_keys(query=changed, key=key) != before).any(dim=-1)
        assert rows[:, :, i].all()
        rows[:, :, i] = False
        assert not rows.any()


@every_mechanism
@pytest.mark.parametrize("search", [TopK(20), Chunked(chunk_size=7)], ids=str)
def test_enough_keys_are_full_attention(kind, search):
    query, key = query_and_key(20)
    value = heads(B, H, 20, D, seed=9)
    context = make(kind, search=search)(query=query, key=key, value=value)
    torch.testing.assert_close(context, torch.softmax(query @ key.mT / D**0.5, dim=-1) @ value)


@every_mechanism
@both_searches
@pytest.mark.parametrize("num_frames", [1, 3, 13, 30])
def test_junk_frames_change_no_pick(kind, options, num_frames):
    mechanism = make(kind, **options)
    query, key = query_and_key(num_frames)
    expected = mechanism.chosen_keys(query=query, key=key)
    place = torch.randperm(num_frames + 25, generator=torch.Generator().manual_seed(3))[:num_frames].sort().values
    padded = [5 * side for side in query_and_key(num_frames + 25, seed=7)]
    for side, real in zip(padded, (query, key), strict=True):
        side[:, :, place] = real
    valid = torch.zeros(B, num_frames + 25, dtype=torch.bool)
    valid[:, place] = True
    chosen = mechanism.chosen_keys(query=padded[0], key=padded[1], valid=valid)
    assert torch.equal(chosen[:, :, place][:, :, :, place], expected)
    assert not chosen[..., ~valid[0]].any()


@every_mechanism
def test_queries_attend_to_all_real_keys_where_there_are_few(kind):
    mechanism = make(kind, search=TopK(5))
    query, key = query_and_key(12)
    for num_real in (0, 1, 4, 5, 6, 12):
        valid = (torch.arange(12) % 12 < num_real).flip(0).expand(B, -1)
        count = mechanism.chosen_keys(query=query, key=key, valid=valid).sum(-1)
        assert (count == min(5, num_real)).all()


@every_mechanism
def test_equal_frames_give_way_to_the_earliest(kind):
    frames = torch.ones(B, H, 30, D, dtype=torch.float64)
    chosen = make(kind, search=TopK(5)).chosen_keys(query=frames, key=frames)
    assert chosen[..., :5].all()
    assert not chosen[..., 5:].any()


@every_mechanism
@both_searches
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_picks_the_keys_of_the_same_numbers_in_float32(kind, options, dtype):
    mechanism = make(kind, **options).float()
    query, key = (300 * side.to(dtype) for side in query_and_key(40))  # products beyond the range of float16
    expected = mechanism.chosen_keys(query=query.float(), key=key.float())
    assert torch.equal(mechanism.chosen_keys(query=query, key=key), expected)
    with torch.autocast("cpu", dtype):
        assert torch.equal(mechanism.chosen_keys(query=query, key=key), expected)
    context = mechanism(query=query / 300, key=key / 300, value=heads(B, H, 40, D).to(dtype))
    assert context.dtype == dtype
    assert context.isfinite().all()


@every_mechanism
@both_searches
def test_projections_are_saved_and_never_change(kind, options):
    mechanism = make(kind, **options).train()
    saved = mechanism.state_dict()["projections"].clone()
    assert saved.shape[:2] == (H, D + mechanism.num_extra)
    assert not list(mechanism.parameters())
    query, key = (side.requires_grad_() for side in query_and_key(20))
    for _ in range(2):
        mechanism(query=query, key=key, value=key).sum().backward()
    assert torch.equal(mechanism.projections, saved)
    other = make(kind, seed=5, **options)
    other.load_state_dict(mechanism.state_dict())
    assert torch.equal(other.chosen_keys(query=query, key=key), mechanism.chosen_keys(query=query, key=key))


@both_searches
def test_the_hash_sees_what_the_score_sees(options):
    mechanism = make(lsh.SimpleLSH, **options)
    query, key = query_and_key(40)
    rotary = Rotary(H * D, H, 40)
    plain = mechanism.chosen_keys(query=query, key=key)
    rotated = mechanism.chosen_keys(query=query, key=key, positions=rotary)
    assert torch.equal(rotated, mechanism.chosen_keys(query=rotary.rotate(query), key=rotary.rotate(key)))
    assert not torch.equal(rotated, plain)
    assert torch.equal(mechanism.chosen_keys(query=query, key=key, positions=ALiBi(H * D, H, 40)), plain)


@both_searches
def test_shared_queries_are_transformed_as_queries_and_as_keys(options):
    query, _ = query_and_key(40)
    shared, apart = (make(lsh.XBOXQNF, share_query_key=share, **options) for share in (True, False))
    expected = apart.chosen_keys(query=query, key=query)
    assert torch.equal(shared.chosen_keys(query=query), expected)
    assert lsh.recall(shared, query, None, 8) == lsh.recall(apart, query, query, 8)


@pytest.mark.parametrize("kind", [lsh.SimpleALSH, lsh.XBOX])
def test_rounds_attend_to_the_keys_of_every_round_in_one_softmax(kind):
    mechanism = make(kind, search=Chunked(chunk_size=4, num_rounds=3), num_bits=5)
    single = make(kind, **CHUNKED)
    query, key = query_and_key(50)
    value = heads(B, H, 50, D, seed=9)
    chosen = torch.zeros(B, H, 50, 50, dtype=torch.bool)
    for projections in mechanism.projections.split(5, dim=-1):
        single.projections.copy_(projections)
        chosen |= single.chosen_keys(query=query, key=key)
    assert torch.equal(mechanism.chosen_keys(query=query, key=key), chosen)
    weights = torch.softmax((query @ key.mT / D**0.5).masked_fill(~chosen, -torch.inf), dim=-1)
    torch.testing.assert_close(mechanism(query=query, key=key, value=value), weights @ value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lsh.SignALSH(12, 2, 8, num_bits=0), r"num_bits is 0: set it to 1 or more"),
        (lambda: lsh.SignALSH(12, 2, 8, num_terms=0), r"num_terms is 0: set it to 1 or more"),
        (lambda: lsh.SignALSH(12, 2, 8, max_norm=1.0), r"max_norm is 1\.0: set it to more than 0 and less than 1"),
        (
            lambda: lsh.SignALSH(12, 2, 8, search="topk"),
            r"search is 'topk': pass an object of audiot\.attention\.search, such as TopK\(\) or Chunked\(\)",
        ),
        (lambda: TopK(attended_keys=0), r"attended_keys is 0: set it to 1 or more"),
        (lambda: Chunked(chunk_size=0), r"chunk_size is 0: set it to 1 or more"),
        (lambda: Chunked(num_rounds=0), r"num_rounds is 0: set it to 1 or more"),
    ],
)
def test_impossible_options_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


@pytest.mark.parametrize(("search", "columns"), [(None, 64), (TopK(), 64), (Chunked(), 8), (Chunked(num_rounds=3), 24)], ids=str)
def test_a_search_adds_nothing_to_the_state_but_sizes_the_projections(search, columns):
    assert {name: value.shape for name, value in lsh.SimpleLSH(12, 2, 8, search=search).state_dict().items()} == {
        "projections": (2, 7, columns)
    }


def test_xbox_hashes_on_the_scale_of_the_keys():
    query, key = query_and_key(60)
    mechanism = make(lsh.XBOX, search=TopK(5))
    chosen = mechanism.chosen_keys(query=query, key=key)
    assert torch.equal(mechanism.chosen_keys(query=4 * query, key=4 * key), chosen)
    assert not torch.equal(mechanism.chosen_keys(query=4 * query, key=key), chosen)


@pytest.mark.parametrize("num_terms", [2, 8])
def test_long_padded_keys_change_no_cell_of_sign_alsh(num_terms):
    torch.manual_seed(0)
    mechanism = lsh.SignALSH(16, 2, 40, search=Chunked(chunk_size=4), num_terms=num_terms).eval()
    query, key, value = torch.randn(3, 1, 2, 20, 8)
    alone = mechanism(query=query, key=key, value=value)
    junk = 100 * torch.randn(1, 2, 10, 8)
    longer = [torch.cat([frames, junk], dim=2) for frames in (query, key, value)]
    valid = torch.arange(30)[None] < 20
    padded = mechanism(query=longer[0], key=longer[1], value=longer[2], valid=valid)
    torch.testing.assert_close(padded[:, :, :20], alone)
