"""Which tiles, halves and groups of inputs the programs of a Mosaic GPU kernel take: each once, whatever the load."""

from __future__ import annotations

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_kernels.mosaic_cut import Ring, Statics, Work, behind, share_of, tile_of

SHARED = Ring((8, 32), alone=True, shared=True)


def statics(ring: Ring = SHARED, groups: int = 16, tiles: int = 6, programs: int = 132) -> Statics:
    """Of gate and up."""
    return Statics(ring, 8, False, True, 128, groups, tiles * ring.warpgroups * ring.parts * 32, programs)


def taken(s: Statics, live: int) -> tuple[collections.Counter, list[bool]]:
    """How often each half of a live block's tile is taken, and of each turn with work whether it is shared."""
    program, found, turns = jnp.arange(s.programs), collections.Counter(), []
    while True:
        turn = jnp.int32(len(turns))
        shared = behind(s, turn) >= live if s.shares else None
        tile, half = tile_of(s, turn, program, shared)
        work = np.asarray(tile) < live * s.tiles
        if not work.any():
            return found, turns
        turns.append(bool(shared))
        for which in (half,) if shared else (0, 1):
            found.update(zip(tile[work].tolist(), np.broadcast_to(which, s.programs)[work].tolist(), strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300), st.integers(1, 12), st.integers(1, 150), st.booleans())
def test_each_half_of_a_tile_is_taken_once_and_only_a_last_turn_of_few_tiles_is_shared(live, tiles, programs, shared):
    s = statics(Ring((8, 32), alone=True, shared=shared), tiles=tiles, programs=programs)
    found, turns = taken(s, live)
    assert found == dict.fromkeys(((tile, half) for tile in range(live * tiles) for half in (0, 1)), 1)
    assert not any(turns[:-1])
    left = live * tiles - (len(turns) - 1) * programs
    if turns:
        assert turns[-1] is (shared and 2 * left <= programs)


@pytest.mark.parametrize("shared", [True, False])
def test_warpgroups_take_each_group_of_their_outputs_once(shared):
    zero, found = jnp.int32(0), collections.Counter()
    work = Work(zero, zero, zero, zero, zero, zero, jnp.asarray(shared), zero)
    for warpgroup in range(2):
        first, every, outputs = map(int, share_of(work, jnp.int32(warpgroup)))
        found.update((outputs, group) for group in range(first, 16, every))
    outputs = (0,) if shared else (0, 1)
    assert found == dict.fromkeys(((each, group) for each in outputs for group in range(16)), 1)
    assert share_of(work._replace(shared=None, half=None), 1) == (0, 1)


def test_rings_of_other_shapes_and_few_groups_are_not_shared():
    assert statics().shares
    assert not statics(groups=6).shares
    assert not statics(Ring((8, 32), alone=True)).shares
    assert not statics(Ring(shared=True)).shares
    assert not statics(Ring((8,), parts=1, warpgroups=4, alone=True, shared=True)).shares
