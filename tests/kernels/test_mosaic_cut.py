"""Which tiles, halves and groups of inputs the programs of a Mosaic GPU kernel take: each once, whatever the load."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_kernels.mosaic_cut import Refs, Ring, Statics, Work, share_of, work_of
from ferrum_kernels.mosaic_turns import down_tile, turns_of, up_tile

SHARED = Ring((8, 32), alone=True, shared=True)


def statics(ring: Ring = SHARED, groups: int = 16, tiles: int = 6, programs: int = 132, gated: bool = True) -> Statics:
    size = 32 if gated else 64
    return Statics(
        ring, 8 * gated, not gated, gated, 128, groups, tiles * ring.warpgroups * ring.parts * size, programs
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def schedule(up: Statics, down: Statics, used: Any) -> Any:
    """Of all programs at once: up's tiles of as many turns as any has, whether halves, which; down's; and counts."""
    turns = turns_of(up, down, used, jnp.arange(up.programs))
    most = -(-300 * up.tiles // up.programs), -(-300 * down.tiles // up.programs) + 300
    ups = jax.vmap(lambda turn: up_tile(up, turns, turn))(jnp.arange(most[0]))
    return turns.count, ups, jax.vmap(lambda nth: down_tile(up, down, turns, nth))(jnp.arange(most[1])), turns.total


def taken(up: Statics, down: Statics, used: int) -> tuple[collections.Counter, list[list[int]], np.ndarray]:
    """How often each half of a tile of gate and up is taken; each program's tiles of down; the groups of each."""
    count, (tile, shared, half), downs, total = jax.tree.map(np.asarray, schedule(up, down, jnp.int32(used)))
    found, groups = collections.Counter(), np.zeros(up.programs)
    for program in range(up.programs):
        for turn in range(count[program]):
            halves = (int(half[turn, program]),) if shared is not None and shared[turn] else (0, 1)
            found.update((int(tile[turn, program]), which) for which in halves)
            groups[program] += up.groups * len(halves) / 2
    of_down = []
    for program in range(up.programs):
        beyond = np.flatnonzero(downs[:, program] >= total)
        of_down.append(downs[: beyond[0], program].tolist())
        groups[program] += down.groups * beyond[0]
    return found, of_down, groups


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 300),
    st.integers(1, 12),
    st.integers(1, 16),
    st.sampled_from([1, 2, 6, 40]),
    st.integers(1, 150),
    st.booleans(),
)
def test_each_tile_is_taken_once(used, tiles, of_down, groups, programs, shared):
    ring = Ring((8, 32), alone=True, shared=shared)
    up = statics(ring, tiles=tiles, programs=programs)
    down = statics(ring, groups, of_down, programs, gated=False)
    found, downs, _ = taken(up, down, used)
    assert found == dict.fromkeys(((tile, half) for tile in range(used * tiles) for half in (0, 1)), 1)
    assert sorted(itertools.chain(*downs)) == list(range(used * of_down))
    assert all(tiles == sorted(tiles) for tiles in downs)


@pytest.mark.parametrize("used", [22, 28, 52, 83, 111, 126, 128, 200])
def test_programs_of_a_layer_end_about_together(used):
    """Of Qwen3-30B-A3B's layers no program has a tile of down more than the mean, which is 6 groups."""
    up, down = statics(), statics(groups=6, tiles=8, gated=False)
    _, _, groups = taken(up, down, used)
    assert groups.sum() == used * (6 * 16 + 8 * 6)
    assert groups.max() - groups.mean() < 6


def test_what_is_not_written_yet_is_not_taken_first():
    """In the first turn no tile of down has its rows: every program gets as many."""
    up, down = statics(Ring((8, 32), alone=True)), statics(groups=6, tiles=8, gated=False)
    _, downs, _ = taken(up, down, 16)
    assert {len(tiles) for tiles in downs} == {0, 1}


def test_a_tile_is_described_by_its_block_and_one_behind_the_last_by_the_last():
    up = statics()
    tables = {"experts": jnp.array([7, 3, 128]), "starts": jnp.array([5, 0, 2]), "counts": jnp.array([4, 2, 0])}
    names = {field.name for field in dataclasses.fields(Refs)} - tables.keys()
    refs = Refs(**tables, **dict.fromkeys(names))
    found = [work_of(up, refs, 1, 16, jnp.int32(tile)) for tile in (5, 6, 40)]
    assert [(int(w.tile), int(w.block), int(w.expert), int(w.start), int(w.count)) for w in found] == [
        (5, 0, 7, 5, 4),
        (0, 1, 3, 0, 2),
        (28, 2, 128, 2, 0),
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_warpgroups_take_each_group_of_their_outputs_once(shared):
    zero, found = jnp.int32(0), collections.Counter()
    work = Work(zero, zero, zero, zero, zero, zero, zero, jnp.asarray(shared), zero)
    for warpgroup in range(2):
        first, every, outputs = map(int, share_of(work, jnp.int32(warpgroup)))
        found.update((outputs, group) for group in range(first, 16, every))
    outputs = (0,) if shared else (0, 1)
    assert found == dict.fromkeys(((each, group) for each in outputs for group in range(16)), 1)
    assert share_of(work._replace(shared=None, half=None), 1) == (0, 1)


def test_rings_of_other_shapes_few_groups_and_down_are_not_shared():
    assert statics().shares
    assert not statics(groups=6).shares
    assert not statics(gated=False).shares
    assert not statics(Ring((8, 32), alone=True)).shares
    assert not statics(Ring(shared=True)).shares
    assert not statics(Ring((8,), parts=1, warpgroups=4, alone=True, shared=True)).shares
