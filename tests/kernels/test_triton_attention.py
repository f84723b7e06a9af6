"""Attention of the Triton backend, interpreted on the CPU, against plain numpy; what it refuses; that it lowers."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from ferrum_kernels import code_words, triton, triton_attend, triton_attention, triton_attention_cuts, triton_tiles
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.triton_statics import Cut, Statics
from tests.support.attention_cases import Case, build, check, fused, in_words
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]
RAGGED: dict[str, Any] = {"start": (0, 5, 17, 40), "count": (1, 1, 0, 1)}
MANY: dict[str, Any] = {"start": (0, 5, 17, 40), "count": (20, 7, 0, 3), "tokens": 20}
LONG: dict[str, Any] = {"start": (300, 5, 17, 1023), "count": (1, 1, 0, 1), "capacity": 1024}
CASES = {
    "one": Case(**RAGGED),
    "one alone": Case(start=(33,), count=(1,), heads=3, kv_heads=1),
    "one in pages": Case(**RAGGED, page=16, norms=False, dtype="float16"),
    "one in pages of int8": Case(**RAGGED, page=32, cache="int8", head_dim=64),
    "one in int8": Case(**{**RAGGED, "capacity": 128}, cache="int8", head_dim=64),
    "one in int8 with a window, in rows of no whole tiles": Case(
        **{**RAGGED, "capacity": 101}, cache="int8", head_dim=64, window=9
    ),
    "one in parts": Case(start=(300, 5, 17, 1000), count=(1, 1, 0, 1), capacity=1024, page=128),
    "one in many parts": Case(start=(0, 700, 17, 1023, 300), count=(1, 1, 0, 1, 1), capacity=1024),
    "one alone in parts": Case(start=(700,), count=(1,), capacity=1024, page=128),
    "one alone in small tiles of int8": Case(start=(500,), count=(1,), capacity=512, cache="int8", head_dim=64),
    "one alone that is done": Case(start=(300,), count=(0,), capacity=512),
    "one in parts of int8 with a window": Case(**LONG, page=16, cache="int8", window=270, head_dim=64),
    "one with a window": Case(**LONG, window=40, head_dim=16),
    "one with a window of itself": Case(**RAGGED, window=1),
    "many": Case(**MANY),
    "many in groups of three": Case(**MANY, heads=6, norms=False),
    "many in pages": Case(**MANY, page=16, window=9),
    "many in pages of int8": Case(**MANY, page=32, cache="int8", head_dim=64, dtype="float16"),
    "many in large pages of int8": Case(**{**MANY, "capacity": 128}, page=64, cache="int8", head_dim=64),
    "many with a window": Case(start=(200, 0), count=(70, 64), tokens=70, capacity=300, window=150, heads=8),
    "a few, all there is room for": Case(start=(93, 91), count=(3, 3), tokens=3),
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    with triton.interpreted():
        yield


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_plain_numpy(name):
    check(CASES[name], triton_attention.attention)


@pytest.mark.parametrize("what", [np.inf, -np.inf, np.nan])
def test_a_key_that_is_not_finite_makes_nan_of_whoever_sees_its_codes(what):
    """Also of queries whose sum is not exactly what the keys' shift takes back."""
    case = Case(start=(10, 10), count=(1, 1), cache="int8", head_dim=128, norms=False)
    args, _ = build(case)
    args["k"] = args["k"].at[0, 0, 3].set(what)
    _, pools, scales, _ = triton_attention.attention(**args)
    for seed in range(3):
        args, _ = build(dataclasses.replace(case, start=(11, 11), seed=seed))
        uneven = np.exp(2.5 * np.random.default_rng(seed).standard_normal(args["q"].shape))
        q = (np.asarray(args["q"], np.float32) * uneven).astype(jnp.bfloat16)
        y, *_ = triton_attention.attention(**{**args, "q": jnp.asarray(q), "pools": pools, "scales": scales})
        seen = np.isnan(np.asarray(y, np.float32)).reshape(2, case.heads, -1)
        assert seen[0, :2].all() and not seen[0, 2:].any() and not seen[1].any()


@pytest.mark.parametrize("size", [1e-37, 1e-38, 1e-40])
def test_heads_too_small_for_a_scale_are_codes_all_the_same(size):
    args, _ = build(Case(start=(10,), count=(1,), cache="int8", head_dim=64, norms=False))
    small = {name: (args[name].astype(jnp.float32) * size).astype(jnp.bfloat16) for name in ("k", "v")}
    y, (keys, _), _, _ = triton_attention.attention(**{**args, **small})
    codes = code_words.from_words(keys[1, 0, 10])
    assert np.isfinite(np.asarray(y, np.float32)).all() and (jnp.abs(codes) <= 127).all()


@pytest.mark.parametrize("name", ["one in parts of int8 with a window", "many in pages"])
def test_one_product_may_hold_queries_keys_and_values(name):
    args, _ = build(CASES[name])
    apart = triton_attention.attention(**args)
    together = triton_attention.attention_fused(**fused(args))
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("name", ["one", "one in pages of int8"])
def test_the_product_may_come_in_parts(name):
    args, _ = build(CASES[name])
    whole = fused(args)
    exact = whole["qkv"].astype(jnp.float32)
    parts = jnp.stack([0.25 * exact, 1.25 * exact, -0.5 * exact])  # their sum is exact
    in_parts = triton_attention.attention_fused(**{**whole, "qkv": parts}, dtype=whole["qkv"].dtype)
    for one, other in zip(*map(jax.tree.leaves, (in_parts, triton_attention.attention_fused(**whole))), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    args, _ = build(CASES["many"])
    qkv = fused(args)["qkv"].astype(jnp.float32)[None]
    with pytest.raises(ShapeError, match=r"it is \[B, T, \(H \+ 4\) \* 32\]"):
        triton_attention.attention_fused(**{**fused(args), "qkv": qkv}, dtype=jnp.bfloat16)


@pytest.mark.once
@pytest.mark.parametrize("programs", [3, 66])
@pytest.mark.parametrize("name", ["one in parts", "one in parts of int8 with a window"])
def test_rows_in_parts_give_the_same_however_many_programs_share_them(name, programs, monkeypatch):
    cut = triton_attention.decode_cut
    change = {"tile": 64, "least": 1, "whole": 0, "parts": 10, "programs": programs}
    monkeypatch.setattr(triton_attention, "decode_cut", lambda *a: dataclasses.replace(cut(*a), **change))
    check(CASES[name], triton_attention.attention)


TURNED = {
    "in pages with a window": CASES["one in parts of int8 with a window"],
    "of a head each": Case(**LONG, cache="int8", heads=2, head_dim=64, norms=False),
    "of eight": Case(**LONG, cache="int8", heads=16, head_dim=128, dtype="float16"),
    "of sixteen": Case(**{**LONG, "capacity": 1090}, cache="int8", heads=16, kv_heads=1, head_dim=64),
    "of wide heads in groups of three": Case(**LONG, page=32, cache="int8", heads=3, kv_heads=1, head_dim=256),
}


@pytest.mark.once
@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("name", TURNED)
def test_turned_scores_give_the_same(name, programs, monkeypatch):
    cut, turned = triton_attention.decode_cut, []

    def two_warps(s, batch):
        change = {"tile": 64, "warps": 2, "programs": programs, "least": 1, "whole": 2, "fresh": 3}
        how = dataclasses.replace(cut(s, batch), **change)
        turned.append(dataclasses.replace(s, cut=how).turned)
        return how

    monkeypatch.setattr(triton_attention, "decode_cut", two_warps)
    check(TURNED[name], triton_attention.attention)
    assert all(turned)


def test_programs_of_a_row_in_parts_leave_their_counters_at_zero():
    *_, arrived = triton_attention.attention(**build(CASES["one in parts"])[0])
    assert arrived is not None and arrived.shape == (8,) and not arrived.any()


class Taken(NamedTuple):
    """What one program takes of a row; see `triton_attend.Share`."""

    program: int
    row: int
    begin: int
    end: int
    fresh: int
    first: int
    last: int


@functools.cache
def sharing(batch: int, programs: int, cut: Cut, capacity: int) -> Any:
    """From starts, counts and a window to [programs, batch, 6], -1 where a program takes nothing of a row."""
    s = Statics(8, 2, 64, (0, 0, 0), 1e-6, capacity, capacity, cut, jnp.bfloat16, False, True)

    def kernel(start, count, window, out):
        me = pl.program_id(0)
        out[me] = jnp.full((batch, 6), -1, jnp.int32)

        def take(share):
            for i, x in enumerate((share.row, *share.tiles, share.fresh, *share.holders)):
                out[me, share.row, i] = jnp.int32(x)

        triton_attend.walk(s, {"start": start, "count": count, "window": window}, me, programs, take)

    shape = jax.ShapeDtypeStruct((programs, batch, 6), jnp.int32)
    return jax.jit(pl.pallas_call(kernel, out_shape=shape, grid=(programs,), interpret=True))


def shares(lengths: Any, cut: Cut, counts: Any = 1, window: int = 2**31 - 1, capacity: int = 8192) -> list[Taken]:
    batch = len(lengths)
    programs = triton_attention_cuts.most_programs(capacity, cut, batch)
    counts = jnp.broadcast_to(jnp.int32(counts), (batch,))
    found = sharing(batch, programs, cut, capacity)(jnp.int32(lengths), counts, jnp.int32([window]))
    return [Taken(me, *row) for me, rows in enumerate(found.tolist()) for row in rows if row[0] >= 0]


def test_short_rows_stay_whole_whatever_they_could_hold():
    cut = Cut(tile=64, programs=66, least=4, whole=8)
    found = [share[1:4] for share in shares((300, 0, 512, 257), cut)]
    assert found == [(0, 0, 5), (1, 0, 0), (2, 0, 8), (3, 0, 5)]
    assert [share[1:4] for share in shares((300,), cut)] == [(0, 0, 5)]


LENGTHS = st.one_of(
    st.integers(0, 9000), st.integers(0, 600), st.sampled_from((0, 1, 63, 64, 65, 512, 513, 8191, 8192, 8193))
)


@given(st.data())
@settings(deadline=None)
def test_each_tile_and_each_new_token_is_taken_once_in_even_runs(data):
    batch = data.draw(st.sampled_from((1, 3, 8, 70)))
    units = ((1, 1, 2), (4, 1, 8), (1, 3, 2), (2, 5, 16), (4, 3, 8), (3, 3, 0), (1, 5, 1))
    least, fresh, whole = data.draw(st.sampled_from(units))
    cut = Cut(tile=64, programs=data.draw(st.sampled_from((1, 7, 66))), least=least, fresh=fresh, whole=whole)
    lengths = data.draw(st.lists(LENGTHS, min_size=batch, max_size=batch))
    counts = data.draw(st.lists(st.integers(0, 1), min_size=batch, max_size=batch))
    window = data.draw(st.sampled_from((2**31 - 1, 1, 700)))
    programs = triton_attention_cuts.most_programs(8192, cut, batch)
    found = shares(lengths, cut, counts, window)
    units, run = 0, [0] * programs
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        end = -(-min(length, 8192) // 64) if count else 0
        first = min(max(length + 1 - window, 0) // 64, end)
        mine = [share for share in found if share.row == row]
        assert [share.begin for share in mine] == [first, *(share.end for share in mine[:-1])]
        assert mine[-1].end == end and all(share.begin <= share.end for share in mine)
        assert [share.fresh for share in mine] == [1] + [0] * (len(mine) - 1)
        # Its programs follow each other and know of each other, so that the parts of all rows have slots of their own.
        assert [share.program for share in mine] == list(range(mine[0].first, mine[0].last + 1))
        assert {(share.first, share.last) for share in mine} == {(mine[0].program, mine[-1].program)}
        assert len(mine) == 1 or end - first > whole
        units += fresh + end - first
        for share in mine:
            run[share.program] += fresh * share.fresh + share.end - share.begin
            assert share.fresh or share.begin < share.end
    slots = [share.program + share.row for share in found]
    assert len(set(slots)) == len(slots) and max(slots) < programs + batch
    used = 1 + max(share.program for share in found)
    assert max(run) <= -(-units // used) + max(2 * least + fresh, max(whole, fresh - 1) + fresh + 1)


def test_no_program_has_nothing_of_a_row_that_costs_much_besides_its_tiles():
    cut = Cut(tile=64, programs=66, least=1, fresh=5, whole=1)
    found = [share[:4] for share in shares((0, 65, 0), cut, (0, 1, 0))]
    assert [share[1:] for share in found] == [(0, 0, 0), (1, 0, 2), (2, 0, 0)]


def test_a_row_has_no_more_parts_than_are_worth_adding_up():
    alone = [len(shares((n,), Cut(tile=64, programs=66, least=1, whole=8))) for n in (512, 1024, 2048, 8000)]
    assert alone == [1, 16, 17, 19]


@pytest.mark.parametrize("lengths", [(320,), (320, 320, 320, 320)])
def test_where_one_tile_is_worth_a_program_none_takes_two_while_others_have_none(lengths):
    found = shares(lengths, Cut(tile=64, programs=66, least=1, whole=2))
    assert [share.end - share.begin for share in found] == [0, 1, 1, 1, 1, 1] * len(lengths)


def test_smaller_tiles_where_shared_memory_is_small_give_the_same(monkeypatch):
    cuts = []
    cut = triton_attention.prefill_cut
    monkeypatch.setattr(triton_attention, "prefill_cut", lambda *a: cuts.append(cut(*a)) or cuts[-1])
    for little in (False, True):
        monkeypatch.setattr(triton_attention_cuts, "little_memory", lambda little=little: little)
        check(CASES["many with a window"], triton_attention.attention)
    assert cuts[1].tile < cuts[0].tile and cuts[1].stages < cuts[0].stages


@pytest.mark.parametrize(("head_dim", "width"), [(64, 256), (128, 256), (256, 128)])
def test_prompts_have_half_as_many_queries_in_a_tile_before_hopper(head_dim, width, monkeypatch):
    """More of them spill registers where products take both operands from there: kernels/bench/other_gpus.py."""
    s = Statics(32, 4, head_dim, (0, 0, 0), 1e-6, 8192, 8192, Cut(), jnp.bfloat16, False, False)
    found = []
    for capability in ("9.0", "8.0"):
        monkeypatch.setattr(triton_tiles, "capability", lambda capability=capability: capability)
        found.append(triton_attention_cuts.prefill_cut(s, 1, 4096).queries * s.padded_group)
    assert found == [width, width // 2]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_token_past_the_capacity_is_not_written(tokens):
    case = Case(start=(94, 95, 96), count=(1, tokens, 1), tokens=tokens, page=16)
    args, _ = build(case)
    _, pools, *_ = triton_attention.attention(**args)
    table = np.asarray(args["table"])
    for before, after in zip(args["pools"], pools, strict=True):
        changed = ~((before == after) | (jnp.isnan(before) & jnp.isnan(after))).all((0, 3, 4))
        where = {tuple(int(i) for i in at) for at in np.argwhere(np.asarray(changed))}
        assert where == {(table[0, 5], 14), (table[1, 5], 15)}


@pytest.mark.parametrize(("tokens", "rows"), [(1, 2), (1, 20), (16, 2)])
@pytest.mark.parametrize("cache", ["", "int8"])
def test_it_lowers_for_cuda_and_writes_in_place(tokens, rows, cache):
    """Of 20 rows the scores of int8 are turned."""
    shape: dict[str, Any] = {"page": 16, "capacity": 2048, "head_dim": 128}
    case = Case(start=(3,) * rows, count=(tokens,) * rows, tokens=tokens, cache=cache, **shape)
    args, _ = build(case)
    eps = args.pop("eps")
    with triton.interpreted(False):
        text = lower_for_cuda(lambda args: triton_attention.attention(eps=eps, **args), args)
    calls = [line for line in text.splitlines() if "gpu$xla.gpu.triton" in line]
    aliases = [len(re.findall(r"output_operand_alias<", call)) for call in calls]
    pools = 4 if cache else 2
    # Of one token in one kernel with the counters of arrivals, of several in two: one writes, one attends.
    assert aliases == ([pools + 1] if tokens == 1 else [pools, pools])


ONE = Case(**RAGGED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((4, 1, 100), jnp.bfloat16)}, "queries a multiple of 32 wide"),
        ({"q": jnp.zeros((4, 1, 96), jnp.bfloat16)}, r"attention of 3 heads on 2 .* whole groups of heads"),
        ({"q": jnp.zeros((4, 1, 128), jnp.float32)}, r"in float32: the Triton kernels take bfloat16 and float16"),
        ({"pools": (jnp.zeros((2, 4, 96, 2, 32), jnp.float16),) * 2}, "it is of bfloat16 without scales"),
        (
            {"pools": (jnp.zeros((2, 4, 96, 2, 32), jnp.int32),) * 2},
            "of int32, words of int8 codes, with two arrays",
        ),
        ({"pools": (jnp.zeros((2, 3, 96, 2, 32), jnp.bfloat16),) * 2}, "the cache has 3 rows and there are 4"),
        ({"start": jnp.zeros(3, jnp.int32)}, "there is one start and one count per row"),
        ({"arrived": jnp.zeros(4, jnp.int32)}, r"arrived is int32\[4\]; of 4 rows and 2 key heads it is int32"),
        ({"table": jnp.zeros((3, 2), jnp.int32)}, "it has 4 rows, and a page is a power of two from 16"),
        ({"table": jnp.zeros((4, 2), jnp.int32)}, "pages of 96 positions; it has 4 rows, and a page is a power of two"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, message):
    args, _ = build(ONE)
    with pytest.raises(ShapeError, match=message):
        triton_attention.attention(**{**args, **change})


def test_a_product_of_another_width_is_refused():
    args = fused(build(ONE)[0])
    with pytest.raises(ShapeError, match=r"it is \[B, T, \(H \+ 4\) \* 32\]: queries, keys, values"):
        triton_attention.attention_fused(**{**args, "qkv": args["qkv"][..., :128]})


def test_words_hold_the_codes_that_plain_numpy_packs():
    codes = np.random.default_rng(0).integers(-128, 128, (3, 2, 64)).astype(np.int8)
    words = code_words.to_words(jnp.asarray(codes))
    assert words.dtype == jnp.int32
    np.testing.assert_array_equal(words, in_words(codes))
    np.testing.assert_array_equal(code_words.from_words(words), codes)


def test_int8_of_narrow_heads_is_refused():
    with pytest.raises(ShapeError, match=r"on 2 of 32 in bfloat16: .* from 64 in int8, and whole groups"):
        triton_attention.attention(**build(Case(**RAGGED, cache="int8"))[0])
